"""Runs side by side."""
import random

import pytest

from nanochat.compare import paired_test, pairs_of
from nanochat.evals.results import Row, write_results
from nanochat.report import main
from nanochat.run_log import RunLog


def run(base, tag: str, shift: float, bpb: float) -> None:
    folder = base / "base_checkpoints" / tag
    folder.mkdir(parents=True)
    log = RunLog(folder / "log.jsonl")
    log.log("start", 0, counts={"total": 1234567}, flops_per_token=100, total_batch_size=10, config={})
    log.log("eval", 5, val_bpb=bpb, tokens=50, flops=5e9, time=90.0)
    log.log("end", 5, peak_memory_mib=512.0)
    log.close()
    draw = random.Random(tag)
    tasks = {f"blimp/pairs/paradigm/p{i}": Row(0.5 + i / 100 + shift + draw.gauss(0, 0.01), 200, 0.03, baseline=0.5) for i in range(20)}
    write_results(folder, 5, {"blimp/pairs": Row(0.6 + shift, 4000, 0.01, baseline=0.5, label="BLiMP pairs"), **tasks})


def test_side_by_side(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(base_dir, "d6", 0.0, 1.5)
    run(base_dir, "d12", 0.08, 1.25)
    run(base_dir, "twin", 0.0, 1.5001)
    assert main(["compare", "d6", "d12", "twin"]) == 0
    text = (base_dir / "report" / "compare.md").read_text()
    assert "| Validation bpb | 1.5000 | 1.2500 | 1.5001 |" in text and "| Parameters | 1,234,567 |" in text
    assert "| blimp/pairs | 0.6000 ± 0.0100 | 0.6800 ± 0.0100 |" in text
    better, none = (line for line in text.splitlines() if line.startswith("- "))
    assert "blimp/pairs: d12 is better (d12 - d6 = +0.0" in better and "over 20 tasks" in better
    assert "no difference that could not be chance" in none
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG") and "data:image/png" in (tmp_path / "compare.html").read_text()


def test_what_was_measured_before_the_end_is_shown_as_such_and_decides_nothing(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(base_dir, "d6", 0.0, 1.5)
    run(base_dir, "d12", 0.08, 1.25)
    (base_dir / "base_checkpoints" / "d12" / "eval_000005.json").rename(base_dir / "base_checkpoints" / "d12" / "eval_000003.json")
    assert main(["compare", "d6", "d12"]) == 0
    text = (base_dir / "report" / "compare.md").read_text()
    assert "| blimp/pairs | 0.6000 ± 0.0100 | 0.6800 ± 0.0100 (step 3) |" in text
    assert "better (" not in text and "No evaluation of 5 tasks or more is known of the last steps of two of them" in text


@pytest.mark.parametrize("flags, message", [
    (["compare", "d6"], "two runs"), (["compare", "d6", "d7"], "there is no run d7 to compare; there are: d6"), (["generate", "d6"], "takes no runs")])
def test_what_cannot_be_compared(base_dir, capsys, flags, message):
    run(base_dir, "d6", 0.0, 1.5)
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_the_paired_test():
    """Exact where all signs can be tried, and fair: equal runs rarely differ, a constant difference always does."""
    assert paired_test([1.0] * 5) == pytest.approx(2 / 32)
    assert paired_test([1.0, -1.0, 2.0, -2.0]) == 1.0
    assert paired_test([0.02] * 40) < 1e-4
    draw = random.Random(0)
    assert sum(paired_test([draw.gauss(0, 1) for _ in range(30)]) < 0.05 for _ in range(60)) < 10


def test_only_the_same_measurements_are_paired():
    row = lambda value, **more: {"value": value, **more}
    one = {"core/a": row(0.1), "core": row(0.5), "core:50/a": row(0.2), "blimp/x/paradigm/p": row(0.3), "blimp/x/field/f": row(0.4), "bpb/val": row(1.0, metric="bits per byte")}
    other = {**one, "core/a": row(0.2)}
    other.pop("core:50/a")
    assert pairs_of(one, other) == {"core": [(0.1, 0.2)], "blimp/x": [(0.3, 0.3)]}
