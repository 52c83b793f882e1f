"""Bits per byte. Numbers against nanochat: tests/golden/test_bits_per_byte.py."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.core_eval import evaluate_task
from nanochat.evals.blimp import score_pairs
from nanochat.loss_eval import evaluate_bpb
from tests.test_blimp import pairs
from tests.test_core_eval import META, model, rows, tokenizer

ROOT = Path(__file__).parent.parent


class Constant:
    """Every token costs `nats`; those below 0 cost NaN, which must not count where the token does not."""

    def __init__(self, nats):
        self.nats = nats

    def get_device(self):
        return torch.device("cpu")

    def __call__(self, x, y, loss_reduction):
        assert loss_reduction == "none" and x.shape == y.shape
        return torch.where(y.flatten() >= 0, self.nats, float("nan"))


TOKEN_BYTES = torch.tensor([1, 2, 3, 0], dtype=torch.int32)


def batch(*targets):
    y = torch.tensor([targets])
    return torch.zeros_like(y), y


def test_bits_over_bytes():
    bpb = evaluate_bpb(Constant(math.log(2)), [batch(0, 1, 2), batch(2, 2, 2)], 2, TOKEN_BYTES)
    assert bpb == pytest.approx(6 / 15)


def test_special_and_ignored_targets_count_for_neither():
    assert evaluate_bpb(Constant(math.log(2)), [batch(3, 1, -1, 3)], 1, TOKEN_BYTES) == pytest.approx(1 / 2)


def test_no_bytes_at_all():
    assert evaluate_bpb(Constant(1.0), [batch(3, -1)], 1, TOKEN_BYTES) == math.inf
    assert evaluate_bpb(Constant(1.0), [], 0, TOKEN_BYTES) == math.inf


def test_takes_no_more_batches_than_steps():
    batches = iter([batch(0, 1), batch(0, 1), batch(2, 2)])
    evaluate_bpb(Constant(1.0), batches, 2, TOKEN_BYTES)
    assert len(list(batches)) == 1


def test_small_batches_count_beside_a_large_one():
    """In float32 the 3 nats of a batch would vanish beside 3e8."""
    model = Constant(1e8)

    def batches():
        yield batch(0, 0, 0)
        model.nats = 1.0
        for _ in range(99):
            yield batch(0, 0, 0)

    bpb = evaluate_bpb(model, batches(), 100, TOKEN_BYTES)
    assert bpb * math.log(2) * 300 == pytest.approx(3e8 + 297, rel=1e-9)


RANKS = """
import json, sys
from pathlib import Path
import torch
from nanochat.common import compute_cleanup, compute_init
from nanochat.core_eval import evaluate_task
from nanochat.evals.blimp import score_pairs
from nanochat.evals.classification import share_jobs
from nanochat.loss_eval import evaluate_bpb
from tests.test_blimp import pairs
from tests.test_core_eval import META, model, rows, tokenizer
from tests.test_loss_eval import TOKEN_BYTES, Constant, batch

model()  # what PyTorch imports on first use keeps a process group alive that exists by then, and its threads abort the exit
_, rank, _, _, device = compute_init("cpu")
bpb = evaluate_bpb(Constant(float(rank)), [batch(0, 1, 2)] * (rank + 1), 2, TOKEN_BYTES)
accuracies = [evaluate_task(model(), tokenizer(), rows(task_type, 11), device, meta) for task_type, meta in META.items()]
better, ties = score_pairs(model(), tokenizer(), [*pairs("any", 9), dict(sentence_good="ka", sentence_bad="ka")], device)
jobs = share_jobs([lambda i=i: {f"job {i}": rank} for i in range(3)])
Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps([better.tolist(), ties, jobs, bpb, *accuracies]))
compute_cleanup()
"""


@pytest.mark.slow
def test_two_ranks_agree_on_what_both_saw(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    better, ties, jobs, bpb, *accuracies = results[0]
    assert better == score_pairs(model(), tokenizer(), [*pairs("any", 9), dict(sentence_good="ka", sentence_bad="ka")], "cpu")[0].tolist() and ties == [9]
    assert jobs == {"job 0": 0, "job 1": 1, "job 2": 0}
    assert bpb == pytest.approx(6 / 18 / math.log(2))  # rank 0: 3 targets free of cost; rank 1: 6 targets of 1 nat
    assert accuracies == [evaluate_task(model(), tokenizer(), rows(task_type, 11), "cpu", meta) for task_type, meta in META.items()]
