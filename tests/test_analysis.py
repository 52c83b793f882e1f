"""The studies of analysis/, with trials that need no training."""
import csv
import json

import numpy as np
import pytest

from analysis import growth, growth_bound, low_rank, normalized, scaling, width_transfer
from analysis.trials import Result, cost_with
from nanochat.run_log import RunLog


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


def finished(base_dir, tag: str, flops: float, params: float, tokens: float, bpb: float | None, end: bool = True) -> None:
    (base_dir / "base_checkpoints" / tag).mkdir(parents=True)
    log = RunLog(base_dir / "base_checkpoints" / tag / "log.jsonl")
    counts = dict(wte=5, value_embeds=6, lm_head=params / 4, transformer_matrices=params * 3 / 4, scalars=7, total=18 + params)
    log.log("start", 0, config={"target_flops": flops}, model_config={"n_layer": int(tag.split("_d")[-1]), "n_embd": 64}, counts=counts, num_iterations=9, total_tokens=tokens)
    if bpb is not None:
        log.log("eval", 0, val_bpb=3.0)
        log.log("eval", 9, val_bpb=bpb)
    if end:
        log.log("end", 9, total_training_time=1.5)
    log.close()


def test_best_sizes_are_found_where_the_losses_are_a_parabola(base_dir, capsys):
    for flops, best in ((1e15, 1e6), (1e17, 8e6)):  # 100 times the FLOPs, 8 times the size: FLOPs^0.4515
        for depth, times in enumerate((0.25, 0.5, 1.5, 4)):
            finished(base_dir, f"try_scaling_{flops:g}_d{depth}", flops, best * times, flops / (best * times), 1 + 0.1 * np.log(times) ** 2)
    finished(base_dir, "try_scaling_1e18_d4", 1e18, 1e7, 1e11, 1.0)  # alone at its budget
    finished(base_dir, "try_scaling_1e18_d5", 1e18, 2e7, 1e11, None, end=False)  # still going on
    finished(base_dir, "other_scaling_1e15_d5", 1e15, 1e6, 1e9, 0.1)
    assert scaling.main(["scaling_laws", "try"]) == 0
    out = capsys.readouterr().out
    assert "| 1.00e+15 | 1.000e+06 | 1.000e+09 | 1000.00 | 1.0000 |" in out and "| 1.00e+17 | 8.000e+06 | 1.250e+10 |" in out
    assert "grows with FLOPs^0.452, its tokens with FLOPs^0.548" in out
    folder = base_dir / "scaling_laws_results_try"
    rows = list(csv.DictReader(open(folder / "results.csv")))
    assert len(rows) == 9 and list(rows[0]) == scaling.COLUMNS["scaling_laws"] and rows[-1]["depth"] == "4"
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_best_size_beyond_those_tried_is_not_invented(base_dir, capsys):
    for depth, size in enumerate((1, 2, 4)):
        finished(base_dir, f"try_scaling_1e15_d{depth}", 1e15, 1e6 * size, 1e9 / size, 2 - 0.1 * np.log(size) + 0.01 * np.log(size) ** 2)
    assert scaling.main(["scaling_laws", "try"]) == 0
    out = capsys.readouterr().out
    assert "not between 1.00e+06 and 4.00e+06" in out and "grows" not in out


def test_a_series_without_finished_runs_says_so(base_dir, capsys):
    finished(base_dir, "mini_miniseries_d2", -1, 1e6, 1e9, 1.0, end=False)
    assert scaling.main(["miniseries", "mini"]) == 2
    assert "runs/miniseries.sh" in capsys.readouterr().err
