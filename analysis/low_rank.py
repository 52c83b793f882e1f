"""What low-rank layers cost and buy: loss against the dense model at equal tokens, equal FLOPs and equal parameters.

    python -m analysis.low_rank --out=low_rank.json --plot=low_rank.png

The question is that of a proposal on low-rank training (not published). On the data and the tokenizer in NANOCHAT_BASE_DIR. Every contestant has learning rates tuned at this size (dev/LOG.md has the
grids), sees the same batches in the same order, and runs with the same seeds, all without weight decay, which base_train would
make another one for each of these models. The rank is a quarter of the width.
"""
import statistics
import sys
from pathlib import Path

from analysis.estimates import Estimate
from analysis.study import SHAPE, STEPS, TUNED, dense_flops, nats_per_bpb, run_by_seed, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic

LOW_RANK = {**TUNED, "matrix-lr": 0.24}
RANK = 32
EQUAL = {"target-flops": 0}  # to be filled in: those of a dense run, which the vocabulary decides
CONTESTANTS: dict[str, dict] = {
    "dense": {**TUNED, "num-iterations": STEPS},
    "both, equal tokens": {**LOW_RANK, "rank": RANK, "num-iterations": STEPS},
    "both, equal FLOPs": {**LOW_RANK, "rank": RANK, **EQUAL},
    "attention, equal tokens": {**LOW_RANK, "attn-rank": RANK, "num-iterations": STEPS},
    "attention, equal FLOPs": {**LOW_RANK, "attn-rank": RANK, **EQUAL},
    "MLP, equal tokens": {**LOW_RANK, "mlp-rank": RANK, "num-iterations": STEPS},
    "MLP, equal FLOPs": {**LOW_RANK, "mlp-rank": RANK, **EQUAL},
    "naive (AdamW on the factors), equal tokens": {**TUNED, "matrix-lr": 1.0, "matrix-optimizer": "adamw", "rank": RANK, "num-iterations": STEPS},
    # ten low-rank layers of width 128 have the block parameters of four dense ones
    "both, ten layers, equal tokens": {**LOW_RANK, "rank": RANK, "num-iterations": STEPS, "depth": 10, "aspect-ratio": 12},
}


def plan(names: list[str], seed: int) -> dict[str, Trial]:
    flops = {"target-flops": dense_flops()}
    return {name: Trial({**SHAPE, "weight-decay": 0.0, **CONTESTANTS[name], **(flops if "target-flops" in CONTESTANTS[name] else {}), "seed": seed}) for name in names}


def draw(rows: dict[str, list[Result]], nats: float, path: Path) -> None:
    """Gap to the dense model of the same seed, one dot each."""
    names = [name for name in rows if name != "dense"]
    with picture(path, 8, 0.5 * len(rows) + 1.2) as axes:
        for y, name in enumerate(names):
            gaps = [(result.final - dense.final) * nats for result, dense in zip(rows[name], rows["dense"])]
            axes.plot(gaps, [y] * len(gaps), "o", color="#3b82f6", alpha=0.5)
            axes.plot(statistics.mean(gaps), y, "|", color="#e8853d", markersize=18, markeredgewidth=2.5)
        axes.axvline(0, color="#808890", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("nats per token above the dense model of the same seed")


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="contestants")
    args = parser.parse_args(argv)
    names = list(dict.fromkeys(["dense", *args.only]))
    by_seed = run_by_seed(lambda seed: plan(names, seed), args.seeds, args.jobs)
    rows = {name: [runs[name] for runs in by_seed] for name in names}
    nats = nats_per_bpb()
    print(f"Nats per token = {nats:.4f} x bits per byte\n\n| contestant | bits per byte, by seed | nats above dense | by seed | FLOPs of dense | parameters |\n|---|---|---:|---|---:|---:|")
    for name, found in rows.items():
        gaps = [(result.final - dense.final) * nats for result, dense in zip(found, rows["dense"])]
        print(f"| {name} | {', '.join(f'{r.final:.4f}' for r in found)} | {Estimate.of(gaps).shown(4)} | {', '.join(f'{g:+.3f}' for g in gaps)} | "
              f"{found[0].flops[-1] / rows['dense'][0].flops[-1]:.2f} | {found[0].params:,} |")
    if args.out:
        write_text_atomic(args.out, to_json(rows))
    if args.plot:
        draw(rows, nats, args.plot)


if __name__ == "__main__":
    sys.exit(main())
