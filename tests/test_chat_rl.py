"""Reinforcement learning on tiny models: what is trained on, exact resume, ranks, errors."""
import json
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.objectives import policy_gradient
from nanochat.run_log import read_run_log
from scripts import chat_rl, chat_sft
from scripts.chat_web import describe_model
from tasks import spellingbee
from tests import tiny
from tests.golden.fixtures import build_model, tokenizer_512
from tests.test_chat_sft import assert_same, folder, run

FLAGS = ["--device-type=cpu", "--task-name=SpellingBee", "--num-iterations=4", "--device-batch-size=2", "--num-samples=4", "--examples-per-step=2",
         "--max-new-tokens=6", "--eval-every=2", "--eval-examples=2", "--save-every=1"]


def train(*flags: str) -> int:
    spellingbee._all_words.cache_clear()
    return chat_rl.main([*FLAGS, *flags])


def with_chat_model(base, target) -> None:
    """A copy of a pretraining run, whose model passes for a chat model."""
    shutil.copytree(base, target, dirs_exist_ok=True)
    shutil.copytree(target / "base_checkpoints", target / "chatsft_checkpoints")


@pytest.fixture
def tuned(finished_run, base_dir):
    with_chat_model(finished_run, base_dir)
    return base_dir


@pytest.fixture(scope="module")
def trained_run(finished_run, tmp_path_factory):
    """A run that nobody interrupted; its rewards, from the text alone, are never all equal. Not to be written to."""
    directory = tmp_path_factory.mktemp("rl")
    with_chat_model(finished_run, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        patch.setattr(spellingbee.SpellingBee, "reward", reward)
        assert train() == 0
    return directory


def reward(self, problem, completion):
    return len(completion) / 10


@pytest.fixture(autouse=True)
def easy_reward(monkeypatch):
    monkeypatch.setattr(spellingbee.SpellingBee, "reward", reward)


def test_it_logs_and_saves(trained_run):
    records = read_run_log(folder(trained_run, "chatrl") / "log.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in steps] == [0, 1, 2, 3] and [record["lrm"] for record in steps] == [1, 0.75, 0.5, 0.25]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 2]
    assert checkpoints.list_steps(folder(trained_run, "chatrl")) == [1, 2, 3]
    assert (trained_run / "report" / "chat-rl.md").exists()


def test_a_long_run(tuned):
    """From the eleventh step on time is measured."""
    assert train("--num-iterations=13", "--examples-per-step=1", "--num-samples=2", "--max-new-tokens=2", "--eval-every=-1", "--save-every=-1") == 0
    assert checkpoints.list_steps(folder(tuned, "chatrl")) == [12]


@pytest.mark.slow
def test_resume(trained_run, base_dir):
    shutil.copytree(trained_run, base_dir, dirs_exist_ok=True)
    assert train("--resume-from-step=1") == 0
    assert_same(base_dir, trained_run, step=3, kind="chatrl")


def train_and_die() -> None:
    """Killed while the second checkpoint is half written: after the log, and state, optimizer, meta and model of the first."""
    replace, calls = os.replace, []

    def replace_or_die(*args):
        calls.append(args)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace_or_die)
        patch.setattr(spellingbee.SpellingBee, "reward", reward)  # it is a process of its own
        train()


@pytest.mark.slow
def test_kill_9_during_a_save_and_resume(tuned, trained_run):
    process = multiprocessing.get_context("spawn").Process(target=train_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and checkpoints.list_steps(folder(tuned, "chatrl")) == [1]
    assert train("--resume") == 0
    assert_same(tuned, trained_run, step=3, kind="chatrl")


def test_a_finished_run_is_left_alone(trained_run, base_dir):
    shutil.copytree(trained_run, base_dir, dirs_exist_ok=True)
    assert train("--resume") == 0
    assert_same(base_dir, trained_run, step=3, kind="chatrl")


@pytest.mark.slow
def test_two_ranks(tuned):
    out = run(tuned, *FLAGS, "--num-iterations=2", ranks=2, script="chat_rl")
    assert "1 problems per rank and step" in out and "Step 00000 | pass@1: " in out
    assert len(list(folder(tuned, "chatrl").glob("optim_000001_rank*.pt"))) == 2


def test_growth_is_remembered(tuned):
    """A chat model's meta tells how its base model grew, and the page shows it."""
    path = tiny.folder(tuned) / "meta_000008.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "growth": [{"step": 2, "from": "2x16", "to": "3x16", "mode": "lossless"}]}))
    spellingbee._all_words.cache_clear()
    assert chat_sft.main(["--device-type=cpu", "--mixture=spelling", "--num-iterations=2", "--eval-every=-1", "--chatcore-every=-1"]) == 0
    assert train("--num-iterations=1", "--eval-every=-1", "--model-step=1") == 0
    for source, step in (("sft", 1), ("rl", 0)):
        model, _, meta = checkpoints.load_model(source, torch.device("cpu"), phase="eval", step=step)
        assert describe_model(source, tuned / "d3", model, meta)["growth"] == meta["growth"] == [{"step": 2, "from": "2x16", "to": "3x16", "mode": "lossless"}]


class Answers:
    """Gives each sample of a call its own text, with one forced token."""

    def __init__(self, model, texts: list[str]):
        self.model, self.texts, self.seeds = model, texts, []

    def generate_batch(self, tokens, num_samples, max_tokens, temperature, top_k, seed):
        self.seeds.append(seed)
        first = len(self.seeds) * num_samples - num_samples
        answers = [tokenizer_512().encode(text) for text in self.texts[first:first + num_samples]]
        return [tokens + answer for answer in answers], [[0] * len(tokens) + [1] * (len(answer) - 1) + [0] for answer in answers]


@pytest.fixture
def rollout():
    config = dict(sequence_len=64, vocab_size=512, n_layer=3, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L")
    model = build_model(config, seed=5)
    args = SimpleNamespace(num_samples=4, device_batch_size=2, max_new_tokens=9, temperature=1.0, top_k=5)
    problem = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "4"}]}
    task = SimpleNamespace(reward=lambda problem, text: float(len(text)))
    engine = Answers(model, ["a!", "bb?!", "c, d.", "ee"])
    return model, engine, chat_rl.Rollout(task, problem, tokenizer_512(), engine, args, step=3, index=7)


def test_what_is_trained_on(rollout):
    """Tokens the model sampled: not the prompt, not what was forced, not the padding; advantages sum to zero."""
    _, engine, batch = rollout
    tokenizer = tokenizer_512()
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": ""}]})
    for row, text in enumerate(engine.texts):
        answer = tokenizer.encode(text)
        expected = [-1] * (len(prompt) - 1) + answer[:-1]
        assert batch.targets[row].tolist() == expected + [-1] * (batch.targets.size(1) - len(expected))
        assert batch.inputs[row].tolist()[:len(prompt) + len(answer)][:batch.inputs.size(1)] == (prompt + answer)[:batch.inputs.size(1)]
    assert batch.rewards.tolist() == [float(len(text)) for text in engine.texts]
    assert batch.advantages.sum().item() == pytest.approx(0, abs=1e-6)
    assert len(set(engine.seeds)) == 2, "each pass has its own seed"


def test_the_gradient_raises_what_was_rewarded(rollout):
    model, _, batch = rollout
    before = policy_gradient(model, batch.inputs, batch.targets, batch.advantages)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-4 / (batch.targets >= 0).sum() * parameter.grad
    assert policy_gradient(model, batch.inputs, batch.targets, batch.advantages) < before


def test_no_gradient_where_all_are_as_good(rollout):
    model, _, batch = rollout
    policy_gradient(model, batch.inputs, batch.targets, torch.zeros(4)).backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("outcomes, expected", [([[1, 0, 0], [0, 0, 1]], [0.5, 0.5, 1.0]), ([[0, 0, 0]], [0, 0, 0]), ([[0, 1, 0]], [0, 1, 1])])
def test_pass_at_k(outcomes, expected):
    records = [{"idx": i, "outcomes": [{"is_correct": bool(correct)} for correct in row]} for i, row in enumerate(outcomes)]
    assert chat_rl.pass_at_k(records, 3) == expected


@pytest.mark.parametrize("flags, message", [
    (["--num-samples=5"], "use a multiple of --device-batch-size"), (["--num-iterations=-1", "--examples-per-step=100000"], "fewer than --examples-per-step"),
    (["--resume-from-step=9"], "no checkpoint of step 9"), (["--model-tag=d9"], "no model 'd9'"),
])
def test_bad_settings(tuned, capsys, flags, message):
    assert train(*flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_resume_with_other_settings_is_refused(trained_run, base_dir, capsys):
    shutil.copytree(trained_run, base_dir, dirs_exist_ok=True)
    assert train("--resume-from-step=2", "--num-samples=6") == 2
    assert "num_samples 4 -> 6" in capsys.readouterr().err


def test_a_rl_model_loads_like_any_other(trained_run, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(trained_run))
    model, _, meta = checkpoints.load_model("rl", torch.device("cpu"), phase="eval")
    assert meta["step"] == 3 and json.dumps(meta)
    assert not tiny.identical(model.state_dict(), checkpoints.load_model("sft", torch.device("cpu"), phase="eval")[0].state_dict())
