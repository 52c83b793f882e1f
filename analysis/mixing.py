"""How much is a token worth that a small model has seen, once the model has grown? At a constant learning rate, with branches that decay.

    python -m nanochat.dataset --source='/usr/**/*.py' && python -m scripts.tok_train --vocab-size=2048
    python -m analysis.mixing --out=mixing.json --plot=dev/mixing.png

The planner's question (scripts.plan --rho), for which no source is known. The trunk is four layers of width 128 from scratch at a constant rate. Smaller trunks grow into it in the middle and go on at that rate. The loss of the grown
model is looked up on the trunk's own curve: it is worth as many tokens D_eff as the trunk needs for it. With D_large tokens since the growth and D_small before,

    rho = (D_eff - D_large) / D_small,

so 1 says that the small model's tokens count as the large one's would have, and 0 that they were lost. Growth pays at a constant rate as long as rho exceeds the
small model's share of the FLOPs per token. Everything on fresh text (no token twice), all in the same order. Losses in bits per byte.
"""
import statistics
import sys
from pathlib import Path

import numpy as np

from analysis.study import DECAY, FLOPS_SHARE, LARGE, SMALL, UNIT, cost_with, nats_per_bpb, run_by_seed, steps_of, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

HORIZON, SHARE = 20, 0.8  # tokens per parameter; share of them that a small model sees
TRUNK, MIXED = 30, 10  # tokens per parameter of the trunk; after a growth at a constant rate


def trunk(seed: int, units: int, **flags) -> Trial:
    return Trial({**LARGE, "num-iterations": steps_of(units), "save-every": UNIT, "seed": seed, **flags})


def decayed(parent: Trial, at: int, until: int) -> Trial:
    """The branch that ends at step `until`, having decayed from `at` on."""
    return parent.branch(at, warmdown_steps=until - at)


def plan(seed: int) -> dict[str, Trial]:
    """All trainings of a seed, in the order in which they answer most."""
    large = trunk(seed, TRUNK)
    found = {"4x128": large}
    begin = steps_of(SHARE * HORIZON)
    for shape, flags in SMALL.items():
        small = trunk(seed, int(SHARE * HORIZON), **flags)
        found[shape] = small
        grown = small.branch(begin, grow_to="4x128", steady_steps=steps_of(MIXED), matrix_lr=LARGE["matrix-lr"], save_every=UNIT)
        found[f"{shape} -> 4x128"] = grown
        found[f"{shape} -> 4x128, decayed at {HORIZON}"] = decayed(grown, steps_of(HORIZON * (1 - DECAY)), steps_of(HORIZON))  # as many tokens as scratch
    for units in (5, 10, HORIZON):
        found[f"4x128, decayed at {units}"] = decayed(large, steps_of(units * (1 - DECAY)) // UNIT * UNIT, steps_of(units))
    return found


class Curve:
    """A trunk's losses at a constant rate, smoothed: a cubic in the logarithm of its tokens per parameter."""

    def __init__(self, units, losses):
        self.units = np.geomspace(units[0], units[-1], 2001)
        self.losses = np.minimum.accumulate(np.polyval(np.polyfit(np.log(units), losses, 3), np.log(self.units)))

    @classmethod
    def of(cls, result: Result) -> "Curve":
        kept = [(step / UNIT, loss) for step, loss in zip(result.steps, result.bpb) if step >= 2 * UNIT]  # before, the loss falls too fast for it
        return cls(*zip(*kept))

    def worth(self, losses) -> np.ndarray:
        """The tokens per parameter after which the trunk has these losses; no more than it was trained on."""
        return np.interp(-np.asarray(losses, dtype=float), -self.losses, self.units)


def rho_of(result: Result, curve: Curve, small: float) -> tuple[np.ndarray, np.ndarray]:
    """(tokens per parameter since the growth, rho there) at each validation of a model that grew after `small` tokens per parameter."""
    since = np.array(result.steps) / UNIT - small
    return since, (curve.worth(result.bpb) - since) / small


def draw(runs: dict[str, list[Result]], path: Path) -> None:
    """Left: losses at a constant rate over tokens. Right: rho over the tokens since the growth. Mean of the seeds."""
    with pictures(path, 13, 5, 2) as (losses, rhos):
        for i, (name, seeds) in enumerate((name, seeds) for name, seeds in runs.items() if "decayed" not in name):
            x = np.array(seeds[0].steps) / UNIT
            y = np.mean([seed.bpb for seed in seeds], axis=0)
            color = "black" if i == 0 else f"C{(i - 1) % 10}"
            first = 0 if "->" in name else 2
            losses.plot(x[first:], y[first:], color=color, label=name, linewidth=1.2, linestyle="-" if "->" in name or i == 0 else ":")
            if "->" in name:
                pairs = [rho_of(seed, Curve.of(scratch), SHARE * HORIZON) for seed, scratch in zip(seeds, runs["4x128"])]
                rhos.plot(pairs[0][0], np.mean([rho for _, rho in pairs], axis=0), color=color, marker=".", label=name)
        losses.set_xlabel("tokens per parameter of 4x128")
        losses.set_ylabel("validation bits per byte, constant rate")
        losses.set_ylim(top=runs["4x128"][0].bpb[3])
        rhos.set_xlabel("tokens per parameter since the growth")
        rhos.set_ylabel("rho: what a token of the small model is worth")
        rhos.axhline(FLOPS_SHARE, color="grey", linewidth=0.8, linestyle="--", label="its share of the FLOPs: growth pays above")
        for panel in (losses, rhos):
            panel.legend(frameon=False, fontsize=8)


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=1)
    args = parser.parse_args(argv)
    by_seed = run_by_seed(plan, args.seeds, args.jobs)
    runs = {name: [seed[name] for seed in by_seed] for name in by_seed[0]}
    curves = [Curve.of(result) for result in runs["4x128"]]
    small = SHARE * HORIZON
    seen = [3, 4, 6, 8, 10, 12, 16]
    print("rho of what a small model alone has seen, in tokens per parameter of 4x128:\n")
    print("| model | " + " | ".join(map(str, seen)) + " |\n|---|" + "---:|" * len(seen))
    for name, seeds in runs.items():
        if name != "4x128" and "->" not in name and "decayed" not in name:
            small_curves = [Curve.of(seed) for seed in seeds]
            worth = [statistics.mean(large.worth(np.interp(t, own.units, own.losses)) / t for large, own in zip(curves, small_curves)) for t in seen]
            print(f"| {name} | " + " | ".join(f"{rho:.2f}" for rho in worth) + " |")
    print(f"\nGrowth after {small:g} tokens per parameter of 4x128, at a constant rate. rho after so many more:\n")
    after = [0, 1, 2, 3, 6, 10]
    print("| growth | " + " | ".join(map(str, after)) + " |\n|---|" + "---:|" * len(after))
    for name, seeds in runs.items():
        if "->" in name and "decayed" not in name:
            found = [dict(zip(*(np.round(x, 3) for x in rho_of(seed, curve, small)))) for seed, curve in zip(seeds, curves)]
            print(f"| {name} | " + " | ".join(f"{statistics.mean(f[t] for f in found):.2f}" if all(t in f for f in found) else "" for t in map(float, after)) + " |")
    scratch = [name for name in runs if name.startswith("4x128, decayed")]
    nats = nats_per_bpb()
    print("\n| run | tokens per parameter | FLOPs, of scratch's | bits per byte | nats per token above scratch | FLOPs, of those that scratch needs for this loss |\n|---|---:|---:|---:|---:|---:|")
    reference = runs[f"4x128, decayed at {HORIZON}"]
    for name, seeds in runs.items():
        if "decayed" in name:
            rows = [(run.flops[-1] / full.flops[-1], run.final, (run.final - full.final) * nats,
                     run.flops[-1] / cost_with(run.final, [by[other].flops[-1] for other in scratch], [by[other].final for other in scratch]))
                    for run, full, by in zip(seeds, reference, by_seed)]
            share, loss, gap, needed = (statistics.mean(row[i] for row in rows) for i in range(4))
            print(f"| {name} | {seeds[0].steps[-1] / UNIT:g} | {share:.2f} | {loss:.4f} | {gap:+.4f} | {needed:.2f} |")
    if args.out:
        write_text_atomic(args.out, to_json(runs))
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    sys.exit(main())
