"""Layers that are run several times: the model in which each of them stands several times, with fewer weights."""
import re
import shutil
from dataclasses import replace

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.engine import Engine
from nanochat.growth import grow, grown_config
from nanochat.layered_gpt import build_gpt
from tests import tiny
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import load
from tests.growing import difference, float64, loss_and_gradients, mixed, random_model, tokens, uniform

BLOCKS = ("prenorm", "ngpt")
LAYER = re.compile(r"(transformer\.h|value_embeds)\.(\d+)\.")


def copies(name: str, loops: int) -> list[str]:
    """The names that a parameter has in the model in which each layer stands `loops` times."""
    if (layer := LAYER.match(name)) is None:
        return [name]
    return [f"{layer[1]}.{int(layer[2]) * loops + use}.{name[layer.end():]}" for use in range(loops)]


def unrolled(model):
    """The same function, written out."""
    config, loops = model.config, model.config.loops
    twin = build_gpt(replace(config, loops=1, n_layer=loops * config.n_layer, layers=tuple(layer for layer in config.layers for _ in range(loops)),
                             backout_layer=config.backout_layer * loops + loops - 1))
    twin.init_buffers()
    state = {copy: value for name, value in model.state_dict().items() for copy in copies(name, loops)}
    state |= {name: state[name].repeat_interleave(loops) for name in ("resid_lambdas", "x0_lambdas")}
    twin.load_state_dict(state, strict=True)
    return twin


@pytest.mark.parametrize("block", BLOCKS)
def test_logits_gradients_and_costs_are_those_of_the_model_written_out(block):
    """Counts of FLOPs and of the cache too; a weight's gradient is the sum over its uses."""
    with float64():
        model = random_model(mixed(block, loops=3))
        twin = unrolled(model)
        assert difference(model, twin) <= 1e-12
        assert loss_and_gradients(model) == pytest.approx(loss_and_gradients(twin), abs=1e-12)
        theirs = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            if name.endswith("_lambdas"):
                expected = theirs[name].grad.view(-1, 3).sum(dim=1)
            else:
                expected = sum(theirs[copy].grad for copy in copies(name, 3))
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-12, msg=name)
    for cost in (lambda m: m.estimate_flops(), lambda m: m.estimate_decode_flops(20), lambda m: m.estimate_prefill_flops(20), lambda m: m.kv_read_bytes(20)):
        assert cost(model) == cost(twin)
    once = random_model(mixed(block))
    assert model.num_scaling_params() == once.num_scaling_params() and model.estimate_flops() > 2 * once.estimate_flops()


@pytest.mark.parametrize("config", [mixed(loops=2), mixed("ngpt", loops=3), uniform("prenorm", loops=3)], ids=["mixed", "ngpt", "few calls"])
def test_each_use_of_a_layer_has_its_own_keys_and_values(config):
    """Behind a cache, by prompts, pieces and single tokens, and as the engine decodes."""
    model = random_model(config).eval()
    text = tokens(1)[:1]
    with torch.no_grad():
        whole = model(text)
        greedy = list(model.generate(text[0, :8].tolist(), 8, temperature=0))
        model.cast_for_inference()
        assert (model.decode_step is not None) == (config.layers[0].block == "prenorm" and config.layers[0] == config.layers[-1])
        engine = Engine(model, ByteTokenizer(load("decode")["generate"]["special"]))
        cache = engine._new_cache(1, 24)
        cache.last_logits_only = False
        pieces = [model(text[:, a:b], kv_cache=cache) for a, b in ((0, 7), (7, 12), *((i, i + 1) for i in range(12, 24)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=5e-5)
    assert [column[0] for column, _ in engine.generate(text[0, :8].tolist(), max_tokens=8, temperature=0)] == greedy


@pytest.mark.parametrize("depth_mode", ["identity", "append"])
@pytest.mark.parametrize("block", BLOCKS)
def test_growth_is_lossless(block, depth_mode):
    """Wider and deeper at once: what is new passes the stream on in each of its uses, and wakes up."""
    config = mixed(block, loops=3)
    with float64():
        model = random_model(config)
        optimizer = model.setup_optimizer()
        loss_and_gradients(model)
        optimizer.step()
        grown, grown_optimizer = grow(model, grown_config(config, 6, 56, depth_mode=depth_mode), optimizer, depth_mode=depth_mode, theta=20.0, spread=0.5, noise=0.5)
        assert grown.config.loops == 3 and difference(model, grown) <= 1e-10
        loss_and_gradients(grown)
        assert all(p.grad is not None for p in grown.parameters())
        grown_optimizer.step()
        assert difference(model, grown) > 1e-3


def test_loops_stay_as_they_are_when_a_model_grows():
    with pytest.raises(checkpoints.UsageError, match="growth keeps loops"):
        grow(random_model(uniform("prenorm")), uniform("prenorm", n_embd=64, loops=2))


@pytest.mark.slow
def test_train_grow_resume_and_load(base_dir, tmp_path_factory, monkeypatch, capsys):
    tiny.prepare(base_dir)
    flags = ["--loops=2", "--grow-path=2x64,3x96", "--grow-at=0.4", "--model-tag=looped"]
    assert tiny.train(*flags) == 0
    steps = checkpoints.list_steps(tiny.folder(base_dir, "looped"))
    other = tmp_path_factory.mktemp("resumed")
    shutil.copytree(base_dir, other, dirs_exist_ok=True)
    for path in tiny.folder(other, "looped").glob(f"*_{steps[-1]:06d}*"):
        path.unlink()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(other))
    assert tiny.train(*flags, "--resume") == 0
    assert tiny.losses(base_dir, "looped") == tiny.losses(other, "looped")
    model, _, _ = checkpoints.load_model("base", torch.device("cpu"), phase="eval", model_tag="looped")
    assert (model.config.loops, model.config.n_layer, model.config.n_embd) == (2, 3, 96)
    capsys.readouterr()
    assert tiny.train(*flags, "--loops=3", "--resume") == 2
    assert "loops 2 -> 3" in capsys.readouterr().err


def test_a_layered_run_from_before_there_were_loops_goes_on(base_dir):
    tiny.prepare(base_dir)
    assert tiny.train("--rank=8", "--num-iterations=2") == 0
    meta = checkpoints.load_meta(tiny.folder(base_dir), 2)
    del meta["model_config"]["loops"]
    checkpoints.save_meta(tiny.folder(base_dir), 2, meta)
    assert tiny.train("--rank=8", "--num-iterations=3", "--resume") == 0
    assert checkpoints.model_from_config(meta["model_config"]).config.loops == 1


def test_no_loop_is_no_model(capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny.train("--loops=0")
    assert "--loops" in capsys.readouterr().err
    with pytest.raises(ValueError, match="run 0 times"):
        uniform("prenorm", loops=0)
