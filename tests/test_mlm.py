"""Masked language modelling: what is hidden, what is learned from both sides, and that such models grow, resume and refuse to chat; and that mixed with next tokens."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from nanochat import checkpoint_manager as checkpoints
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.mlm import MASK, Masking, pseudo_log_likelihoods
from nanochat.objectives import OBJECTIVES, ObjectiveSettings, causal_or_masked
from nanochat.run_log import read_run_log
from nanochat.tokenizer import get_tokenizer
from scripts import base_eval, chat_sft
from tests import growing, tiny
from tests.golden.fixtures import tokenizer_512

MLM = ("--objective=mlm",)
MIXED = ("--objective=mixed", "--device-batch-size=1")  # four passes a step


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


def test_what_is_hidden():
    """15 % are to be told; of these 80 % masked, 10 % any token, 10 % unchanged. Never what begins a document."""
    tokenizer = tokenizer_512()
    bos, mask = tokenizer.get_bos_token_id(), tokenizer.encode_special(MASK)
    torch.manual_seed(0)
    tokens = torch.randint(1, 256, (200, 500))
    tokens[:, ::50] = bos
    inputs, targets = Masking(tokenizer)(tokens)
    told = targets >= 0
    assert torch.equal(targets[told], tokens[told]) and torch.equal(inputs[~told], tokens[~told]) and not told[:, ::50].any()
    assert told.sum() / (tokens != bos).sum() == pytest.approx(0.15, abs=0.005)
    assert (inputs[told] == mask).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs[told] == tokens[told]).float().mean() == pytest.approx(0.1, abs=0.02)


def test_static_masks_belong_to_the_text():
    tokenizer = tokenizer_512()
    tokens = torch.randint(1, 256, (4, 100))
    static, dynamic = Masking(tokenizer, static=True), Masking(tokenizer)
    assert torch.equal(static(tokens)[1], static(tokens)[1]) and torch.equal(static(tokens)[1][2:], static(tokens[2:])[1])
    assert not torch.equal(dynamic(tokens)[1], dynamic(tokens)[1])
    before = torch.get_rng_state()
    static(tokens)
    assert torch.equal(torch.get_rng_state(), before), "a validation must not change the training's masks"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--masking=static",), ("--block=ngpt",), ("--rank=8",), ("--window-pattern=S",)], ids=str)
def test_it_learns_from_both_sides(base, flags):
    assert tiny.train(*MLM, "--num-iterations=60", "--eval-every=60", "--save-every=-1", *flags) == 0
    log = read_run_log(tiny.folder(base) / "log.jsonl")
    first, last = (record["val_bpb"] for record in log if record["kind"] == "eval")
    assert last < 0.97 * first
    model, tokenizer, _ = checkpoints.build_model(tiny.folder(base), 60, torch.device("cpu"), "train")
    ids = torch.tensor([tokenizer.encode("the cat sat on the mat")])
    changed = ids.clone()
    changed[0, -1] = tokenizer.encode("a")[0]
    assert not torch.equal(model(ids)[0, 0], model(changed)[0, 0]), "the first position sees the last"


@pytest.mark.slow
def test_a_resumed_run_hides_the_same_tokens(base):
    assert tiny.train(*MLM, "--model-tag=whole") == 0
    shutil.copytree(tiny.folder(base, "whole"), tiny.folder(base, "part"))
    (tiny.folder(base, "part") / "model_000008.pt").unlink()
    assert tiny.train(*MLM, "--model-tag=part", "--resume") == 0
    states = [torch.load(tiny.folder(base, tag) / "model_000008.pt", weights_only=True) for tag in ("whole", "part")]
    assert tiny.identical(*states)


@pytest.mark.parametrize("flags", [(), pytest.param(("--block=ngpt",), marks=pytest.mark.slow)], ids=str)
def test_growth_is_lossless_for_a_model_that_looks_both_ways(base, flags):
    assert tiny.train(*MLM, "--grow-path=1x64,3x96", "--head-dim=32", "--grow-at=0.5", *flags) == 0
    (grow,) = [record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "grow"]
    assert grow["loss_after"] == pytest.approx(grow["loss_before"], abs=1e-4)
    assert checkpoints.load_meta(tiny.folder(base), max(checkpoints.list_steps(tiny.folder(base))))["model_config"]["causal"] is False


def test_pseudo_log_likelihood_hides_one_token_at_a_time(base):
    assert tiny.train(*MLM) == 0
    model, tokenizer, _ = checkpoints.build_model(tiny.folder(base), 8, torch.device("cpu"), "train")
    bos, mask = tokenizer.get_bos_token_id(), tokenizer.encode_special(MASK)
    tokens = tokenizer.encode("some words", prepend=bos)
    expected = []
    for i in range(1, len(tokens)):
        hidden = [*tokens[:i], mask, *tokens[i + 1:]]
        expected.append(F.log_softmax(model(torch.tensor([hidden]))[0, i].double(), dim=-1)[tokens[i]].item())
    assert pseudo_log_likelihoods(model, tokens, mask, {bos}, rows_at_once=3) == pytest.approx(expected, abs=1e-4)


def test_evaluation_and_refusals(base, capsys):
    """Its bits per byte of next tokens would be a lie, since it sees them."""
    assert tiny.train(*MLM, "--sample-every=4") == 0
    assert "No samples and no CORE metric in this run" in capsys.readouterr().out
    assert base_eval.main(["--eval=pll:64", "--device-type=cpu"]) == 0
    perplexity = float(capsys.readouterr().out.split("val pseudo-perplexity: ")[1].split(",")[0])
    assert 1 < perplexity < 2 * get_tokenizer().get_vocab_size() and math.isfinite(perplexity)
    for flags in (["--eval=bpb", "--split-tokens=4096"], ["--eval=sample"]):
        assert base_eval.main([*flags, "--device-type=cpu"]) == 2
        assert "looks both ways" in capsys.readouterr().err
    assert chat_sft.main(["--mixture=spelling", "--num-iterations=2", "--device-type=cpu"]) == 2
    assert "looks both ways" in capsys.readouterr().err


def test_nothing_hidden_is_nothing_to_learn(base, capsys):
    assert tiny.train(*MLM, "--mask-rate=0") == 2
    assert "--mask-rate=0 hides nothing" in capsys.readouterr().err


def test_pseudo_likelihoods_are_for_masked_models(base, capsys):
    assert tiny.train() == 0
    assert base_eval.main(["--eval=pll", "--device-type=cpu"]) == 2
    assert "use bpb" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# Mixed with next tokens


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3, 0.9])
def test_passes_of_both_kinds_in_turn(share):
    """The kind follows from the number alone; masked ones tell a hidden token at the place before it, and nobody tells what is not in the row."""
    tokenizer = tokenizer_512()
    torch.manual_seed(0)
    text = torch.randint(1, 256, (10, 201))
    tokens, following = text[:, :-1], text[:, 1:]
    prepare = OBJECTIVES["mixed"].prepare(tokenizer, ObjectiveSettings(objective="mixed", causal_share=share))
    kinds = []
    for number in range(40):
        inputs, targets, both_ways = prepare(tokens, following, number)
        kinds.append(bool(both_ways[0]))
        assert both_ways.tolist() == [kinds[-1]] * 10
        if not kinds[-1]:
            assert torch.equal(inputs, tokens) and torch.equal(targets, following)
            continue
        told = targets >= 0
        assert torch.equal(targets[told], following[told]) and not told[:, -1].any() and 0.1 < told.float().mean() < 0.2
        assert (inputs[:, 1:][told[:, :-1]] == tokenizer.encode_special(MASK)).float().mean() > 0.6
    assert sum(kinds) == pytest.approx(40 * (1 - share), abs=1)
    assert all(abs(sum(kinds[i:i + 10]) - 10 * (1 - share)) <= 1 for i in range(30)), "evenly"


@pytest.mark.parametrize("config", [growing.STOCK, growing.mixed(), growing.mixed("ngpt")], ids=["stock", "mixed", "ngpt"])
@torch.no_grad()
def test_a_causal_model_that_looks_both_ways_is_the_masked_one(config):
    model = growing.random_model(config)
    text = growing.tokens()
    both = model(text, both_ways=True)
    assert (both - model(text)).abs().max() > 0.01
    if config is not growing.STOCK:
        masked = growing.random_model(growing.mixed(config.layers[0].block, causal=False))
        assert torch.equal(masked(text), both)
    targets = torch.where(text % 5 == 0, text, -1)
    batch = text, targets, torch.ones(len(text), dtype=torch.bool)
    assert causal_or_masked(model, *batch) == model(text, targets, loss_reduction="sum", both_ways=True) != model(text, targets, loss_reduction="sum")


@pytest.mark.slow
def test_mixed_training_learns_both_and_makes_a_stock_model(base):
    assert tiny.train(*MIXED, "--num-iterations=60", "--eval-every=60", "--save-every=-1", "--warmup-steps=30") == 0  # at full rates from the start rounding decides whether it learns
    first, last = (record["val_bpb"] for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "eval")
    assert last < 0.98 * first, "validation is of next tokens"
    model, tokenizer, _ = checkpoints.build_model(tiny.folder(base), 60, torch.device("cpu"), "train")
    assert type(model) is GPT
    assert len(Engine(model, tokenizer).generate_batch(tokenizer.encode("ka", prepend="<|bos|>"), max_tokens=4, temperature=0.0)[0][0]) > 2
    bos, mask = tokenizer.get_bos_token_id(), tokenizer.encode_special(MASK)
    text = tokenizer.encode("some words of a text", prepend=bos)
    told = pseudo_log_likelihoods(model, text, mask, {bos}, rows_at_once=3)
    expected = []
    for i in range(1, len(text)):
        hidden = torch.tensor([[*text[:i], mask, *text[i + 1:]]])
        expected.append(F.log_softmax(model(hidden, both_ways=True)[0, i - 1].double(), dim=-1)[text[i]].item())
    assert told == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_resumed_mixed_run_sees_the_same_kinds_and_masks(base):
    flags = (*MIXED, "--causal-share=0.6")  # which no step divides evenly
    assert tiny.train(*flags, "--model-tag=whole") == 0
    shutil.copytree(tiny.folder(base, "whole"), tiny.folder(base, "part"))
    (tiny.folder(base, "part") / "model_000008.pt").unlink()
    assert tiny.train(*flags, "--model-tag=part", "--resume") == 0
    states = [torch.load(tiny.folder(base, tag) / "model_000008.pt", weights_only=True) for tag in ("whole", "part")]
    assert tiny.identical(*states)
    assert tiny.losses(base, "whole") == tiny.losses(base, "part")


@pytest.mark.parametrize("flags, message", [
    (["--causal-share=1"], "--causal-share=1 mixes nothing; use --objective=next-token"), (["--causal-share=0"], "use --objective=mlm"), (["--mask-rate=0"], "hides nothing")])
def test_mixtures_of_one_kind(base, capsys, flags, message):
    assert tiny.train(*MIXED, *flags) == 2
    assert message in capsys.readouterr().err


def test_few_passes_are_pointed_out(base, capsys):
    assert tiny.train("--objective=mixed", "--num-iterations=1", "--eval-every=-1") == 0
    assert "Few passes make a step (2)" in capsys.readouterr().out
