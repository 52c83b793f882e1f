"""Decoding with a cache, the calculator and streamed text. Numbers against nanochat: tests/golden/test_decode.py and its neighbours."""
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dev import bench_decode
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.engine import Engine, KVCache, TextStream, eval_with_timeout, sample_next_token, use_calculator
from nanochat.engine import main as engine_main
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import build_model, tokenizer_512

SPECIAL = {name: 256 + i for i, name in enumerate(
    ["<|bos|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"])}
CONFIG = dict(sequence_len=32, vocab_size=262, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")


class UniformModel:
    """All tokens equally likely; counts its forward passes."""

    def __init__(self):
        self.config = SimpleNamespace(n_kv_head=1, n_head=1, n_embd=8, n_layer=1, sequence_len=64)
        self.passes = 0

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache=None):
        kv_cache.advance(ids.size(1))
        self.passes += 1
        return torch.zeros(*ids.shape, 262)


@pytest.fixture
def uniform():
    return Engine(UniformModel(), ByteTokenizer(SPECIAL))


@pytest.fixture(scope="module")
def engine():
    return Engine(build_model(CONFIG, seed=7), ByteTokenizer(SPECIAL))


# -----------------------------------------------------------------------------
# Calculator

numbers = st.one_of(st.integers(0, 10**6).map(str), st.floats(0, 1e4).map(lambda x: f"{x:.3f}"))
formulas = st.recursive(numbers, lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", " + ", " // "]), inner).map("".join),
    inner.map(lambda x: f"({x})"), inner.map(lambda x: f"-{x}"), inner.map(lambda x: f"+ {x}")), max_leaves=12)


@given(formulas)
def test_arithmetic_is_pythons(formula):
    try:
        expected = eval(formula)
    except ArithmeticError:
        expected = None
    answer = use_calculator(formula)
    assert type(answer) is type(expected) and repr(answer) == repr(expected)


@given(st.text("abR '\"._", max_size=20).filter(lambda text: "'" not in text and "__" not in text), st.text("abR.", max_size=2))
def test_counting_is_pythons(text, part):
    assert use_calculator(f"'{text}'.count('{part}')") == text.count(part)


@given(st.text(max_size=40))
def test_any_text_gets_an_answer_or_none(text):
    for answer in (use_calculator(text), use_calculator(f"'{text}'.count('a')"), eval_with_timeout(text)):
        assert answer is None or type(answer) in (int, float, str)


@pytest.mark.parametrize("hostile", [
    "9**9**9", "'a'*999999999", "[0]*999999999", "(1).__class__", "'a'.zfill(999999999)", "'{0.real}'.format(1)", "(lambda: 1)()", "print(1)",
    "x", "1 if 1 else 2", "[i for i in (1,)]", "f'{1}'", "b'a'.count(b'a')", "'a'.count(sub='a')", "True", "None", "...", "1j", "1\x00", "'a'+'b'",
    "'abc'.count('a', 1)", "(" * 400 + "1" + ")" * 400, "-" * 990 + "1", "1+" * 40_000 + "1", "9" * 5000])
def test_whatever_is_no_formula_is_refused(hostile):
    assert eval_with_timeout(hostile) is None


def test_a_long_product_has_all_its_digits():
    formula = "*".join(["9999999999"] * 90)
    assert eval_with_timeout(formula) == 9999999999**90


def test_the_case_of_a_string_can_be_folded_first():
    assert use_calculator("'Hello LOL'.lower().count('l')") == 4
    assert use_calculator("('a').upper().count(('A'))") == 1


def test_the_calculator_works_off_the_main_thread():
    answers = []
    thread = threading.Thread(target=lambda: answers.append((use_calculator("6*7"), use_calculator("1/0"))))
    thread.start()
    thread.join()
    assert answers == [(42, None)]


def test_no_warnings_reach_the_chat():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_calculator("1(2)") is None
        assert use_calculator("'a'(1).count('a')") is None


# -----------------------------------------------------------------------------
# Cache


def make_cache(batch_size=1, seq_len=8, num_layers=2) -> KVCache:
    return KVCache(batch_size=batch_size, num_heads=3, seq_len=seq_len, head_dim=4, num_layers=num_layers, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("use_fa3", [False, True])
def test_cache_position_is_where_the_attention_reads_it(monkeypatch, use_fa3):
    """On the CPU for the fallback, which needs its value and would otherwise wait for the device in every layer."""
    monkeypatch.setattr("nanochat.flash_attention.USE_FA3", use_fa3)
    cache = KVCache(batch_size=2, num_heads=1, seq_len=4, head_dim=8, num_layers=1, device="meta", dtype=torch.float32)
    cache.advance(3)
    assert cache.k_cache.device.type == "meta" and cache.get_pos() == 3
    assert cache.cache_seqlens.device.type == ("meta" if use_fa3 else "cpu")


def test_cache_starts_empty_advances_and_resets():
    cache = make_cache(batch_size=2)
    assert cache.k_cache.shape == cache.v_cache.shape == (2, 2, 8, 3, 4)
    assert cache.get_pos() == 0 and cache.prev_embedding is None
    cache.advance(3)
    cache.advance(1)
    assert cache.get_pos() == 4 and cache.cache_seqlens.tolist() == [4, 4]
    cache.prev_embedding = torch.ones(2, 1, 5)
    cache.reset()
    assert cache.get_pos() == 0 and cache.cache_seqlens.tolist() == [0, 0] and cache.prev_embedding is None


def test_layer_caches_are_views():
    cache = make_cache()
    keys, values = cache.get_layer_cache(1)
    keys[0, 2] = 1.0
    values[0, 3] = 2.0
    assert cache.k_cache[1, 0, 2].eq(1).all() and cache.v_cache[1, 0, 3].eq(2).all()
    assert not cache.k_cache[0].any()


def test_prefill_spreads_one_row_over_all():
    prompt, cache = make_cache(seq_len=3), make_cache(batch_size=4)
    prompt.k_cache.normal_()
    prompt.v_cache.normal_()
    prompt.prev_embedding = torch.randn(1, 1, 5)
    prompt.advance(2)
    cache.prefill(prompt)
    assert cache.get_pos() == 2 and cache.cache_seqlens.tolist() == [2] * 4
    for row in range(4):
        assert torch.equal(cache.k_cache[:, row, :2], prompt.k_cache[:, 0, :2])
        assert torch.equal(cache.v_cache[:, row, :2], prompt.v_cache[:, 0, :2])
        assert torch.equal(cache.prev_embedding[row], prompt.prev_embedding[0])
    assert not cache.k_cache[:, :, 2:].any()


def test_a_full_cache_says_so():
    cache = make_cache(seq_len=4)
    cache.advance(4)
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        cache.advance(1)
    assert cache.get_pos() == 4


# -----------------------------------------------------------------------------
# Sampling


@given(st.integers(1, 30), st.sampled_from([0.3, 1.0, 2.5]), st.integers(0, 1000))
def test_top_k_never_leaves_the_k_likeliest(k, temperature, seed):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 20, generator=rng)
    drawn = sample_next_token(logits, rng, temperature, k)
    likeliest = logits.topk(min(k, 20)).indices
    assert drawn.shape == (3, 1) and all(drawn[row] in likeliest[row] for row in range(3))


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = sample_next_token(logits.expand(20_000, -1), torch.Generator().manual_seed(0), temperature=2.0)
    frequencies = drawn.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(frequencies, (logits / 2).softmax(0), atol=0.015, rtol=0)


# -----------------------------------------------------------------------------
# Engine


def test_samples_differ_and_seeds_matter(uniform):
    prompt = [SPECIAL["<|bos|>"], 72, 105]
    firsts = next(uniform.generate(prompt, num_samples=16, max_tokens=1))[0]
    assert len(set(firsts)) > 8
    run = uniform.generate_batch(prompt, num_samples=2, max_tokens=8, seed=1)
    assert run == uniform.generate_batch(prompt, num_samples=2, max_tokens=8, seed=1)
    assert run != uniform.generate_batch(prompt, num_samples=2, max_tokens=8, seed=2)


def test_number_of_samples_and_tokens(uniform):
    columns = list(uniform.generate([256, 72], num_samples=5, max_tokens=7))
    assert len(columns) == 7 and all(len(tokens) == len(masks) == 5 for tokens, masks in columns)
    results, masks = uniform.generate_batch([256, 72], num_samples=3, max_tokens=0)
    assert results == [[256, 72]] * 3 and masks == [[0, 0]] * 3


def test_no_pass_is_run_that_nobody_reads(uniform):
    results, _ = uniform.generate_batch([256, 72], max_tokens=5, seed=3)
    assert len(results[0]) == 7 and uniform.model.passes == 5  # the prompt's pass gives the first token


def test_every_row_equals_a_single_sample(engine):
    prompt = [256, 5, 250, 30]
    results, _ = engine.generate_batch(prompt, num_samples=3, max_tokens=12, temperature=0)
    single, _ = engine.generate_batch(prompt, max_tokens=12, temperature=0)
    assert results == single * 3


def test_a_prompt_of_one_token(engine):
    whole, _ = engine.generate_batch([200], max_tokens=10, temperature=0)
    continued, _ = engine.generate_batch(whole[0][:4], max_tokens=7, temperature=0)
    assert whole == continued


def test_without_a_limit_the_context_is_filled(engine):
    columns = list(engine.generate([256, 1, 2], temperature=0))
    assert 3 + len(columns) == CONFIG["sequence_len"]
    assert list(engine.generate([5] * CONFIG["sequence_len"])) == []


def test_decoding_beyond_the_context_when_asked_to(engine):
    prompt = [5] * (CONFIG["sequence_len"] + 3)
    ours, _ = engine.generate_batch(prompt, max_tokens=6, temperature=0)
    assert ours[0][len(prompt):] == list(engine.model.generate(prompt, 6, temperature=0))


def test_misuse_is_refused_before_the_first_token(engine):
    with pytest.raises(ValueError, match="33 tokens, the model's context 32"):
        engine.generate([5] * 33)
    with pytest.raises(IndexError, match="empty"):
        engine.generate([])
    with pytest.raises(AssertionError, match="list of ints"):
        engine.generate("text")
    with pytest.raises(AssertionError, match="temperature"):
        engine.generate([5, 6], temperature=-1.0)


# -----------------------------------------------------------------------------
# Text


@given(st.text())
def test_streamed_text_is_the_text(text):
    stream = TextStream(ByteTokenizer(SPECIAL))
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) == text and stream.flush() == ""
    assert all(len(piece) <= 1 for piece in pieces)


@given(st.binary(max_size=30))
def test_any_bytes_stream_like_they_decode(data):
    stream = TextStream(ByteTokenizer(SPECIAL))
    assert "".join(map(stream.push, data)) + stream.flush() == data.decode("utf-8", errors="replace")


def test_an_unfinished_character_is_shown_at_the_end():
    stream = TextStream(ByteTokenizer(SPECIAL))
    assert [stream.push(byte) for byte in "é".encode()] == ["", "é"]
    assert stream.push(0xC3) == "" and stream.flush() == "\ufffd"
    assert stream.flush() == "" and stream.push(97) == "a"


# -----------------------------------------------------------------------------


def test_running_the_module_compares_with_plain_decoding(base_dir, capsys):
    tokenizer = tokenizer_512()
    tokenizer.save(base_dir / "tokenizer")
    config = {**CONFIG, "sequence_len": 64, "vocab_size": 512}
    save_checkpoint(base_dir / "base_checkpoints" / "d3", 10, build_model(config, seed=1).state_dict(), None, {"step": 10, "model_config": config})
    assert engine_main([]) == 0
    out = capsys.readouterr().out
    assert "naive" in out and "tokens/s" in out and "agrees with plain decoding on " in out


def test_running_the_module_without_a_model(base_dir, capsys):
    assert engine_main([]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_the_benchmark_compares_with_and_without_cache(capsys):
    assert bench_decode.main(["--depth=1", "--vocab=64", "--context=8", "--steps=2", "--batch-sizes=1,3", "--device-type=cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("batch")]
    assert [int(row[1]) for row in rows] == [1, 3] and all(float(speed) >= 0 for row in rows for speed in row[2:5])  # the fourth column is nan without transformers
