"""The engine's calculator handling, token by token, with a scripted model."""
from types import SimpleNamespace

import pytest
import torch

from nanochat.engine import Engine
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import load

FIXTURE = load("tool_machine")


class ScriptedModel:
    """Call 0 favours `prefill_choice` everywhere, call n the n-th of each row's `decode_choices`."""

    def __init__(self, case):
        self.config = SimpleNamespace(**FIXTURE["mock_config"])
        self.case, self.fed_back, self.calls = case, [], 0

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache):
        kv_cache.advance(ids.size(1))
        if self.calls == 0:
            choices = [self.case["prefill_choice"]] * ids.size(0)
        else:
            self.fed_back.append(ids[:, 0].tolist())
            choices = [row[self.calls - 1] if self.calls <= len(row) else self.case["filler"] for row in self.case["decode_choices"]]
        self.calls += 1
        logits = torch.zeros(ids.size(0), ids.size(1), FIXTURE["vocab"])
        logits[torch.arange(ids.size(0)), -1, choices] = FIXTURE["favoured_logit"]
        return logits


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda case: case["name"])
def test_stream_and_batch(case):
    arguments = dict(num_samples=len(case["decode_choices"]), max_tokens=case["max_tokens"], temperature=0.0)
    tokenizer = ByteTokenizer(FIXTURE["special"])
    model = ScriptedModel(case)
    stream = list(Engine(model, tokenizer).generate(FIXTURE["prompt"], **arguments))
    assert [tokens for tokens, _ in stream] == case["stream_tokens"]
    assert [masks for _, masks in stream] == case["stream_masks"]
    assert model.fed_back == case["fed_back"]
    results, masks = Engine(ScriptedModel(case), tokenizer).generate_batch(FIXTURE["prompt"], **arguments)
    assert results == case["batch_results"]
    assert masks == case["batch_masks"]
