"""The tables and fits of analysis/scaling.py, from run logs that need no training."""
import csv

import numpy as np

from analysis import scaling
from nanochat.run_log import RunLog


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


def test_a_miniseries_is_a_table_of_its_finished_runs(base_dir, capsys):
    finished(base_dir, "mini_miniseries_d12", -1, 1e6, 12e6, 0.9)
    finished(base_dir, "mini_miniseries_d4", -1, 1e5, 12e5, 1.1)
    assert scaling.main(["miniseries", "mini"]) == 0
    header, *rows = capsys.readouterr().out.split("\n\nWritten")[0].splitlines()
    assert header == ",".join(scaling.COLUMNS["miniseries"])
    assert [row.split(",")[0] for row in rows] == ["4", "12"] and rows[0].split(",")[6:] == ["12.0", "1.1", "", "1.5"]
