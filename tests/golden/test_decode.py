"""The model with a key/value cache, the engine, the plain decoder and the sampler against nanochat's."""
from contextlib import contextmanager

import pytest
import torch

from nanochat.engine import Engine, KVCache, sample_next_token
from tests.golden import inputs
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import arrays, batch, build_model, load, tensor

FIXTURE = load("decode")
GENERATE = FIXTURE["generate"]
CACHED = pytest.mark.parametrize("case", FIXTURE["kv_cache"], ids=lambda case: case["name"])
close = {"rtol": 0, "atol": 1e-4}


def cache_for(model, batch_size: int, seq_len: int) -> KVCache:
    config = model.config
    return KVCache(batch_size=batch_size, num_heads=config.n_kv_head, seq_len=seq_len, head_dim=config.n_embd // config.n_head,
                   num_layers=config.n_layer, device="cpu", dtype=torch.float32)


@contextmanager
def inverse_cdf(seed: int):
    """In place of torch.multinomial: draws that do not depend on the version of torch."""
    pick = inputs.inverse_cdf_picker(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda probs, num_samples=1, **_: torch.from_numpy(pick(probs.double().numpy())))
        yield


# -----------------------------------------------------------------------------
# The model with a cache


@pytest.fixture(scope="module")
def golden():
    return arrays("decode")


@CACHED
@torch.no_grad()
def test_decoding_after_a_prompt(case, golden):
    model, prompt, steps = build_model(case["config"], case["seed"]), case["prompt"], case["steps"]
    ids, _ = batch(case["batch_seed"], case["B"], prompt + steps, case["config"]["vocab_size"])
    cache = cache_for(model, case["B"], prompt + steps)
    assert list(cache.k_cache.shape) == case["cache_shape"] and str(cache.cache_seqlens.dtype) == f"torch.{case['seqlens_dtype']}"
    positions, logits = [cache.get_pos()], []
    for begin, end in [(0, prompt)] + [(t, t + 1) for t in range(prompt, prompt + steps)]:
        logits.append(model(ids[:, begin:end], kv_cache=cache)[:, -1])
        positions.append(cache.get_pos())
    assert positions == case["cache_positions"]
    decoded = torch.stack(logits, dim=1)
    torch.testing.assert_close(decoded, tensor(golden[f"{case['name']}/decode_logits"]), **close)
    torch.testing.assert_close(decoded, model(ids)[:, prompt - 1:], **close)
    for name, value in (("prev_embedding_after", cache.prev_embedding), ("k_cache_last_layer_tail", cache.k_cache[-1][:, -3:]),
                        ("v_cache_last_layer_tail", cache.v_cache[-1][:, -3:])):
        torch.testing.assert_close(value, tensor(golden[f"{case['name']}/{name}"]), **close)


@CACHED
@torch.no_grad()
def test_one_by_one_from_an_empty_cache(case, golden):
    model = build_model(case["config"], case["seed"])
    ids, _ = batch(case["batch_seed"], case["B"], case["prompt"] + case["steps"], case["config"]["vocab_size"])
    cache = cache_for(model, case["B"], 6)
    logits = torch.stack([model(ids[:, t:t + 1], kv_cache=cache)[:, -1] for t in range(6)], dim=1)
    torch.testing.assert_close(logits, tensor(golden[f"{case['name']}/one_by_one_logits"]), **close)


@CACHED
@torch.no_grad()
def test_two_chunks_equal_the_full_pass(case):
    assert ("decode", "two_chunk_second") in EXCEPTIONS
    model, split = build_model(case["config"], case["seed"]), case["two_chunk_split"]
    ids, _ = batch(case["batch_seed"], case["B"], case["prompt"] + case["steps"], case["config"]["vocab_size"])
    cache = cache_for(model, case["B"], ids.size(1))
    chunks = [model(ids[:, :split], kv_cache=cache), model(ids[:, split:], kv_cache=cache)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(ids), **close)


@CACHED
@torch.no_grad()
def test_one_prompt_continued_by_three_rows(case, golden):
    model, prompt = build_model(case["config"], case["seed"]), case["prompt"]
    ids, _ = batch(case["batch_seed"], case["B"], prompt + case["steps"], case["config"]["vocab_size"])
    narrow, wide = cache_for(model, 1, prompt), cache_for(model, case["widened_batch"], prompt + 2)
    model(ids[:1, :prompt], kv_cache=narrow)
    wide.prefill(narrow)
    logits = model(torch.tensor(case["widened_tokens"])[:, None], kv_cache=wide)[:, -1]
    torch.testing.assert_close(logits, tensor(golden[f"{case['name']}/widened_logits"]), **close)


# -----------------------------------------------------------------------------
# Generation


@pytest.fixture(scope="module")
def engine():
    return Engine(build_model(GENERATE["config"], GENERATE["seed"]), ByteTokenizer(GENERATE["special"]))


@pytest.mark.parametrize("case", GENERATE["greedy"])
def test_greedy(case, engine):
    prompt = GENERATE["prompts"][case["prompt"]]
    results, masks = engine.generate_batch(prompt, num_samples=case["num_samples"], max_tokens=case["max_tokens"], temperature=0.0)
    assert results == [prompt + case["result"]] * case["num_samples"]
    assert masks == [case["masks"]] * case["num_samples"]
    assert list(engine.model.generate(prompt, case["max_tokens"], temperature=0.0)) == case["naive"]


@pytest.mark.parametrize("case", GENERATE["sampled_inverse_cdf"])
def test_sampled(case, engine):
    prompt = GENERATE["prompts"][case["prompt"]]
    with inverse_cdf(case["picker_seed"]):
        results, masks = engine.generate_batch(prompt, **case["kwargs"])
    assert [result[len(prompt):] for result in results] == case["results"]
    assert [mask[len(prompt):] for mask in masks] == case["masks"]


@pytest.mark.parametrize("case", GENERATE["sampled_native"])
def test_sampled_with_the_generator_of_torch(case, engine):
    prompt = GENERATE["prompts"][case["prompt"]]
    results, masks = engine.generate_batch(prompt, **case["kwargs"])
    assert [result[len(prompt):] for result in results] == case["results"]
    assert [mask[len(prompt):] for mask in masks] == case["masks"]


@pytest.mark.parametrize("case", GENERATE["naive"])
def test_plain_decoding(case, engine):
    prompt = GENERATE["prompts"][case["prompt"]]
    arguments = {name: case[name] for name in ("max_tokens", "temperature", "top_k", "seed")}
    assert list(engine.model.generate(prompt, **arguments)) == case["native"]
    with inverse_cdf(case["seed"]):
        assert list(engine.model.generate(prompt, **arguments)) == case["inverse_cdf"]


@pytest.mark.parametrize("case", GENERATE["sampler"]["draws"], ids=lambda case: f"t{case['temperature']}-k{case['top_k']}")
def test_sampler(case):
    sampler = GENERATE["sampler"]
    logits = tensor(inputs.normals(sampler["logits_seed"], [sampler["logits_shape"]], [sampler["logits_scale"]])[0])

    def draws(rng):
        return [sample_next_token(logits, rng, case["temperature"], case["top_k"]) for _ in range(6)]

    rng = torch.Generator().manual_seed(case["native_generator_seed"])
    native = draws(rng)
    assert list(native[0].shape) == case["out_shape"]
    assert [draw[:, 0].tolist() for draw in native] == case["native"]
    with inverse_cdf(case["inverse_cdf_seed"]):
        assert [draw[:, 0].tolist() for draw in draws(None)] == case["inverse_cdf"]


# -----------------------------------------------------------------------------
# Misuse


def small_cache(batch_size=1, seq_len=4, num_heads=2, filled=0) -> KVCache:
    cache = KVCache(batch_size, num_heads, seq_len, head_dim=8, num_layers=1, device="cpu", dtype=torch.float32)
    cache.advance(filled)
    return cache


def misuses(engine) -> dict:
    def into_good():
        cache = small_cache(batch_size=3, seq_len=6)
        cache.prefill(small_cache(filled=3))
        assert cache.get_pos() == FIXTURE["refusals"]["position_after_good_prefill"]

    return {
        "prefill_into_used": lambda: small_cache(filled=1).prefill(small_cache(filled=3)),
        "prefill_into_smaller": lambda: small_cache(seq_len=2).prefill(small_cache(filled=3)),
        "prefill_other_shape": lambda: small_cache(num_heads=1).prefill(small_cache(filled=3)),
        "prefill_good": into_good,
        "generate_empty": lambda: list(engine.generate([], max_tokens=2)),
        "generate_tensor": lambda: list(engine.generate(torch.tensor([1, 2]), max_tokens=2)),
        "generate_floats": lambda: list(engine.generate([1.0, 2.0], max_tokens=2)),
        "one_token_prompt": lambda: list(engine.generate([5], max_tokens=2)),
        "naive_one_token_prompt": lambda: list(engine.model.generate([5], 2)),
        "naive_tensor": lambda: list(engine.model.generate(torch.tensor([1, 2]), 2)),
        "beyond_capacity": lambda: engine.model(torch.zeros(1, 5, dtype=torch.long), kv_cache=cache_for(engine.model, 1, 4)),
    }


@pytest.mark.parametrize("name", [name for name in FIXTURE["refusals"] if name != "position_after_good_prefill"])
def test_refusals(name, engine):
    expected = "ValueError" if ("decode", name) in EXCEPTIONS else FIXTURE["refusals"][name]
    try:
        misuses(engine)[name]()
        raised = None
    except Exception as error:
        raised = type(error).__name__
    assert raised == expected
