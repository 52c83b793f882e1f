"""Batches of nanochat's fine-tuning packer, and its fine-tuning from end to end."""
import json

import pytest
import torch

from nanochat.cli import UsageError
from nanochat.run_log import read_run_log
from scripts import chat_sft
from tasks.customjson import CustomJSON
from tests.golden import task_data
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import arrays, load, tokenizer_512
from tests.golden.test_scripts_trace import check_meta, check_optimizer, pretrain

GOLDEN, ARRAYS = load("sft_packing"), arrays("sft_packing")
TRACE = load("scripts_trace")["chat_sft"]
LOSS = 5e-3


def keep_windows(model, sequence_len: int):
    """What nanochat does for another context length: it trains with the windows of the old one, but saves the new one."""
    assert ("scripts_trace", "chat_sft windows") in EXCEPTIONS
    model.config.sequence_len = sequence_len
    return model


def dataset(tmp_path, conversations: list):
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(conversation["messages"]) + "\n" for conversation in conversations))
    return CustomJSON(path)


def batches(tmp_path, monkeypatch, run: dict) -> list:
    monkeypatch.setenv("RANK", str(run["rank"]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(run["world_size"]))
    conversations = [GOLDEN["train"][4]] if run["dataset"] == "train[4] alone" else GOLDEN[run["dataset"]]
    loader = chat_sft.pack_conversations(dataset(tmp_path, conversations), tokenizer_512(), run["device_batch_size"], run["max_seq_len"], "cpu",
                                         num_iterations=run["num_iterations"], buffer_size=run["buffer_size"])
    return [next(loader) for _ in range(run["batches"])]


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: run["name"])
def test_batches(tmp_path, monkeypatch, run):
    if ("sft_packing", run["name"]) in EXCEPTIONS:
        with pytest.raises(UsageError, match="no conversation has an answer"):
            batches(tmp_path, monkeypatch, run)
        return
    got = batches(tmp_path, monkeypatch, run)
    for i, (inputs, targets, state) in enumerate(got):
        assert (str(inputs.dtype), str(targets.dtype)) == (f"torch.{run['inputs_dtype']}", f"torch.{run['targets_dtype']}")
        assert torch.equal(inputs.long(), torch.from_numpy(ARRAYS[f"{run['name']}/inputs"][i]).long())
        assert torch.equal(targets, torch.from_numpy(ARRAYS[f"{run['name']}/targets"][i]).long())
        last, progress, epoch = run["last_step_progress_epoch"][i]
        if run["split"] == "train":
            assert (state["last"], state["progress"], state["epoch"]) == (last, pytest.approx(progress, rel=1e-12), epoch)


@pytest.mark.parametrize("case", load("schedules")["fine_tuning"], ids=lambda case: str(case["warmup_ratio"]))
def test_schedules(case):
    for progress, multiplier in case["lr_multiplier_by_progress"]:
        assert chat_sft.lr_multiplier(progress, case["warmup_ratio"], case["warmdown_ratio"], case["final_lr_frac"]) == pytest.approx(multiplier, rel=1e-12, abs=1e-15)
    for step, momentum in case["muon_momentum_by_step"]:
        assert chat_sft.muon_momentum(step) == pytest.approx(momentum, rel=1e-12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A base directory after the pretraining and the fine-tuning of the fixture, and what the latter logged."""
    directory = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        pretrain(directory, patch)
        task_data.place(directory, at_least={("cais--mmlu", "all", "test"): 5200, ("openai--gsm8k", "main", "test"): 420})
        patch.setattr(chat_sft, "with_context", keep_windows)
        assert chat_sft.main(TRACE["flags"]) == 0
    return directory / "chatsft_checkpoints" / "d3"


def test_losses(finished):
    records = read_run_log(finished / "log.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert [[r["step"] + 1, round(r["lrm"], 2), r["epoch"]] for r in train] == [[step, lrm, epoch] for step, _, lrm, epoch in TRACE["train"]]
    assert ("scripts_trace", "chat_sft loss") in EXCEPTIONS  # nanochat divides by 1 - 0.9^(updates + 1)
    assert [r["loss"] * (1 - 0.9 ** (r["step"] + 1)) / (1 - 0.9 ** (r["step"] + 2)) for r in train] == pytest.approx([row[1] for row in TRACE["train"]], abs=LOSS)
    assert [[r["step"], r["val_bpb"]] for r in records if r["kind"] == "eval"] == [[step, pytest.approx(bpb, abs=0.02)] for step, bpb in TRACE["val_bpb"]]


def test_chatcore(finished):
    (record,) = [record for record in read_run_log(finished / "log.jsonl") if record["kind"] == "chatcore"]
    assert [record["chatcore_metric"], record["chatcore_cat"]] == pytest.approx(TRACE["chatcore"], abs=1e-4)
    assert {name: f"{100 * record[name]:.2f}" for name, _ in TRACE["task_percent"]} == dict(TRACE["task_percent"])


def test_checkpoint(finished):
    expected, step = TRACE["checkpoint"], TRACE["last_step"]
    assert set(expected["files"]) <= {path.name for path in finished.iterdir()}
    meta = json.loads((finished / f"meta_{step:06d}.json").read_text())
    settled = dict(expected["meta"])
    assert meta.pop("val_bpb") == pytest.approx(settled.pop("val_bpb"), abs=0.02)
    check_meta(meta, settled)
    check_optimizer(finished, step, expected["optimizer"])
    weights = torch.load(finished / f"model_{step:06d}.pt", weights_only=True)
    assert set(weights) == set(expected["norm_and_sum"])
    for key, (norm, _) in expected["norm_and_sum"].items():
        assert weights[key].double().norm().item() == pytest.approx(norm, rel=0.02, abs=0.1), key
