"""The trigger: its formula, its predictors in their order, when a fit is trusted, and the cap."""
import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.growth.kappa import GrowthTrigger, Prediction, final_loss_of_earlier_run, fit_power_law, forecast, kappa_target
from nanochat.run_log import RunLog
from tests.growing import STOCK, mixed


@settings(max_examples=50, deadline=None)
@given(start=st.floats(1, 10), gain=st.floats(0.1, 5), kappa=st.floats(0, 1))
def test_kappa_is_the_share_of_the_gain_that_is_left(start, gain, kappa):
    target = kappa_target(start, start - gain, kappa)
    assert target - (start - gain) == pytest.approx(kappa * gain, abs=1e-12)


def curve(t, p, a, b, t0, noise=0.0, seed=0):
    return p + a * (t + t0) ** -b + noise * np.random.default_rng(seed).standard_normal(len(t))


@settings(max_examples=10, deadline=None)
@given(p=st.floats(0.5, 4), a=st.floats(0.5, 4), b=st.floats(0.2, 1.5), t0=st.floats(0.02, 1), unit=st.sampled_from([1.0, 1e15]))
def test_a_power_law_is_found_again(p, a, b, t0, unit):
    """Not its parameters, which are hard to tell apart, but its future; in whatever unit t is, FLOPs too."""
    t = np.linspace(0, 1, 16)
    law = fit_power_law(t * unit, curve(t, p, a, b, t0))
    gain = curve(np.array([0, 3.0]), p, a, b, t0)
    assert law(3.0 * unit) == pytest.approx(gain[1], abs=0.03 * (gain[0] - gain[1]))
    assert 0 <= law.p


def test_an_outlier_does_not_bend_the_fit():
    t = np.linspace(0, 1, 16)
    clean = curve(t, 2.5, 1, 0.5, 0.1)
    spoilt = clean.copy()
    spoilt[9] += 0.5
    assert fit_power_law(t, spoilt)(2.0) == pytest.approx(fit_power_law(t, clean)(2.0), abs=0.02)


def test_when_a_forecast_is_trusted():
    t = np.linspace(0, 1, 12)
    losses = curve(t, 2.5, 1, 0.5, 0.1, noise=0.001)
    prediction, why_not = forecast(list(t), list(losses), horizon=4.0)
    assert prediction is not None and not why_not and prediction.loss == pytest.approx(2.5 + 4.1 ** -0.5, abs=0.05)
    for points, reason in ((t[:5], "points"), (t, "does not fall"), (t, "foretell")):
        bad = {"points": losses[:5], "does not fall": np.full(12, 3.0), "foretell": np.where(t > 0.7, losses - 0.5, losses)}[reason]
        prediction, why_not = forecast(list(points), list(bad), horizon=4.0)
        assert prediction is None and reason in why_not


# -----------------------------------------------------------------------------


def observe_all(trigger: GrowthTrigger, flops, losses):
    """The first decision to grow, and when."""
    for f, loss in zip(flops, losses):
        decision = trigger.observe(f, loss)
        if decision.grow:
            return f, decision
    return None, decision


def test_a_known_final_loss_decides_by_the_formula():
    t = np.linspace(0, 1, 101)
    losses = curve(t, 2.0, 1, 1.0, 0.5)  # from 4 towards 2 + 2/3
    trigger = GrowthTrigger(kappa=0.25, cap=9.0, horizon=10.0, final=Prediction(2.5, "the user"))
    f, decision = observe_all(trigger, t, losses)
    assert decision.target == pytest.approx(2.5 + 0.25 * 1.5) and decision.predicted == 2.5 and "the user" in decision.reason
    assert losses[list(t).index(f)] <= decision.target < losses[list(t).index(f) - 1]


def test_without_one_the_curve_decides():
    t = np.linspace(0, 4, 25)
    losses = curve(t, 2.0, 1, 1.0, 0.5, noise=0.001)
    f, decision = observe_all(GrowthTrigger(kappa=0.15, cap=9.0, horizon=10.0), t + 3.0, losses)  # the stage begins at 3
    end = curve(np.array([7.0]), 2.0, 1, 1.0, 0.5)[0]
    assert "by the curve" in decision.reason and decision.predicted == pytest.approx(end, abs=0.1)
    assert losses[list(t + 3.0).index(f)] <= decision.target


def test_an_unreachable_target_falls_back_to_the_cap_and_says_so():
    trigger = GrowthTrigger(kappa=0.1, cap=0.5, horizon=1.0, final=Prediction(0.1, "the user"))
    f, decision = observe_all(trigger, np.linspace(0, 1, 21), curve(np.linspace(0, 1, 21), 2.0, 1, 1.0, 0.5))
    assert f == 0.5 and "share of the FLOPs" in decision.reason and "target" in decision.reason
    assert trigger.at_cap(0.5) and not trigger.at_cap(0.49)
    _, decision = observe_all(GrowthTrigger(kappa=0.1, cap=0.5, horizon=1.0), [0.0, 0.5], [3.0, 2.9])
    assert decision.grow and "no prediction" in decision.reason


def test_fixed_growths_ask_for_no_loss():
    trigger = GrowthTrigger(kappa=None, cap=0.3, horizon=1.0)
    f, decision = observe_all(trigger, [0.0, 0.2, 0.31], [3.0, 0.0, 0.0])
    assert f == 0.31 and decision.target is None


def test_it_does_not_grow_at_the_very_start():
    assert not GrowthTrigger(kappa=0.5, cap=1.0, horizon=1.0, final=Prediction(5.0, "the user")).observe(0.0, 3.0).grow


def test_it_goes_on_from_a_checkpoint():
    t, losses = np.linspace(0, 1, 15), curve(np.linspace(0, 1, 15), 2.0, 1, 1.0, 0.5, noise=0.002)
    for final in (None, Prediction(2.3, "the run d4")):
        whole = GrowthTrigger(kappa=0.15, cap=0.9, horizon=10.0, final=final)
        expected = [whole.observe(*point) for point in zip(t, losses)]
        half = GrowthTrigger(kappa=0.15, cap=0.9, horizon=10.0, final=final)
        for point in zip(t[:8], losses[:8]):
            half.observe(*point)
        resumed = GrowthTrigger(**json.loads(json.dumps(half.state())))
        assert [resumed.observe(*point) for point in zip(t[8:], losses[8:])] == expected[8:]


# -----------------------------------------------------------------------------


def write_run(folder, config, losses, kinds=("end",)):
    folder.mkdir(parents=True)
    log = RunLog(folder / "log.jsonl")
    log.log("start", 0, model_config=asdict(config))
    for step, loss in enumerate(losses):
        log.log("eval", step, val_bpb=loss)
    for kind in kinds:
        log.log(kind, len(losses))
    log.close()


def test_finished_runs_of_the_same_shape_foretell(tmp_path):
    write_run(tmp_path / "slow", STOCK, [3.0, 1.3])
    write_run(tmp_path / "best", STOCK, [3.0, 1.2])
    write_run(tmp_path / "unfinished", STOCK, [3.0, 1.0], kinds=())
    write_run(tmp_path / "grown", STOCK, [3.0, 0.9], kinds=("grow", "end"))
    write_run(tmp_path / "other", mixed(), [3.0, 0.8])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "log.jsonl").write_text("{}\n{}\n")
    assert final_loss_of_earlier_run(tmp_path, STOCK) == Prediction(1.2, "the run best")
    assert final_loss_of_earlier_run(tmp_path, mixed()) == Prediction(0.8, "the run other")
    assert final_loss_of_earlier_run(tmp_path, mixed("ngpt")) is None
    assert final_loss_of_earlier_run(tmp_path / "nowhere", STOCK) is None
