import json
import resource
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.cli import UsageError
from nanochat.run_log import RunLog, is_finished, last_of_each_kind, read_run_log


def write(path, steps, resume_step=None):
    log = RunLog(path, resume_step)
    for step in steps:
        if step % 2 == 0:
            log.log("eval", step, val_bpb=1 / (step + 1))
        log.log("train", step, loss=10 - step)
    log.close()


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "d4" / "log.jsonl"
    write(path, range(3))
    assert [(r["kind"], r["step"]) for r in read_run_log(path)] == [("eval", 0), ("train", 0), ("train", 1), ("eval", 2), ("train", 2)]
    assert read_run_log(path)[2] == {"kind": "train", "step": 1, "loss": 9}


def test_every_record_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.log("train", 0, loss=1.5)
    assert read_run_log(tmp_path / "log.jsonl") == [{"kind": "train", "step": 0, "loss": 1.5}]


def test_a_fresh_run_starts_over(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, range(5))
    write(path, range(2))
    assert [r["step"] for r in read_run_log(path) if r["kind"] == "train"] == [0, 1]


@pytest.mark.parametrize("killed_at", [4, 5, 6, 9])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, killed_at):
    write(tmp_path / "whole.jsonl", range(10))
    write(tmp_path / "resumed.jsonl", range(killed_at + 1))
    with open(tmp_path / "resumed.jsonl", "ab") as f:
        f.write(b'{"kind": "train", "st')  # killed in the middle of a write
    write(tmp_path / "resumed.jsonl", range(4, 10), resume_step=4)
    assert (tmp_path / "resumed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_resuming_without_a_log_starts_one(tmp_path):
    write(tmp_path / "log.jsonl", range(4, 6), resume_step=4)
    assert [r["step"] for r in read_run_log(tmp_path / "log.jsonl") if r["kind"] == "train"] == [4, 5]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, resume_step=3)
    log.log("train", 0, loss=1.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_values_become_strict_json(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.log("train", 0, nan=float("nan"), deep={"inf": [float("inf"), 1.0]}, tensor=torch.tensor(2.5), nan_tensor=torch.tensor(float("nan")),
            array=np.array([1, 2]), integer=np.int64(7), text="é\n")
    (line,) = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record == {"kind": "train", "step": 0, "nan": None, "deep": {"inf": [None, 1.0]}, "tensor": 2.5, "nan_tensor": None,
                      "array": [1, 2], "integer": 7, "text": "é\n"}


@pytest.mark.parametrize("line", [b"nonsense", b"[1]", b'{"kind": "train"}', b'{"kind": "train", "step": "3"}', b"\xff"])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 0}\n' + line + b'\n{"kind": "train", "step": 1}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_run_log(path)


def test_a_missing_log_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run log"):
        read_run_log(tmp_path / "log.jsonl")


@given(st.data())
def test_any_cut_loses_at_most_the_last_record(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    write(path, range(4))
    whole, content = read_run_log(path), path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    survivors = read_run_log(path)
    assert survivors == whole[:len(survivors)]
    assert len(survivors) >= content[:cut].count(b"\n")


def test_a_full_disk_costs_records_but_not_the_run(tmp_path, caplog):
    """The kernel takes only the beginning of a record that goes beyond the limit; nothing of it stays."""
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    log.log("train", 0, loss=1.5)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        log.log("train", 1, loss=1.4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.log("train", 2, loss=1.3)
    assert [record["step"] for record in read_run_log(path)] == [0, 2]
    assert "the record train of step 1 is left out" in caplog.text


def test_what_a_finished_run_s_log_has(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, range(4))
    records = read_run_log(path)
    assert last_of_each_kind(records)["train"]["step"] == 3 and last_of_each_kind(records)["eval"]["step"] == 2
    end = [{"kind": "end", "step": 4}]
    assert not is_finished(records) and not is_finished(records + end), "its last validation is missing"
    assert is_finished([*records, {"kind": "eval", "step": 4, "val_bpb": 0.1}, *end])
    assert is_finished([{"kind": "start", "step": 0}, *end]) and not is_finished([]), "not all runs validate"
