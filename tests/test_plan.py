"""The planner: laws from runs, times from small models, and commands that really run."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat.planning import step_time
from nanochat.planning.finished_runs import finished_runs, of_one_recipe
from nanochat.planning.planner import MOST_EPOCHS, Memory, Planner, fitting, lowest
from nanochat.planning.scaling_law import Law, effective_tokens, fit, nonnegative_least_squares, published
from nanochat.planning.step_time import Card, Measured, Timing
from nanochat.run_log import RunLog
from nanochat.run_plan import RunPlan
from nanochat.training import Process
from scripts import base_train, plan
from tests import tiny

SIZES = [(params, params * ratio) for params in (1e5, 3e5, 1e6) for ratio in (1, 3, 9)]


def true_loss(params: float, tokens: float) -> float:
    return 0.8 + 40 / params ** 0.4 + 90 / tokens ** 0.35


def law_of_the_truth(noise: float = 0.0) -> Law:
    random = np.random.default_rng(0)
    losses = [true_loss(*size) * (1 + noise * random.standard_normal()) for size in SIZES]
    return fit(*zip(*SIZES), losses, "bits per byte", "a test")


# -----------------------------------------------------------------------------
# The law


def test_a_law_tells_losses_between_and_somewhat_beyond_its_runs():
    law = law_of_the_truth(noise=0.002)
    for size in ((2e5, 8e5), (6e5, 1.2e6), (2e6, 1e7)):
        loss, error = law.predict(*size)
        assert abs(loss - true_loss(*size)) < 0.02 and abs(loss - true_loss(*size)) < error


def test_the_error_grows_away_from_the_runs_and_with_their_noise():
    law = law_of_the_truth()
    errors = [law.predict(params, 5 * params)[1] for params in (4e5, 4e6, 4e7, 4e8)]
    assert errors == sorted(errors) and errors[-1] > 3 * errors[0]
    assert law_of_the_truth(noise=0.02).predict(4e5, 2e6)[1] > 2 * errors[0]


def test_tokens_for_a_loss_are_those_after_which_it_is_reached():
    law = law_of_the_truth()
    assert law.tokens_for(5e5, law.predict(5e5, 2e6)[0]) == pytest.approx(2e6, rel=1e-3)
    assert law.tokens_for(1e5, law.predict(1e6, 1e12)[0]) == math.inf


def test_too_few_runs_are_no_law():
    with pytest.raises(ValueError, match="6 runs"):
        fit([1e5] * 9, [1e5 * n for n in range(1, 10)], [2.0] * 9, "bits per byte", "one size")


def test_factors_are_never_negative():
    x = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    factors, used = nonnegative_least_squares(x, np.array([3.0, 2.0, 1.0]))  # the slope would be -1
    assert factors.tolist() == pytest.approx([2, 0]) and used == [0]


def test_a_text_read_again_is_worth_less_and_no_more_than_a_few_of_itself():
    assert effective_tokens(5e6, 1e7) == 5e6
    assert 3.5e7 < effective_tokens(4e7, 1e7) < 4e7
    assert effective_tokens(1e12, 1e7) == pytest.approx(16.4e7)


# -----------------------------------------------------------------------------
# The runs


def finish(base_dir, tag: str, params: float, tokens: float, bpb: float, end: bool = True, conditions=None, **flags) -> None:
    log = RunLog(base_dir / "base_checkpoints" / tag / "log.jsonl")
    log.log("start", 0, config={"matrix_lr": 0.02} | flags, model_config={"vocab_size": 320}, counts=dict(transformer_matrices=params * 0.75, lm_head=params * 0.25), total_tokens=tokens,
            **({"conditions": conditions} if conditions else {}))
    log.log("eval", 9, val_bpb=bpb)
    if end:
        log.log("end", 9)
    log.close()


def test_runs_that_are_not_finished_or_began_elsewhere_are_left_out(base_dir):
    finish(base_dir, "good", 1e5, 1e6, 2.0)
    finish(base_dir, "stopped", 1e5, 1e6, 2.0, end=False)
    finish(base_dir, "branch", 1e5, 1e6, 2.0, branch_from="good@5")
    (base_dir / "base_checkpoints" / "other").mkdir()
    (base_dir / "base_checkpoints" / "other" / "log.jsonl").write_text('{"kind": "start", "step": 0}\n{"kind": "eval", "step": 1}\n{"kind": "end", "step": 1}\n')
    assert [(run.tag, run.params, run.bpb) for run in finished_runs(base_dir / "base_checkpoints")] == [("good", 1e5, 2.0)]


def test_only_runs_with_the_same_tokenizer_count(finished_run):
    folder = finished_run / "base_checkpoints"
    checksum = json.loads((folder / "d3" / "meta_000008.json").read_text())["tokenizer"]
    assert [run.tag for run in finished_runs(folder, checksum)] == ["d3"]
    assert finished_runs(folder, "another") == []


def test_only_runs_of_the_same_text_count(base_dir):
    finish(base_dir, "untold", 1e5, 1e6, 2.0)
    for tag, text in (("stories", "tinystories"), ("python", "stdlib")):
        finish(base_dir, tag, 1e5, 1e6, 2.0, conditions={"data": text})
    finish(base_dir, "damaged", 1e5, 1e6, 2.0, conditions="none")
    assert [run.tag for run in finished_runs(base_dir / "base_checkpoints", text="stdlib")] == ["python", "untold"]
    assert [run.tag for run in finished_runs(base_dir / "base_checkpoints")] == ["python", "stories", "untold"]


def test_runs_of_the_most_common_recipe_are_taken_unless_another_is_asked_for():
    runs = [SimpleNamespace(flags={"matrix_lr": rate}) for rate in (0.02, 0.1, 0.1, 0.3)]
    assert of_one_recipe(runs, {"matrix_lr": (0.02, 0.02)}) == (runs[1:3], {"matrix_lr": 0.1})
    assert of_one_recipe(runs, {"matrix_lr": (0.02, 0.3)}) == (runs[3:], {"matrix_lr": 0.3})
    assert of_one_recipe(runs, {"matrix_lr": (0.02, 0.5)}) == ([], {})


# -----------------------------------------------------------------------------
# The time


def test_times_of_small_models_add_up_to_those_of_large_ones(monkeypatch):
    """A machine whose passes take 3 s and per layer width / 100 s; the optimizer's take 1 s a layer."""
    monkeypatch.setattr(step_time, "measure", lambda config, rows, *args, **kwargs: Timing(
        rows, rows * (3 + config.n_layer * config.n_embd / 100) * (0.5 if kwargs.get("patience") else 1), 1.0 * config.n_layer + 1e-9))
    make = lambda depth, width: SimpleNamespace(n_layer=depth, n_embd=width, sequence_len=16)  # noqa: E731
    speed = Measured(make, lambda config, rows: iter(()), torch.device("cpu"))
    for width in (100, 200, 400):
        speed.probe(width, 4)
    expected = 8 * (3 + 10 * 3) + 10
    assert speed.seconds(make(10, 300), 0, 8 * 16, 4) == pytest.approx(expected, rel=0.02)
    speed.correct(make(10, 300), 4, False)  # the model itself takes half as long
    assert speed.seconds(make(10, 300), 0, 8 * 16, 4) == pytest.approx(8 * (3 + 10 * 3) / 2 + 10, rel=0.02)


def test_a_model_is_really_trained_to_measure_it():
    config = tiny_settings().config(320, depth=1)
    timing = step_time.measure(config, 2, torch.device("cpu"), step_time.random_batches(config, 2, torch.device("cpu")), patience=0.0)
    assert timing.rows == 2 and timing.of_pass > 0 and timing.of_optimizer > 0


# -----------------------------------------------------------------------------
# The plan


def tiny_settings(**flags) -> plan.Settings:
    return plan.Settings(hours=1, aspect_ratio=32, head_dim=32, max_seq_len=64, window_pattern="L", **flags)


def planner(budget: float = 60, speed: float = 1e10, **options) -> Planner:
    return Planner(tiny_settings(), 320, budget, False, law_of_the_truth(), "cpu", speed=Card(speed, 1, 1.0), **{"batch": 256} | options)


def test_the_best_size_grows_with_the_budget_and_all_of_the_time_is_used():
    few, many = (planner(seconds).candidates([]) for seconds in (60, 6000))
    assert lowest(few).size.params < lowest(many).size.params and lowest(few).loss > lowest(many).loss
    assert all(0.98 * 6000 < one.seconds <= 6000 for one in many)
    assert len(few) > 1 and lowest(few).loss < max(one.loss for one in few)


def test_a_small_text_is_read_sixteen_times_at_most():
    for one in planner(6000, unique=1e5).candidates([]):
        assert one.tokens <= MOST_EPOCHS * 1e5 and one.worth < one.tokens and one.seconds < 6000


@pytest.mark.slow
def test_growth_is_worth_more_the_more_the_small_model_counts():
    losses = []
    for rho in (0.0, 0.5, 1.0):
        one = planner(rho=rho)
        losses.append(lowest(list(one.growths(one.candidates([])))).loss)
    assert losses[0] > losses[1] >= losses[2]
    best = lowest(planner().candidates([]))
    assert losses[0] >= best.loss  # time that is worth nothing


def test_what_is_not_known_of_rho_is_part_of_the_error():
    """1x32 -> 4x96 came to a rho of 0.25 where 0.5 had been assumed: the loss of that is to be within the error."""
    one, bad = planner(6000, rho=0.5), planner(6000, rho=0.25)
    final = one.candidates([6])[0]
    grown, worse = (each.growth(each.size(3), final, 0.3) for each in (one, bad))
    assert worse.worth < grown.worth
    law_error = one.law.predict(one.size(6).params, grown.worth)[1]
    assert grown.loss < worse.loss <= grown.loss + grown.error and grown.error > law_error


def test_growth_does_not_save_more_than_what_the_small_model_had_learned():
    """At worst for the bound: every token of a cheap small model counts whole."""
    one = planner(6000, rho=1.0)
    final = one.candidates([4])[0]
    grown = one.growth(one.size(1), final, 0.7)
    small = one.law.predict(one.size(1).params, 0.7 * 6000 / one.seconds_per_token(one.size(1), final))[0]
    assert one.law.tokens_for(one.size(4).params, small) + 0.3 * final.tokens == pytest.approx(grown.worth, rel=0.01)


@pytest.mark.slow
def test_models_that_do_not_fit_are_left_out_and_rows_are_fewer_where_they_must():
    one = planner(6000)
    candidates = one.candidates([])
    memory = Memory("cpu", False, "muon")
    best, too_large = fitting(candidates, one, memory, math.inf)
    assert best == lowest(candidates) and not too_large
    full = memory.bytes(best.size, best.rows)
    fewer, _ = fitting([best], one, memory, full - 1)
    assert fewer.rows < best.rows and memory.bytes(fewer.size, fewer.rows) < full
    smaller, too_large = fitting(candidates, one, memory, 0.8 * memory.bytes(best.size, 1))
    assert smaller.size.params < best.size.params and best.name in too_large
    with pytest.raises(plan.UsageError, match="none of them fits"):
        fitting(candidates, one, memory, 1.0)


@pytest.mark.slow
def test_memory_carried_over_is_near_what_is_counted():
    one, memory = planner(), Memory("cpu", False, "muon")
    memory.count(one.size(3), 4)
    carried = memory.bytes(one.size(4), 4)
    memory.count(one.size(4), 4)
    assert carried == pytest.approx(memory.bytes(one.size(4), 4), rel=0.15)


# -----------------------------------------------------------------------------
# The command


@pytest.fixture
def prepared(base_dir, monkeypatch):
    """With data and a tokenizer, and a stopwatch that is content with the least number of passes."""
    tiny.prepare(base_dir)
    measure = step_time.measure
    monkeypatch.setattr(step_time, "measure", lambda *args, **options: measure(*args, **options | dict(patience=0.0)))
    return base_dir


SHAPE = ["--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--window-pattern=L", "--total-batch-size=256", "--device-type=cpu"]


def planned(base_dir, *flags: str) -> dict:
    assert plan.main([*SHAPE, *flags, f"--json={base_dir / 'plan.json'}"]) == 0
    return json.loads((base_dir / "plan.json").read_text())


@pytest.mark.slow
def test_the_commands_that_are_printed_train_what_was_planned(prepared, capsys, monkeypatch):
    monkeypatch.setattr(plan, "text_bytes", lambda split: 1e9)
    for tag, size in enumerate(SIZES):
        finish(prepared, f"run{tag}", *size, true_loss(*size), **{name: value for name, value in vars(tiny_settings(total_batch_size=256, matrix_lr=0.03)).items()})
    made = planned(prepared, "--flops=2e11")
    printed = capsys.readouterr().out
    assert made["unit"] == "bits per byte" and "9 finished runs" in made["law"] and "* " in printed
    for row in (made["best"], made["rows"][-1]):
        assert row["command"][:3] == ["python", "-m", "scripts.base_train"] and " ".join(row["command"]) in printed
        settings = base_train.parse(row["command"][3:])
        assert settings.matrix_lr == 0.03 and settings.max_seq_len == 64  # of the runs
        made_of_it = RunPlan(settings, 320, Process(0, 1, torch.device("cpu")))
        assert made_of_it.final_model.config.n_layer == row["depth"] and made_of_it.final_model.config.n_embd == row["width"]
        assert made_of_it.budget == pytest.approx(row["flops"], rel=0.02) and made_of_it.horizon.total_batch_size == row["batch"]
    assert "→" in made["rows"][-1]["model"]
    assert base_train.main([*made["best"]["command"][3:], "--sample-every=-1", "--num-iterations=4", "--eval-tokens=512"]) == 0
    assert (prepared / "base_checkpoints" / f"plan_d{made['best']['depth']}" / "log.jsonl").exists()


@pytest.mark.slow
def test_without_runs_data_or_a_tokenizer_there_is_a_plan_for_a_card(base_dir, capsys):
    assert plan.main(["--hours=2", "--gpus=4", "--card=RTX 3060=12", "--price-per-hour=0.5", "--depth=4"]) == 0
    out = capsys.readouterr().out
    assert "published constants" in out and "python -m nanochat.dataset" in out and "scripts.tok_train --vocab-size=" in out
    assert "torchrun --standalone --nproc_per_node=4 -m scripts.base_train --depth=4" in out and "4.00" in out  # 4 cards, 2 hours, 0.50 each


@pytest.mark.slow
def test_published_constants_say_nothing_of_tiny_models(prepared):
    made = planned(prepared, "--flops=1e10", "--depth=1")
    assert made["unit"] == published().unit and any("? is a loss that cannot be" in note for note in made["notes"])


@pytest.mark.parametrize("flags, message", [
    (["--hours=1e305"], "no more than --hours=1e"), (["--flops=1e40"], "no more than"), ([], "say how much"), (["--hours=1", "--flops=1e9"], "one of the two"), (["--hours=1", "--gpus=2", "--device-type=cpu"], "--card="),
    (["--hours=1", "--card=H100=80", "--mfu=0"], "--mfu=0"), (["--hours=1", "--card=H100=80", "--device-type=cpu"], "one of them"),
    (["--flops=10", "--card=H100=80"], "too little"), (["--hours=1", "--card=H100=80", "--total-batch-size=1000"], "--total-batch-size=1000"),
    (["--hours=1", "--card=H100=80", "--device-batch-size=3", "--total-batch-size=8192"], "--device-batch-size=3"), pytest.param(["--hours=10", "--card=H100=0.01", "--depth=8"], "fits into", marks=pytest.mark.slow)])
def test_what_cannot_be_planned_is_said_in_one_line(base_dir, capsys, flags, message):
    assert plan.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("flag", ["--hours=0", "--rho=2", "--card=nothing", "--gpus=0", "--price-per-hour=-1"])
def test_values_that_make_no_sense_are_refused(flag, capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["--hours=1", flag])
    assert end.value.code == 2 and flag.partition("=")[0] in capsys.readouterr().err
