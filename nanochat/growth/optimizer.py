"""The optimizer's state, carried over a growth.

A gradient of the grown model is G' = Rᵀ G Sᵀ. So first moments are transformed by that, and Adam's second moments by the squared
coefficients (each entry of G' is one entry of G, times a number). NorMuon's second moments belong to orthogonalized, hence
scale-free updates: those of rows are copied, those of columns get the squared coefficients. Fresh entries have first moments of 0 and the
mean second moments: the step counter goes on, and with zeros their first steps would be several times too large.

Exact, in the sense that the moments are those of the large model trained along the small one's trajectory, where there is no noise,
no key head serves queries of different shares and no channel that a gate reads has a copy. Noise lets through parts of
the gradient that the small model has no notion of; what is transported is then the share that it knows.

What becomes of the state when the model grows (`OPTIMIZER_MODES`):

| mode | moments |
|---|---|
| `transport` | all go on, those of copies too |
| `reset` | all start anew |
| `reset-new` | only the originals' go on; further copies, of entries and of layers, begin as fresh ones do (SPARKLING, 2602.02472): equal copies get unequal steps |

With several ranks all of them go through the parameters of the grown model together. Each parameter's state is gathered (`full_state_dict` of the old
optimizer), transformed, cut to what this rank keeps (`load_full_state_dict` of the new one), and forgotten.
"""
from collections.abc import Callable

import torch

from nanochat.distributed import rank_and_world
from nanochat.growth.expand import apply, in_float64
from nanochat.growth.maps import Map, Maps, along, mapped
from nanochat.optim import MuonAdamW

OPTIMIZER_MODES: dict[str, Callable[[Map], Map] | None] = {  # the map that the moments go through, of that of the weights; None: they do not
    "transport": lambda map: map,
    "reset": None,
    "reset-new": Map.originals,
}


def leave_out_frozen(optimizer: MuonAdamW) -> MuonAdamW:
    """Takes parameters that want no gradient out of their groups: they are not updated and have no state."""
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    optimizer.lay_out(rank_and_world()[1])
    return optimizer


def transport(state: dict, maps: Maps, shape: torch.Size) -> dict:
    """The moments of one parameter after it has grown to `shape`."""
    moved = {}
    for key, value in state.items():
        if not torch.is_tensor(value):  # the step counter
            moved[key] = value
            continue
        if key == "second_momentum_buffer":
            dim = 0 if value.size(1) == 1 else 1
            if (shape[0] >= shape[1]) != (dim == 0):
                continue  # the matrix has turned from tall to wide, or back
            moment = scale_free(in_float64(value), maps[dim], dim)
        elif key == "exp_avg_sq":
            moment = mean_if_fresh(apply(in_float64(value), maps, of_gradient=True, power=2), maps)
        else:
            moment = apply(in_float64(value), maps, of_gradient=True)
        moved[key] = moment.to(value.dtype).to(value.device)
    return moved


def scale_free(moment: torch.Tensor, entry: tuple[Map, bool] | None, dim: int) -> torch.Tensor:
    """Of updates whose rows were scaled to equal lengths, and whose columns were not."""
    if entry is None:
        return moment
    lines: Maps = [(entry[0].before_scale(), True), None] if dim == 0 else [None, (entry[0], True)]
    return mean_if_fresh(apply(moment, lines, power=2), lines)


def mean_if_fresh(moment: torch.Tensor, maps: Maps) -> torch.Tensor:
    """Second moments whose fresh rows and columns, which have seen no gradient, are the mean of the others."""
    for dim, map, _ in mapped(maps):
        if map.fresh.any():
            mean = moment.index_select(dim, (~map.fresh).nonzero()[:, 0].to(moment.device)).mean(dim=dim, keepdim=True)
            moment = torch.where(along(map.fresh, dim, moment), mean, moment)
    return moment
