"""What a token is drawn from, against distributions computed by hand."""
import math

import pytest
import torch

from nanochat.sampling import Sampler, Sampling, sample_next_token, score

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBS.log()


def drawn(logits: torch.Tensor = LOGITS, **settings) -> list[float]:
    """How often each token comes, in 20,000 draws."""
    tokens = sample_next_token(logits.expand(20_000, -1), torch.Generator().manual_seed(0), **settings)
    return (torch.bincount(tokens.flatten(), minlength=len(logits)) / 20_000).tolist()


@pytest.mark.parametrize("settings, left", [
    ({}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [1, 3]), ({"top_k": 9}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.6}, [1, 3]), ({"top_p": 0.66}, [1, 3, 4]), ({"top_p": 0}, [1]), ({"top_p": 1e-30}, [1]),
    ({"min_p": 0.45}, [1, 3, 4]), ({"min_p": 1}, [1]), ({"min_p": 1e-9}, [0, 1, 2, 3, 4]),
    ({"top_k": 3, "top_p": 0.7}, [1, 3]),  # of the three, not of all
    ({"top_k": 4, "min_p": 0.3, "top_p": 0.9}, [1, 3, 4]),
])
def test_what_is_left_keeps_its_proportions(settings, left):
    kept = torch.zeros(5)
    kept[left] = PROBS[left]
    assert drawn(**settings) == pytest.approx((kept / kept.sum()).tolist(), abs=0.015)
    assert all(share == 0 for token, share in enumerate(drawn(**settings)) if token not in left)


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-40, 1e-38, 1e-20, 1e-6, 1e-3])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_cold_temperature_is_greedy(temperature, settings):
    for logits in (LOGITS, 15 * LOGITS, LOGITS - 200):
        assert drawn(logits, temperature=temperature, **settings)[1] == 1


def sampler(prompt=(), **settings) -> Sampler:
    return Sampler(Sampling(temperature=0, **settings), list(prompt), 5, torch.device("cpu"))


def penalised(settings: dict, logits: list[float], prompt=(), answer=()) -> list[float]:
    """The logits that a draw begins with."""
    one, seen = sampler(prompt, **settings), []
    for token in answer:
        one.add(token)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.sampling.sample_next_token", lambda logits, *_: seen.append(logits))
        one.draw(torch.tensor([logits]))
    return seen[0][0].tolist()


def test_penalties_and_bias():
    logits = [2.0, -2.0, 1.0, 0.0, 3.0]
    assert penalised({"repetition_penalty": 2}, logits, prompt=[0, 1], answer=[4]) == [1, -4, 1, 0, 1.5]
    assert penalised({"frequency_penalty": 0.5}, logits, prompt=[0], answer=[4, 4, 1]) == [2, -2.5, 1, 0, 2], "the prompt does not count"
    assert penalised({"presence_penalty": 0.5}, logits, answer=[4, 4, 1]) == [2, -2.5, 1, 0, 2.5]
    assert penalised({"logit_bias": {1: 4, 4: -100}}, logits) == [2, 2, 1, 0, -97]
    assert penalised({"logit_bias": {1: 4}, "repetition_penalty": 2, "presence_penalty": 1}, logits, answer=[1]) == [2, 0, 1, 0, 3]


def test_a_sampler_without_settings_draws_as_the_engine_does():
    one, rng = Sampler(Sampling(temperature=0.7, top_k=4, seed=9), [], 5, torch.device("cpu")), torch.Generator().manual_seed(9)
    assert [one.draw(LOGITS[None]).item() for _ in range(20)] == [sample_next_token(LOGITS[None], rng, 0.7, 4).item() for _ in range(20)]


def test_scores():
    first, second = score(torch.stack([LOGITS, LOGITS]), [2, 1], top=2)
    assert (first.logprob, second.logprob) == pytest.approx((math.log(0.1), math.log(0.4)))
    assert [token for token, _ in first.top] == [1, 3] and [logprob for _, logprob in first.top] == pytest.approx([math.log(0.4), math.log(0.25)])
    assert score(LOGITS[None], [0], top=0)[0].top == []
