"""The model written down a second time (nanochat/export/nanochat_reference.py) against the model itself: each is the other's oracle."""
from types import SimpleNamespace

import pytest
import torch

from nanochat.export.hf import reference_config
from nanochat.export.nanochat_reference import LanguageModel, ListCache, place, visible
from nanochat.growth.target import grown_config, layered_config
from tests import growing
from tests.golden.fixtures import arrays, batch, build_model, load

KINDS = {"stock": growing.STOCK, "mixed": growing.mixed(), "ngpt": growing.mixed("ngpt"), "masked": growing.mixed(causal=False),
         "masked-ngpt": growing.mixed("ngpt", causal=False), "grown": grown_config(growing.STOCK, n_layer=5, n_embd=48),
         "gelu": growing.uniform("prenorm", activation="gelu"), "looped": growing.mixed(loops=3), "looped-ngpt": growing.mixed("ngpt", loops=2)}


def pair(kind: str):
    """(model, the same by the reference)."""
    model = growing.random_model(KINDS[kind]).eval()
    return model, twin(model)


def twin(model) -> LanguageModel:
    reference = LanguageModel(SimpleNamespace(**reference_config(model.config, model.transformer.wte.weight.size(0))))
    reference.load_state_dict({place(name): value for name, value in model.state_dict().items()}, strict=True)
    return reference.eval()


@pytest.mark.parametrize("case", load("gpt_forward")["cases"], ids=lambda case: case["name"])
def test_the_golden_logits(case):
    """Neither our model nor its author stands between the reference and nanochat's numbers."""
    reference = twin(build_model(case["config"], case["seed"], case["pad_vocab_size_to"]))
    idx, _ = batch(case["batch_seed"], case["B"], case["T"], case["config"]["vocab_size"])
    with torch.no_grad():
        logits = reference(idx)[:, case["logits_positions"]]
    torch.testing.assert_close(logits, torch.from_numpy(arrays("gpt_forward")[f"{case['name']}/logits"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equal_logits(kind):
    """In float64 there is no rounding to hide behind; in float32 there is what a few layers make of it."""
    model, reference = pair(kind)
    assert growing.difference(model, reference) <= 5e-5
    with growing.float64():
        model, reference = pair(kind)
        assert growing.difference(model, reference) <= 1e-12


@pytest.mark.parametrize("kind", [kind for kind, config in KINDS.items() if config.causal])
@torch.no_grad()
def test_pieces_behind_a_cache_are_the_whole(kind):
    _, reference = pair(kind)
    tokens, cache = growing.tokens(), ListCache()
    pieces = [reference(tokens[:, a:b], cache=cache) for a, b in ((0, 9), (9, 15), *((i, i + 1) for i in range(15, 24)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), reference(tokens), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing(kind):
    """On the left and on the right, whatever token it is."""
    _, reference = pair(kind)
    tokens = growing.tokens()
    padding = torch.full((2, 4), 3)
    for left in (True, False):
        padded = torch.cat((padding, tokens) if left else (tokens, padding), dim=1)
        mask = torch.ones_like(padded)
        mask[:, slice(0, 4) if left else slice(-4, None)] = 0
        logits = reference(padded, mask)
        assert not logits.isnan().any()
        torch.testing.assert_close(logits[:, 4:] if left else logits[:, :-4], reference(tokens), rtol=0, atol=5e-5)


def test_a_window_is_a_band():
    assert visible(3, 5, 1, True, "cpu").int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert visible(3, 3, 1, False, "cpu").int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert visible(2, 3, -1, True, "cpu").int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_what_looks_both_ways_refuses_a_cache():
    _, reference = pair("masked")
    with pytest.raises(ValueError, match="both ways"):
        reference(growing.tokens(), cache=ListCache())


def test_the_layered_configuration_says_it_all():
    config = reference_config(growing.STOCK, 128)
    assert config["padded_vocab_size"] == 128 and len(config["layers"]) == 3 and config["backout_layer"] == layered_config(growing.STOCK).backout_layer
