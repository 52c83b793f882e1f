"""The schedule of pretraining holds over the whole run, at its edges and behind its end."""
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.schedules import WARMDOWN_SHAPES, Branch, Now, Schedule, ScheduleSettings, sft_lr_multiplier


@given(steps=st.integers(1, 3000), warmup=st.integers(0, 50), ratio=st.floats(0, 1), shape=st.sampled_from(sorted(WARMDOWN_SHAPES)), share=st.floats(0, 2))
def test_every_moment_has_a_value(steps, warmup, ratio, shape, share):
    """A growing run's last step may lie beyond its budget, and a run may have no warm-down."""
    settings = ScheduleSettings(warmup_steps=warmup, warmdown_ratio=ratio, warmdown_shape=shape)
    step = share * steps
    now = Schedule(settings, steps, 0.1).at(step)
    assert 0 < now.lr <= 1 and 0.85 <= now.momentum <= 0.97 and 0 <= now.weight_decay <= 0.1
    if step >= max(steps, warmup) and round(ratio * steps):
        assert now.lr == pytest.approx(settings.final_lr_frac) and now.weight_decay == pytest.approx(0, abs=1e-9)
    branch = Branch(settings, now, 10, 5, steps).at(15 + step)
    assert 0 < branch.lr <= now.lr and all(map(math.isfinite, branch))


def test_a_growing_run_warms_up_by_steps_and_nothing_else_does():
    """Its first steps cost little, so there are many of them before its position has moved."""
    schedule = Schedule(ScheduleSettings(warmup_steps=40, warmdown_ratio=0.5), 30, 0.1)
    assert schedule.at(1.0, 19).lr == pytest.approx(0.5)
    after = schedule.at(3.0, 60)
    assert (after.lr, after.momentum, after.weight_decay) == (1.0, schedule.at(3.0).momentum, schedule.at(3.0).weight_decay)
    assert schedule.at(30.0, 500).lr == pytest.approx(0.05)


def test_without_a_warm_down_nothing_falls():
    """A trunk at a constant rate keeps its weight decay, whatever its horizon; a fine-tuning's last batch lies a little beyond its data."""
    assert Schedule(ScheduleSettings(warmup_steps=0, warmdown_ratio=0.0), 500, 0.1).at(499).weight_decay == 0.1
    assert [sft_lr_multiplier(progress, 0.0, 0.0, 0.0) for progress in (0.5, 1.0, 1.0625)] == [1.0, 1.0, 1.0]


def test_a_branch_begins_with_what_its_trunk_has():
    trunk = Now(0.7, 0.95, 0.05)
    branch = Branch(ScheduleSettings(), trunk, 100, 20, 50)
    assert (branch.at(100).lr, branch.at(120).lr, branch.at(100).weight_decay) == (0.7, 0.7, 0.05)
    assert branch.at(170).lr == pytest.approx(0.7 * 0.05)
