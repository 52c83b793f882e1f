"""The study of a small model's dials: fair rates, paired differences, table and picture."""
import json
import math

import pytest

from analysis import arms, dials
from analysis.trial import Result
from nanochat.cli import UsageError
from tests import tiny

SWEEP = """
[fixed]
device-type = "cpu"
num-iterations = 4
eval-every = 2
seed = 41
[grid]
matrix-lr = [1, 2]
[[together]]
objective = ["next-token", "mlm"]
eval-tasks = ["blimp", "blimp:20"]
[[together]]
depth = [4, 2, 6]
aspect-ratio = [32, 64, 16]
"""
LOSSES, LIKED = {4: 2.0, 2: 2.1, 6: 1.9}, {4: 2, 2: 0.5, 6: 1}


@pytest.fixture
def asked(monkeypatch):
    """The flags of all runs: deeper ones end lower, each likes another rate, and the noise of a seed is the same for all but the deepest."""
    found = []

    def run(trial):
        flags, depth = trial.flags, trial.flags["depth"]
        noise = (flags["seed"] - 43) * (0.01 if depth != 6 else 0.5)
        value = {"value": 0.5 + depth / 100, "n": 100, "se": 0.001, "metric": "accuracy", "label": "BLiMP"}
        rows = {"blimp/pairs": value, "blimp/pairs/field/syntax": {"value": 0.1, "label": ""}, "decode/cpu": {"value": 10.0 * depth, "se": None, "metric": "tokens/s", "label": "decoded"}}
        return Result(flags, [0, 4], [3.0, LOSSES[depth] + noise + abs(math.log2(flags["matrix-lr"] / LIKED[depth]))], [0.0, 0.25 * depth], 2.0, 7, tokens=1000,
                      rows=rows if "eval-tasks" in flags else {})

    def run_trials(base_dir, trials, jobs, places):
        found.extend(trial.flags for trial in trials)
        return [run(trial) for trial in trials]
    monkeypatch.setattr(arms, "run_trials", run_trials)
    monkeypatch.setattr(arms, "check_evaluations", lambda arms: None)
    return found


@pytest.fixture
def config(tmp_path, base_dir):
    path = tmp_path / "blocks.toml"
    path.write_text(SWEEP)
    return path


def test_each_configuration_has_its_own_rate_and_is_told_from_the_first_by_paired_seeds(asked, config, tmp_path, capsys):
    assert dials.main([str(config), f"--out={tmp_path / 'numbers.json'}", f"--plot={tmp_path / 'picture.png'}"]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in out[out.index("| configuration"):].splitlines())}
    assert list(rows)[2:] == ["depth=4 aspect-ratio=32", "depth=2 aspect-ratio=64", "depth=6 aspect-ratio=16"]
    first, shallow, deep = list(rows.values())[2:]
    assert (first[0], shallow[0], deep[0]) == ("2", "0.5", "1")
    assert first[3:10] == ["0.0", "1,000", "1.00", "2", "2.0000", "1.9900, 2.0000, 2.0100", ""] and shallow[9] == "+0.1000 ± 0.0000: worse (p < 0.01)"
    assert shallow[5] == "0.50" and deep[9].startswith("-0.1000 ± 1.2") and deep[9].endswith(": not told apart"), "the mean is better, by one seed"
    assert first[10:] == ["54.0", "40.0"] and shallow[10:] == ["52.0 (-2.0 ± 0.3)", "20.0 (-20.0 ± 0.0)"]
    tuning, reported = ([flags for flags in asked if (flags["seed"] == 41) == wanted] for wanted in (True, False))
    assert {flags["num-iterations"] for flags in tuning} == {2} and not any("eval-tasks" in flags for flags in tuning)
    assert [(flags["depth"], flags["seed"], flags["num-iterations"]) for flags in reported] == [(depth, seed, 4) for depth in (4, 2, 6) for seed in (42, 43, 44)]
    assert {flags["objective"] for flags in asked} == {"next-token"}
    assert len(json.loads((tmp_path / "numbers.json").read_text())["depth=4 aspect-ratio=32"]["runs"]) == 3
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_tells_nothing_apart(asked, config, capsys):
    assert dials.main([str(config), "--seeds=1", "--objective=mlm"]) == 0
    out = capsys.readouterr().out
    assert out.count("not told apart") == 2 and "inf" not in out and {flags["objective"] for flags in asked} == {"mlm"}


def test_what_the_file_does_not_have(asked, config, capsys):
    assert dials.main([str(config), "--objective=mixed"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --objective=mixed: blocks has mlm and next-token\n" and not asked


def test_one_that_diverges_is_said_to_and_the_others_are_told(asked, config, tmp_path, monkeypatch, capsys):
    runs = arms.run_trials
    broken = lambda trial: trial.flags["depth"] == 6 and trial.flags["seed"] == 44
    monkeypatch.setattr(arms, "run_trials", lambda base_dir, trials, *rest: [Result(trial.flags, [], [], [], 0.0, 0) if broken(trial) else result
                                                                             for trial, result in zip(trials, runs(base_dir, trials, *rest))])
    assert dials.main([str(config), f"--out={tmp_path / 'numbers.json'}"]) == 0
    out = capsys.readouterr().out
    assert len(json.loads((tmp_path / "numbers.json").read_text())["depth=6 aspect-ratio=16"]["runs"]) == 3, "nothing is lost"
    assert "depth=6 aspect-ratio=16: diverged with matrix-lr 1 for 1 of 3 seeds" in out and "+0.1000 ± 0.0000: worse" in out and "nan" not in out


def test_evaluations_are_checked_as_the_runs_would(config, base_dir, monkeypatch):
    """By their own rows a pass and tokens: 2 rows of 64 tokens make a batch that the default of 32 would not."""
    tiny.prepare(base_dir)
    asked = []
    monkeypatch.setattr(arms.evaluations, "check", lambda chosen, subject: asked.append([one.evaluation.check(subject, one.limit) for one in chosen]))
    config.write_text(SWEEP.replace('"blimp", "blimp:20"', '"bpb:256", "pll:20"').replace("seed = 41", "seed = 41\ndevice-batch-size = 2\nmax-seq-len = 64\nhead-dim = 32"))
    arms.check_evaluations(arms.configurations(config, "", "next-token"))
    assert len(asked) == 1, "once for all configurations"
    config.write_text(config.read_text().replace("bpb:256", "bpb:100"))
    with pytest.raises(UsageError, match="less than one batch of 128 tokens"):
        arms.check_evaluations(arms.configurations(config, "", "next-token"))


def test_what_an_evaluation_lacks_is_said_before_the_tuning(config, base_dir, monkeypatch, capsys):
    tiny.prepare(base_dir)
    tuned = []
    monkeypatch.setattr(arms, "run_trials", lambda *_: tuned.append(1))
    for objective in ("next-token", "mlm"):
        capsys.readouterr()
        assert dials.main([str(config), f"--objective={objective}", "--flags=--head-dim=32"]) == 2 and not tuned
        assert "no pairs for --eval=blimp: give --blimp" in capsys.readouterr().err.splitlines()[-1]
