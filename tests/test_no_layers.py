"""A model without layers is one like any other: it counts, decodes, trains, is saved and grows."""
from dataclasses import replace

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.growth import grow, grown_config
from nanochat.growth.target import continued_layers
from nanochat.layered_gpt import LayeredGPT
from scripts import base_train, grow_checkpoint
from tests import tiny
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import load
from tests.growing import STOCK, difference, float64, loss_and_gradients, random_model, tokens

NONE = replace(STOCK, n_layer=0)


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("depth, width", [(1, 32), (2, 32), (4, 48), (5, 64), (0, 48)])
@pytest.mark.parametrize("mode", ["identity", "append"])
def test_the_first_layers_change_nothing(layered, depth, width, mode):
    with float64():
        model = random_model(NONE)
        if layered:
            model = LayeredGPT.from_gpt(model)
            assert difference(random_model(NONE), model) == 0
        target = grown_config(model.config, depth, width)
        grown, _ = grow(model, target, depth_mode=mode)
        assert difference(model, grown) <= 1e-10 and grown.config.n_layer == depth
        again, _ = grow(grown, grown_config(grown.config, 6, 2 * width))
        assert difference(model, again) <= 1e-10


def test_they_are_those_of_a_stock_model():
    grown, _ = grow(random_model(NONE), replace(STOCK, n_layer=4, n_embd=64, n_head=8, n_kv_head=4))
    assert type(grown) is GPT
    stock = GPT(grown.config)
    assert grown.window_sizes == stock.window_sizes and grown.value_embeds.keys() == stock.value_embeds.keys() and grown.backout_layer == stock.backout_layer


def test_what_is_counted():
    model = GPT(NONE)
    head, gate = 128 * 32, 24
    assert model.estimate_flops() == 6 * (head + gate) and model.estimate_decode_flops(9) == 2 * (head + gate) and model.kv_bytes_per_token() == 0
    assert model.num_scaling_params()["total"] == 2 * head + gate + 2


@torch.no_grad()
@pytest.mark.parametrize("cast", [False, True])
def test_decoding_through_a_cache(cast):
    model = random_model(NONE)
    full = model(tokens()[:1])
    if cast:
        model.cast_for_inference()
        assert model.decode_step is not None
    cache = Engine(model, ByteTokenizer(load("decode")["generate"]["special"]))._new_cache(1, 24)
    cache.last_logits_only = False
    pieces = [model(tokens()[:1, a:b], kv_cache=cache) for a, b in ((0, 7), (7, 8), (8, 12), *((i, i + 1) for i in range(12, 24)))]
    assert cache.get_pos() == 24
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=2e-2 if cast else 1e-5)


def test_training_goes_on_with_the_moments():
    model = random_model(NONE)
    optimizer = model.setup_optimizer()
    before = loss_and_gradients(model)
    for _ in range(2):
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss_and_gradients(model)
    grown, grown_optimizer = grow(model, replace(STOCK, n_layer=2), optimizer)
    moments = dict(grown_optimizer.full_state_dict())
    assert torch.equal(moments["lm_head.weight"]["exp_avg"], dict(optimizer.full_state_dict())["lm_head.weight"]["exp_avg"])
    assert "resid_lambdas" not in moments
    for _ in range(3):
        grown.zero_grad(set_to_none=True)
        loss = loss_and_gradients(grown)
        grown_optimizer.step()
    assert loss < before and all(torch.isfinite(p).all() for p in grown.parameters())


@pytest.mark.parametrize("mode", ["stack", "interleave"])
def test_there_is_nothing_to_copy(mode):
    with pytest.raises(UsageError, match="no layer that"):
        continued_layers(0, 4, mode)


FLAGS = ["--grow-path=0x64,3x96", "--head-dim=32", "--eval-every=2", "--save-every=2", "--warmup-steps=0", "--grow-at=0.3"]


@pytest.mark.slow
def test_a_run_that_begins_without_layers(base):
    """It loses nothing at the growth, and resumed before or after it ends with the same bits."""
    assert tiny.train(*FLAGS, "--model-tag=whole") == 0
    folder = tiny.folder(base, "whole")
    expected, steps = tiny.losses(base, "whole"), checkpoints.list_steps(folder)
    (growth,) = checkpoints.load_meta(folder, steps[-1])["growth"]
    assert (growth["from"], growth["to"]) == ("0x64", "3x96") and growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-5)
    weights = torch.load(folder / f"model_{steps[-1]:06d}.pt", weights_only=True)
    after = next(step for step in steps if step > growth["step"])
    for start in (after, steps[0]):
        for step in steps:
            for path in folder.glob(f"*_{step:06d}*") if step > start else ():
                path.unlink()
        assert tiny.train(*FLAGS, "--model-tag=whole", "--resume") == 0
        assert tiny.losses(base, "whole") == expected
        assert tiny.identical(torch.load(folder / f"model_{steps[-1]:06d}.pt", weights_only=True), weights)


def test_its_checkpoint_grows(base, capsys):
    assert tiny.train("--grow-path=0x32,0x64", "--head-dim=32", "--grow-at=0.5", "--model-tag=bare") == 0
    assert grow_checkpoint.main(["--model-tag=bare", "--to=3x96", "--eval-tokens=512", "--device-type=cpu"]) == 0
    assert "0x64 -> 3x96" in capsys.readouterr().out
    model, _, _ = checkpoints.load_model("base", torch.device("cpu"), phase="eval", model_tag="bare-3x96")
    assert model.config.n_layer == 3


@pytest.mark.parametrize("flags, reason", [
    (["--rank=8"], "without layers"), (["--block=ngpt"], "without layers"), (["--grow-depth-mode=stack"], "no layer that"), (["--grow-path=0x0,3x96"], "is not a model")])
def test_what_it_cannot_be(base, capsys, flags, reason):
    assert base_train.main([*tiny.FLAGS, *FLAGS, *flags]) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
