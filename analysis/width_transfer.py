"""Do the learning rates of normalized layers hold at other widths? Final loss over --matrix-lr at several widths.

    python -m analysis.width_transfer --plot=width_transfer.png

That they do is what mu-parametrization gets by scaling (2203.03466), and what norms on every matrix suggest (nGPT, 2410.01131). On the data and the tokenizer in NANOCHAT_BASE_DIR.
A learning rate that transfers has its minimum at the same place for every width.
"""
import sys

from analysis.study import SHAPE, STEPS, TUNED, run_trials, study_parser, width_of_heads
from nanochat.cli import command, positive_float, positive_int
from nanochat.common import get_base_dir
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=0)
    parser.add_argument("--block", default="ngpt", choices=("ngpt", "prenorm"))
    parser.add_argument("--widths", type=width_of_heads, nargs="+", default=[64, 128, 256])
    parser.add_argument("--matrix-lrs", type=positive_float, nargs="+", default=[0.4, 0.8, 1.6])
    parser.add_argument("--steps", type=positive_int, default=STEPS)
    args = parser.parse_args(argv)
    base = {**SHAPE, **TUNED, "block": args.block, "num-iterations": args.steps}
    results = iter(run_trials(get_base_dir(), [{**base, "aspect-ratio": width // SHAPE["depth"], "matrix-lr": lr} for width in args.widths
                                               for lr in args.matrix_lrs], args.jobs))
    runs = {width: [next(results) for _ in args.matrix_lrs] for width in args.widths}
    losses = {width: [result.final for result in found] for width, found in runs.items()}
    print("| width | " + " | ".join(f"lr {lr:g}" for lr in args.matrix_lrs) + " | best at |\n|---|" + "---|" * (len(args.matrix_lrs) + 1))
    for width, found in losses.items():
        print(f"| {width} | " + " | ".join(f"{loss:.4f}" for loss in found) + f" | {args.matrix_lrs[found.index(min(found))]:g} |")
    if args.out:
        write_text_atomic(args.out, to_json(runs))
    if args.plot:
        with picture(args.plot, 6, 4) as axes:
            for width, found in losses.items():
                axes.plot(args.matrix_lrs, found, "o-", label=f"width {width}")
            axes.set_xscale("log")
            axes.set_xlabel("--matrix-lr")
            axes.set_ylabel("final validation bits per byte")
            axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
