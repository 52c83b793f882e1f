"""Do models end better that have grown? The claims of the drafts on growing, with what they must be measured against, for normalized models (nGPT, 2410.01131).

    python -m analysis.growth_drafts --seeds=3 --plot=drafts.png               4x64, vocabulary 2,048, on a CPU
    python -m analysis.growth_drafts --size=64m --seeds=3 --plot=drafts.png    8x512, vocabulary 12,288: a GPU for 3 hours a seed (by its FLOPs; runs/growth_drafts.sh)

The drafts (not published) grow a 64M nGPT by HyperCloning (2409.12903) and by BUS, which tiles a matrix, cuts it to size and scales it by old width / new width, and so
grows by fractions too; they report SNLI and MNLI (nanochat/evals/nli.py) and say that 15 to 20 % of the tokens bring 80 to 90 % of the gain. Their configuration is not
known. Here `64m` has 8 layers of width 512, 8 heads and 63.0M parameters, embeddings and value embeddings among them, and 20 tokens for each of the 31M in blocks and
head; the default is its twin, with half as many layers and heads, an eighth of the width and 4.5 tokens for each of its 0.33M. All arms have the FLOPs of the standard run, the same text in the same
order and schedules over their FLOPs. The rate of the matrices is tuned on another seed and half of a run (rates.py), for the largest model, whose rate all that become it
have, and for the two smaller ones that never grow: the first stage's, and that of the middle stage. A stage ends by --kappa, the share of its gain that is left; what the smallest
model would end with is known from the runs of it alone, whose FLOPs are not counted, later stages foretell it. So begin with all seeds that you want, and with one kappa: a later
call would know more of both stages, from what this one has trained. What grows in one step is large from then on, what grows by fractions only at the end of its last stage but
one: compare modes among those that grow alike. The small model alone reads 2.5 times the tokens of the standard one: give it text enough.

Measured: validation loss over FLOPs and seconds (of which the first steps of a run and the first after a growth, which compile, take none), and by a briefer validation
around each growth; paired differences of the seeds; the FLOPs at which the standard model, by runs of 5 to 100 % of the tokens with schedules of their own, has an arm's loss;
NLI by prompt and by probe, where --nli has the data; the share of the gain that a share of the tokens brings.
"""
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from analysis.estimates import Estimate
from analysis.rates import best_rate, rates_table, try_rates
from analysis.runner import Place, places_for
from analysis.study import SHAPE, TUNED, cost_with, flops_per_token, nats_per_bpb, run_by_seed, run_trials, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import UsageError, command, fraction, positive_int
from nanochat.common import get_base_dir
from nanochat.drawing import pictures
from nanochat.evals.nli import DRAFTS, read_sets
from nanochat.files import to_json, write_text_atomic
from nanochat.tokenizer import get_tokenizer


@dataclass(frozen=True)
class Size:
    flags: dict
    widths: tuple[int, ...]  # of the stages
    vocabulary: int
    steps: int  # of the standard run
    rates: tuple[float, ...]  # of the matrices, to begin with

    def path(self, *widths: int) -> str:
        return ",".join(f"{self.flags['depth']}x{width}" for width in widths)

    @property
    def smaller(self) -> dict[str, dict]:
        """What makes the models that never grow of the flags of the last stage."""
        return {name: {"aspect-ratio": width // self.flags["depth"]} for name, width in ((SMALL, self.widths[0]), (MIDDLE, self.widths[len(self.widths) // 2]))}

    def shares(self) -> dict[str, float]:
        """FLOPs of a token of these, of those of the last stage's."""
        return {name: flops_per_token({**self.flags, **flags}, self.vocabulary) / flops_per_token(self.flags, self.vocabulary) for name, flags in self.smaller.items()}


SIZES = {
    "cpu": Size({**SHAPE, **TUNED, "aspect-ratio": 16, "head-dim": 16, "block": "ngpt", "eval-tokens": 32768}, (32, 48, 64), 2048, 360, (0.4, 0.8)),
    # what is not named has base_train's defaults, which are for batches of this order
    "64m": Size({"device-type": "cuda", "depth": 8, "aspect-ratio": 64, "head-dim": 64, "max-seq-len": 1024, "window-pattern": "L", "device-batch-size": 32,
                 "total-batch-size": 131072, "block": "ngpt", "eval-tokens": 1048576}, (256, 320, 384, 448, 512), 12288, 4800, (0.02, 0.04)),
}
STANDARD, SMALL, MIDDLE = "standard", "small alone", "middle alone"
HYPERCLONE, BUS_ONCE, LOSSLESS_ONCE, BUS, LOSSLESS = "HyperCloning, in one step", "BUS, in one step", "lossless, in one step", "BUS, by fractions", "lossless, by fractions"
GROWN = {HYPERCLONE: ("hyperclone", False), BUS_ONCE: ("bus", False), LOSSLESS_ONCE: ("lossless", False), BUS: ("bus", True), LOSSLESS: ("lossless", True)}  # mode, and whether by fractions
METHOD_OF = {STANDARD: "standard", BUS: "BUS", HYPERCLONE: "HyperCloning"}  # of the drafts
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the tokens, for runs of their own
CLAIMED = ((0.15, 0.8), (0.2, 0.9))  # share of the tokens, share of the gain
TASKS = ("nli-prompt", "nli-probe")
TUNING_SEED = 41  # no other run's
VALIDATIONS = 40  # in a run


# -----------------------------------------------------------------------------
# Runs


def shorter(share: float) -> str:
    return f"{STANDARD}, {share:.0%} of the tokens"


def plan(size: Size, steps: int, rates: dict[str, float], kappa: float, evaluations: dict, seed: int) -> list[dict[str, Trial]]:
    """By their names, in three parts that come one after the other: what kappa learns from, those that grow, and what it must not learn from."""
    shared = {**size.flags, "matrix-lr": rates[STANDARD], "num-iterations": steps, "eval-every": max(1, steps // VALIDATIONS), "seed": seed}
    flags = {**shared, **evaluations}
    alone = {name: Trial({**flags, **changes, "matrix-lr": rates[name], **lasting(round(steps / size.shares()[name]))}) for name, changes in size.smaller.items()}
    first = {STANDARD: Trial(flags), SMALL: alone[SMALL]}
    if rates[SMALL] != rates[STANDARD]:  # kappa knows the end of a stage from runs of the same rates only
        first["small, for kappa"] = Trial({**shared, **size.smaller[SMALL], **lasting(round(steps / size.shares()[SMALL]))})
    for share in SHARES:
        length = max(1, round(steps * share))
        first[shorter(share)] = Trial({**shared, "num-iterations": length, "eval-every": length})
    grown = {arm: Trial({**flags, "grow-path": size.path(*(size.widths if by_fractions else (size.widths[0], size.widths[-1]))), "kappa": kappa, "grow-mode": mode})
             for arm, (mode, by_fractions) in GROWN.items()}
    return [first, grown, {MIDDLE: alone[MIDDLE]}]


def lasting(steps: int) -> dict:
    return {"num-iterations": steps, "eval-every": max(1, steps // VALIDATIONS)}


def tune(size: Size, steps: int, jobs: int, places: list[Place] | None) -> dict[str, float]:
    """The rates of the matrices, by runs of half as many steps as each will have."""
    lengths = {STANDARD: max(1, steps // 2), **{name: max(1, round(steps / share / 2)) for name, share in size.shares().items()}}
    shapes = {name: {**size.smaller.get(name, {}), "num-iterations": length, "eval-every": length} for name, length in lengths.items()}
    shared = {**size.flags, "seed": TUNING_SEED}

    def losses(asked: list[tuple[str, float]]) -> list[float]:
        return [found.final for found in run_trials(get_base_dir(), [{**shared, **shapes[name], "matrix-lr": rate} for name, rate in asked], jobs, places)]

    tried = try_rates(list(shapes), size.rates, losses)
    print(f"Bits per byte after half of the steps, by --matrix-lr\n\n{rates_table(tried)}\n")
    return {name: best_rate(found) for name, found in tried.items()}


# -----------------------------------------------------------------------------
# Estimates and claims


@dataclass(frozen=True)
class Claim:
    text: str
    effect: Estimate
    digits: int = 1
    above: bool = True  # whether it says that the effect is above 0, or below
    drafts: str = ""  # what they have

    def verdict(self) -> str:
        return self.effect.verdict(self.above) + (" (one seed)" if math.isinf(self.effect.half) else "")


def row_of(run: Result, task: str, name: str) -> dict | None:
    return run.rows.get(f"{task}/{name}")


class Study:
    """The results of some seeds. by_seed: of each, those of all runs by their names."""

    def __init__(self, by_seed: list[dict[str, Result]], nats: float):
        self.by_seed, self.nats = by_seed, nats
        self.arms = [STANDARD, SMALL, MIDDLE, *GROWN]
        self.sets = sorted({key.split("/")[1] for runs in by_seed for run in runs.values() for key in run.rows if key.startswith(TASKS)}, reverse=True)

    def of(self, arm: str) -> list[Result]:
        return [runs[arm] for runs in self.by_seed]

    def gaps(self, arm: str, other: str) -> Estimate:
        """Nats per token by which it ends above the other."""
        return Estimate.of([(run.final - base.final) * self.nats for run, base in zip(self.of(arm), self.of(other))])

    def losses(self) -> str:
        lines = ["| arm | tokens | FLOPs | seconds | bits per byte | nats per token above standard | by seed | FLOPs, of those that standard needs for this loss | grown after FLOPs, loss before → after |",
                 "|---|---:|---:|---:|---:|---:|---|---:|---|"]
        references = [STANDARD, *map(shorter, SHARES)]
        batch = self.of(STANDARD)[0].flags["total-batch-size"]
        for arm in self.arms:
            found = self.of(arm)
            costs = [run.flops[-1] / cost_with(run.final, [runs[name].flops[-1] for name in references], [runs[name].final for name in references])
                     for run, runs in zip(found, self.by_seed)]
            growths = ", ".join(f"{growth.flops / found[0].flops[-1]:.0%}: {growth.before:.3f} → {growth.after:.3f}" for growth in found[0].growths)
            by_seed = ", ".join(f"{(run.final - base.final) * self.nats:+.4f}" for run, base in zip(found, self.of(STANDARD)))
            gap = "|" if arm == STANDARD else f"{self.gaps(arm, STANDARD).shown(4)} | {by_seed}"
            lines.append(f"| {arm} | {statistics.mean(run.steps[-1] for run in found) * batch:,.0f} | {statistics.mean(run.flops[-1] for run in found):.2e} | "
                         f"{statistics.mean(run.seconds for run in found):.0f} | {Estimate.of([run.final for run in found]).shown(4, sign=False)} | {gap} | "
                         f"{statistics.mean(costs):.2f} | {growths} |")
        return "\n".join(lines)

    def accuracy(self, arm: str, task: str, name: str) -> Estimate:
        """In percent."""
        rows = [row_of(run, task, name) for run in self.of(arm)]
        return Estimate.of([100 * row["value"] for row in rows if row], 100 * max(row["se"] for row in rows if row))

    def nli(self) -> str:
        """± holds for other seeds and other test rows."""
        columns = [(task, name) for task in TASKS for name in self.sets]
        lines = ["| arm | " + " | ".join(f"{name}, {task.removeprefix('nli-')}" for task, name in columns) + " |", "|---|" + "---:|" * len(columns)]
        lines += [f"| {arm} | " + " | ".join(self.accuracy(arm, *column).shown(1, sign=False) for column in columns) + " |" for arm in self.arms]
        return "\n".join(lines + [f"| {method}, 64M (drafts; how is not known) | " + " | ".join(str(values.get(name, "")) for _, name in columns) + " |"
                                  for method, values in DRAFTS.items()])

    # -- the share of the gain that a share of the tokens brings

    def gains_inside(self, run: Result) -> tuple[np.ndarray, np.ndarray]:
        """(shares of the tokens, shares of the gain there), under one schedule."""
        return np.array(run.steps) / run.steps[-1], (run.bpb[0] - np.array(run.bpb)) / (run.bpb[0] - run.final)

    def gains_alone(self, runs: dict[str, Result]) -> tuple[np.ndarray, np.ndarray]:
        """The same of runs that end there, each with a schedule of its own."""
        full = runs[STANDARD]
        losses = np.array([*(runs[shorter(share)].final for share in SHARES), full.final])
        return np.array([*SHARES, 1.0]), (full.bpb[0] - losses) / (full.bpb[0] - full.final)

    def curves(self) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
        return {"inside the run": [self.gains_inside(run) for run in self.of(STANDARD)], "runs that end there": [self.gains_alone(runs) for runs in self.by_seed]}

    def gain_at(self, curve: list[tuple[np.ndarray, np.ndarray]], share: float) -> list[float]:
        """In percent, by seed. Between what was measured by straight lines over the logarithm of the tokens."""
        return [float(np.interp(math.log(share), np.log(x[x > 0]), 100 * y[x > 0])) for x, y in curve]

    def gains(self) -> str:
        shares = sorted({*SHARES, *(share for share, _ in CLAIMED)})
        lines = ["| share of the gain, percent | " + " | ".join(f"{share:.0%} of the tokens" for share in shares) + " | tokens for 80 % of it | for 90 % |",
                 "|---|" + "---:|" * (len(shares) + 2)]
        for name, curve in self.curves().items():
            needed = [statistics.mean(100 * math.exp(np.interp(goal, np.maximum.accumulate(y[x > 0]), np.log(x[x > 0]))) for x, y in curve) for goal in (0.8, 0.9)]
            least = 100 * max(x[x > 0][0] for x, _ in curve)  # no shorter run tells
            lines.append(f"| {name} | " + " | ".join(Estimate.of(self.gain_at(curve, share)).shown(1, sign=False) for share in shares) + " | "
                         + " | ".join(f"{'≤ ' if share <= least * (1 + 1e-9) else ''}{share:.1f} %" for share in needed) + " |")
        return "\n".join(lines)

    # -- claims

    def claims(self) -> list[Claim]:
        found = [Claim(f"{arm}, ends below {other} (nats per token)", self.gaps(arm, other), 4, above=False)
                 for arm, other in (*((arm, other) for other in (STANDARD, SMALL, MIDDLE) for arm in GROWN), (BUS_ONCE, HYPERCLONE), (LOSSLESS_ONCE, HYPERCLONE), (LOSSLESS_ONCE, BUS_ONCE),
                                    (LOSSLESS, BUS))]
        for arm, task, name in ((arm, task, name) for arm in (BUS, HYPERCLONE) for task in TASKS for name in self.sets if name in DRAFTS["standard"]):
            theirs = DRAFTS[METHOD_OF[arm]][name] - DRAFTS["standard"][name]
            pairs = [(row_of(run, task, name), row_of(base, task, name)) for run, base in zip(self.of(arm), self.of(STANDARD))]
            differences = [(100 * (one["value"] - other["value"]), 100 * math.hypot(one["se"], other["se"])) for one, other in pairs if one and other]
            effect = Estimate.of([value for value, _ in differences], max(error for _, error in differences))
            found.append(Claim(f"{arm}, is {'better' if theirs > 0 else 'worse'} than {STANDARD} on {name} by {task.removeprefix('nli-')} (points)", effect, above=theirs > 0,
                               drafts=f"{theirs:+.1f}"))
        for name, curve in self.curves().items():
            for share, gain in CLAIMED:
                effect = Estimate.of([value - 100 * gain for value in self.gain_at(curve, share)])
                found.append(Claim(f"{share:.0%} of the tokens bring {gain:.0%} of the gain or more, {name} (points above {100 * gain:.0f})", effect))
        return found

    def claims_table(self) -> str:
        lines = ["| claim | effect, 95 % interval | the drafts have | verdict |", "|---|---:|---:|---|"]
        return "\n".join(lines + [f"| {claim.text} | {claim.effect.shown(claim.digits)} | {claim.drafts} | {claim.verdict()} |" for claim in self.claims()])


def draw(study: Study, path: Path) -> None:
    """Losses over FLOPs and over seconds, all seeds, each growth a bar as long as the loss jumps; shares of the gain over shares of the tokens."""
    with pictures(path, 17, 5, 3) as (flops, seconds, gains):
        for i, arm in enumerate(study.arms):
            color = "black" if arm == STANDARD else "grey" if arm in (SMALL, MIDDLE) else f"C{i - 3}"
            for run in study.of(arm):
                label = arm if run is study.of(arm)[0] else None
                for axes, costs, of_growth in ((flops, run.flops, [g.flops for g in run.growths]), (seconds, run.times, [g.seconds for g in run.growths])):
                    axes.plot(costs[1:], run.bpb[1:], {SMALL: ":", MIDDLE: "--"}.get(arm, "-"), color=color, label=label, linewidth=1)
                    on_curve = np.interp([g.flops for g in run.growths], run.flops, run.bpb)  # the losses around a growth are of a briefer validation
                    jumped = on_curve + [g.after - g.before for g in run.growths]
                    axes.vlines(of_growth, on_curve, jumped, color=color, linewidth=2)
                    axes.plot(of_growth, jumped, "^", color=color, markersize=4)
        first = study.of(STANDARD)[0]
        for axes, name in (flops, "training FLOPs, all stages"), (seconds, "seconds of training"):
            axes.set_xscale("log")
            axes.set_xlabel(name)
            axes.set_ylabel("validation bits per byte")
            axes.set_ylim(top=first.bpb[min(2, len(first.bpb) - 1)])
        flops.legend(frameon=False, fontsize=8)
        for i, (name, curve) in enumerate(study.curves().items()):
            for x, y in curve:
                gains.plot(100 * x, 100 * y, ("-", "o--")[i], color=f"C{i}", label=name if x is curve[0][0] else None, linewidth=1, markersize=4)
        gains.fill_between([15, 20], 80, 90, color="grey", alpha=0.4, linewidth=0, label="claimed")
        gains.set_xlabel("share of the tokens, percent")
        gains.set_ylabel("share of the standard run's gain, percent")
        gains.set_ylim(50, 101)
        gains.legend(frameon=False, fontsize=8)


# -----------------------------------------------------------------------------
# The command


def check_vocabulary(name: str) -> None:
    wanted, found = SIZES[name].vocabulary, get_tokenizer().get_vocab_size()
    if found != wanted:
        raise UsageError(f"--size={name} is meant for a vocabulary of {wanted:,}, and the tokenizer in {get_base_dir()} has {found:,}: "
                         f"python -m scripts.tok_train --vocab-size={wanted}, or another NANOCHAT_BASE_DIR")


def nli_flags(folder: Path | None) -> dict:
    """For the evaluation at the end of each run; none without data."""
    path = folder or Path(get_base_dir(), "nli")
    if folder is None and not path.is_dir():
        print(f"No NLI in this study: there is no {path}; give the folder of the sets as --nli=FOLDER\n")
        return {}
    read_sets(path)  # what is wrong with it shows now
    return {"eval-tasks": ",".join(TASKS), "eval-tasks-every": 10 ** 9, "nli": str(path)}


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=1)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=positive_int, help="of the standard run (default: by --size)")
    parser.add_argument("--kappa", type=fraction, default=0.15, help="share of a stage's gain that is left when it ends")
    parser.add_argument("--nli", type=Path, help="folder of SNLI and MNLI, as for base_eval (default: nli in the base directory, if it is there)")
    args = parser.parse_args(argv)
    size = SIZES[args.size]
    steps, places = args.steps or size.steps, places_for(size.flags.get("device-type", "cpu"), args.jobs)
    check_vocabulary(args.size)
    evaluations = nli_flags(args.nli)
    rates = tune(size, steps, args.jobs, places)
    # in this order, so that kappa finds the same finished runs whatever is interrupted
    parts = [run_by_seed(lambda seed, part=part: plan(size, steps, rates, args.kappa, evaluations, seed)[part], args.seeds, args.jobs, places) for part in range(3)]
    study = Study([{**first, **grown, **last} for first, grown, last in zip(*parts)], nats_per_bpb())
    print(f"{study.of(STANDARD)[0].params:,} parameters; kappa {args.kappa:g}; {args.seeds} seed(s), ± half of a 95 % interval; growths are those of the first seed\n")
    print(study.losses() + "\n")
    if study.sets:
        print(study.nli() + "\n")
    print(study.gains() + "\n")
    print(study.claims_table())
    if args.out:
        claims = [{"claim": claim.text, "effect": asdict(claim.effect), "drafts": claim.drafts, "verdict": claim.verdict()} for claim in study.claims()]
        write_text_atomic(args.out, to_json({"runs": study.by_seed, "claims": claims}))
    if args.plot:
        draw(study, args.plot)


if __name__ == "__main__":
    sys.exit(main())
