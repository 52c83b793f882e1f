"""Normalized (nGPT) against pre-norm layers: steps and seconds to the same loss, with Muon and with AdamW.

    python -m analysis.normalized --out=normalized.json --plot=normalized.png

The claim is that of nGPT (Loshchilov et al., 2410.01131): far fewer steps to the same loss. On the data and the tokenizer in NANOCHAT_BASE_DIR. Learning rates are tuned at this size for each of the four (dev/LOG.md has the
grids); batches, their order and the seeds are the same. Each contestant is trained to several horizons with a schedule of its own, since a
loss in the middle of a long schedule says little about a short one; the steps to the pre-norm model's loss at the full horizon are
interpolated between them.
"""
import statistics
import sys
from pathlib import Path

from analysis.estimates import Estimate
from analysis.study import SHAPE, STEPS, TUNED, cost_with, nats_per_bpb, run_by_seed, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic

CONTESTANTS: dict[str, dict] = {
    "pre-norm, Muon": TUNED,
    "nGPT, Muon": {**TUNED, "matrix-lr": 0.8, "block": "ngpt"},
    "pre-norm, AdamW": {**TUNED, "matrix-lr": 0.6, "matrix-optimizer": "adamw"},
    "nGPT, AdamW": {**TUNED, "matrix-lr": 0.8, "matrix-optimizer": "adamw", "block": "ngpt"},
}
HORIZONS = (0.65, 1.0)  # shares of STEPS


def draw(runs: dict[str, list[list[Result]]], nats: float, path: Path) -> None:
    """Final loss of each horizon, all seeds."""
    with picture(path, 7, 4.5) as axes:
        for (name, seeds), color in zip(runs.items(), ("#3b82f6", "#e8853d", "#93c5fd", "#fbbf8a")):
            for seed in seeds:
                axes.plot([r.steps[-1] for r in seed], [r.final * nats for r in seed], "o-", color=color, label=name if seed is seeds[0] else None, markersize=4)
        axes.set_xlabel("steps of the run")
        axes.set_ylabel("final validation loss, nats per token")
        axes.legend(frameon=False)


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    args = parser.parse_args(argv)
    lengths = [round(STEPS * share) for share in HORIZONS]
    plan = lambda seed: {f"{name}, {length}": Trial({**SHAPE, **flags, "num-iterations": length, "seed": seed}) for name, flags in CONTESTANTS.items() for length in lengths}
    by_seed = run_by_seed(plan, args.seeds, args.jobs)
    runs = {name: [[found[f"{name}, {length}"] for length in lengths] for found in by_seed] for name in CONTESTANTS}
    nats = nats_per_bpb()
    print("| contestant | " + " | ".join(f"nats at {length} steps" for length in lengths) + " | steps to pre-norm's loss | seconds per step, of pre-norm |\n|---|" + "---|" * (len(lengths) + 2))
    for name, found in runs.items():
        baseline = runs[f"pre-norm, {name.split(', ')[1]}"]
        ratios = [cost_with(base[-1].final, lengths, [r.final for r in seed]) / lengths[-1] for seed, base in zip(found, baseline)]
        pace = [seed[-1].seconds / base[-1].seconds for seed, base in zip(found, baseline)]
        print(f"| {name} | " + " | ".join(f"{statistics.mean(seed[i].final for seed in found) * nats:.4f}" for i in range(len(lengths)))
              + f" | {Estimate.of(ratios).shown(2, sign=False)} ({', '.join(f'{ratio:.2f}' for ratio in ratios)}) | {statistics.median(pace):.2f} |")
    if args.out:
        write_text_atomic(args.out, to_json(runs))
    if args.plot:
        draw(runs, nats, args.plot)


if __name__ == "__main__":
    sys.exit(main())
