"""Evaluation of chat models from the command line: scores, ranks, ChatCORE, errors."""
import random
import shutil

import pytest
import torch

from nanochat.cli import UsageError, is_out_of_memory
from nanochat.engine import Engine
from scripts import chat_eval
from tasks import spellingbee
from tasks.common import Task
from tasks.evaluation import evaluate
from tasks.registry import CHATCORE, chatcore
from tests.golden import task_data
from tests.golden.fixtures import TableModel, build_model, inputs, tokenizer_512
from tests.test_chat_sft import run


@pytest.fixture
def tuned(finished_run, base_dir):
    """A base directory with a chat model: the base model's own weights under that name; toy tasks and words."""
    shutil.copytree(finished_run, base_dir, dirs_exist_ok=True)
    shutil.copytree(base_dir / "base_checkpoints", base_dir / "chatsft_checkpoints")
    task_data.place(base_dir)
    spellingbee._all_words.cache_clear()
    return base_dir


def scores(out: str) -> dict:
    return {line.split(" accuracy: ")[0]: float(line.split(" accuracy: ")[1].rstrip("%")) for line in out.splitlines() if " accuracy: " in line}


def test_all_of_chatcore(tuned, capsys):
    assert chat_eval.main(["-i", "sft", "-m", "2", "-x", "3", "--device-type=cpu"]) == 0
    out = capsys.readouterr().out
    got = scores(out)
    assert list(got) == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"]
    expected = sum((accuracy / 100 - b) / (1 - b) for accuracy, b in zip(got.values(), (0.25, 0.25, 0.25, 0, 0), strict=True)) / 5
    assert float(out.split("ChatCORE metric: ")[1].split()[0]) == pytest.approx(expected, abs=1e-4)
    report = (tuned / "report" / "chat-evaluation-sft.md").read_text()
    assert "- ChatCORE metric: " in report and "- MMLU: " in report


def test_chosen_tasks(tuned, capsys):
    assert chat_eval.main(["-i", "sft", "-a", "MMLU|SpellingBee", "-m", "2", "-x", "2", "-n", "2", "-t", "1", "--device-type=cpu"]) == 0
    out = capsys.readouterr().out
    assert list(scores(out)) == ["MMLU", "SpellingBee"] and "ChatCORE" not in out


@pytest.mark.slow
def test_ranks_share_the_problems(tuned, capsys):
    assert chat_eval.main(["-i", "base", "-a", "MMLU|ARC-Easy", "-b", "2", "--device-type=cpu"]) == 0
    alone = scores(capsys.readouterr().out)
    assert scores(run(tuned, "-i", "base", "-a", "MMLU|ARC-Easy", "-b", "2", "--device-type=cpu", ranks=2, script="chat_eval")) == alone


class Numbers(Task):
    """Which of several answers is right depends on the number of the problem."""
    eval_type = "generative"

    def __init__(self, letters=None):
        super().__init__()
        self.letters = letters
        if letters:
            self.eval_type = "categorical"

    def num_examples(self):
        return 7

    def get_example(self, index):
        messages = [{"role": "user", "content": "x" * (index + 1)}, {"role": "assistant", "content": "B" if self.letters else "yes"}]
        return {"messages": messages, "letters": self.letters, "number": index}

    def evaluate(self, problem, completion):
        return completion == (problem["messages"][-1]["content"] if self.letters else str(problem["number"]))


class Counting:
    """Sample j of the n-th problem answers n + j."""

    def __init__(self):
        self.calls = -1

    def generate_batch(self, tokens, num_samples, **kwargs):
        self.calls += 1
        return [tokens + tokenizer_512().encode(str(self.calls + j - 1)) for j in range(num_samples)], None


@pytest.mark.parametrize("num_samples, expected", [(1, 0.0), (2, 1.0), (3, 1.0)])
def test_one_right_sample_suffices(num_samples, expected):
    model = TableModel(inputs.table(0, 512, [], 0))
    assert evaluate(Numbers(), model, tokenizer_512(), Counting(), num_samples=num_samples, temperature=1.0) == expected


@pytest.mark.parametrize("batch_size", [1, 3, 10])
@pytest.mark.parametrize("favoured, expected", [("B", 1.0), ("A", 0.0)])
def test_only_the_letters_compete(batch_size, favoured, expected):
    """Whatever token is likeliest; and rows of different lengths do not disturb each other."""
    tokenizer = tokenizer_512()
    table = inputs.table(0, 512, [], 0)
    table[:, 100] = 50
    table[tokenizer.encode_special("<|assistant_start|>"), tokenizer.encode(favoured)[0]] = 40
    table[tokenizer.get_bos_token_id(), tokenizer.encode("A")[0]] = 45  # at the padding
    assert evaluate(Numbers(["A", "B"]), TableModel(table), tokenizer, None, batch_size=batch_size) == expected


class Prompts(Task):
    """Prompts of several lengths; notes the answers."""
    eval_type = "generative"

    def __init__(self):
        super().__init__()
        self.answers: dict[int, str] = {}

    def num_examples(self):
        return 11

    def get_example(self, index):
        text = "".join(random.Random(index).choices("abcdefgh ", k=1 + 7 * index % 30))
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ""}], "number": index}

    def evaluate(self, problem, completion):
        self.answers[problem["number"]] = completion
        return problem["number"] % 3 == 0


SMALL = dict(sequence_len=24, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")  # with 240 positions


@pytest.mark.parametrize("task", [Prompts(), Numbers(["A", "B"])], ids=["generative", "categorical"])
def test_prompts_that_the_model_has_no_positions_for_lose_their_beginning(task, monkeypatch, capsys):
    model, tokenizer = build_model(SMALL, 3), tokenizer_512()
    render = type(tokenizer).render_for_completion
    monkeypatch.setattr(type(tokenizer), "render_for_completion", lambda self, problem: [ids := render(self, problem), ids[:1] + ids[1:2] * 300 + ids[1:]][1])
    assert 0 <= evaluate(task, model, tokenizer, Engine(model, tokenizer), batch_size=4, max_new_tokens=5, max_problems=3) <= 1
    assert "their beginnings are left out" in capsys.readouterr().out
    if task.eval_type == "generative":
        with pytest.raises(UsageError, match="do not fit into the 240 positions"):
            evaluate(task, model, tokenizer, Engine(model, tokenizer), max_new_tokens=240)


def test_full_memory_while_problems_are_answered_is_known_as_such(monkeypatch):
    model, tokenizer = build_model(SMALL, 3), tokenizer_512()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(RuntimeError, match="could not be answered") as raised:
        evaluate(Prompts(), model, tokenizer, Engine(model, tokenizer), batch_size=4, max_new_tokens=5)
    assert is_out_of_memory(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_problems_that_share_steps_get_the_answers_they_get_alone(batch_size):
    """Also beyond the model's context, and where the answers end at different lengths."""
    model, tokenizer, task = build_model(dict(sequence_len=24, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"), 3), tokenizer_512(), Prompts()
    engine = Engine(model, tokenizer)
    assert evaluate(task, model, tokenizer, engine, batch_size=batch_size, max_new_tokens=40) == 4 / 11
    assert len(set(task.answers.values())) > 5
    for index, answer in task.answers.items():
        prompt = tokenizer.render_for_completion(task[index])
        (alone,), _ = engine.generate_batch(prompt, max_tokens=40, temperature=0.0)
        assert answer == tokenizer.decode(alone[len(prompt):])


def test_chatcore_of_guessing_is_zero():
    assert chatcore(CHATCORE) == 0
    assert chatcore(dict.fromkeys(CHATCORE, 1.0)) == 1


@pytest.mark.parametrize("flags, message", [
    (["-a", "MMLU|Chess"], "unknown task 'Chess'"), ([], "-i/--source"), (["-i", "sft", "-x", "0"], "not a whole number above 0"),
])
def test_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        chat_eval.main(flags if "-i" in flags or not flags else ["-i", "sft", *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_missing_model_or_data(base_dir, capsys, monkeypatch):
    task_data.place(base_dir)
    assert chat_eval.main(["-i", "sft", "-a", "MMLU", "--device-type=cpu"]) == 2
    assert "no model in" in capsys.readouterr().err

    def fail(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr("datasets.load_dataset", fail)
    shutil.rmtree(base_dir / "task_data")
    assert chat_eval.main(["-i", "sft", "-a", "MMLU", "--device-type=cpu"]) == 2
    assert "task_data/cais--mmlu/all/test" in capsys.readouterr().err


def test_a_finished_answer_is_judged_without_the_rest(tuned):
    """The engine's answers end before the terminal token; what the tool was asked and answered is part of the text."""
    tokenizer = tokenizer_512()
    task = spellingbee.SpellingBee(4, "train")
    problem = task[0]
    ids, _ = tokenizer.render_conversation(problem)
    prompt = tokenizer.render_for_completion(problem)

    class Perfect:
        def generate_batch(self, tokens, **kwargs):
            assert tokens == prompt
            return [ids[:-1]], None
    task.stop = 1
    model = TableModel(torch.zeros(512, 512).numpy())
    assert evaluate(task, model, tokenizer, Perfect(), temperature=1.0) == 1.0
