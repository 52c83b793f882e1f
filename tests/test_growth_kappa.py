"""The trigger: its formula, what it takes p from, how close it comes to what was asked for, the cap, and what a checkpoint keeps of it."""
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev import bench_kappa
from nanochat.growth.kappa import SEED_ERROR, GrowthTrigger, Prediction, earlier_runs, final_loss_of_earlier_runs, kappa_target
from nanochat.run_log import RunLog
from tests.examples import examples
from tests.growing import STOCK, mixed


@settings(max_examples=examples(50), deadline=None)
@given(start=st.floats(1, 10), gain=st.floats(0.1, 5), kappa=st.floats(0, 1))
def test_kappa_is_the_share_of_the_gain_that_is_left(start, gain, kappa):
    target = kappa_target(start, start - gain, kappa)
    assert target - (start - gain) == pytest.approx(kappa * gain, abs=1e-12)


def stage(kappa, steps=240, p=1.9, b=0.5, t0=30, noise=0.02, anneal=0.1, warmdown=0.65, seed=0, bpb=0.4, **options):
    """(trigger, validation losses after each step, training losses) of a model whose losses follow the law exactly, but for noise of the batches."""
    lr = np.minimum(1, (steps - np.arange(steps + 1)) / (warmdown * steps)) if warmdown else np.ones(steps + 1)
    h = (np.concatenate(([0], np.cumsum(lr[1:]))) + t0) ** -b
    validation = p + (3.4 - p) * (h - h[-1]) / (h[0] - h[-1]) + anneal * (lr - lr[-1])
    train = validation[1:] / bpb * (1 + noise * np.random.default_rng(seed).standard_normal(steps))
    train[0] = validation[0] / bpb
    trigger = GrowthTrigger(kappa, options.pop("cap", math.inf), steps, np.interp(np.linspace(0, steps, 257), np.arange(steps + 1), lr).tolist(), **options)
    trigger.begin(float(validation[0]))
    return trigger, validation, train


def run(trigger, validation, train, begin=0):
    """The step at which it grows, and the decision; nothing if it does not."""
    for step, loss in enumerate(train[begin:], begin + 1):
        trigger.observe(float(loss))
        if trigger.at_cap(step) or trigger.due():
            decision = trigger.decide(step, float(validation[step]))
            if decision.grow:
                return step, decision
    return None, None


@settings(max_examples=examples(6), deadline=None)
@given(kappa=st.sampled_from([0.1, 0.2, 0.4]), p=st.floats(1.6, 2.1), b=st.floats(0.3, 0.8), t0=st.floats(15, 60), warmdown=st.sampled_from([0.0, 0.15, 0.65]),
       seed=st.integers(0, 99))
def test_it_keeps_its_word_on_curves_that_follow_the_law(kappa, p, b, t0, warmdown, seed):
    """Without having seen a model of its kind before, from noisy batches alone."""
    trigger, validation, train = stage(kappa, p=p, b=b, t0=t0, warmdown=warmdown, seed=seed)
    step, decision = run(trigger, validation, train)
    left = (validation[step] - validation[-1]) / (validation[0] - validation[-1])
    assert left == pytest.approx(kappa, abs=0.12)
    assert decision.left <= kappa and decision.predicted.error > 0


@settings(max_examples=examples(6), deadline=None)
@given(kappa=st.sampled_from([0.1, 0.2, 0.4]), p=st.floats(1.2, 2.1), b=st.floats(0.3, 0.8), seed=st.integers(0, 99))
def test_with_p_known_it_grows_when_the_loss_is_there(kappa, p, b, seed):
    trigger, validation, train = stage(kappa, p=p, b=b, seed=seed, final=Prediction(p, "the user"))
    step, decision = run(trigger, validation, train)
    assert decision.target == pytest.approx(kappa_target(validation[0], p, kappa), abs=2e-3) and "the user" in str(decision.predicted)
    assert validation[step] <= decision.target
    assert (validation[step] - p) / (validation[0] - p) == pytest.approx(kappa, abs=0.05)


def test_p_is_the_loss_at_the_end_of_the_schedule():
    """Two stages that are alike until now: the one whose rate will fall ends lower."""
    foretold = {}
    for warmdown in (0.0, 0.1):
        trigger, _, train = stage(0.01, warmdown=0)
        trigger.rates = stage(0.01, warmdown=warmdown)[0].rates
        for loss in train[:150]:  # still at the full rate
            trigger.observe(float(loss))
        foretold[warmdown] = trigger.predict().loss
    assert foretold[0.1] < foretold[0.0] - 0.01


def test_it_becomes_surer():
    trigger, validation, train = stage(0.01)
    errors = [trigger.predict().error]
    for number, loss in enumerate(train, 1):
        trigger.observe(float(loss))
        if number in (30, 120, 235):
            errors.append(trigger.predict().error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    assert trigger.predict().loss == pytest.approx(validation[-1], abs=0.12)


def test_a_validation_has_the_last_word():
    """The batches look better than the validations are: it asks, is refused, learns from it, and does not ask again at once."""
    trigger, validation, train = stage(0.2, final=Prediction(1.9, "the user"))
    for loss in train:
        trigger.observe(float(loss))
        if trigger.due():
            break
    step = trigger.seen
    assert trigger.due() and not trigger.decide(0, 1.1 * float(validation[step])).grow
    assert trigger.checks == [(step, 1.1 * float(validation[step]))] and not trigger.due()
    trigger.observe(float(train[step]))
    assert not trigger.due()


@pytest.mark.parametrize("check_steps", [1.0, 5.0])
def test_validations_stay_cheap(check_steps):
    trigger, validation, train = stage(0.5, check_steps=check_steps, final=Prediction(1.9, "the user"))
    asked = 0
    for step, loss in enumerate(train, 1):
        trigger.observe(float(loss))
        if trigger.due():
            asked += 1
            trigger.decide(0, 3.3)  # never confirmed
            assert asked * check_steps <= 0.05 * step
    assert asked > 1


def test_an_unreachable_target_falls_back_to_the_cap_and_says_so():
    trigger, validation, train = stage(0.1, cap=100, final=Prediction(0.1, "the user"))
    step, decision = run(trigger, validation, train)
    assert step == 100 and "share of the FLOPs" in decision.reason and "target" in decision.reason and decision.left > 0.1
    assert trigger.at_cap(100) and not trigger.at_cap(99)


def test_fixed_growths_ask_for_no_loss():
    trigger = GrowthTrigger(None, cap=0.3)
    trigger.observe(3.0)
    assert not trigger.due() and trigger.at_cap(0.31)
    decision = trigger.decide(0.31, None)
    assert decision.grow and decision.target is None


def test_a_first_step_that_teaches_nothing():
    """Of a small batch no token may be hidden."""
    trigger = GrowthTrigger(0.2, 1e9, 100)
    trigger.begin(3.0)
    trigger.observe(0.0)
    assert not trigger.due()
    trigger.observe(1.5)
    assert trigger.ratio == 2.0


def test_it_does_not_grow_at_the_very_start():
    trigger, *_ = stage(0.5, final=Prediction(5.0, "the user"))
    assert not trigger.due() and not trigger.decide(0.0, 3.4).grow


@pytest.mark.parametrize("final", [None, Prediction(1.9, "the run d4", 0.02)])
def test_it_goes_on_from_a_checkpoint(final):
    """At any step, also amid the steps that one mean is made of, and after a validation that did not confirm."""
    whole, validation, train = stage(0.15, final=final)
    expected = run(whole, validation, train)
    for cut in (1, 13, expected[0] - 1):
        half, *_ = stage(0.15, final=final)
        assert run(half, validation, train[:cut]) == (None, None)
        resumed = GrowthTrigger(**json.loads(json.dumps(half.state())))
        assert resumed == half
        assert run(resumed, validation, train, begin=cut) == expected


def test_a_long_stage_is_kept_in_few_numbers():
    trigger, validation, train = stage(0.01, steps=3000)
    for loss in train:
        trigger.observe(float(loss))
    assert len(trigger.losses) < 64 and trigger.predict().loss == pytest.approx(1.9, abs=0.03)


def test_a_stage_learns_from_the_one_before():
    first, validation, train = stage(0.4)
    step, decision = run(first, validation, train)
    second = GrowthTrigger(0.4, math.inf, 300, (1.0, 0.1))
    second.follow(first, float(validation[step]))
    second.begin(float(validation[step]))
    assert second.ratio == pytest.approx(0.4, rel=0.03)  # bits per byte for each nat
    assert "stage before" in second.predict().source and second.predict().loss == pytest.approx(decision.predicted.loss, abs=0.1)
    assert second.prior.exponent == pytest.approx(first.forecast((step, float(validation[step]))).exponent()[0])


# -----------------------------------------------------------------------------
# Recorded stages


def recorded(kappas, curves, final=lambda curve: None):
    return {kappa: np.array([bench_kappa.judge(curve, kappa, final(curve), {}).left for curve in curves]) for kappa in kappas}


@pytest.mark.slow
def test_what_is_left_of_recorded_stages_with_an_earlier_run():
    curves = bench_kappa.load()
    pairs = {curve.run.tag: bench_kappa.twin(curve, curves) for curve in curves}
    curves = [curve for curve in curves if pairs[curve.run.tag]]

    def final(curve):
        p = pairs[curve.run.tag].evals[-1][1]
        return Prediction(p, "an earlier run", SEED_ERROR * p * math.sqrt(2))

    for kappa, left in recorded((0.2, 0.4), curves, final).items():
        assert np.median(abs(left - kappa)) < 0.03 and abs(left - kappa).max() < 0.1


def test_what_is_left_of_recorded_stages_without_one():
    curves = [curve for curve in bench_kappa.load() if not curve.before][::3]
    for kappa, left in recorded((0.2, 0.4), curves).items():
        assert np.median(abs(left - kappa)) < 0.1


# -----------------------------------------------------------------------------
# Earlier runs


CONDITIONS = dict(data="stdlib", tokenizer="abc", flops=1e12, warmdown_ratio=0.65)


def write_run(folder, config, losses, kinds=("end",), **conditions):
    folder.mkdir(parents=True)
    log = RunLog(folder / "log.jsonl")
    log.log("start", 0, model_config=asdict(config), conditions=CONDITIONS | conditions)
    for step, loss in enumerate(losses):
        log.log("eval", step, val_bpb=loss)
    for kind in kinds:
        log.log(kind, len(losses) - 1)
    log.close()


def test_finished_runs_of_the_same_kind_foretell(tmp_path):
    write_run(tmp_path / "one", STOCK, [3.0, 1.3])
    write_run(tmp_path / "two", STOCK, [3.0, 1.2], flops=1.01e12)
    write_run(tmp_path / "unfinished", STOCK, [3.0, 1.0], kinds=())
    write_run(tmp_path / "cut", STOCK, [3.0, 1.0], kinds=())
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:
        log.write('{"kind": "end", "step": 9}\n')  # the disk was full meanwhile
    write_run(tmp_path / "grown", STOCK, [3.0, 0.9], kinds=("grow", "end"))
    write_run(tmp_path / "other", mixed(), [3.0, 0.8])
    for number, different in enumerate((dict(data="tinystories"), dict(tokenizer="def"), dict(flops=2e12), dict(warmdown_ratio=0.0), dict(more=1))):
        write_run(tmp_path / f"elsewhere{number}", STOCK, [3.0, 0.5], **different)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "log.jsonl").write_text("{}\n{}\n")
    both = final_loss_of_earlier_runs(tmp_path, STOCK, CONDITIONS)
    assert both.loss == pytest.approx(1.25) and both.source == "2 earlier runs" and both.error > 0
    other = final_loss_of_earlier_runs(tmp_path, mixed(), CONDITIONS)
    assert other.loss == 0.8 and other.source == "the run other" and other.error > 0.01 * 0.8
    assert final_loss_of_earlier_runs(tmp_path, mixed(), CONDITIONS, grown=True).error > other.error
    assert final_loss_of_earlier_runs(tmp_path, mixed("ngpt"), CONDITIONS) is None
    assert final_loss_of_earlier_runs(tmp_path / "nowhere", STOCK, CONDITIONS) is None
    assert len(earlier_runs(tmp_path, STOCK)) == 7  # those of the same shape, for the reports
