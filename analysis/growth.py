"""What growth saves: FLOPs and seconds, all stages counted, to the final loss of the same model trained from scratch.

    python -m analysis.growth --out=growth.json --plot=growth.png

On the data and the tokenizer in NANOCHAT_BASE_DIR. From scratch and every way to grow are trained to several budgets, each with a schedule of
its own, on the same batches in the same order and with the same seeds. Learning rates are those tuned for the model from scratch (Muon's hold
at any width). The budget at which a contestant would reach the loss from scratch is interpolated between its own.
"""
import json
import math
import statistics
import sys
from pathlib import Path

from analysis.low_rank import SHAPE, STEPS, TUNED, nats_per_bpb
from analysis.trials import Result, run_trials
from nanochat.cli import ArgumentParser, command, positive_int
from nanochat.common import atomic_path, get_base_dir, write_text_atomic

CONTESTANTS: dict[str, dict] = {
    "from scratch": {},
    "width and depth": {"grow-path": "2x64,4x128", "grow-at": "0.1"},
    "width": {"grow-path": "4x64,4x128", "grow-at": "0.1"},
    "depth": {"grow-path": "2x128,4x128", "grow-at": "0.2"},
    "width, plain clones": {"grow-path": "4x64,4x128", "grow-at": "0.1", "grow-mode": "hyperclone"},
    "width, BUS": {"grow-path": "4x64,4x128", "grow-at": "0.1", "grow-mode": "bus"},
    "width, random": {"grow-path": "4x64,4x128", "grow-at": "0.1", "grow-mode": "random"},
    "depth, stacked": {"grow-path": "2x128,4x128", "grow-at": "0.2", "grow-depth-mode": "stack"},
}
BUDGETS = (0.5, 0.7, 1.0)  # of the FLOPs of STEPS steps from scratch


def budget_to(loss: float, budgets: list[float], losses: list[float]) -> float:
    """Where a curve through these points, straight against the log of the budget, reaches `loss`."""
    pairs = sorted(zip(budgets, losses))
    (b0, l0), (b1, l1) = next(((a, b) for a, b in zip(pairs, pairs[1:]) if b[1] <= loss), (pairs[-2], pairs[-1]))
    return math.exp(math.log(b0) + (math.log(b1) - math.log(b0)) * (l0 - loss) / (l0 - l1))


def flags_of(name: str, budget: float, seed: int) -> dict:
    if name == "from scratch":
        return {**SHAPE, **TUNED, "num-iterations": round(STEPS * budget), "seed": seed}
    return {**SHAPE, **TUNED, "num-iterations": STEPS, "grow-budget": budget, "seed": seed, **CONTESTANTS[name]}


def draw(runs: dict[str, list[list[Result]]], nats: float, path: Path) -> None:
    """Final loss against FLOPs, all seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(runs.items()):
        for seed in seeds:
            axes.plot([r.flops[-1] for r in seed], [r.final * nats for r in seed], "o-", markersize=4, color="black" if i == 0 else f"C{i - 1}",
                      label=name if seed is seeds[0] else None)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs, all stages")
    axes.set_ylabel("final validation loss, nats per token")
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=positive_int, default=3)
    parser.add_argument("--jobs", type=positive_int, default=2, help="trials at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="contestants")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw the losses into this picture")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(["from scratch", *args.only]))
    seeds = range(42, 42 + args.seeds)
    results = iter(run_trials(get_base_dir(), [flags_of(name, budget, seed) for name in names for seed in seeds for budget in BUDGETS], args.jobs))
    runs = {name: [[next(results) for _ in BUDGETS] for _ in seeds] for name in names}
    nats = nats_per_bpb()
    print("| contestant | " + " | ".join(f"nats at {budget:g} of the FLOPs" for budget in BUDGETS) + " | FLOPs to the loss from scratch | seconds |\n|---|" + "---|" * (len(BUDGETS) + 2))
    for name, found in runs.items():
        flops, seconds = [], []
        for seed, scratch in zip(found, runs["from scratch"]):
            losses = [r.final for r in seed]
            flops.append(budget_to(scratch[-1].final, [r.flops[-1] for r in seed], losses) / scratch[-1].flops[-1])
            seconds.append(budget_to(scratch[-1].final, [r.seconds for r in seed], losses) / scratch[-1].seconds)
        print(f"| {name} | " + " | ".join(f"{statistics.mean(seed[i].final for seed in found) * nats:.4f}" for i in range(len(BUDGETS)))
              + f" | {statistics.mean(flops):.2f} ({', '.join(f'{x:.2f}' for x in flops)}) | {statistics.mean(seconds):.2f} |")
    if args.out:
        write_text_atomic(args.out, json.dumps({name: [[vars(r) for r in seed] for seed in found] for name, found in runs.items()}))
    if args.plot:
        draw(runs, nats, args.plot)


if __name__ == "__main__":
    sys.exit(main())
