"""Bits per byte. Numbers against nanochat: tests/golden/test_bits_per_byte.py."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.core_eval import evaluate_task
from nanochat.loss_eval import evaluate_bpb
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


def test_sums_do_not_lose_small_terms():
    """A million batches in float32 would stop growing; here a few with terms eight orders of magnitude apart."""
    model = Constant(1.0)
    large = batch(*[0] * 3)

    def stream():
        yield large
        model.nats = 1e-9
        yield batch(*[0] * 3)

    model.nats = 1e8
    assert evaluate_bpb(model, stream(), 2, TOKEN_BYTES) * math.log(2) * 6 - 3e8 == pytest.approx(3e-9, rel=0, abs=2e-7)


RANKS = """
import torch
from nanochat.common import compute_cleanup, compute_init
from nanochat.core_eval import evaluate_task
from nanochat.loss_eval import evaluate_bpb
from tests.test_core_eval import META, model, rows, tokenizer
from tests.test_loss_eval import TOKEN_BYTES, Constant, batch

torch.set_num_threads(1)
_, rank, _, _, device = compute_init("cpu")
bpb = evaluate_bpb(Constant(float(rank)), [batch(0, 1, 2)] * (rank + 1), 2, TOKEN_BYTES)
accuracies = [evaluate_task(model(), tokenizer(), rows(task_type, 11), device, meta) for task_type, meta in META.items()]
print("result", bpb, *accuracies, flush=True)
compute_cleanup()
"""


@pytest.mark.slow
def test_two_ranks_agree_on_what_both_saw(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python", sys.executable, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = [[float(number) for number in line.split()[1:]] for line in run.stdout.splitlines() if line.startswith("result")]
    assert len(results) == 2 and results[0] == results[1]
    bpb, *accuracies = results[0]
    assert bpb == pytest.approx(6 / 18 / math.log(2))  # rank 0: 3 targets free of cost; rank 1: 6 targets of 1 nat
    assert accuracies == [evaluate_task(model(), tokenizer(), rows(task_type, 11), "cpu", meta) for task_type, meta in META.items()]
