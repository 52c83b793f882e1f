"""nanochat's reinforcement learning on a numpy model, with what the engine generates given."""
import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.run_log import read_run_log
from scripts import chat_rl
from tests.golden import task_data
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import build_model, load, tokenizer_512

GOLDEN = load("rl")


class GivenEngine:
    """Answers each call with the next of the fixture's, after a look at what is asked."""

    calls: Iterator[dict]  # set by `run`, which a worker that takes tests from another may set up twice

    def __init__(self, model, tokenizer):
        self.model = model

    def generate_batch(self, tokens, num_samples=1, **arguments):
        call = next(self.calls)
        assert (tokens, num_samples, arguments) == (call["prompt"], call["num_samples"], call["arguments"])
        return ([tokens + completion for completion in call["completions"]], [[0] * len(tokens) + mask for mask in call["completion_masks"]])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base directory, per optimizer step its gradient norms, learning rates, momenta and the norms of the parameters after it)."""
    directory = tmp_path_factory.mktemp("rl")
    task_data.place(directory)
    tokenizer_512().save(directory / "tokenizer")
    model = build_model(GOLDEN["config"], GOLDEN["seed"])
    source = directory / "chatsft_checkpoints" / "d3"
    checkpoints.save_checkpoint(source, 0, model.state_dict(), None, {"step": 0, "model_config": asdict(model.config)})
    steps, setup = [], []

    def norms(optimizer, of) -> dict:
        return {names[id(p)]: of(p).double().norm().item() for group in optimizer.param_groups for p in group["params"]}

    def setup_optimizer(self, **kwargs):
        names.update((id(p), name) for name, p in self.named_parameters())
        optimizer = original_setup(self, **kwargs)
        setup.append({"arguments": kwargs, "lrs": [group["lr"] for group in optimizer.param_groups]})
        return optimizer

    def step(optimizer):
        record = {"grad_norms": norms(optimizer, lambda p: p.grad), "lrs": [group["lr"] for group in optimizer.param_groups],
                  "momentum": [group.get("momentum") for group in optimizer.param_groups]}
        original_step(optimizer)
        steps.append({**record, "param_norms_after": norms(optimizer, lambda p: p.detach())})

    names: dict = {}
    original_setup, original_step = GPT.setup_optimizer, MuonAdamW.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        patch.setattr(GivenEngine, "calls", iter(GOLDEN["engine_calls"]), raising=False)
        patch.setattr(chat_rl, "Engine", GivenEngine)
        patch.setattr(GPT, "setup_optimizer", setup_optimizer)
        patch.setattr(MuonAdamW, "step", step)
        assert chat_rl.main(GOLDEN["flags"]) == 0
        assert next(GivenEngine.calls, None) is None, "every call was made"
    return directory / "chatrl_checkpoints" / "d3", setup[0], steps


def test_losses_and_rewards(run):
    records = read_run_log(run[0] / "log.jsonl")
    passes = [record for record in records if record["kind"] == "pass"]
    assert [record["loss"] for record in passes] == pytest.approx(GOLDEN["pass_losses"], abs=1e-4)
    assert [record["reward"] for record in passes] == GOLDEN["pass_average_rewards"]
    train = [record for record in records if record["kind"] == "train"]
    assert len(train) == GOLDEN["num_steps"]
    assert [[record["reward"], record["sequence_length"]] for record in train] == [pytest.approx(pair, abs=0.006) for pair in GOLDEN["step_reward_and_length"]]
    scores = [[value for key, value in record.items() if key.startswith("pass@")] for record in records if record["kind"] == "eval"]
    assert scores == [pytest.approx(row, abs=1e-4) for row in GOLDEN["pass_at_k"]]


def test_optimizer_setup(run):
    expected = GOLDEN["optimizer"][0]
    assert expected["setup"].items() <= run[1]["arguments"].items()
    assert run[1]["lrs"] == pytest.approx(expected["lrs"], rel=1e-12)


@pytest.mark.parametrize("step", range(GOLDEN["num_steps"]))
def test_optimizer_steps(run, step):
    got, expected = run[2][step], GOLDEN["optimizer"][1 + step]
    assert got["lrs"] == pytest.approx(expected["lrs"], rel=1e-12)
    assert got["momentum"] == expected["momentum"]
    for kind in ("grad_norms", "param_norms_after"):
        assert got[kind].keys() == expected[kind].keys()
        for name, norm in expected[kind].items():
            assert got[kind][name] == pytest.approx(norm, rel=1e-3, abs=1e-4), (kind, name)


def test_saved(run):
    (expected,) = GOLDEN["saved"]
    assert checkpoints.list_steps(run[0]) == [expected["step"]]
    assert len(torch.load(run[0] / f"model_{expected['step']:06d}.pt", weights_only=True)) == expected["keys"]
    meta = json.loads((run[0] / f"meta_{expected['step']:06d}.json").read_text())
    assert meta["model_config"] == expected["meta"]["model_config"]
    assert ("rl", "saved") in EXCEPTIONS
    assert meta["step"] == expected["step"] and (run[0] / f"optim_{expected['step']:06d}_rank0.pt").exists()
