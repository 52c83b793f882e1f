"""The studies of analysis/, with trials that need no training."""
import json
import math
from types import SimpleNamespace

import pytest

from analysis import (
    growth,
    growth_bound,
    growth_cause,
    growth_family,
    growth_few_data,
    low_rank,
    mixing,
    normalized,
    operators,
    runner,
    small_english,
    trials,
    width_transfer,
)
from analysis.trial import Growth, Result, Trial, folder_of
from analysis.trials import cost_with
from nanochat.cli import UsageError
from tests import fake_runs, tiny


@pytest.mark.parametrize("study, flags, runs", [
    (low_rank, ["--seeds=2", "--only", "both, equal tokens"], 4), (normalized, ["--seeds=2"], 16), (width_transfer, ["--widths", "64", "128"], 6),
    (growth, ["--seeds=2"], 34)], ids=["low_rank", "normalized", "width_transfer", "growth"])
def test_table_numbers_and_picture(study, flags, runs, tmp_path, base_dir, monkeypatch, capsys):
    trained = []

    def run_trials(directory, trials, jobs):
        assert directory == str(base_dir) and jobs == 2
        trained.extend(trials)
        return [Result(trial, [0, 100 + i], [3.0, 2.0 - i / 100], [0.0, 1e9], 1.0, 1000) for i, trial in enumerate(trained)]

    monkeypatch.setattr(study, "run_trials", run_trials)
    monkeypatch.setattr(study, "nats_per_bpb", lambda: 2.0, raising=False)
    assert study.main([*flags, f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    rows = json.loads((tmp_path / "numbers.json").read_text())
    assert len(trained) == runs and all(trial["depth"] == 4 for trial in trained)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert list(dict.fromkeys(line.split(" | ")[0].removeprefix("| ") for line in table[1:])) == list(rows)
    assert "bpb" in json.dumps(rows) and (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("study", [mixing, growth_family, growth_cause, growth_few_data, operators], ids=lambda study: study.__name__)
def test_studies_of_branches(study, tmp_path, base_dir, monkeypatch, capsys):
    """From their plans to their tables and pictures, with losses that fall as those of a trunk do."""
    def run_trials(directory, wanted, jobs):
        def result(trial):
            last = trial.step + sum(trial.flags.get(name, 0) for name in ("num-iterations", "steady-steps", "warmdown-steps"))
            steps = list(range(trial.step or 256, last, 256)) + [last]
            losses = [3 - 0.2 * math.log(step) - 0.001 * len(trial.name.strip("0123456789")) for step in steps]
            return Result(trial.flags, steps, losses, [1e9 * step for step in steps], 1.0, 1000, begin=1e9 * trial.step, growths=[Growth(1e9, 1.0, 2.0, 2.1)])
        return [result(trial) for trial in wanted]

    monkeypatch.setattr(trials, "run_trials", run_trials)
    for name in ("nats_per_bpb", "steps_of_an_epoch"):
        monkeypatch.setattr(study, name, lambda: 100.0, raising=False)
    flags = [f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}", "--seeds=2"]
    assert study.main(flags) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) > 5 and len({line.count(" | ") for line in rows}) <= 3 and "nan" not in out
    assert "bpb" in (tmp_path / "numbers.json").read_text()
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_cost_with_a_loss_is_interpolated_over_its_logarithm():
    assert cost_with(2.5, [1, 4], [3, 2]) == pytest.approx(2)
    assert cost_with(1.5, [16, 1, 4], [1, 3, 2]) == pytest.approx(8)
    assert cost_with(0.5, [16, 1, 4], [1, 3, 2]) == pytest.approx(32)  # beyond the last run


def test_grown_and_other_contestants_get_the_same_flops():
    grown = growth.flags_of(growth.WIDTH, 0.6, 42)
    scratch = growth.flags_of({}, 0.6, 42)
    assert grown["num-iterations"] * grown["grow-budget"] * growth.DENSE_FLOPS / growth.STEPS == scratch["target-flops"]
    assert "num-iterations" not in scratch and grown["seed"] == scratch["seed"] == 42


def test_growth_can_save_much_of_a_run_that_is_short_for_its_size_and_nothing_of_a_long_one():
    ideal, single, size = zip(*(growth_bound.shares(1e9, tokens) for tokens in (0.3, 1, 5, 20, 100, 1000)))
    assert ideal == tuple(sorted(ideal)) and single == tuple(sorted(single)) and size == tuple(sorted(size))
    assert all(i <= s + 1e-3 for i, s in zip(ideal, single))
    assert ideal[0] < 0.3 and ideal[-1] == pytest.approx(1, abs=0.02) and (single[-1], size[-1]) == pytest.approx((1, 1))
    with pytest.raises(SystemExit, match="2"):
        growth_bound.main(["--params=0"])


def test_a_trial_is_trained_once_and_one_that_died_again(base_dir, monkeypatch):
    """What it writes needs no encoding. One that diverged has a result, infinite; one that was killed has none."""
    monkeypatch.setattr(runner, "train", fake_runs.train)
    fine, refused, killed = Trial({"seed": 9}), Trial({"seed": fake_runs.REFUSED}), Trial({"seed": fake_runs.KILLED})
    for _ in range(2):
        first, second = trials.run_trials(str(base_dir), [fine, refused])
    assert first.bpb == [3.0, 2.0] and second.final == float("inf")
    assert [fake_runs.times(base_dir, trial) for trial in (fine, refused)] == [1, 1]
    for _ in range(2):
        with pytest.raises(UsageError, match="1 of 1 trials died, see .*out.txt"):
            trials.run_trials(str(base_dir), [killed])
    assert fake_runs.times(base_dir, killed) == 2


@pytest.mark.slow
def test_branches_begin_where_their_parents_stand(base_dir, monkeypatch):
    """Parents come first, whatever the order, keep what branches begin with and nothing else, and are trained again when it is missing."""
    tiny.prepare(base_dir)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    flags = dict(flag.removeprefix("--").split("=") for flag in (*tiny.FLAGS, "--warmdown-ratio=0", "--save-every=2"))
    trunk = Trial(flags)
    grown = trunk.branch(4, grow_to="3x128", steady_steps=4, save_every=2)
    decayed = grown.branch(6, warmdown_steps=2)
    first, last = trials.run_trials(str(base_dir), [decayed, trunk], jobs=1)
    assert last.steps[-1] == 8 and first.steps[-1] == 8 and first.params > last.params and first.flops[-1] > last.flops[-1]
    left = lambda trial: sorted(path.name for path in folder_of(str(base_dir), trial).glob("model_*.pt"))
    assert (left(trunk), left(grown), left(decayed)) == (["model_000004.pt"], ["model_000006.pt"], [])
    times = lambda trial: (folder_of(str(base_dir), trial) / "done.json").stat().st_mtime_ns
    before = times(trunk), times(grown)
    assert trials.run_trials(str(base_dir), [decayed], jobs=1)[0].bpb == first.bpb
    other = trials.run_trials(str(base_dir), [grown.branch(8, warmdown_steps=1)], jobs=1)[0]
    assert other.steps[-1] == 9 and times(trunk) == before[0] and times(grown) != before[1], "only the parent that lacked the step was trained again"


def test_what_a_small_models_token_is_worth():
    """Read off the trunk's own curve: 1 if the grown model has the trunk's loss of all tokens, 0 if that of the large ones alone."""
    loss = lambda units: 1 - 0.2 * math.log(units)
    curve = mixing.Curve(range(2, 31), [loss(units) for units in range(2, 31)])
    shares = {0: 1.0, 4: 0.5, 10: 0.0}  # by tokens per parameter since the growth
    grown = Result({}, [mixing.UNIT * (16 + units) for units in shares], [loss(16 * share + units) for units, share in shares.items()], [], 1.0, 1)
    since, rho = mixing.rho_of(grown, curve, 16)
    assert list(since) == [0, 4, 10] and list(rho) == pytest.approx([1, 0.5, 0], abs=0.02)
    plans = mixing.plan(42)
    assert all(trial.parent is None or trial.step % mixing.UNIT == 0 for trial in plans.values()), "there are checkpoints at whole units only"


def test_small_english_compares_at_equal_tokens_and_at_equal_flops(tmp_path, base_dir, monkeypatch, capsys):
    """The table tells which paradigms' differences are no chance; learning rates are chosen without BLiMP."""
    wanted = []

    def run_trials(directory, asked, jobs):
        def result(trial):
            steps, looped = trial.flags["num-iterations"], "loops" in trial.flags
            assert ("eval-tasks" in trial.flags) == (trial.flags["seed"] != 41)
            values = {f"blimp/pairs/paradigm/p{i}": {"value": 0.5 + i / 100 + 0.02 * looped, "label": ""} for i in range(20)}
            whole = {f"{key}/pairs": {"value": 0.6 + 0.02 * looped, "se": 0.01, "label": "BLiMP"} for key in ("blimp", "blimp-pll:20")}
            return Result(trial.flags, [0, steps], [3.0, 2.0], [0.0, 1e9 * steps * (2 if looped else 1)], 1.0, 1000, rows=whole | values)
        wanted.extend(asked)
        return [result(trial) for trial in asked]

    monkeypatch.setattr(trials, "run_trials", run_trials)
    monkeypatch.setattr(small_english, "run_trials", run_trials)
    monkeypatch.setattr(small_english, "get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 8192))
    assert small_english.main(["--seeds=2", f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    rows = dict(line.removeprefix("| ").split(" | ", 1) for line in capsys.readouterr().out.splitlines() if line.startswith("| "))
    assert "62.00 ± 1.00 | 62.00, 62.00 |  | +2.00 | 0.000 |" in rows["looped"] and "60.0 | +0.00 | 1.000 |" in rows["mixed"] and len(rows) == 1 + 5 + 3
    assert [trial.flags["num-iterations"] for trial in wanted[:5]] == [100, 100, 100, 100, 216]
    assert json.loads((tmp_path / "numbers.json").read_text())["looped"][0]["rows"] and (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert small_english.main(["--tune"]) == 0
    assert len(wanted) == 10 + 12 and "| looped and mixed | 2.0000 |" in capsys.readouterr().out
