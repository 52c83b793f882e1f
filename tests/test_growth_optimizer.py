"""Transported moments are those of the large model trained along the small one's trajectory; shards, symmetry, frozen layers."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from nanochat.growth import grow, grown_config
from nanochat.optim_state import SavedState
from tests.growing import STOCK, float64, loss_and_gradients, mixed, random_model, uniform
from tests.ranks import on_ranks
from tests.tiny import identical

CLONES = dict(theta=45.0, spread=0.0, noise=0.0)


def step(model, optimizer, seed: int) -> float:
    loss = loss_and_gradients(model, seed)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return loss


def trained(config, steps: int = 3, **setup):
    model = random_model(config)
    optimizer = model.setup_optimizer(**setup)
    for seed in range(steps):
        step(model, optimizer, seed)
    return model, optimizer


def along_the_trajectory(config, target, steps: int = 3, smear: bool = True, **how):
    """(the state after growing, the state of the large model that was grown anew from the small one before each of its steps)."""
    model = random_model(config)
    optimizer = model.setup_optimizer()
    large, _ = grow(model, target, **how)
    large_optimizer = large.setup_optimizer()
    for seed in range(steps):
        if not smear:
            model.smear_lambda.data.zero_()
        now, _ = grow(model, target, **how)
        large.load_state_dict(now.state_dict())
        small_loss, loss = step(model, optimizer, seed), step(large, large_optimizer, seed)
        assert loss == pytest.approx(small_loss, abs=1e-10)
    grown, grown_optimizer = grow(model, target, optimizer, **how)
    return dict(grown_optimizer.full_state_dict()), dict(large_optimizer.full_state_dict())


def assert_equal_moments(transported, measured, keys):
    assert transported.keys() == measured.keys()
    compared = 0
    for name, state in measured.items():
        for key in keys:
            if key in state:
                torch.testing.assert_close(transported[name][key], state[key], rtol=1e-6, atol=1e-14, msg=f"{key} of {name}")
                compared += bool(state[key].any())
        assert transported[name].get("step") == state.get("step")
    assert compared > 15


# Exact without noise, where no gate reads a channel that has copies (uniform: no value embeddings, and a smear of zero)


@pytest.mark.parametrize("how", [pytest.param(CLONES, marks=pytest.mark.slow), dict(theta=20.0, spread=0.4, noise=0.0)], ids=["clones", "unequal"])  # clones are a special case
@pytest.mark.parametrize("config, width", [
    (uniform("prenorm"), 48), (uniform("ngpt"), 48), (uniform("prenorm", n_kv_head=2), 64), (uniform("prenorm", mlp_depth=2), 40),
    (uniform("ngpt", mlp_depth=2), 40), (uniform("ngpt", activation="swiglu"), 48), (uniform("prenorm", activation="gelu"), 48), (uniform("prenorm", attn_rank=6, mlp_rank=7), 48),
    (uniform("ngpt", attn_rank=6, mlp_rank=7, order="parallel"), 96),
], ids=["prenorm", "ngpt", "gqa", "deep", "deep-ngpt", "swiglu", "gelu", "low-rank", "low-rank-ngpt"])
def test_first_and_second_moments_are_exact(config, width, how):
    with float64():
        transported, measured = along_the_trajectory(config, grown_config(config, n_embd=width), smear=False, **how)
        assert_equal_moments(transported, measured, ("exp_avg", "exp_avg_sq", "momentum_buffer"))


def test_inserted_layers_leave_the_moments_of_all_others():
    with float64():
        transported, measured = along_the_trajectory(STOCK, grown_config(STOCK, 5))
        old = {name: state for name, state in measured.items() if not name.startswith(("transformer.h.1", "transformer.h.3", "value_embeds.1"))}
        old = {name: state for name, state in old.items() if "lambdas" not in name}
        assert_equal_moments({name: transported[name] for name in old}, old, ("exp_avg", "exp_avg_sq", "momentum_buffer"))
        assert not transported["transformer.h.1.mlp.c_fc.weight"]["momentum_buffer"].any()
        for name in ("resid_lambdas", "x0_lambdas"):
            torch.testing.assert_close(transported[name]["exp_avg"][::2], measured[name]["exp_avg"][::2])
            assert not transported[name]["exp_avg"][1::2].any()


@pytest.mark.parametrize("how", [CLONES, dict(theta=20.0, spread=0.4, noise=0.0)], ids=["clones", "unequal"])
def test_normuons_second_moments_are_exact_where_everything_doubles(how):
    """Up to a factor per matrix, which the update does not depend on."""
    config = uniform("prenorm")
    with float64():
        transported, measured = along_the_trajectory(config, grown_config(config, n_embd=64), smear=False, **how)
    for name, state in measured.items():
        if "second_momentum_buffer" in state:
            ours, theirs = transported[name]["second_momentum_buffer"], state["second_momentum_buffer"]
            torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), rtol=1e-4, atol=0, msg=name)


def test_reset_starts_anew_and_setup_is_passed_on():
    model, optimizer = trained(STOCK)
    target = replace(STOCK, n_embd=48, n_head=6, n_kv_head=3)
    _, fresh = grow(model, target, optimizer, optimizer_mode="reset", setup=dict(matrix_lr=0.123))
    assert not fresh.state and {group["initial_lr"] for group in fresh.param_groups if group["kind"] == "muon"} == {0.123}
    _, untrained = grow(model, target, model.setup_optimizer())
    assert not untrained.state


@pytest.mark.parametrize("config", [STOCK, mixed(), mixed("ngpt")], ids=["stock", "mixed", "ngpt"])
@pytest.mark.parametrize("matrix_optimizer", ["muon", "adamw"])
def test_training_goes_on_after_a_growth(config, matrix_optimizer):
    setup = dict(matrix_optimizer=matrix_optimizer)
    model, optimizer = trained(config, 3, **setup)
    for target in (grown_config(config, 5, 40), grown_config(grown_config(config, 5, 40), 6, 72)):
        before = float(loss_and_gradients(model, 99))
        model.zero_grad(set_to_none=True)
        model, optimizer = grow(model, target, optimizer, setup=setup)
        assert step(model, optimizer, 99) == pytest.approx(before, abs=1e-5)
        for seed in range(3):
            assert step(model, optimizer, seed) < 8
        assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
        roundtrip = model.setup_optimizer(**setup)
        roundtrip.load_state_dict(copy.deepcopy(optimizer.state_dict()))


# -----------------------------------------------------------------------------
# Symmetry


def twin_difference(model, before, old_hidden: int) -> float:
    """How differently copies of hidden units have moved since `before`: |move - move of the twin| / |move|, over all layers."""
    moves = [block.mlp.c_fc.weight.detach() - old.mlp.c_fc.weight for block, old in zip(model.transformer.h, before.transformer.h)]
    pairs = [(move[:old_hidden], move[old_hidden:2 * old_hidden]) for move in moves]
    return (sum((a - b).norm() for a, b in pairs) / sum(a.norm() for a, _ in pairs)).item()


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
@pytest.mark.parametrize("how", [{}, CLONES, dict(theta=0.0, spread=1.0)], ids=["default", "clones", "fresh"])
def test_twins_part_by_default_and_plain_clones_do_not(block, how):
    with float64():
        model = random_model(uniform(block))
        target = grown_config(model.config, n_embd=64)
        grown, optimizer = grow(model, target, model.setup_optimizer(), **how)
        before = copy.deepcopy(grown)
        for seed in range(8):
            step(grown, optimizer, seed)
        parted = twin_difference(grown, before, 64)
        assert parted < 1e-3 if how == CLONES else parted > 0.3


@pytest.mark.parametrize("block", ["prenorm", "ngpt"])
@pytest.mark.parametrize("change", [dict(mlp_hidden=192), dict(n_head=12, n_kv_head=12)], ids=["units", "heads"])
def test_three_copies_of_units_or_heads_alone_part_too(block, change):
    """The stream has no copies here, so nothing but the noise of the projection tells the copies apart."""
    with float64():
        model = random_model(uniform(block))
        grown, optimizer = grow(model, grown_config(model.config, **change), model.setup_optimizer())
        for seed in range(5):
            step(grown, optimizer, seed)
        layer = grown.transformer.h[0]
        weight = layer.mlp.c_fc.weight if "mlp_hidden" in change else layer.attn.c_v.weight
        copies = weight.detach().view(3, -1)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert (copies[a] - copies[b]).norm() > 1e-3 * copies[a].norm()


# -----------------------------------------------------------------------------
# Frozen layers


def test_frozen_layers_have_no_state_and_stay():
    model, optimizer = trained(STOCK)
    grown, grown_optimizer = grow(model, grown_config(STOCK, 4, depth_mode="append"), optimizer, depth_mode="append", freeze=True)
    frozen = {name for name, p in grown.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(("transformer.h.", "value_embeds."))}
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    for seed in range(2):
        step(grown, grown_optimizer, seed)
    moved = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert not moved & frozen and {"transformer.h.3.mlp.c_proj.weight", "transformer.wte.weight"} <= moved
    assert not grown_optimizer.full_state_dict().keys() & frozen
    again, again_optimizer = grow(grown, grown_config(grown.config, 5, depth_mode="append"), grown_optimizer, depth_mode="append")
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == frozen  # what is frozen stays so
    step(again, again_optimizer, 0)


# -----------------------------------------------------------------------------
# Ranks


def shards(optimizer, world: int) -> list[dict]:
    """What each of so many ranks would save."""
    whole = dict(optimizer.full_state_dict())
    states = []
    for rank in range(world):
        optimizer.load_full_state_dict(whole, rank, world)
        states.append(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_full_state_dict(whole, 0, 1)
    return states


@pytest.mark.parametrize("world", [2, 9, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 3))])
@pytest.mark.parametrize("config", [STOCK, mixed("ngpt")], ids=["stock", "mixed"])
def test_shards_make_a_whole_again(config, world):
    model, optimizer = trained(config)
    whole = dict(optimizer.full_state_dict())
    parts = shards(optimizer, world)
    rows = {state["exp_avg"].size(0) for state in parts[0]["state"].values() if "exp_avg" in state and state["exp_avg"].dim() == 2}
    assert 128 // world in rows if 128 % world == 0 else 128 in rows  # of tables that cannot be shared evenly every rank has all
    assert any("owners" in group for group in parts[0]["param_groups"]) == (config is not STOCK and world > 1)  # dealt where layers differ
    other = model.setup_optimizer(matrix_lr=0.5)
    assert identical(dict(SavedState(other, parts)), whole)
    other.load_shards(parts)
    assert identical(other.state_dict(), optimizer.state_dict())  # hyper-parameters, too
    for resharded, part in zip(shards(other, world), parts):
        assert identical(resharded, part)


def test_shards_of_another_model_are_refused():
    _, optimizer = trained(STOCK, 1)
    parts = shards(optimizer, 2)
    wider = random_model(replace(STOCK, n_embd=48, n_head=6, n_kv_head=3)).setup_optimizer()
    with pytest.raises(ValueError, match=r"exp_avg of lm_head.weight has the shape \(128, 32\), not \(128, 48\)"):
        wider.load_shards(parts)
    with pytest.raises(ValueError, match="has the shape"):
        wider.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        random_model(replace(STOCK, n_layer=5)).setup_optimizer().load_shards(parts)


def grow_on_a_rank(folder: str) -> None:
    rank = dist.get_rank()
    model = random_model(STOCK)
    model.load_state_dict(torch.load(f"{folder}/model.pt"))
    optimizer = model.setup_optimizer()
    optimizer.load_state_dict(torch.load(f"{folder}/optim{rank}.pt"))
    torch.manual_seed(rank)  # ranks may have drawn different numbers
    grown, grown_optimizer = grow(model, grown_config(STOCK, 5, 48), optimizer)
    torch.save((grown.state_dict(), grown_optimizer.state_dict(), dict(grown_optimizer.full_state_dict())), f"{folder}/grown{rank}.pt")


@pytest.mark.slow
def test_two_ranks_grow_to_the_bits_of_one(tmp_path):
    model, optimizer = trained(STOCK)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for rank, state in enumerate(shards(optimizer, 2)):
        torch.save(state, tmp_path / f"optim{rank}.pt")
    grown, grown_optimizer = grow(model, grown_config(STOCK, 5, 48), optimizer)
    expected = shards(grown_optimizer, 2)
    on_ranks(2, tmp_path, grow_on_a_rank, str(tmp_path))
    for rank in range(2):
        weights, state, whole = torch.load(tmp_path / f"grown{rank}.pt")
        assert identical(dict(weights), dict(grown.state_dict()))
        assert identical(state["state"], expected[rank]["state"])
        assert identical(whole, dict(grown_optimizer.full_state_dict()))
