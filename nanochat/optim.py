"""MuonAdamW: Muon for the matrices of the blocks, AdamW for everything else, sharded over ranks like ZeRO-2.

Notable:
* Muon (Jordan 2024) with Polar Express coefficients (Amsel et al., 2505.16932), row equilibration before and a
  Frobenius renormalization after the orthogonalization, NorMuon's variance reduction (2510.05491) and cautious
  weight decay: only where update and weight agree in sign (2510.12402)
* one Muon group is one stack (K, r, c): all its matrices go through the same batched matmuls
* no DDP wrapper: gradients are averaged here, each rank updates its share and the results are gathered. NCCL averages
  while it reduces; gloo (CPU) cannot, there the gradients are divided first
* hyper-parameters enter the Muon kernel as 0-dim tensors, and one graph serves all shapes: neither schedules nor growth nor a
  rank of its own for each layer compiles it anew
"""
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from nanochat.common import COMPUTE_DTYPE
from nanochat.compiler import jit

polar_express_coeffs = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
# PyTorch 2.13 renamed the two collectives
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SMALL = 1024  # parameters with fewer elements, and those whose rows cannot be shared evenly, are updated on every rank


def adamw_step_fused(p, grad, exp_avg, exp_avg_sq, step_t, lr_t, beta1_t, beta2_t, eps_t, wd_t) -> None:
    """One AdamW step (Loshchilov and Hutter, 1711.05101, algorithm 2) in one pass of PyTorch's fused kernel.

    p and both moments change in place, the arithmetic is float32; hyper-parameters are 0-dim tensors on the CPU or numbers.
    """
    adamw([p], [grad], [exp_avg], [exp_avg_sq], [], [torch.full((), float(step_t) - 1, device=p.device)], fused=True, amsgrad=False,
          maximize=False, lr=float(lr_t), beta1=float(beta1_t), beta2=float(beta2_t), eps=float(eps_t), weight_decay=float(wd_t))


def orthogonalize(X: torch.Tensor, ns_steps: int) -> torch.Tensor:
    """Polar Express: pushes the singular values of each (r, c) matrix of X (K, r, c) towards 1, in X's dtype.

    Rows are first scaled to equal norm. The Gram matrix is taken on the shorter side.
    """
    rows, columns = X.shape[-2:]
    row_norm = X.float().norm(dim=-1, keepdim=True)
    target = X.float().norm(dim=(-2, -1), keepdim=True) / rows ** 0.5
    X = X * (target / row_norm.clamp(min=1e-6)).to(X.dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in polar_express_coeffs[:ns_steps]:
        A = X.mT @ X if rows > columns else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, *((X, B) if rows > columns else (B, X)), beta=a)
    return X


@jit("cuda", dynamic=True)  # on a CPU the matmuls dominate: compiling would take longer than it saves in a short run
def muon_step_fused(stacked_grads, stacked_params, momentum_buffer, second_momentum_buffer,
                    momentum_t, lr_t, wd_t, beta2_t, ns_steps: int, red_dim: int) -> None:
    """One Muon step of a stack (K, r, c). Parameters, buffers and gradients change in place.

    The second-moment buffer is (K, r, 1) for red_dim -1 and (K, 1, c) for red_dim -2.
    """
    rows, columns = stacked_params.shape[-2:]
    # Nesterov momentum
    momentum_buffer.lerp_(stacked_grads, 1 - momentum_t.to(stacked_grads.dtype))
    g = stacked_grads.lerp_(momentum_buffer, momentum_t.to(stacked_grads.dtype))
    # orthogonalize, then fix the norm that an exactly orthogonal matrix would have
    g = orthogonalize(g.bfloat16() if COMPUTE_DTYPE == torch.bfloat16 else g, ns_steps).to(stacked_params.dtype)
    norms = torch.linalg.vector_norm(g, dim=red_dim, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))  # of rows or columns
    rescale = min(rows, columns) ** 0.5 / norms.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-6)
    norms = norms * rescale
    # NorMuon: even out the rows (or columns) by a running second moment, at an unchanged Frobenius norm
    mean_square = norms.square() / g.size(red_dim)
    second_momentum_buffer.lerp_(mean_square.to(second_momentum_buffer.dtype), 1 - beta2_t.to(second_momentum_buffer.dtype))
    scale = second_momentum_buffer.to(norms.dtype).clamp(min=1e-10).rsqrt()
    scale = scale * (norms.norm(dim=(-2, -1), keepdim=True) / (norms * scale).norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    g = g.mul_((rescale * scale).to(g.dtype))
    # cautious decoupled decay
    agree = g * stacked_params >= 0
    g = g.addcmul_(stacked_params, wd_t.to(g.dtype) * agree)
    stacked_params.sub_(g.mul_(lr_t.to(g.dtype)))


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


class MuonAdamW(torch.optim.Optimizer):
    """Takes param_groups with `kind`: `adamw` (lr, betas, eps, weight_decay) or `muon` (lr, momentum, ns_steps, beta2,
    weight_decay; all parameters of one shape). Raises ValueError for another kind.

    With W ranks, rank r keeps the AdamW moments of rows [r·d/W, (r+1)·d/W) and the Muon buffers of its ceil(K/W)
    matrices, the latter on the group's first parameter. A state therefore fits only the same number of ranks.
    Every parameter must have a gradient, the same ones on every rank.
    """

    def __init__(self, param_groups: list[dict]):
        for group in param_groups:
            if group["kind"] not in ("adamw", "muon"):
                raise ValueError(f"unknown optimizer kind {group['kind']!r}: use adamw or muon")
            if group["kind"] == "muon" and len({p.shape for p in group["params"]}) > 1:
                raise ValueError("all parameters of a muon group must have one shape")
        super().__init__(param_groups, defaults={})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        distributed = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
        self.averages = distributed and dist.get_backend() == "nccl"
        # three phases keep the network busy: start all reductions, update as they arrive, collect the gathers
        groups = [group for group in self.param_groups if group["params"]]
        reduced = [self._reduce_adamw(group, rank, world) if group["kind"] == "adamw" else self._reduce_muon(group, rank, world)
                   for group in groups]
        gathers = []
        for group, jobs in zip(groups, reduced, strict=True):
            update = self._update_adamw if group["kind"] == "adamw" else self._update_muon
            gathers.extend(update(group, jobs, rank, world))
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
            elif p.numel() < SMALL or p.size(0) % world:
                jobs.append((p, p.grad, self._mean(dist.all_reduce, p.grad, world=world)))
            else:
                part = torch.empty_like(p.grad[:p.size(0) // world])
                jobs.append((p, part, self._mean(reduce_scatter, part, p.grad, world=world)))
        return jobs

    def _update_adamw(self, group, jobs, rank, world):
        gathers = []
        for p, grad, work in jobs:
            if work is not None:
                work.wait()
            sharded = grad.shape != p.shape
            part = p.chunk(world)[rank] if sharded else p
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(part), exp_avg_sq=torch.zeros_like(part))
            state["step"] += 1
            beta1, beta2 = group["betas"]
            adamw_step_fused(part, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group["lr"],
                             beta1, beta2, group["eps"], group["weight_decay"])
            if sharded:
                gathers.append((all_gather(p.data, part.clone(), async_op=True), None))
        return gathers

    # -- Muon: one job per group: (stacked gradients of this rank's chunk, the buffer of all, work to wait for)

    def _reduce_muon(self, group, rank, world):
        params = group["params"]
        if world == 1:
            return torch.stack([p.grad for p in params]), None, None
        chunk = -(-len(params) // world)
        everything = params[0].new_empty(chunk * world, *params[0].shape)
        torch.stack([p.grad for p in params], out=everything[:len(params)])
        everything[len(params):].zero_()  # the places of no matrix
        part = torch.empty_like(everything[:chunk])
        return part, everything, self._mean(reduce_scatter, part, everything, world=world)

    def _update_muon(self, group, job, rank, world):
        grads, everything, work = job
        params = group["params"]
        rows, columns = params[0].shape
        red_dim = -1 if rows >= columns else -2
        chunk = grads.size(0)
        mine = params[rank * chunk:(rank + 1) * chunk]
        state = self.state[params[0]]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grads)
            state["second_momentum_buffer"] = torch.zeros_like(grads[..., :1] if red_dim == -1 else grads[:, :1])
        if work is not None:
            work.wait()
        updated = torch.empty_like(grads)  # its last places stay unfilled where there are fewer matrices than places
        if mine:
            stacked = torch.stack(list(mine), out=updated[:len(mine)])
            muon_step_fused(
                grads[:len(mine)], stacked, state["momentum_buffer"][:len(mine)], state["second_momentum_buffer"][:len(mine)],
                *(_scalar(value, stacked.device) for value in (
                    group["momentum"], group["lr"] * max(1.0, rows / columns) ** 0.5, group["weight_decay"], group["beta2"])),
                group["ns_steps"], red_dim)
        if world == 1:
            torch._foreach_copy_(params, list(updated.unbind()))
            return []
        gather = all_gather(everything, updated, async_op=True)
        return [(gather, lambda: torch._foreach_copy_(params, list(everything[:len(params)].unbind())))]
