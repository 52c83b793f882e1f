"""The loader against nanochat's batches and states: ranks, epochs, nanochat's resume, odd buffer sizes."""
import shutil

import numpy as np
import pytest

from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit as data_loader
from nanochat.dataset import parquets_iter_batched
from tests.golden.fixtures import HERE, arrays, load, tokenizer_from

GOLDEN = load("dataloader")


@pytest.fixture
def shards(base_dir):
    shutil.copytree(HERE / "shards", base_dir / "base_data_climbmix")


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["name"])
def test_run(shards, monkeypatch, run):
    if run["world_size"] > 1:
        for name, value in (("RANK", run["rank"]), ("LOCAL_RANK", run["rank"]), ("WORLD_SIZE", run["world_size"])):
            monkeypatch.setenv(name, str(value))
    expected = arrays("dataloader")[run["name"]]
    loader = data_loader(tokenizer_from(GOLDEN["ranks_hex"]), device="cpu", resume_state_dict=run["resume_state"], **run["arguments"])
    states = []
    for number, (inputs, targets, state) in zip(range(run["batches"]), loader):  # noqa: B905 - the loader is endless
        np.testing.assert_array_equal(np.stack([inputs, targets]), expected[number])
        states.append([state["pq_idx"], state["rg_idx"], state["epoch"]])
    assert states == run["states_pq_rg_epoch"]


@pytest.mark.parametrize("case", GOLDEN["document_iteration"], ids=lambda case: f"{case['split']}-{case['start']}-{case['step']}")
def test_document_iteration(shards, case):
    groups = parquets_iter_batched(case["split"], start=case["start"], step=case["step"])
    assert [[len(group), [len(text) for text in group]] for group in groups] == case["groups"]
