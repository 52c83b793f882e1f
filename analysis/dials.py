"""What does a dial of a small model do? Loss, grammar, fine-tuning, time and speed of configurations that differ in one thing (docs/sweeps.md).

    python -m analysis.dials analysis/sweeps/dials/width.toml --flags="--blimp=FOLDER --nli=FOLDER" --plot=width.png         CPU size
    python -m analysis.dials analysis/sweeps/dials/width.toml --objective=mlm --flags="--blimp=FOLDER --nli=FOLDER"          masked models (BERT-like)
    sed 's/= .*# 9M: /= /' analysis/sweeps/dials/width.toml | python -m analysis.dials - --plot=width_9m.png                 the real size, for a GPU,
    with BLiMP and NLI in `blimp` and `nli` of the base directory

The questions are those of small studies on "tiny transformers" of TinyStories (2305.07759). A file of analysis/sweeps/dials asks one question: to ask another, change a line of it. The learning rate of each configuration is tuned by one seed and half of the steps
(rates.py), other seeds are reported, and compared with the first configuration, seed by seed. All read the same text in the same order, so they have equal tokens and not equal
FLOPs, which are a column, as is every evaluation of --eval-tasks. Seconds and decoding speed are of this machine, with whatever else it does. A configuration that diverges is
said to, and the others are told.
"""
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.arms import RATE, configurations, reported_seeds, run_arms
from analysis.estimates import Estimate
from analysis.study import check_ended, study_parser
from analysis.trial import Result
from nanochat.cli import command
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

LOSS = "bits per byte"


@dataclass(frozen=True)
class Arm:
    name: str
    rate: float
    runs: list[Result]  # of each seed, all with losses
    first: list[Result]  # those that it is compared with

    def values(self, measure: str, runs: Sequence[Result] | None = None) -> list[float]:
        """Of each seed: the loss, or an evaluation by its label; shares in percent."""
        runs = self.runs if runs is None else runs
        return [run.final for run in runs] if measure == LOSS else [row["value"] * _unit(row) for row in (_row(run, measure) for run in runs)]

    def difference(self, measure: str) -> Estimate:
        """From the first arm. Of evaluations the error of their rows counts too, as if they were others for each."""
        pairs = zip(self.values(measure), self.values(measure, self.first))
        rows = [_row(run, measure) for run in (*self.runs, *self.first)] if measure != LOSS else []
        return Estimate.of([one - other for one, other in pairs], 2 ** 0.5 * max((row.get("se") or 0.0) * _unit(row) for row in rows) if rows else 0.0)

    @property
    def verdict(self) -> str:
        """On its loss."""
        return "" if self.runs is self.first else self.difference(LOSS).loss_verdict


def _unit(row: dict) -> int:
    return 100 if row.get("metric") == "accuracy" else 1  # percent


def _digits(run: Result, label: str) -> int:
    """Of percent and speeds fewer than of losses."""
    return 1 if _row(run, label).get("metric") in ("accuracy", "tokens/s") else 4


def _row(run: Result, label: str) -> dict:
    return next(row for row in run.rows.values() if row["label"] == label)


def measures(runs: Sequence[Result]) -> list[str]:
    """The loss, and the labels of what was evaluated as a whole."""
    return [LOSS, *dict.fromkeys(row["label"] for row in runs[0].rows.values() if row["label"])]


def table(arms: Sequence[Arm]) -> str:
    labels = measures(arms[0].runs)
    lines = [f"| configuration | {RATE} | parameters | of the blocks | MB as float32 | tokens seen | FLOPs, of the first's | seconds | {LOSS}, mean | by seed | above the first | "
             + "".join(f"{label} | " for label in labels[1:]), "|---|" + "---:|" * 8 + "---|---|" + "---:|" * (len(labels) - 1)]
    for arm in arms:
        first = arm.runs is arm.first
        cells = [f"{statistics.mean(arm.values(label)):.{digits}f}" + ("" if first else f" ({arm.difference(label).shown(digits)})")
                 for label in labels[1:] for digits in [_digits(arm.runs[0], label)]]
        gap = "" if first else f"{arm.difference(LOSS).shown(4)}: {arm.verdict}"
        lines.append(f"| {arm.name} | {arm.rate:g} | {arm.runs[0].params:,} | {arm.runs[0].blocks:,} | {4e-6 * arm.runs[0].params:.1f} | {arm.runs[0].tokens:,} | "
                     f"{arm.runs[0].flops[-1] / arm.first[0].flops[-1]:.2f} | "
                     f"{statistics.mean(run.seconds for run in arm.runs):.0f} | "
                     f"{statistics.mean(arm.values(LOSS)):.4f} | {', '.join(f'{value:.4f}' for value in arm.values(LOSS))} | {gap} | " + "".join(f"{cell} | " for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def draw(arms: Sequence[Arm], path: Path) -> None:
    """A panel for each measure: the mean, every seed, and of the others the interval of their difference to the first."""
    labels = measures(arms[0].runs)
    with pictures(path, 3.2 + 3 * len(labels), 1.8 + 0.36 * len(arms), len(labels)) as panels:
        for axes, label in zip(panels, labels):
            axes.axvline(statistics.mean(arms[0].values(label)), color="#c0c8d0", linewidth=1)
            for place, arm in enumerate(arms):
                middle, half = statistics.mean(arm.values(label)), arm.difference(label).half if place else 0.0
                axes.errorbar(middle, place, xerr=half if half < float("inf") else 0.0, fmt="s", color="C0" if place else "black", capsize=3)
                axes.plot(arm.values(label), [place] * len(arm.runs), "o", color="#808890", markersize=3)
            axes.set_yticks(range(len(arms)), [arm.name if axes is panels[0] else "" for arm in arms], fontsize=8)
            axes.set_ylim(len(arms) - 0.5, -0.5)
            axes.set_xlabel(label)


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, jobs=None)
    parser.add_argument("config", type=Path, help="TOML file of the configurations, - for standard input")
    parser.add_argument("--objective", default="next-token", help="of those in the file")
    parser.add_argument("--flags", default="", help="more flags of base_train for all runs, as for analysis.sweep")
    args = parser.parse_args(argv)
    chosen = configurations(args.config, args.flags, args.objective)
    seeds = reported_seeds(chosen, args.seeds)
    runs = run_arms(chosen, [1.0], seeds, args.jobs)
    first = next(iter(runs.values()))[1]
    check_ended((chosen[0].name, result) for result in first)
    whole = lambda results: all(result.bpb for result in results)
    arms = [Arm(one.name, rate, results, first) for one, (rate, results) in zip(chosen, runs.values()) if whole(results)]
    print(f"{args.objective}, seeds {', '.join(map(str, seeds))}; ± half of a 95 % interval of the difference to the first\n")
    print(table(arms))
    for one, (rate, results) in zip(chosen, runs.values()):
        if not whole(results):
            print(f"\n{one.name}: diverged with {RATE} {rate:g} for {sum(not result.bpb for result in results)} of {len(seeds)} seeds")
    if args.out:
        write_text_atomic(args.out, to_json({one.name: {"rate": rate, "runs": results} for one, (rate, results) in zip(chosen, runs.values())}))
    if args.plot:
        draw(arms, args.plot)


if __name__ == "__main__":
    sys.exit(main())
