"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over ranks like ZeRO-2.

Notable:
* Muon (Jordan 2024) with Polar Express coefficients (Amsel et al., 2505.16932), row equilibration before and a
  Frobenius renormalization after the orthogonalization, NorMuon's variance reduction (2510.05491) and cautious
  weight decay: only where update and weight agree in sign (2510.12402)
* one Muon group is one stack (K, r, c): all its matrices go through the same batched matmuls
* no DDP wrapper: gradients are averaged here, each rank updates its share and the results are gathered. NCCL averages
  while it reduces; gloo (CPU) cannot, there the gradients are divided first
* the state can be given and taken whole, by the parameters' names and one parameter at a time, whatever the number of ranks: growth and
  checkpoints of other numbers of ranks go that way
* where layers differ, matrices are dealt to the ranks over all Muon groups at once: with fewer matrices in a group than ranks some would idle
* hyper-parameters enter the Muon kernel as 0-dim tensors, and one graph serves all shapes: neither schedules nor growth nor a
  rank of its own for each layer compiles it anew
"""
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from nanochat.common import COMPUTE_DTYPE
from nanochat.compiler import jit
from nanochat.distributed import all_gather, rank_and_world, reduce_scatter, share
from nanochat.optim_state import (
    GatheredState,
    SavedState,
    State,
    check_groups,
    deal,
    is_sharded,
    kept_shapes,
    matrices,
    moment_shapes,
    owner_of,
    owners,
    stacks,
)

polar_express_coeffs = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def adamw_step_fused(p, grad, exp_avg, exp_avg_sq, step_t, lr_t, beta1_t, beta2_t, eps_t, wd_t) -> None:
    """One AdamW step (Loshchilov and Hutter, 1711.05101, algorithm 2) in one pass of PyTorch's fused kernel.

    p and both moments change in place, the arithmetic is float32; hyper-parameters are 0-dim tensors on the CPU or numbers.
    """
    adamw([p], [grad], [exp_avg], [exp_avg_sq], [], [torch.full((), float(step_t) - 1, device=p.device)], fused=True, amsgrad=False,
          maximize=False, lr=float(lr_t), beta1=float(beta1_t), beta2=float(beta2_t), eps=float(eps_t), weight_decay=float(wd_t))


def orthogonalize(X_KRC: torch.Tensor, ns_steps: int) -> torch.Tensor:
    """Polar Express: pushes the singular values of each of K matrices (R rows, C columns) towards 1, in their dtype.

    Rows are first scaled to equal norm. The Gram matrix is taken on the shorter side, of length S = min(R, C).
    """
    rows, columns = X_KRC.shape[-2:]
    # row equilibration: every row gets the root mean square of all, so that none is lost to the others
    norm_KR1 = X_KRC.float().norm(dim=-1, keepdim=True)
    target_K11 = X_KRC.float().norm(dim=(-2, -1), keepdim=True) / rows ** 0.5
    X_KRC = X_KRC * (target_K11 / norm_KR1.clamp(min=1e-6)).to(X_KRC.dtype)
    # the iteration converges from singular values of at most 1, which the Frobenius norm bounds; 1 % is left for rounding
    X_KRC = X_KRC / (X_KRC.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in polar_express_coeffs[:ns_steps]:
        A_KSS = X_KRC.mT @ X_KRC if rows > columns else X_KRC @ X_KRC.mT
        B_KSS = torch.baddbmm(A_KSS, A_KSS, A_KSS, beta=b, alpha=c)  # b A + c A A
        X_KRC = torch.baddbmm(X_KRC, *((X_KRC, B_KSS) if rows > columns else (B_KSS, X_KRC)), beta=a)  # a X + X B, or a X + B X
    return X_KRC


@jit("cuda", dynamic=True)  # on a CPU the matmuls dominate: compiling would take longer than it saves in a short run
def muon_step_fused(
    stacked_grads: torch.Tensor,  # (K, R, C) gradients; used up
    stacked_params: torch.Tensor,  # (K, R, C) weights, updated in place
    momentum_buffer: torch.Tensor,  # (K, R, C) first moment, updated in place
    second_momentum_buffer: torch.Tensor,  # (K, R, 1) or (K, 1, C) second moment of rows or columns, updated in place
    momentum_t: torch.Tensor,  # () float32 like the other three: decay of the first moment
    lr_t: torch.Tensor,  # learning rate, with the factor for tall matrices
    wd_t: torch.Tensor,  # weight decay, relative to the learning rate
    beta2_t: torch.Tensor,  # decay of the second moment
    ns_steps: int,  # iterations of Polar Express, at most 5
    red_dim: int,  # -1: one second moment for each row (tall matrices), -2: for each column
) -> None:
    """One Muon step of K matrices of one shape. In the names below N1 is R1 or 1C: what is left of a matrix when `red_dim` is summed up."""
    rows, columns = stacked_params.shape[-2:]
    # Nesterov momentum: g = (1 - momentum) gradient + momentum buffer
    momentum_buffer.lerp_(stacked_grads, 1 - momentum_t.to(stacked_grads.dtype))
    g_KRC = stacked_grads.lerp_(momentum_buffer, momentum_t.to(stacked_grads.dtype))
    # orthogonalize, then give the update the norm that an exactly orthogonal matrix would have
    g_KRC = orthogonalize(g_KRC.bfloat16() if COMPUTE_DTYPE == torch.bfloat16 else g_KRC, ns_steps).to(stacked_params.dtype)
    norms_KN1 = torch.linalg.vector_norm(g_KRC, dim=red_dim, keepdim=True, dtype=torch.promote_types(g_KRC.dtype, torch.float32))
    rescale_K11 = min(rows, columns) ** 0.5 / norms_KN1.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    norms_KN1 = norms_KN1 * rescale_K11  # of the rescaled update, which itself is not made: both scales meet in one pass below
    # NorMuon: even out the rows (or columns) by a running second moment, at an unchanged Frobenius norm
    mean_square_KN1 = norms_KN1.square() / g_KRC.size(red_dim)
    second_momentum_buffer.lerp_(mean_square_KN1.to(second_momentum_buffer.dtype), 1 - beta2_t.to(second_momentum_buffer.dtype))
    scale_KN1 = second_momentum_buffer.to(norms_KN1.dtype).clamp(min=1e-10).rsqrt()
    before_K11, after_K11 = norms_KN1.norm(dim=(-2, -1), keepdim=True), (norms_KN1 * scale_KN1).norm(dim=(-2, -1), keepdim=True)
    scale_KN1 = scale_KN1 * (before_K11 / after_K11.clamp(min=1e-10))
    g_KRC = g_KRC.mul_((rescale_K11 * scale_KN1).to(g_KRC.dtype))
    # cautious decoupled decay: p -= lr (g + wd p), the second term only where g and p agree in sign
    agree_KRC = g_KRC * stacked_params >= 0
    g_KRC = g_KRC.addcmul_(stacked_params, wd_t.to(g_KRC.dtype) * agree_KRC)
    stacked_params.sub_(g_KRC.mul_(lr_t.to(g_KRC.dtype)))


def _scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


MATRIX_OPTIMIZERS = ("muon", "adamw")


def inert(p: torch.Tensor) -> torch.Tensor:
    """p with a gradient of exactly 0. For a scalar that a later norm cancels: its gradient is pure rounding noise, which Adam would turn
    into steps of full size, until the scalar crosses 0 and its sign, which the norm keeps, turns the stream around."""
    return p.detach() + 0 * p


def adamw_group(params: Iterable, lr: float, betas: tuple[float, float], weight_decay: float) -> dict:
    return dict(kind="adamw", params=list(params), lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay)


def matrix_groups(params: Iterable, lr: float, weight_decay: float, optimizer: str = "muon") -> list[dict]:
    """One group for each shape. `lr` is Muon's, under which a matrix moves by lr / sqrt(columns) per entry; AdamW gets that too."""
    params = list(params)
    groups = []
    for shape in sorted({tuple(p.shape) for p in params}):
        same = [p for p in params if p.shape == shape]
        if optimizer == "muon":
            groups.append(dict(kind="muon", params=same, lr=lr, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=weight_decay))
        else:
            share = shape[1] ** -0.5
            groups.append(adamw_group(same, lr * share, (0.9, 0.95), weight_decay / share))
    return groups


# Both are functions, so that the moments they are given are forgotten before the next ones are put together


def _rows(p: torch.Tensor, state: dict, rank: int, world: int) -> dict:
    """A rank's rows of the moments of AdamW's parameter p; of those that are not sharded all ranks get the same bits."""
    rows = {}
    for key, value in state.items():
        if torch.is_tensor(value):
            part = value.chunk(world)[rank] if is_sharded(p, world) else value
            value = p.new_empty(part.shape).copy_(part)
            if not is_sharded(p, world):
                share(value)
        rows[key] = value
    return rows


def _put(stacks: dict, slot: int | None, state: dict) -> bool:
    """Writes the moments of a matrix into their place in the stacks, if they have one here. Whether there are any."""
    for key, value in state.items() if slot is not None else ():
        stacks[key][slot] = value
    return bool(state)


class MuonAdamW(torch.optim.Optimizer):
    """Takes param_groups with `kind`: `adamw` (lr, betas, eps, weight_decay) or `muon` (lr, momentum, ns_steps, beta2,
    weight_decay; all parameters of one shape). Raises ValueError for another kind.

    With W ranks, rank r keeps the AdamW moments of rows [r·d/W, (r+1)·d/W) and the Muon buffers of the matrices that it updates:
    nanochat's ceil(K/W) of each group, or with `deals` those that it was dealt; the groups then say so in `owners`, in memory and in
    `state_dict`. `state_dict` is one rank's; `full_state_dict` is everybody's, by the names of `named_parameters` (default: the running numbers).
    Every parameter must have a gradient, the same ones on every rank.
    """

    def __init__(self, param_groups: list[dict], named_parameters: Iterable[tuple[str, torch.Tensor]] | None = None, deals: bool = False):
        for group in param_groups:
            if group["kind"] not in ("adamw", "muon"):
                raise ValueError(f"unknown optimizer kind {group['kind']!r}: use adamw or muon")
            if group["kind"] == "muon" and len({p.shape for p in group["params"]}) > 1:
                raise ValueError("all parameters of a muon group must have one shape")
        super().__init__(param_groups, defaults={})
        params = [p for group in self.param_groups for p in group["params"]]
        self.names = {p: name for name, p in named_parameters or zip(map(str, range(len(params))), params)}
        self.deals = deals
        self.lay_out(rank_and_world()[1])

    def lay_out(self, world: int) -> None:
        """Decides which of so many ranks updates which matrix; again when parameters have left their groups, as long as there is no state."""
        for group in self.param_groups:
            group.pop("owners", None)
        if self.deals and world > 1:
            deal(self.param_groups, world)

    # -- the state as a whole

    def full_state_dict(self) -> State:
        """The moments of every parameter that has any, by name: `step`, `exp_avg` and `exp_avg_sq` (the parameter's shape), or `momentum_buffer`
        (its shape) and `second_momentum_buffer` (R, 1) or (1, C).

        Each is gathered when it is asked for, so that no rank holds more than one unsharded; all ranks must ask alike.
        """
        return GatheredState(self)

    def load_full_state_dict(self, whole: State, rank: int | None = None, world: int | None = None) -> None:
        """Replaces the state by what a rank keeps of `whole`, by default this one. Parameters without an entry start fresh.

        All ranks must call it. Raises ValueError for moments that do not have the shape of their parameter.
        """
        if rank is None or world is None:
            rank, world = rank_and_world()
        self.lay_out(world)
        known = set(whole)  # `in` and `get` of a mapping would ask for the entry, and take every KeyError on the way for its absence

        def moments(p: torch.Tensor, group: dict) -> dict:
            """Of a whole parameter; none where they are those of the other kind of optimizer."""
            name, shapes = self.names[p], moment_shapes(group, p)
            state = whole[name] if name in known else {}
            for key, shape in shapes.items():
                if key in state and tuple(state[key].shape) != shape:
                    raise ValueError(f"{key} of {name} has the shape {tuple(state[key].shape)}, not {shape}")
            return state if state.keys() & shapes.keys() else {}

        loaded: dict = {}
        for group in self.param_groups:
            for first, shapes in kept_shapes(group, rank, world):
                if group["kind"] == "adamw":
                    loaded[first] = _rows(first, moments(first, group), rank, world)
                    continue
                kept = {key: first.new_zeros(shape) for key, shape in shapes.items()}
                places = [owner_of(group, i, world) for i in range(len(group["params"]))]
                # what is another rank's is asked for as well: it is gathered together
                found = [_put(kept, slot if owner == rank else None, moments(p, group)) for p, (owner, slot) in zip(group["params"], places, strict=True)]
                if any(found):
                    loaded[first] = kept
        self.state.clear()
        self.state.update({p: state for p, state in loaded.items() if state})

    def load_shards(self, shards: Sequence[dict]) -> None:
        """Takes state and hyper-parameters from the state dicts of a run of any number of ranks. Raises ValueError for those of another model."""
        self.load_full_state_dict(SavedState(self, shards))
        for group, saved in zip(self.param_groups, shards[0]["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key not in ("params", "owners")})

    def load_state_dict(self, state_dict: dict) -> None:
        """One rank's own shard, of the same number of ranks. Raises ValueError for that of another model or kind of optimizer."""
        check_groups(self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p, shapes in kept_shapes(group, *rank_and_world()):
                for key, shape in shapes.items():
                    value = self.state[p].get(key) if p in self.state else None
                    if value is not None and tuple(value.shape) != shape:
                        raise ValueError(f"{key} of {self.names[p]} has the shape {tuple(value.shape)}, not {shape}")

    # -- the step

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        rank, world = rank_and_world()
        self.averages = world > 1 and dist.get_backend() == "nccl"
        groups = [group for group in self.param_groups if group["params"]]
        for group in groups:
            for p, shapes in kept_shapes(group, rank, world):
                if not self.state[p]:
                    self.state[p].update({"step": 0} if group["kind"] == "adamw" else {}, **{key: p.new_zeros(shape) for key, shape in shapes.items()})
        # matrices that are dealt travel together: there are many groups of them, with few matrices each
        dealt = [group for group in groups if "owners" in group]
        jobs = [[group] for group in groups if "owners" not in group] + ([dealt] if dealt else [])
        # three phases keep the network busy: start all reductions, update as they arrive, collect the gathers
        reduced = [self._reduce_adamw(job[0], rank, world) if job[0]["kind"] == "adamw" else self._reduce_muon(job, rank, world) for job in jobs]
        gathers = []
        for job, parts in zip(jobs, reduced, strict=True):
            gathers += self._update_adamw(job[0], parts, rank, world) if job[0]["kind"] == "adamw" else self._update_muon(job, parts, rank, world)
        for work, finish in gathers:
            work.wait()
            if finish is not None:
                finish()

    def _mean(self, collective, *tensors: torch.Tensor, world: int):
        """Starts an all_reduce or reduce_scatter of the last of the tensors, which it may change, to the mean over the ranks."""
        if self.averages:
            return collective(*tensors, op=dist.ReduceOp.AVG, async_op=True)
        tensors[-1].div_(world)
        return collective(*tensors, async_op=True)

    # -- AdamW: one job per parameter: (parameter, gradient of this rank's part, work to wait for)

    def _reduce_adamw(self, group, rank, world):
        jobs = []
        for p in group["params"]:
            if world == 1:
                jobs.append((p, p.grad, None))
            elif is_sharded(p, world):
                part = torch.empty_like(p.grad[:p.size(0) // world])
                jobs.append((p, part, self._mean(reduce_scatter, part, p.grad, world=world)))
            else:
                jobs.append((p, p.grad, self._mean(dist.all_reduce, p.grad, world=world)))
        return jobs

    def _update_adamw(self, group, jobs, rank, world):
        gathers = []
        for p, grad, work in jobs:
            if work is not None:
                work.wait()
            part = p.chunk(world)[rank] if is_sharded(p, world) else p
            state = self.state[p]
            state["step"] += 1
            beta1, beta2 = group["betas"]
            adamw_step_fused(part, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"],
                             beta1, beta2, group["eps"], group["weight_decay"])
            if part is not p:
                gathers.append((all_gather(p.data, part.clone(), async_op=True), None))
        return gathers

    # -- Muon: one job per group of nanochat's layout, one for all that are dealt: (gradients of this rank's matrices, those of all, work to
    # wait for). N numbers make a row: as many as the matrices of the fullest rank have, so the rows of others end in places of no matrix.

    def _reduce_muon(self, groups, rank, world):
        gradients = [p.grad for group in groups for p in group["params"]]
        if world == 1:
            return torch.stack(gradients).view(-1), None, None
        width = max(sum(owners(group, world).count(rank) * group["params"][0].numel() for group in groups) for rank in range(world))
        everything_WN = gradients[0].new_empty(world, width)
        torch._foreach_copy_(matrices(everything_WN, groups), gradients)
        part_N = torch.empty_like(everything_WN[0])
        return part_N, everything_WN, self._mean(reduce_scatter, part_N, everything_WN.view(-1), world=world)

    def _update_muon(self, groups, job, rank, world):
        gradients_N, everything_WN, work = job
        updated_N = torch.empty_like(gradients_N)
        if work is not None:
            work.wait()
        for group, g_KRC, p_KRC in zip(groups, stacks(gradients_N, groups, rank, world), stacks(updated_N, groups, rank, world), strict=True):
            mine = [p for p, owner in zip(group["params"], owners(group, world), strict=True) if owner == rank]
            if not mine:
                continue
            rows, columns = p_KRC.shape[1:]
            state = self.state[group["params"][0]]
            torch.stack(mine, out=p_KRC)
            muon_step_fused(
                g_KRC, p_KRC, state["momentum_buffer"][:len(mine)], state["second_momentum_buffer"][:len(mine)],
                *(_scalar(value, p_KRC.device) for value in (
                    group["momentum"], group["lr"] * max(1.0, rows / columns) ** 0.5, group["weight_decay"], group["beta2"])),
                group["ns_steps"], -1 if rows >= columns else -2)
        params = [p for group in groups for p in group["params"]]
        if world == 1:
            torch._foreach_copy_(params, matrices(updated_N.view(1, -1), groups))
            return []
        gather = all_gather(everything_WN.view(-1), updated_N, async_op=True)
        return [(gather, lambda: torch._foreach_copy_(params, matrices(everything_WN, groups)))]
