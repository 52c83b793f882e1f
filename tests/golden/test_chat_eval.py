"""Accuracies of nanochat's chat evaluation on toy tasks."""
import pytest
import torch

from tasks import evaluation as chat_eval
from tasks.mmlu import MMLU
from tests.golden import task_data
from tests.golden.fixtures import build_model, load, tokenizer_512

GOLDEN = load("chat_eval")


@pytest.fixture(autouse=True)
def data(base_dir):
    task_data.place(base_dir)


@pytest.fixture(scope="module")
def model():
    return build_model(GOLDEN["config"], GOLDEN["seed"])


@pytest.mark.parametrize("case", GOLDEN["categorical"], ids=lambda case: f"{case['task']}-{case['arguments']}")
def test_categorical(model, case):
    accuracy = chat_eval.run_chat_eval(case["task"], model, tokenizer_512(), None, **case["arguments"])
    assert accuracy == pytest.approx(case["accuracy"], abs=1e-9)


def test_letters_are_compared_at_the_end_of_the_prompt(model, monkeypatch):
    tokenizer, task, chosen = tokenizer_512(), MMLU("all", "test"), []
    monkeypatch.setattr(task, "evaluate", lambda problem, letter: chosen.append(letter) or True)
    chat_eval.run_categorical_eval(task, tokenizer, model, batch_size=4)
    for problem, expected, choice in zip(task, GOLDEN["mmlu_predictions"], chosen, strict=True):
        prompt = tokenizer.render_for_completion(problem)
        logits = model(torch.tensor([prompt]))[0, -1]
        assert (len(prompt), choice) == (expected["prompt_ids"], expected["choice"])
        assert [logits[tokenizer.encode(letter)[0]].item() for letter in "ABCD"] == pytest.approx(expected["letter_logits"], abs=1e-4)


class ScriptedEngine:
    """Call n, from 1, answers cycle[(n + j) % 3] in sample j."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def generate_batch(self, tokens, num_samples=1, **kwargs):
        self.calls.append({"prompt": len(tokens), "num_samples": num_samples, **kwargs})
        return [tokens + self.tokenizer.encode(GOLDEN["cycle"][(len(self.calls) + j) % 3]) for j in range(num_samples)], None


@pytest.mark.parametrize("case", GOLDEN["generative"], ids=lambda case: f"{case['num_samples']}-{case['max_problems']}")
def test_generative(model, case):
    tokenizer = tokenizer_512()
    engine = ScriptedEngine(tokenizer)
    accuracy = chat_eval.run_chat_eval("GSM8K", model, tokenizer, engine, num_samples=case["num_samples"], max_new_tokens=9, temperature=0.5, top_k=11,
                                       max_problems=case["max_problems"])
    assert accuracy == pytest.approx(case["accuracy"], abs=1e-9)
    assert engine.calls == case["calls"]
