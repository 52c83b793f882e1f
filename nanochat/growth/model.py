"""grow: a larger model that goes on where a smaller one stands."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nanochat.cli import UsageError
from nanochat.distributed import share_weights
from nanochat.gpt import GPT, GPTConfig, first_mix, uniform
from nanochat.growth import optimizer as states
from nanochat.growth.expand import expand, in_float64
from nanochat.growth.lineage import Lineage, in_layer, layer_of
from nanochat.growth.maps import Map
from nanochat.growth.modes import width_mode
from nanochat.growth.target import continued_layers, deepening, layered_config, layered_target, stock_config
from nanochat.layered_gpt import LayeredGPTConfig, build_gpt, empty_gpt
from nanochat.ngpt import NormalizedWeights
from nanochat.optim import MuonAdamW


@torch.no_grad()
def grow(model: GPT, target: GPTConfig, optimizer: MuonAdamW | None = None, *, mode: str = "lossless", depth_mode: str = "identity",
         layers: Sequence[int | None] | None = None, optimizer_mode: str = "transport", setup: Mapping[str, Any] | None = None,
         freeze: bool = False, generator: torch.Generator | None = None, **parameters: float) -> tuple[GPT, MuonAdamW | None]:
    """A model of the configuration `target` that continues `model`, and its optimizer (None without `optimizer`).

    **Width**, by `mode` (modes.py). An axis of n entries grows to n' by a map: entry j continues entry index[j], is written with a
    coefficient a_j and read with b_j, and for every i the sum of a_j b_j over its copies is 1. As matrices, S[j, index[j]] = a_j and
    R[index[j], j] = b_j, so that R S = I (maps.py). Activations become x' = S x, a weight between two axes (axes.py) becomes

        W' = S_out W R_in + N,  N S_in = 0        (expand.py)
        G' = R_outᵀ G S_inᵀ  for its gradients    (optimizer.py)

    Any target that is nowhere smaller will do: n'/n need not be whole, heads are copied whole and may grow unevenly, and with grouped
    queries each copy of a query uses a copy of its key. Hidden widths, ranks and depth grow in the same call; factors whose rank is 0 in
    the target are multiplied out.
    In the mode "lossless" (default) the function stays the same up to the rounding of what is stored: 1e-10 in the logits with float64
    weights, some 1e-5 with float32. Embeddings stored in bfloat16 are rounded to its 8 bits where a coefficient is not a power of two. Its
    parameters theta, spread and noise (`modes.Lossless`) come as keyword arguments.

    **Depth**, by `depth_mode` (target.py), or by `layers`: for each layer of the target the layer that it continues, None for a new one.
    New layers are initialized like those of a new model, but (unless the mode says otherwise) pass the stream on as it is: zero output
    projections (nGPT: alpha 0), resid_lambda 1, x0_lambda 0.

    target: a LayeredGPTConfig (see `grown_config`), or a GPTConfig, of which depth, width and heads count. The result is a stock GPT
    if `model` is one and the grown layers are those of a stock model, else a LayeredGPT: windows, value embeddings and the backout
    layer stay with their layers.
    optimizer, optimizer_mode: "transport" carries its moments over, "reset" starts them anew, "reset-new" those of all that is added. Groups and hyper-parameters are
    those of `setup_optimizer(**setup)` of the grown model. With several ranks all must call; each gets its shard of rank 0's bits.
    freeze: layers that continue one of `model` want no gradient from now on and have no optimizer state (a second copy of a layer does).
    generator: of all random numbers, by default seeded with 0. From equal states of a CPU generator every rank and device gets the same model.

    Memory: at the peak a device holds both models, with each rank's shards of both optimizer states, and one parameter of the grown model
    some four times in float64 (weights, moments and intermediate results are handled one by one).

    Raises UsageError for a target that cannot be. `model` and `optimizer` are left as they are.
    """
    source = layered_config(model.config)
    layers = continued_layers(source.n_layer, target.n_layer, depth_mode) if layers is None else list(layers)
    target = layered_target(source, target, layers)
    if optimizer_mode not in states.OPTIMIZER_MODES:
        raise UsageError(f"unknown optimizer mode {optimizer_mode!r}: use one of {', '.join(states.OPTIMIZER_MODES)}")
    begin = deepening(depth_mode).begin
    width = width_mode(mode, **parameters)
    generator = generator or torch.Generator().manual_seed(0)
    padded_vocab = model.transformer.wte.num_embeddings

    lineage = Lineage(width, source, target, layers, padded_vocab)
    weights = dict(model.named_parameters())
    frozen = {layers.index(layer) for layer in range(source.n_layer)} if freeze else set()

    grown = empty_model(stock_config(target) if type(model) is GPT else target, padded_vocab, model.get_device())
    new_weights = initialized_layers(target, layers, padded_vocab, generator, begin)
    for name, parameter in grown.named_parameters():
        if (old_name := lineage.origin[name]) is None:
            parameter.copy_(new_weights[name])
            continue
        weight, factor = continued_weight(weights, old_name)
        if weight.numel():  # there may be no layer yet whose scalars could go on
            parameter.copy_(expand(weight, lineage.maps_of(name), width, generator, factor if source.normalized else None))
        parameter.requires_grad_(layer_of(name) not in frozen and weights.get(old_name, parameter).requires_grad)
    for t, layer in enumerate(layers):
        if layer is None:
            grown.resid_lambdas[t], grown.x0_lambdas[t] = first_mix(t, target.n_layer) if begin == "fresh" else (1.0, 0.0)
    if source.normalized and not width.keeps_sphere:
        NormalizedWeights(grown)()
    share_weights(grown)
    grown.train(model.training)
    if optimizer is None:
        return grown, None

    grown_optimizer = states.leave_out_frozen(grown.setup_optimizer(**(setup or {})))
    if (through := states.OPTIMIZER_MODES[optimizer_mode]) is not None:
        grown_optimizer.load_full_state_dict(Transported(optimizer.full_state_dict(), grown, lineage, through))
    return grown, grown_optimizer


class Transported(Mapping):
    """The moments of the grown model's parameters, each made when it is asked for."""

    def __init__(self, moments: Mapping[str, dict], grown: GPT, lineage: Lineage, through: Callable[[Map], Map]):
        self.moments, self.lineage, self.through = moments, lineage, through
        left_out = through(lineage.depth).fresh  # layers
        self.shapes = {name: p.shape for name, p in grown.named_parameters()
                       if lineage.origin[name] in moments and ((layer := layer_of(name)) is None or not left_out[layer])}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> dict:
        shape = self.shapes[name]
        maps = [entry and (self.through(entry[0]), entry[1]) for entry in self.lineage.maps_of(name)]
        return states.transport(self.moments[self.lineage.origin[name]], maps, shape)  # type: ignore[index]


def continued_weight(weights: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight of this name, for which a pair of factors is multiplied out if it must; and the U behind it, if it is a factor V."""
    if name in weights:
        U = weights.get(name.replace(".V.weight", ".U.weight")) if name.endswith(".V.weight") else None
        return in_float64(weights[name]), None if U is None else in_float64(U)
    U, V = (in_float64(weights[name.replace(".weight", f".{factor}.weight")]) for factor in "UV")
    return U @ V, None


def empty_model(config: GPTConfig, padded_vocab: int, device: torch.device) -> GPT:
    """A model whose parameters are not filled yet."""
    model = empty_gpt(config, padded_vocab)
    model.to_empty(device=device)
    model.init_buffers()
    return model


def initialized_layers(target: LayeredGPTConfig, layers: list[int | None], padded_vocab: int, generator: torch.Generator,
                       begin: str) -> dict[str, torch.Tensor]:
    """The weights of the new layers, by name: initialized in a model of these layers alone, and passing the stream on as it is if they `begin` as the
    "identity". "fresh" leaves them as they are, "random" draws also what is 0 in a new model."""
    new = [t for t, layer in enumerate(layers) if layer is None]
    if not new:
        return {}
    config = replace(target, n_layer=len(new), layers=tuple(target.layers[t] for t in new), backout_layer=0, lm_head_rank=0)
    with torch.random.fork_rng(devices=[]):  # `init_weights` draws from the global generator
        torch.default_generator.manual_seed(int(torch.randint(2 ** 62, (), generator=generator, device=generator.device)))
        model = build_gpt(config, padded_vocab)
        for block in model.transformer.h:
            block.alpha_start = 1 / (target.n_layer * target.loops)  # of a normalized block
        model.init_weights()
        for block in model.transformer.h:
            if begin == "identity":
                block.init_as_identity()
            for p in block.matrices() if begin == "random" else ():
                if not p.any():
                    uniform()(p)
    return {in_layer(name, new[layer]): p for name, p in model.named_parameters() if (layer := layer_of(name)) is not None}
