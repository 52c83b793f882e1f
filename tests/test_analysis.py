"""The studies of analysis/, with trials that need no training."""
import json

import pytest
import torch

from analysis import growth, growth_bound, low_rank, normalized, trials, width_transfer
from analysis.trials import Result, cost_with
from nanochat.files import locked
from scripts import base_train


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


def test_a_trial_is_trained_once_whoever_asks(base_dir, monkeypatch):
    """The second of two studies that share a trial waits, and finds it done; what the model writes needs no encoding."""
    trained = []

    def main(flags):
        trained.append(flags)
        print("\u4f60\ud800")
        with locked(base_dir / "base_checkpoints" / trials.name_of({"depth": 1}), wait=False):  # base_train holds the same folder
            return 1

    monkeypatch.setattr(base_train, "main", main)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for _ in range(2):
        trials._run(str(base_dir), {"depth": 1})
    assert len(trained) == 1 and trials.read(str(base_dir), {"depth": 1}).final == float("inf")
