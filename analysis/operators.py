"""Which operator loses least when a model grows, and gets most out of what it adds? The benchmark of dev/LEADERBOARD.md, track *growth*.

    python -m nanochat.dataset --source='/usr/**/*.py' && python -m scripts.tok_train --vocab-size=2048
    python -m analysis.operators --seeds=3 --out=operators.json --plot=dev/operators.png

A trunk of each start trains at a constant rate; every operator grows it to 4x128 at the same step and sees the same batches from there on, at a constant rate, and is
finished by a decay after one and after `--follow` tokens per parameter. Beside them 4x128 from scratch and the start that simply goes on, for as many FLOPs each as the
grown runs had in the end. Some 70 minutes of one core for each seed, and twice that with `--follow=2`. An operator is a line in OPERATORS: a name and base_train's flags.
"""
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

from analysis.estimates import Estimate
from analysis.study import FLOPS_SHARE, LARGE, SMALL, UNIT, check_ended, nats_per_bpb, run_by_seed, steps_of, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command, positive_int
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

TRUNK = 4  # tokens per parameter before the growth
DECAY = UNIT // 2  # steps
FAR = 0.3  # nats, where the picture ends
STARTS = {**SMALL,
          "0x128": {"grow-path": "0x128,4x128", "grow-at": 0.9, "num-iterations": UNIT}}  # nobody trains that alone; its own growth comes after the one here
GOES_ON = ("4x64", "1x128")
SHARES = {"4x64": FLOPS_SHARE, "1x128": 0.389, "0x128": 0.185}  # of the FLOPs of a token of 4x128
OPERATORS: dict[str, dict[str, dict]] = {
    "4x64": {
        "lossless": {},
        "clones": {"grow-mode": "hyperclone"},
        "fresh": {"grow-theta": 0, "grow-spread": 1},
        "sparkling": {"grow-mode": "sparkling", "grow-optimizer": "reset-new", "grow-rewarm": 64, "grow-rewarm-new": True},
        "masks that open": {"grow-mode": "masked", "grow-open": 128},
        "bus": {"grow-mode": "bus"},
        "in an identity": {"grow-mode": "identity"},
        "random": {"grow-mode": "random"},
        "lossless, state reset": {"grow-optimizer": "reset"},
    },
    "1x128": {
        "identity": {},
        "stack": {"grow-depth-mode": "stack"},
        "interleave": {"grow-depth-mode": "interleave"},
        "fresh": {"grow-depth-mode": "fresh"},
        "random": {"grow-depth-mode": "random"},
        "random, masks that open": {"grow-depth-mode": "random", "grow-open": 128},
    },
    "0x128": {"identity": {}, "fresh": {"grow-depth-mode": "fresh"}},
}


def plan(seed: int, follow: int) -> dict[str, Trial]:
    """`follow`: tokens per parameter after the growth."""
    found = {}
    finished = lambda trial, at: trial.branch(at, warmdown_steps=DECAY)
    spent = {start: TRUNK * share + follow for start, share in SHARES.items()}  # tokens of 4x128 per parameter
    scratch = Trial({**LARGE, "num-iterations": steps_of(math.ceil(max(spent.values()))), "save-every": UNIT // 4, "seed": seed})
    for start, flags in STARTS.items():
        alone = int(spent[start] / SHARES[start]) if start in GOES_ON else TRUNK
        trunk = Trial({**LARGE, "num-iterations": steps_of(alone), "save-every": UNIT, "seed": seed, **flags})
        for operator, how in OPERATORS[start].items():
            grown = trunk.branch(steps_of(TRUNK), grow_to="4x128", matrix_lr=LARGE["matrix-lr"], steady_steps=steps_of(follow), save_every=UNIT, **{k.replace("-", "_"): v for k, v in how.items()})
            found[f"{start}, {operator}"] = grown
            for units in sorted({1, follow}):
                found[f"{start}, {operator}, decayed after {units}"] = finished(grown, steps_of(TRUNK + units))
        if start in GOES_ON:
            rest = round(UNIT * ((spent[start] + DECAY / UNIT) / SHARES[start] - alone)) - DECAY  # a small model's decay is cheaper, too
            found[f"{start}, goes on"] = trunk.branch(steps_of(alone), steady_steps=rest, warmdown_steps=DECAY)
        found[f"{start}, 4x128 from scratch"] = finished(scratch, steps_of(round(spent[start] * 4) / 4))
    return found


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--follow", type=positive_int, default=1, help="tokens per parameter of 4x128 after the growth")
    args = parser.parse_args(argv)
    by_seed = run_by_seed(lambda seed: plan(seed, args.follow), args.seeds, args.jobs, all_must_end=False)
    ended = operators_that_ended(by_seed)
    nats = nats_per_bpb()
    units = sorted({1, args.follow})
    print(f"Grown to 4x128 after {TRUNK} tokens per parameter. Bits per byte, mean of {args.seeds} seeds\n")
    after = " | ".join([*(f"after {n}" for n in units), *(f"finished after {n}" for n in units)])
    print(f"| start | operator | before | right after | {after} | nats per token above the first operator | by seed | FLOPs, of 4x128's |")
    print("|---|---|" + "---:|" * (5 + 2 * len(units)))
    mean = lambda function: statistics.mean(map(function, by_seed))
    for start, operators in ended.items():
        for label, name in finished_runs(start, operators, args.follow):
            losses = [""] * (1 + 2 * len(units))
            if label in operators:
                grown = f"{start}, {label}"
                losses = [f"{mean(loss):.4f}" for loss in (lambda runs: runs[grown].grown[0], lambda runs: runs[grown].grown[1], *(lambda runs, n=n: at(runs[grown], TRUNK + n) for n in units),
                                                           *(lambda runs, n=n: runs[f"{grown}, decayed after {n}"].final for n in units[:-1]))]
            cost = mean(lambda runs: runs[name].flops[-1] / runs[f"{start}, 4x128 from scratch"].flops[-1])
            found = gaps(by_seed, start, name, args.follow, nats)
            cells = [start, label if label in operators else f"*{label}*", *losses, f"{mean(lambda runs: runs[name].final):.4f}", Estimate.of(found).shown(4), ", ".join(f"{gap:+.3f}" for gap in found), f"{cost:.2f}"]
            print("| " + " | ".join(cells) + " |")
    for start in OPERATORS:
        for operator in OPERATORS[start]:
            if operator not in ended[start]:
                print(f"\n{start}, {operator}: diverged with at least one of the seeds")
    if args.out:
        write_text_atomic(args.out, to_json(by_seed))
    if args.plot:
        draw(by_seed, ended, args.plot, args.follow, nats)


def operators_that_ended(by_seed: list[dict[str, Result]]) -> dict[str, list[str]]:
    """By start those of which no run diverged. Raises UsageError where one did that the others are compared with: a start's first operator, or a run without growth."""
    of = lambda name, start, operator: name == f"{start}, {operator}" or name.startswith(f"{start}, {operator}, decayed after ")
    others = {(start, operator) for start, operators in OPERATORS.items() for operator in list(operators)[1:]}
    check_ended((name, result) for runs in by_seed for name, result in runs.items() if not any(of(name, *one) for one in others))
    broken = {one for one in others for runs in by_seed for name, result in runs.items() if of(name, *one) and not result.bpb}
    return {start: [operator for operator in operators if (start, operator) not in broken] for start, operators in OPERATORS.items()}


def finished_runs(start: str, operators: Iterable[str], follow: int) -> list[tuple[str, str]]:
    """(what to call it, its name in the plan) of all that began so and were finished for as many FLOPs, the first operator first."""
    return [*((operator, f"{start}, {operator}, decayed after {follow}") for operator in operators),
            *((other, f"{start}, {other}") for other in ("goes on", "4x128 from scratch") if other != "goes on" or start in GOES_ON)]


def gaps(by_seed: list[dict[str, Result]], start: str, name: str, follow: int, nats: float) -> list[float]:
    """Nats per token above the first operator, by seed."""
    first = finished_runs(start, OPERATORS[start], follow)[0][1]
    return [(runs[name].final - runs[first].final) * nats for runs in by_seed]


def at(result: Result, units: int) -> float:
    """The loss after so many tokens per parameter."""
    return result.bpb[result.steps.index(steps_of(units))]


def draw(by_seed: list[dict[str, Result]], ended: dict[str, list[str]], path: Path, follow: int, nats: float) -> None:
    """How far each run ended from the first operator of its start, a dot for each seed; those beyond FAR stand at the edge with their mean."""
    with pictures(path, 15, 4, len(ended)) as panels:
        for axes, (start, operators) in zip(panels, ended.items()):
            names = finished_runs(start, operators, follow)
            for row, (label, name) in enumerate(names):
                found = gaps(by_seed, start, name, follow, nats)
                axes.plot([min(gap, FAR) for gap in found], [row] * len(found), "o", color="C0" if label in operators else "#808890")
                if max(found) > FAR:
                    axes.text(0.93 * FAR, row, f"{statistics.mean(found):.2f} →", ha="right", va="center")
            axes.axvline(0, color="#808890", linewidth=1)
            axes.grid(axis="x", alpha=0.3)
            axes.set_yticks(range(len(names)), [label for label, _ in names])
            axes.invert_yaxis()
            axes.set_title(f"{start} → 4x128")
            axes.locator_params(axis="x", nbins=5)
            axes.set_xlabel("nats per token above the first operator")


if __name__ == "__main__":
    sys.exit(main())
