"""Which rank and which depth for this compute, these parameters, this memory, this time? Pareto fronts of dense and low-rank models.

    python -m analysis.pareto --plot=pareto.png                              rank of attention and MLP, and depth: 6 configurations
    python -m analysis.pareto analysis/sweeps/deeper.toml                    deeper at equal parameters of the blocks: 3, one of them the same
    python -m analysis.pareto analysis/sweeps/rank_schedules.toml            schedules of the rank over depth at equal budget: 5
    python -m analysis.pareto --units 1 5 20 --out=pareto.json               longer budgets

A configuration takes three half runs or four to find its rate and a run for each of three seeds. The questions are those of a proposal on low-rank training (not published).

A file of analysis/sweeps says which configurations there are, at which learning rates of
the matrices they are tuned, with which seed and budget. The best rate of each configuration for each budget, by the
last validation of that one seed after half of it, then trains other seeds, which alone are reported (on the same validation text). The list of rates goes on by its own factor where the best is
at an end (rates.py): long budgets want lower ones than short ones, and a wide model others than a deep one. There is no weight decay: base_train's depends on depth and aspect
ratio, by a factor of 90 between the configurations here, and would be what is compared.

* **Budget.** A unit is the file's `target-flops`: what one token per parameter (of blocks and head) costs for the dense model of four layers of width 128. All
  configurations get the same FLOPs, since compute is what a user has; smaller ones see more tokens. The other reading, so many tokens for each parameter of each model's own,
  is --flags="--target-flops=-1 --target-param-data-ratio=1".
* **Axes.** FLOPs; all parameters, value embeddings included, which every other layer has (`blocks` has those of attention and MLP alone); peak memory, on a CPU that of the process,
  PyTorch included; seconds of training, which other jobs on the machine distort: rely on FLOPs.
* **Threshold.** FLOPs and seconds until a perplexity is reached, by a straight line between the validations of the log. The rates fall for the whole budget, so a run
  that is asked for less would have been there sooner.
"""
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.arms import RATE, Configuration, configurations, reported_seeds, run_arms
from analysis.estimates import Estimate
from analysis.study import nats_per_bpb, study_parser
from analysis.trial import Result
from nanochat.cli import UsageError, command, positive_float
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

DEFAULT = Path(__file__).parent / "sweeps" / "rank_depth.toml"
COSTS = {"flops": "training FLOPs", "params": "parameters", "memory": "peak memory, MiB", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Point:
    """A configuration with a budget; means over the seeds. What is not known is None."""

    number: int  # of the configuration
    name: str
    unit: float
    rate: float
    perplexity: float | None  # per token; None: a seed diverged
    by_seed: list[float]
    above: Estimate | None  # nats per token above the first configuration with this budget, seed by seed; None: a seed of either diverged
    flops: float  # the budget, where it is one of FLOPs: it is met up to a step
    tokens: float  # per parameter of blocks and head
    blocks: int
    params: int
    memory: float
    seconds: float
    flops_to_threshold: float | None
    seconds_to_threshold: float | None
    curve: list[tuple[float, float]]  # (FLOPs, perplexity) of the validations


# -----------------------------------------------------------------------------
# What is made of it


def front(points: Sequence[tuple[float, ...]]) -> list[int]:
    """The numbers of those that no other one dominates: one dominates another if it is nowhere larger and somewhere smaller (Pareto)."""
    return [i for i, point in enumerate(points)
            if not any(all(a <= b for a, b in zip(other, point)) and tuple(other) != tuple(point) for other in points)]


def cost_until(result: Result, bpb: float, costs: Sequence[float]) -> float | None:
    """At which it has this validation loss, by a straight line between two validations, each with its cost; None if it never has."""
    for i, loss in enumerate(result.bpb):
        if loss <= bpb:
            if i == 0:
                return costs[0]
            before, spent = result.bpb[i - 1], costs[i - 1]
            return spent + (costs[i] - spent) * (before - bpb) / (before - loss)
    return None


def budget(flags: dict) -> float:
    """In FLOPs; 0 where steps or tokens are what is given."""
    return max(0.0, float(flags.get("target-flops", 0))) if float(flags.get("num-iterations", -1)) <= 0 else 0.0


def points_of(found: Sequence[Configuration], runs: dict, nats: float, threshold: float | None) -> tuple[list[Point], float | None]:
    """And the threshold: without one, 1.1 times what the first configuration ends with at the smallest budget, None if that diverged. nats: per token for one bit per byte."""
    perplexity = lambda results: math.exp(nats * statistics.mean(result.final for result in results)) if all(result.bpb for result in results) else None
    if threshold is None:
        reference = perplexity(runs[0, min(unit for _, unit in runs)][1])
        threshold = 1.1 * reference if reference else None
    points = []
    for (i, unit), (rate, results) in runs.items():
        done = [result for result in results if result.bpb]
        mean = lambda values: statistics.mean(values) if values else math.nan
        bpb = math.log(threshold) / nats if threshold else -math.inf
        flops, seconds = ([cost_until(result, bpb, costs) for result, costs in zip(done, each)]
                          for each in ([result.flops for result in done], [result.times for result in done]))
        reached = len(done) == len(results) and None not in flops
        pairs = list(zip(results, runs[0, unit][1]))
        points.append(Point(
            i + 1, found[i].name, unit, rate, perplexity(results), [math.exp(nats * result.final) for result in done],
            Estimate.of([nats * (one.final - other.final) for one, other in pairs]) if all(one.bpb and other.bpb for one, other in pairs) else None,
            budget(found[i].trial(unit).flags) or mean([result.flops[-1] for result in done]), mean([result.tokens / result.scaling_params for result in done if result.scaling_params]),
            done[0].blocks if done else 0, done[0].params if done else 0, mean([result.memory for result in done]), mean([result.seconds for result in done]),
            mean(flops) if reached else None, mean(seconds) if reached else None,  # type: ignore[arg-type]
            [(mean(spent), math.exp(nats * mean(losses))) for spent, losses in zip(zip(*(result.flops for result in done)), zip(*(result.bpb for result in done)))]))
    return points, threshold


def fronts(points: Sequence[Point]) -> dict[str, list[list[Point]]]:
    """For each cost the fronts of perplexity over it, from cheap to dear: of each budget, and for what a longer budget costs more of, of all together."""
    known = [point for point in points if point.perplexity is not None]
    by_unit = [[point for point in known if point.unit == unit] for unit in dict.fromkeys(point.unit for point in known)]

    def of(cost: str, some: list[Point]) -> list[Point]:
        return sorted((some[i] for i in front([(getattr(point, cost), point.perplexity) for point in some])), key=lambda point: getattr(point, cost))
    return {cost: [of(cost, some) for some in ([known] if cost in ("flops", "seconds") else by_unit)] for cost in COSTS}


def table(points: Sequence[Point], threshold: float | None) -> str:
    found = fronts(points)
    show = lambda value, form: "" if value is None or math.isnan(value) else format(value, form)
    lines = [f"| # | configuration | units | {RATE} | perplexity | by seed | nats per token above the first | FLOPs | tokens per parameter | blocks | parameters | MiB | seconds "
             f"| FLOPs to {show(threshold, '.3g') or 'the threshold'} | seconds to it | on the front of |", "|---:|---|---:|---:|---:|---|---|" + "---:|" * 8 + "---|"]
    for point in sorted(points, key=lambda point: (point.unit, point.number)):
        above = "" if point.above is None or point.number == 1 else f"{point.above.shown(4)}: {point.above.loss_verdict}"
        on = ", ".join(cost for cost, several in found.items() if any(point in one for one in several))
        lines.append(f"| {point.number} | {point.name} | {point.unit:g} | {point.rate:g} | {show(point.perplexity, '.3f') or 'diverged'} | "
                     f"{', '.join(f'{value:.3f}' for value in point.by_seed)} | {above} | {show(point.flops, '.2g')} | {show(point.tokens, '.2f')} | {point.blocks:,} | {point.params:,} | "
                     f"{show(point.memory, '.0f')} | {show(point.seconds, '.0f')} | {show(point.flops_to_threshold, '.3g')} | {show(point.seconds_to_threshold, '.0f')} | {on} |")
    return "\n".join(lines)


def draw(points: Sequence[Point], threshold: float | None, path: Path) -> None:
    """Left the way of each configuration over FLOPs, with the threshold; then a panel for each other cost: a color for each configuration, a mark for each budget, its seeds as
    dashes, and the fronts as steps."""
    known, found = [point for point in points if point.perplexity is not None], fronts(points)
    if not known:
        raise UsageError("all runs diverged, so there is nothing to draw")
    units = sorted({point.unit for point in known})
    looks = {id(point): dict(color=f"C{point.number - 1}", marker="os^vDP*"[units.index(point.unit) % 7], label=f"{point.number}: {point.name}" if point.unit == units[0] else None)
             for point in known}
    with pictures(path, 4.5 * len(COSTS), 5, len(COSTS)) as panels:
        for axes, (cost, label) in zip(panels, COSTS.items()):
            for one in found[cost]:
                axes.plot([getattr(point, cost) for point in one], [point.perplexity for point in one], color="#808890", linewidth=1, drawstyle="steps-post")
            for point in known:
                place = getattr(point, cost), point.perplexity
                axes.plot(*place, linestyle="none", **looks[id(point)])
                axes.annotate(str(point.number), place, xytext=(4, 3), textcoords="offset points", fontsize=8)
                if cost == "flops":
                    axes.plot(*zip(*point.curve), color=looks[id(point)]["color"], linewidth=1)
                else:
                    axes.plot([place[0]] * len(point.by_seed), point.by_seed, "_", color=looks[id(point)]["color"], alpha=0.6)
            costs = [getattr(point, cost) for point in known]
            if cost != "flops" and max(costs) > 4 * min(costs) > 0:
                axes.set_xscale("log")
            axes.set_xlabel(label)
        ways = panels[0]
        ways.set_yscale("log")
        ways.set_ylim(top=4 * max(point.perplexity or 0.0 for point in known))
        if threshold:
            ways.axhline(threshold, color="black", linewidth=0.8, linestyle=":")
        for axes in panels:
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if axes is ways else "")
        ways.set_ylabel("validation perplexity per token" + (", the threshold dotted" if threshold else ""))
        marks = "" if len(units) == 1 else "; units of compute: " + ", ".join(f"{unit:g} {mark}" for unit, mark in zip(units, ("circle", "square", "triangle", "triangle down", "diamond", "plus", "star")))
        handles = {label: handle for handle, label in zip(*panels[1].get_legend_handles_labels())}
        ways.figure.legend(handles.values(), handles, frameon=False, loc="outside lower center", ncols=3, fontsize=9, title="configurations (grey: the fronts" + marks + ")")


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, jobs=None)
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT, help="TOML file of the configurations (default: %(default)s)")
    parser.add_argument("--objective", default="next-token", help="of those in the file; losses of several are no rivals")
    parser.add_argument("--flags", default="", help="more flags of base_train for all runs, as for analysis.sweep")
    parser.add_argument("--units", nargs="+", type=positive_float, default=[1.0], help="budgets, in those of the file")
    parser.add_argument("--threshold", type=positive_float, help="perplexity to which the way is measured (default: 1.1 times the first configuration's at the smallest budget)")
    args = parser.parse_args(argv)
    found = configurations(args.config, args.flags, args.objective)
    runs = run_arms(found, list(dict.fromkeys(args.units)), reported_seeds(found, args.seeds), args.jobs)
    points, threshold = points_of(found, runs, nats_per_bpb(), args.threshold)
    print(table(points, threshold))
    if args.out:
        write_text_atomic(args.out, to_json({"threshold": threshold, "points": points}, indent=1))
    if args.plot:
        draw(points, threshold, args.plot)


if __name__ == "__main__":
    sys.exit(main())
