"""Bits per byte against the reference."""
import pytest
import torch

from nanochat.loss_eval import evaluate_bpb
from tests.golden import fixtures, inputs

BPB = fixtures.load("bits_per_byte")


def model(name):
    if name == "gpt":
        return fixtures.build_model(BPB["gpt_config"], BPB["gpt_seed"])
    core = fixtures.load(BPB["boost_pairs_in"].removesuffix(".json"))
    return fixtures.TableModel(inputs.table(BPB["table_seed"], 512, [tuple(pair) for pair in core["boost_pairs"]], core["boost"]))


@pytest.mark.parametrize("case", BPB["cases"], ids=lambda case: case["name"])
def test_bits_per_byte(case):
    batches = [fixtures.batch(seed, case["B"], case["T"], case["token_range"], case["ignore_frac"]) for seed in case["batch_seeds"]]
    bpb = evaluate_bpb(model(case["model"]), batches, case["steps"], torch.tensor(BPB["token_bytes"], dtype=torch.int32))
    assert bpb == pytest.approx(case["bpb"], abs=1e-5)
