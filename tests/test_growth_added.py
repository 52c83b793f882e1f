"""What a growth adds gets going slowly: masks that open, learning rates that re-warm."""
from dataclasses import replace

import pytest
import torch

from nanochat.checkpoint_manager import load_meta
from nanochat.growth import grow, grown_config
from nanochat.growth.added import Entering
from nanochat.growth.lineage import Lineage
from nanochat.growth.modes import width_mode
from nanochat.growth.target import continued_layers, layered_config
from tests import tiny
from tests.growing import STOCK, difference, float64, loss_and_gradients, mixed, random_model, uniform

DEEP = uniform("prenorm", mlp_depth=2, value_embed=True)
LOW = uniform("prenorm", attn_rank=5, mlp_rank=6)


class Growing:
    """A grown model, its optimizer and its lineage; `age` is set by hand."""

    def __init__(self, config, depth: int, width: int, depth_mode: str = "random", mode: str = "masked", optimizer_mode: str = "reset", **setup):
        self.model, self.age = random_model(config), 0
        target = grown_config(config, depth, width, depth_mode=depth_mode)
        self.grown, self.optimizer = grow(self.model, target, self.model.setup_optimizer(), mode=mode, depth_mode=depth_mode, optimizer_mode=optimizer_mode, setup=setup)
        layers = continued_layers(config.n_layer, depth, depth_mode)
        self.lineage = Lineage(width_mode(mode), layered_config(config), target, layers, 128)
        self.shapes = {name: p.shape for name, p in self.grown.named_parameters()}

    def enter(self, steps: int, masks: bool) -> Entering:
        which = self.lineage.masked if masks else self.lineage.added
        self.entries = {name: which(name, shape) for name, shape in self.shapes.items()}
        return Entering(self.optimizer, self.entries, steps, lambda: self.age, masks=masks)

    def step(self, seed: int = 0) -> None:
        loss_and_gradients(self.grown, seed)
        self.optimizer.step()
        self.grown.zero_grad(set_to_none=True)
        self.age += 1


@pytest.mark.parametrize("config", [STOCK, DEEP, LOW, mixed(), replace(STOCK, n_layer=0)], ids=["stock", "deep", "low-rank", "mixed", "no layers"])
@pytest.mark.parametrize("more, width", [(0, 48), (2, 32), (3, 64)])
def test_closed_masks_keep_the_function_whatever_is_new(config, more, width):
    with float64():
        growing = Growing(config, config.n_layer + more, width)
        opened = difference(growing.model, growing.grown)
        growing.enter(4, masks=True).close()
        assert difference(growing.model, growing.grown) <= 1e-10
        if config.n_layer:
            assert opened > 0.01


def test_all_that_is_new_is_random_when_the_masks_are_open():
    """No entry of a matrix is 0, nor equal to another one's."""
    growing = Growing(STOCK, 5, 64)
    for name, p in growing.grown.named_parameters():
        if p.dim() == 2 and "gate" not in name:
            assert p.all() and len(p.unique(dim=0)) == len(p) and len(p.T.unique(dim=0)) == p.size(1), name


def test_a_mask_multiplies_the_weights_by_its_steps():
    """Without updates what is there after k of 4 steps is k/4 of what was drawn; then nothing is left of the mask."""
    growing = Growing(STOCK, 5, 48, unembedding_lr=0.0, embedding_lr=0.0, matrix_lr=0.0, scalar_lr=0.0)
    drawn = {name: p.detach().clone() for name, p in growing.grown.named_parameters()}
    opening = growing.enter(4, masks=True)
    opening.close()
    for k in range(6):
        for name, p in growing.grown.named_parameters():
            if p.dim() == 2 and "smear" not in name:
                torch.testing.assert_close(p.detach(), drawn[name] * torch.where(growing.entries[name], min(k, 4) / 4, 1.0).to(p.dtype), rtol=1e-5, atol=1e-7)
        growing.step()
    assert not opening.parts


def test_training_behind_a_mask_is_training_of_the_masked_weights():
    """The same as a model that holds w and is run with m w (2305.02869), under Adam and SGD-like first moments: here by hand for one matrix."""
    with float64():
        growing = Growing(STOCK, 3, 48, matrix_optimizer="adamw")
        name, steps = "transformer.h.1.mlp.c_proj.weight", 5
        entries = growing.lineage.masked(name, growing.shapes[name])
        w = growing.grown.get_parameter(name).detach().clone()
        growing.enter(steps, masks=True).close()
        group = next(group for group in growing.optimizer.param_groups if any(p is growing.grown.get_parameter(name) for p in group["params"]))
        first, second = torch.zeros_like(w), torch.zeros_like(w)
        for t in range(1, steps + 2):
            mask = torch.where(entries, min(1.0, (t - 1) / steps), 1.0)
            p = growing.grown.get_parameter(name)
            torch.testing.assert_close(p.detach(), w * mask, rtol=1e-6, atol=1e-9)
            loss_and_gradients(growing.grown, t)
            gradient = p.grad * mask
            beta1, beta2 = group["betas"]
            first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient ** 2
            w = w - group["lr"] * (first / (1 - beta1 ** t)) / ((second / (1 - beta2 ** t)).sqrt() + group["eps"])
            growing.optimizer.step()
            growing.grown.zero_grad(set_to_none=True)
            growing.age += 1


@pytest.mark.parametrize("mode, depth_mode", [("sparkling", "stack"), ("random", "identity"), ("lossless", "append")])
def test_only_what_is_added_re_warms(mode, depth_mode):
    """After one step at a share of 1/4 the old entries have gone as far as without, the new ones a quarter of it."""
    plain, slow = (Growing(STOCK, 6, 64, depth_mode, mode) for _ in range(2))
    before = {name: p.detach().clone() for name, p in plain.grown.named_parameters()}
    slow.enter(4, masks=False)
    plain.step(), slow.step()
    moved = 0
    for (name, p), q in zip(plain.grown.named_parameters(), slow.grown.parameters(), strict=True):
        share = torch.where(slow.entries[name], 0.25, 1.0)
        torch.testing.assert_close(q - before[name], (p - before[name]) * share, rtol=1e-3, atol=1e-6, msg=name)
        moved += bool((p != q).any())
    assert moved > 20


def test_added_entries_are_all_but_the_first_copies():
    lineage = Growing(STOCK, 6, 64, "stack", "sparkling").lineage
    fc = lineage.added("transformer.h.1.mlp.c_fc.weight", torch.Size((256, 64)))
    assert not fc[:128, :32].any() and fc[128:].all() and fc[:, 32:].all()
    assert lineage.added("transformer.h.4.mlp.c_fc.weight", torch.Size((256, 64))).all()  # a copy of layer 1
    assert lineage.added("resid_lambdas", torch.Size((6,))).tolist() == [False] * 3 + [True] * 3
    assert not lineage.added("smear_lambda", torch.Size((1,))).any()


def test_moments_of_what_is_added_are_those_of_fresh_entries():
    model = random_model(STOCK)
    optimizer = model.setup_optimizer()
    for seed in range(3):
        loss_and_gradients(model, seed)
        optimizer.step()
        model.zero_grad(set_to_none=True)
    target = grown_config(STOCK, 6, 64, depth_mode="stack")
    states = [dict(grow(model, target, optimizer, mode="sparkling", depth_mode="stack", optimizer_mode=way)[1].full_state_dict()) for way in ("transport", "reset-new")]
    everything, reset = states
    for name, key in (("lm_head.weight", "exp_avg"), ("transformer.wte.weight", "exp_avg"), ("transformer.h.1.mlp.c_fc.weight", "momentum_buffer")):
        all_of_it, some = everything[name][key], reset[name][key]
        corner = tuple(slice(n if n == 128 and "mlp" not in name else n // 2) for n in some.shape)  # the vocabulary does not grow
        assert some[corner].any() and torch.equal(some[corner], all_of_it[corner])
        others = torch.ones_like(some, dtype=torch.bool)
        others[corner] = False
        assert not some[others].any() and all_of_it[others].any()
    square = reset["lm_head.weight"]["exp_avg_sq"]
    torch.testing.assert_close(square[:, 40], square[:, :32].mean(dim=1))
    assert "momentum_buffer" in everything["transformer.h.4.mlp.c_fc.weight"] and not reset["transformer.h.4.mlp.c_fc.weight"]["momentum_buffer"].any()


def test_reset_moments_break_the_symmetry_of_copies():
    """Equal copies with equal moments stay equal; with moments of their own they part."""
    unequal = {}
    for way in ("transport", "reset-new"):
        model = random_model(uniform("prenorm"))
        optimizer = model.setup_optimizer()
        with torch.no_grad():
            model.smear_lambda.zero_()
        for seed in range(2):
            loss_and_gradients(model, seed)
            optimizer.step()
            model.zero_grad(set_to_none=True)
        grown, optimizer = grow(model, grown_config(model.config, n_embd=64), optimizer, mode="sparkling", optimizer_mode=way)
        loss_and_gradients(grown, 9)
        optimizer.step()
        head = grown.lm_head.weight.detach()
        unequal[way] = float((head[:, :32] - head[:, 32:]).norm() / head.norm())
    assert unequal["transport"] < 1e-3 < 3e-3 < unequal["reset-new"]


# -----------------------------------------------------------------------------
# In a run


GROW = ["--grow-path=2x64,3x96", "--head-dim=32", "--eval-every=2", "--save-every=2", "--warmup-steps=0", "--grow-at=0.4"]


@pytest.mark.slow
@pytest.mark.parametrize("flags, lossless", [
    (["--grow-mode=masked", "--grow-depth-mode=random", "--grow-open=4"], True),
    (["--grow-mode=sparkling", "--grow-optimizer=reset-new", "--grow-rewarm=6", "--grow-rewarm-new"], True),
    (["--grow-mode=masked", "--grow-depth-mode=random"], False)], ids=["masks", "sparkling", "open"])
def test_a_run_loses_nothing_and_resumes_in_the_middle(base_dir, flags, lossless):
    tiny.prepare(base_dir)
    assert tiny.train(*GROW, *flags) == 0
    folder = tiny.folder(base_dir)
    expected, steps = tiny.losses(base_dir), [int(path.stem[6:]) for path in sorted(folder.glob("model_*.pt"))]
    weights = torch.load(folder / f"model_{steps[-1]:06d}.pt", weights_only=True)
    (growth,) = load_meta(folder, steps[-1])["growth"]
    assert (abs(growth["loss_after"] - growth["loss_before"]) < 1e-5) == lossless
    middle = next(step for step in steps if step > growth["step"])  # the masks are neither closed nor open
    assert middle < growth["step"] + 4 < steps[-1]
    for step in steps:
        for path in folder.glob(f"*_{step:06d}*") if step > middle else ():
            path.unlink()
    assert tiny.train(*GROW, *flags, "--resume") == 0
    assert tiny.losses(base_dir) == expected
    assert tiny.identical(torch.load(folder / f"model_{steps[-1]:06d}.pt", weights_only=True), weights)


@pytest.mark.parametrize("flags, reason", [(["--grow-open=4", "--block=ngpt"], "pre-norm"), (["--grow-rewarm-new"], "how long")])
def test_contradictions(base_dir, capsys, flags, reason):
    tiny.prepare(base_dir)
    assert tiny.train(*GROW, *flags) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_two_ranks_open_the_masks_that_one_opens(base_dir):
    tiny.prepare(base_dir)
    for ranks in (0, 2):
        result = tiny.run(base_dir, *GROW, "--grow-mode=masked", "--grow-depth-mode=random", "--grow-open=6", "--data-streams=2", f"--model-tag=ranks{ranks}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = (tiny.losses(base_dir, f"ranks{ranks}") for ranks in (0, 2))
    assert [record[:2] for record in one] == [record[:2] for record in two]
    assert all(a[4] == pytest.approx(b[4], abs=1e-4) for a, b in zip(one, two) if a[0] == "eval")
