"""Do the singular values of a trained matrix look alike at all widths? And what becomes of them when the model grows?

    python -m analysis.spectra --out=spectra.json --plot=dev/spectra.png

On the data and the tokenizer in NANOCHAT_BASE_DIR. A claim of drafts on growth by upscaling: the spectra of equally trained models of different widths agree, up to their scale.
A spectrum is taken in two parts. The largest singular values, which training pulls out of the rest, are few at any width: one of 64 is a sixty-fourth of a distribution, one of
256 a quarter of that, so a distance of whole distributions would tell widths apart that look alike. So a sixteenth of the values, the largest, is left out of the bulk, which is
the distribution of the others divided by their root mean square. The largest value of each matrix, over that root mean square, is told beside it.

The distance of two is Wasserstein's of order 2, the root of the mean squared difference of their quantiles: 0 for equal shapes at any scale, and comparable at any size. A small matrix
has few values, so its quantiles are noisy, and two small models of one shape are further from each other than two large ones. So the square is not that of one difference, but the
product of the differences of two seeds, whose noise is independent: its mean is what the shapes differ by (the crossvalidated distance of Walther et al., 2016,
doi:10.1016/j.neuroimage.2015.12.012), 0 in the mean for equal ones, and below 0 half of the time.

It is measured between models of several widths, trained on the same tokens with the same rates (Muon's hold at any width) and without weight decay, which base_train would make
another one for each width and which shrinks just the bulk; and set against what must be told apart from it: models trained differently (a quarter of the
rate, half of the steps), other layers, and matrices of random numbers, whose spectra agree across widths by themselves (Marchenko and Pastur) wherever the sides keep their ratio.
All means over the attention's and the MLP's matrices of all layers, with 95 % intervals over pairs of seeds (which share seeds, so they are somewhat too narrow); what is compared is
compared pair by pair.
"""
import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from analysis.estimates import Estimate
from analysis.study import SHAPE, STEPS, TUNED, run_by_seed, study_parser, width_of_heads
from analysis.trial import Trial
from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError, command, positive_int
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic
from nanochat.gpt import GPT
from nanochat.growth import grow
from nanochat.growth.target import grown_config

KINDS = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
QUANTILES = (np.arange(64) + 0.5) / 64
TOP = 1 / 16  # of the values are no part of the bulk
MODES = ("lossless", "hyperclone", "bus")  # of growth
Spectra = dict[str, np.ndarray]  # by "layer.kind"
Twins = tuple[Spectra, Spectra]  # of two seeds


def singular_values(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(the largest, the bulk), from the largest on, over the root mean square of the bulk."""
    values = torch.linalg.svdvals(weight.detach().double().cpu()).numpy()
    top = math.ceil(TOP * len(values))
    values = values / (math.sqrt(np.mean(values[top:] ** 2)) or 1.0)  # 0 where the rank is that low
    return values[:top], values[top:]


def spectrum(weight: torch.Tensor) -> np.ndarray:
    """Quantiles of the bulk, from its largest on."""
    bulk = singular_values(weight)[1]
    return np.interp(QUANTILES, (np.arange(len(bulk)) + 0.5) / len(bulk), bulk)


def largest(model: GPT) -> float:
    """Mean over the matrices."""
    return statistics.mean(singular_values(block.get_submodule(kind).weight)[0][0] for block in model.transformer.h for kind in KINDS)


def spectra_of(model: GPT) -> Spectra:
    return {f"{layer}.{kind}": spectrum(block.get_submodule(kind).weight) for layer, block in enumerate(model.transformer.h) for kind in KINDS}


def random_like(model: GPT, seed: int) -> Spectra:
    """Of normal random numbers in the same shapes."""
    generator = torch.Generator().manual_seed(seed)
    return {f"{layer}.{kind}": spectrum(torch.randn(block.get_submodule(kind).weight.shape, generator=generator))
            for layer, block in enumerate(model.transformer.h) for kind in KINDS}


def noisy_distance(a: Spectra, b: Spectra) -> float:
    """Over the matrices that both have, what seeds differ by included."""
    return math.sqrt(statistics.mean(float(np.mean((a[name] - b[name]) ** 2)) for name in a))


def distance(*pairs: tuple[Twins, Twins]) -> float:
    """Over all pairs and the matrices that both of a pair have; a negative square has a negative root."""
    square = statistics.mean(float(np.mean((a[0][name] - b[0][name]) * (a[1][name] - b[1][name]))) for a, b in pairs for name in a[0])
    return math.copysign(math.sqrt(abs(square)), square)


def layer_pairs(twins: Twins) -> list[tuple[Twins, Twins]]:
    """Of one model, kind by kind."""
    layers = [tuple({name.partition(".")[2]: spectrum for name, spectrum in found.items() if name.startswith(f"{layer}.")} for found in twins)
              for layer in sorted({name.partition(".")[0] for name in twins[0]})]
    return list(itertools.combinations(layers, 2))  # type: ignore[arg-type]


def trials(widths: list[int], steps: int, seed: int) -> dict[str, Trial]:
    run = lambda name, **flags: Trial({**SHAPE, **TUNED, "weight-decay": 0.0, "device-type": "cpu", "core-metric-every": -1, "sample-every": -1, "save-every": -1, "eval-every": steps,
                                       "num-iterations": steps, "seed": seed, **{k.replace("_", "-"): v for k, v in flags.items()}}, tag=f"spectra-{name}-{steps}-{seed}")
    small, large = widths[0], widths[1]
    width = lambda width: {"aspect-ratio": width // SHAPE["depth"]}
    found = {f"4x{w}": run(f"4x{w}", **width(w)) for w in widths}
    found["a quarter of the rate"] = run(f"4x{large}-slow", **width(large), **{name: TUNED[name] / 4 for name in TUNED})
    found["half of the steps"] = run(f"4x{large}-short", **{**width(large), "num_iterations": steps // 2, "eval_every": steps // 2})
    found["grown"] = run(f"4x{small}-4x{large}", **width(large), grow_path=f"4x{small},4x{large}", grow_at_tokens=0.5)
    return found


def load(trial: Trial) -> GPT:
    return checkpoints.load_model_from_dir(checkpoints.checkpoints_dir_of("base"), torch.device("cpu"), "eval", trial.name)[0]


def distances(widths: list[int], models: dict[str, GPT], other: dict[str, GPT], seed: int) -> dict[str, float]:
    """Of one seed, and another one's models."""
    twins = {name: (spectra_of(models[name]), spectra_of(other[name])) for name in models}
    random = {w: (random_like(models[f"4x{w}"], seed), random_like(models[f"4x{w}"], seed + 1000)) for w in widths}
    small, large = f"4x{widths[0]}", f"4x{widths[1]}"
    pairs = list(itertools.combinations(widths, 2))
    widened = lambda model, mode: spectra_of(grow(model, grown_config(model.config, n_layer=4, n_embd=widths[1]), mode=mode)[0])
    grown = {mode: (widened(models[small], mode), widened(other[small], mode)) for mode in MODES if mode != "hyperclone" or widths[1] % widths[0] == 0}
    return {
        "across widths": distance(*((twins[f"4x{a}"], twins[f"4x{b}"]) for a, b in pairs)),
        **{f"{a} and {b}": distance((twins[f"4x{a}"], twins[f"4x{b}"])) for a, b in pairs if len(pairs) > 1},
        "random matrices across widths": distance(*((random[a], random[b]) for a, b in pairs)),
        "trained and random": distance(*((twins[f"4x{w}"], random[w]) for w in widths)),
        "a quarter of the rate": distance((twins[large], twins["a quarter of the rate"])),
        "half of the steps": distance((twins[large], twins["half of the steps"])),
        "two layers of a model": distance(*(pair for w in widths for pair in layer_pairs(twins[f"4x{w}"]))),
        **{f"{small} grown to {large}, {mode}, untrained": distance((spectra, twins[large])) for mode, spectra in grown.items()},
        f"{small} grown to {large} at half of the tokens, trained": distance((twins["grown"], twins[large])),
        **{f"two seeds of 4x{w}, noise included": noisy_distance(*twins[f"4x{w}"]) for w in widths},
    }


def claims(rows: dict[str, list[float]]) -> str:
    """That widths are nearer to each other than what must be told apart from them."""
    lines = ["| models of several widths are nearer to each other than | by | verdict |", "|---|---:|---|"]
    for name in ("a quarter of the rate", "half of the steps", "two layers of a model", "trained and random"):
        gap = Estimate.of([b - a for a, b in zip(rows["across widths"], rows[name])])
        lines.append(f"| {name} | {gap.shown(4)} | {gap.verdict()} |")
    return "\n".join(lines)


def draw(models: dict[str, GPT], widths: list[int], rows: dict[str, list[float]], path: Path) -> None:
    with pictures(path, 15, 4.5, 3) as panels:
        for axes, name in zip(panels, ("1.attn.c_v", "2.mlp.c_fc")):
            for w in widths:
                axes.plot(QUANTILES, spectra_of(models[f"4x{w}"])[name], label=f"width {w}")
                axes.plot(QUANTILES, random_like(models[f"4x{w}"], 0)[name], ":", color=axes.lines[-1].get_color(), label=f"random, {w}")
            axes.set_title(f"layer {name.replace('.', ', ', 1)}")
            axes.set_xlabel("quantile")
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("singular value of the bulk over its root mean square")
        means = {name: Estimate.of(values) for name, values in reversed(rows.items())}
        panels[2].errorbar([mean.value for mean in means.values()], list(means), xerr=[mean.half for mean in means.values()], fmt="o", color="C0", markersize=4)
        panels[2].set_xscale("symlog", linthresh=0.01)
        panels[2].axvline(0, color="#c0c8d0", linewidth=1)
        panels[2].grid(axis="x", alpha=0.3)
        panels[2].tick_params(labelsize=8)
        panels[2].set_xlabel("distance (linear up to 0.01)")


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--widths", type=width_of_heads, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=positive_int, default=STEPS)
    args = parser.parse_args(argv)
    widths = sorted(set(args.widths))
    if args.seeds < 3 or len(widths) < 2:
        raise UsageError("give --seeds=3 or more, so that two seeds can be compared more than once, and two --widths or more")
    plans = [trials(widths, args.steps, seed) for seed in range(42, 42 + args.seeds)]
    runs = run_by_seed(lambda seed: trials(widths, args.steps, seed), args.seeds, args.jobs)
    losses = [{name: result.final for name, result in found.items()} for found in runs]
    models = [{name: load(trial) for name, trial in plan.items()} for plan in plans]
    found = [distances(widths, own, models[i - 1], i) for i, own in enumerate(models)]
    rows = {name: [each[name] for each in found] for name in found[0]}
    print("| singular values of | distance | by seed |\n|---|---:|---|")
    for name, values in rows.items():
        print(f"| {name} | {Estimate.of(values).shown(3, sign=False)} | {', '.join(f'{value:.4f}' for value in values)} |")
    print("\n" + claims(rows))
    tops = {name: [largest(own[name]) for own in models] for name in models[0]}
    print("\n| the largest singular value over that of the bulk | mean over the matrices | by seed |\n|---|---:|---|")
    for name, values in tops.items():
        print(f"| {name} | {Estimate.of(values).shown(3, sign=False)} | {', '.join(f'{value:.3f}' for value in values)} |")
    if args.out:
        write_text_atomic(args.out, to_json({"distances": rows, "largest": tops, "bpb": losses}))
    if args.plot:
        draw(models[0], widths, rows, args.plot)


if __name__ == "__main__":
    sys.exit(main())
