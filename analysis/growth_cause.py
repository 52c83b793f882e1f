"""Why growth did not pay: because it came inside the decay? Growth before and in the warm-down, with long and short ones.

    python -m analysis.growth_cause

A question that growth.py and mixing.py left open. 4x64 grows to 4x128 after 0.5 and 0.8 of the tokens, under a warm-down over 0.65 of the run (nanochat's) and over 0.15. Scratch has each of the two as well, and the same tokens
in the same order. Growth at 0.5 has the rate of 4x128 from its beginning, growth at 0.8 that of 4x64 to its end: do not compare the two. The FLOPs that scratch needs for a loss
are read off its own runs of 0.5, 0.75 and all of the tokens. Beside them 4x64 alone, for as many FLOPs as the grown runs.
"""
import statistics
import sys

from analysis.study import FLOPS_SHARE, LARGE, SMALL, cost_with, nats_per_bpb, run_by_seed, steps_of, study_parser
from analysis.trial import Trial
from nanochat.cli import command, positive_float
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic

WARMDOWNS = (0.65, 0.15)
MOMENTS = (0.5, 0.8)
SHORTER = (0.5, 0.75)  # shares of the tokens


def plan(units: float, seed: int) -> dict[str, Trial]:
    found = {}
    for warmdown in WARMDOWNS:
        flags = {**LARGE, "num-iterations": steps_of(units), "warmdown-ratio": warmdown, "seed": seed}
        found[f"scratch, {warmdown}"] = Trial(flags)
        for share in SHORTER:
            found[f"scratch, {share} of the tokens, {warmdown}"] = Trial({**flags, "num-iterations": steps_of(units * share)})
        for moment in MOMENTS:
            budget = round(FLOPS_SHARE * moment + 1 - moment, 4)
            found[f"grown at {moment}, {warmdown}"] = Trial({**flags, "grow-path": "4x64,4x128", "grow-at-tokens": moment, "grow-budget": budget,
                                                             "matrix-lr": SMALL["4x64"]["matrix-lr"] if moment > 0.5 else LARGE["matrix-lr"]})
            found[f"4x64 alone, for the FLOPs of {moment}, {warmdown}"] = Trial({**flags, **SMALL["4x64"], "num-iterations": steps_of(units * budget / FLOPS_SHARE)})
    return found


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=1)
    parser.add_argument("--units", type=positive_float, default=5, help="tokens per parameter of 4x128")
    args = parser.parse_args(argv)
    by_seed = run_by_seed(lambda seed: plan(args.units, seed), args.seeds, args.jobs)
    nats = nats_per_bpb()
    print("| run, share of the warm-down | FLOPs, of scratch's | bits per byte | nats per token above scratch | FLOPs, of those that scratch needs for this loss |\n|---|---:|---:|---:|---:|")
    for name in by_seed[0]:
        warmdown = name.rsplit(", ", 1)[1]
        rows = []
        for runs in by_seed:
            run, full = runs[name], runs[f"scratch, {warmdown}"]
            scratch = [full, *(runs[f"scratch, {share} of the tokens, {warmdown}"] for share in SHORTER)]
            needed = cost_with(run.final, [other.flops[-1] for other in scratch], [other.final for other in scratch])
            rows.append((run.flops[-1] / full.flops[-1], run.final, (run.final - full.final) * nats, run.flops[-1] / needed))
        share, loss, gap, cost = (statistics.mean(row[i] for row in rows) for i in range(4))
        print(f"| {name} | {share:.2f} | {loss:.4f} | {gap:+.4f} | {cost:.2f} |")
    if args.out:
        write_text_atomic(args.out, to_json(by_seed))
    if args.plot:
        with picture(args.plot, 7, 5) as axes:
            for i, warmdown in enumerate(WARMDOWNS):
                for kind, label, marker in (("scratch", "scratch", "o-"), ("grown", "grown", "x"), ("4x64", "4x64 alone", "s:")):
                    names = sorted((name for name in by_seed[0] if name.startswith(kind) and name.endswith(f", {warmdown}")), key=lambda name: by_seed[0][name].flops[-1])
                    axes.plot([by_seed[0][name].flops[-1] for name in names], [statistics.mean(runs[name].final for runs in by_seed) for name in names], marker,
                              color=f"C{i}", label=f"{label}, warm-down over {warmdown}", markersize=5)
            axes.set_xlabel("training FLOPs, all stages")
            axes.set_ylabel("final validation bits per byte")
            axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
