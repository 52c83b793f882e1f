"""What growth saves: FLOPs and seconds, all stages counted, to the loss of the same model trained from scratch.

    python -m analysis.growth --out=growth.json --plot=growth.png

The claim is that of work on growth (HyperCloning, 2409.12903; stacking, 2405.15319): the large model's loss for fewer FLOPs. On the data and the tokenizer in NANOCHAT_BASE_DIR. From scratch and every way to grow are trained with schedules of their own, on the same
batches in the same order and with the same seeds. Learning rates are those tuned for the model from scratch (Muon's hold at any width).
The budget at which the model from scratch has a contestant's loss is interpolated on its own curve of final losses over budgets.
"""
import statistics
import sys
from pathlib import Path

from analysis.estimates import Estimate
from analysis.study import SHAPE, STEPS, TUNED, cost_with, dense_flops, nats_per_bpb, run_by_seed, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic

SCRATCH = (0.45, 0.6, 0.8, 1.0)  # budgets: shares of the FLOPs of STEPS steps of the last model
WIDTH = {"grow-path": "4x64,4x128", "grow-at": "0.6"}
DEPTH = {"grow-path": "2x128,4x128", "grow-at": "0.5"}
CONTESTANTS: dict[str, tuple[dict, tuple[float, ...]]] = {
    "width at 0.6": (WIDTH, (0.6, 0.8)),
    "width at 0.8": ({**WIDTH, "grow-at": "0.8"}, (0.6, 0.8)),
    "depth at 0.2, width at 0.6": ({"grow-path": "2x64,4x64,4x128", "grow-at": "0.2,0.6"}, (0.6, 0.8)),
    "width at 0.6, hyperclone": ({**WIDTH, "grow-mode": "hyperclone"}, (0.6,)),
    "width at 0.6, bus": ({**WIDTH, "grow-mode": "bus"}, (0.6,)),
    "width at 0.6, random": ({**WIDTH, "grow-mode": "random"}, (0.6,)),
    "depth at 0.5": (DEPTH, (0.6,)),
    "depth at 0.5, stacked": ({**DEPTH, "grow-depth-mode": "stack"}, (0.6,)),
    # not a way to the model from scratch, but what growth must be measured against as well: the small model alone, for as many FLOPs
    "4x64, never grown": ({"aspect-ratio": 16}, (0.6, 0.8)),
}
ALL = {"from scratch": ({}, SCRATCH), **CONTESTANTS}


def plan(seed: int) -> dict[str, Trial]:
    flops = dense_flops()
    horizon = lambda flags, budget: {"num-iterations": STEPS, "grow-budget": budget} if "grow-path" in flags else {"target-flops": budget * flops}
    return {f"{name}, {budget:g}": Trial({**SHAPE, **TUNED, **horizon(flags, budget), **flags, "seed": seed}) for name, (flags, budgets) in ALL.items() for budget in budgets}


def draw(runs: dict[str, list[list[Result]]], nats: float, path: Path) -> None:
    """Final loss against FLOPs, mean of the seeds."""
    with picture(path, 8, 5) as axes:
        for i, (name, seeds) in enumerate(runs.items()):
            color = "black" if i in (0, len(runs) - 1) else f"C{i - 1 if i < 8 else i}"  # C7 is grey
            budgets = [r.flops[-1] for r in seeds[0]]
            axes.plot(budgets, [statistics.mean(seed[k].final for seed in seeds) * nats for k in range(len(budgets))], "o:" if i == len(runs) - 1 else "o-",
                      color=color, label=name)
            for seed in seeds:
                axes.plot(budgets, [r.final * nats for r in seed], ".", color=color, alpha=0.4)
        axes.set_xscale("log")
        axes.set_xlabel("training FLOPs, all stages")
        axes.set_ylabel("final validation loss, nats per token")
        axes.legend(frameon=False)


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    args = parser.parse_args(argv)
    by_seed = run_by_seed(plan, args.seeds, args.jobs)
    runs = {name: [[found[f"{name}, {budget:g}"] for budget in budgets] for found in by_seed] for name, (_, budgets) in ALL.items()}
    nats = nats_per_bpb()
    print("| contestant | FLOPs | nats per token | by seed | FLOPs, of those from scratch to the same loss | by seed | seconds, of the same |\n|---|---:|---:|---|---:|---|---:|")
    scratch = runs["from scratch"]
    for name, found in runs.items():
        for k, budget in enumerate(ALL[name][1]):
            losses = [seed[k].final for seed in found]
            flops = [seed[k].flops[-1] / cost_with(seed[k].final, [r.flops[-1] for r in base], [r.final for r in base])
                     for seed, base in zip(found, scratch)]
            seconds = [seed[k].seconds / cost_with(seed[k].final, [r.seconds for r in base], [r.final for r in base])
                       for seed, base in zip(found, scratch)]
            print(f"| {name} | {budget:g} | {statistics.mean(losses) * nats:.3f} | {', '.join(f'{loss * nats:.3f}' for loss in losses)} | "
                  f"{Estimate.of(flops).shown(2, sign=False)} | {', '.join(f'{x:.2f}' for x in flops)} | {statistics.mean(seconds):.2f} |")
    if args.out:
        write_text_atomic(args.out, to_json(runs))
    if args.plot:
        draw(runs, nats, args.plot)


if __name__ == "__main__":
    sys.exit(main())
