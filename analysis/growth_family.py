"""A family of sizes from one trunk, and a finished model made larger: what they cost next to runs of their own.

    python -m analysis.growth_family --out=family.json --plot=dev/growth_family.png

What mixing.py suggests growth is good for. Measured are final losses and the FLOPs of all stages.

**Family**: 4x64 grows to 4x96 and 4x128 at a constant rate, and each size is finished by a branch in which the rates fall (as --grow-family does). It is compared with
runs of its sizes alone, with schedules of the same kind and the same text; of a size's two losses the difference is told in nats. In the *short* family a size ends after as many
tokens as alone, those of the smaller ones included; in the *long* one it sees more, so much that the smaller ones end below runs of their own (found with seed 42: a smaller one's token had been taken to be worth 0.4, which was not enough).
**Extension**: 4x64 is finished, its FLOPs are spent and do not count. What does it take from there to the loss of 4x128 from scratch? Grown to 4x128, at full rates again or
half of them, for some lengths; always beside the small one simply trained on for as many FLOPs.
"""
import statistics
import sys
from pathlib import Path

from analysis.estimates import Estimate
from analysis.study import DECAY, FLOPS_SHARE, LARGE, SMALL, cost_with, nats_per_bpb, run_by_seed, steps_of, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command, positive_float
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

SIZES: dict[str, dict] = {"4x64": SMALL["4x64"], "4x96": {"aspect-ratio": 24, "matrix-lr": 0.17}, "4x128": {}}
SHARES = (0.6, 0.8, 1.0)  # of the tokens of 4x128 alone, that each size has alone
ENDS = {"short": SHARES, "long": (0.6, 1.0, 1.5)}  # where the sizes of a family end, in the same measure
EXTENSIONS = (0.1, 0.25, 0.5)  # lengths, as shares of the tokens of 4x128 from scratch; what does not grow goes on for as many FLOPs
RATES = {"grown to 4x128": 1.0, "grown at half of the rate": 0.5}  # after the growth, of those that 4x128 has from scratch
CONTINUED = "not grown"


def run_of(size: str, length: int, seed: int, **flags) -> Trial:
    """From scratch over `length` steps; the rates fall at the end."""
    return Trial({**LARGE, "num-iterations": length, "warmdown-ratio": DECAY, "seed": seed, **SIZES[size], **flags})


def family(length: int, ends: tuple[float, ...], seed: int) -> dict[str, Trial]:
    """Each size of the family, finished. `length`: steps of 4x128 alone, of which `ends` are shares; a size's decay comes before its end."""
    found, trunk, at = {}, None, 0
    for size, share in zip(SIZES, ends):
        end = round(share * length * (1 - DECAY))
        if trunk is None:
            trunk = Trial({**LARGE, "num-iterations": end, "seed": seed, **SIZES[size]})
        else:
            trunk = trunk.branch(at, grow_to=size, steady_steps=end - at, matrix_lr=SIZES[size].get("matrix-lr", LARGE["matrix-lr"]))
        at = end
        found[size] = trunk.branch(end, warmdown_steps=round(end * DECAY / (1 - DECAY)))
    return found


def plan(units: float, seed: int) -> dict[str, Trial]:
    length = steps_of(units)
    found: dict[str, Trial] = {}
    for name, ends in ENDS.items():
        found |= {f"{size}, {name} family": trial for size, trial in family(length, ends, seed).items()}
    for size, share in zip(SIZES, SHARES):
        found[f"{size}, alone"] = run_of(size, round(share * length), seed)
    small = run_of("4x64", length, seed)
    found["4x64, finished"] = small
    for share in EXTENSIONS:
        more = round(share * length)
        fall = round(DECAY * more)
        for way, rate in RATES.items():
            found[f"4x64, {way}, {share:g}"] = small.branch(length, grow_to="4x128", steady_rate=rate, steady_steps=more - fall, warmdown_steps=fall, matrix_lr=LARGE["matrix-lr"])
        longer = round(more / FLOPS_SHARE)
        found[f"4x64, {CONTINUED}, {share:g}"] = small.branch(length, steady_rate=1.0, steady_steps=longer - round(DECAY * longer), warmdown_steps=round(DECAY * longer))
    return found


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=1)
    parser.add_argument("--units", type=positive_float, default=5, help="tokens per parameter of 4x128")
    args = parser.parse_args(argv)
    by_seed = run_by_seed(lambda seed: plan(args.units, seed), args.seeds, args.jobs)
    nats, mean = nats_per_bpb(), lambda function: statistics.mean(map(function, by_seed))
    print("| family | size | bits per byte, of the family | alone | difference in nats per token | by seed |\n|---|---|---:|---:|---:|---|")
    for name in ENDS:
        for size in SIZES:
            gaps = [(runs[f"{size}, {name} family"].final - runs[f"{size}, alone"].final) * nats for runs in by_seed]
            print(f"| {name} | {size} | {mean(lambda runs: runs[f'{size}, {name} family'].final):.4f} | {mean(lambda runs: runs[f'{size}, alone'].final):.4f} | "
                  f"{Estimate.of(gaps).shown(4)} | {', '.join(f'{gap:+.4f}' for gap in gaps)} |")
    shares = ", ".join(f"{costs(by_seed[0], f'{name} family')[-1] / costs(by_seed[0], 'alone')[-1]:.2f} ({name})" for name in ENDS)
    print(f"\nFLOPs of a family, of those of the runs alone: {shares}\n")
    scratch = "4x128, alone"
    print("| the finished 4x64 | FLOPs from there, of 4x128 from scratch | bits per byte | nats per token above scratch |\n|---|---:|---:|---:|")
    spent = lambda runs, name: (runs[name].flops[-1] - runs["4x64, finished"].flops[-1]) / runs[scratch].flops[-1]
    for way in (*RATES, CONTINUED):
        names = [f"4x64, {way}, {share:g}" for share in EXTENSIONS]
        for name in names:
            print(f"| {way} | {mean(lambda runs: spent(runs, name)):.2f} | {mean(lambda runs: runs[name].final):.4f} | {mean(lambda runs: (runs[name].final - runs[scratch].final) * nats):+.4f} |")
        needed = [cost_with(runs[scratch].final, [spent(runs, name) for name in names], [runs[name].final for name in names]) for runs in by_seed]
        print(f"| {way}, to the loss of 4x128 from scratch | {Estimate.of(needed).shown(2, sign=False)} ({', '.join(f'{x:.2f}' for x in needed)}) | | |")
    if args.out:
        write_text_atomic(args.out, to_json(by_seed))
    if args.plot:
        draw(by_seed[0], args.plot)


def costs(runs: dict[str, Result], name: str) -> list[float]:
    """FLOPs until each size is finished, those of the sizes before it included: of a family ("long family"), or of the runs "alone"."""
    found, spent, at = [], 0.0, 0.0
    for size in SIZES:
        member = runs[f"{size}, {name}"]
        spent += member.flops[-1] - at
        found.append(spent)
        at = member.begin  # where it left the family's trunk, whose FLOPs the next branch's begin with; 0 for a run of its own
    return found


def draw(runs: dict[str, Result], path: Path) -> None:
    with pictures(path, 12, 4.5, 2) as (left, right):
        for marker, name in zip("o^x", (*(f"{name} family" for name in ENDS), "alone")):
            points = list(zip(costs(runs, name), (runs[f"{size}, {name}"].final for size in SIZES)))
            left.plot(*zip(*points), marker + "-", label=name)
            for size, point in zip(SIZES, points):
                left.annotate(size, point, textcoords="offset points", xytext=(6, 4), fontsize=8)
        left.set_xlabel("FLOPs of all sizes so far")
        begin = runs["4x64, finished"].flops[-1]
        for way, style in zip((*RATES, CONTINUED), ("o-", "^-", "x:")):
            found = [runs[f"4x64, {way}, {share:g}"] for share in EXTENSIONS]
            right.plot([0, *(run.flops[-1] - begin for run in found)], [runs["4x64, finished"].final, *(run.final for run in found)], style, label=way)
        right.axhline(runs["4x128, alone"].final, color="black", linewidth=0.8, label="4x128 from scratch")
        right.set_xlabel("FLOPs after 4x64 is finished")
        for panel in (left, right):
            panel.set_ylabel("validation bits per byte")
            panel.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
