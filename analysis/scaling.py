"""Tables of finished runs of many sizes, and from runs at equal FLOPs the best size for a budget.

    python -m analysis.scaling miniseries mini         after bash runs/miniseries.sh
    python -m analysis.scaling scaling_laws jan26      after bash runs/scaling_laws.sh

Reads the run logs below NANOCHAT_BASE_DIR of the runs that the recipe gave this name, also while others are going on. Writes results.csv into
the folder <name>_miniseries_results or scaling_laws_results_<name> there, and for scaling laws the picture results.png beside it.

At each budget the loss is a parabola in log N (the IsoFLOP profile of Hoffmann et al., 2203.15556, section 3.2) whose lowest point is the best
size. N counts the blocks' matrices and the head, in which the horizon of base_train is stated too. Over the budgets C the best size and
the best number of tokens D are power laws, N ~ C^a and D ~ C^b.
"""
import csv
import glob
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.cli import ArgumentParser, UsageError, command, folder_name
from nanochat.common import get_base_dir
from nanochat.drawing import picture
from nanochat.files import write_text_atomic
from nanochat.run_log import is_finished, last_of_each_kind, read_run_log

COLUMNS = {
    "miniseries": ["depth", "model_dim", "num_params", "num_scaling_params", "num_iterations", "tokens_trained", "param_data_ratio", "val_bpb",
                   "core_score", "train_time_sec"],
    "scaling_laws": ["flops_budget", "depth", "model_dim", "params_wte", "params_value_embeds", "params_lm_head", "params_transformer", "params_scalars",
                     "params_total", "num_iterations", "tokens_trained", "val_bpb", "core_score", "train_time_sec"],
}
PLACES = {"miniseries": ("{}_miniseries_d*", "{}_miniseries_results"), "scaling_laws": ("{}_scaling_*_d*", "scaling_laws_results_{}")}


def read_run(log: Path) -> dict | None:
    """All columns of one run, None while it is not finished. What was not measured is None."""
    records = read_run_log(log)
    of = last_of_each_kind(records)
    if "start" not in of or not is_finished(records):
        return None
    start, config, counts = of["start"], of["start"]["model_config"], of["start"]["counts"]
    scaling_params = counts["transformer_matrices"] + counts["lm_head"]
    return dict(
        flops_budget=start["config"]["target_flops"], depth=config["n_layer"], model_dim=config["n_embd"],
        params_wte=counts["wte"], params_value_embeds=counts["value_embeds"], params_lm_head=counts["lm_head"],
        params_transformer=counts["transformer_matrices"], params_scalars=counts["scalars"], params_total=counts["total"],
        num_params=counts["total"], num_scaling_params=scaling_params, num_iterations=start["num_iterations"], tokens_trained=start["total_tokens"],
        param_data_ratio=start["total_tokens"] / scaling_params, val_bpb=of.get("eval", {}).get("val_bpb"),
        core_score=of.get("core", {}).get("core_metric"), train_time_sec=of["end"]["total_training_time"])


def table(rows: list[dict], columns: list[str]) -> str:
    """CSV with a header; None is an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:g}" if key == "flops_budget" else value for key, value in row.items()} for row in rows)
    return out.getvalue()


@dataclass
class Profile:
    """The runs at one budget."""
    flops: float
    params: np.ndarray  # of blocks and head, rising
    tokens: np.ndarray
    bpb: np.ndarray

    def __post_init__(self):
        x = np.log(self.params)
        self.curve = np.polyfit(x - x.mean(), self.bpb, 2)
        self.center = x.mean()
        inside = self.curve[0] > 0 and x[0] <= self.center - self.curve[1] / (2 * self.curve[0]) <= x[-1]
        self.best_params = float(np.exp(self.center - self.curve[1] / (2 * self.curve[0]))) if inside else None  # None: beyond the sizes that were tried
        if self.best_params is not None:
            self.best_tokens = float(np.exp(np.polyval(np.polyfit(x, np.log(self.tokens), 1), np.log(self.best_params))))
            self.best_bpb = float(self.at(self.best_params))

    def at(self, params):
        return np.polyval(self.curve, np.log(params) - self.center)


def profiles(rows: list[dict]) -> list[Profile]:
    """One for each budget of which three sizes or more were measured."""
    found = []
    for flops in sorted({row["flops_budget"] for row in rows}):
        at = sorted((row["num_scaling_params"], row["tokens_trained"], row["val_bpb"]) for row in rows if row["flops_budget"] == flops and row["val_bpb"] is not None)
        if len({size for size, *_ in at}) >= 3:
            found.append(Profile(flops, *(np.array(column, dtype=float) for column in zip(*at))))
    return found


def power_laws(bottoms: list[Profile]) -> tuple[float, float]:
    """The exponents (a, b) of the best size and the best number of tokens over the budgets."""
    flops = np.log([profile.flops for profile in bottoms])
    a, b = (np.polyfit(flops, np.log(values), 1)[0] for values in ([p.best_params for p in bottoms], [p.best_tokens for p in bottoms]))
    return float(a), float(b)


def draw(found: list[Profile], path: Path) -> None:
    with picture(path, 8, 5) as axes:
        for i, profile in enumerate(found):
            color = f"C{i}"
            sizes = np.geomspace(profile.params[0], profile.params[-1], 200)
            axes.plot(profile.params, profile.bpb, "o", color=color, label=f"{profile.flops:.2e} FLOPs")
            axes.plot(sizes, profile.at(sizes), color=color, linewidth=1)
            if profile.best_params is not None:
                axes.plot(profile.best_params, profile.best_bpb, "*", color=color, markersize=14)
        axes.set_xscale("log")
        axes.set_xlabel("parameters of blocks and head")
        axes.set_ylabel("validation bits per byte")
        axes.legend()


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=COLUMNS, help="whose runs")
    parser.add_argument("name", type=folder_name, help="the recipe's SERIES_NAME or LABEL")
    args = parser.parse_args(argv)
    tags, folder = PLACES[args.recipe][0].format(glob.escape(args.name)), PLACES[args.recipe][1].format(args.name)
    logs = sorted(Path(get_base_dir(), "base_checkpoints").glob(f"{tags}/log.jsonl"))
    rows = [row for log in logs if (row := read_run(log)) is not None]
    if not rows:
        raise UsageError(f"no finished run {tags} in {get_base_dir()}/base_checkpoints; first: bash runs/{args.recipe}.sh")
    rows.sort(key=lambda row: (row["flops_budget"], row["depth"]))
    results = Path(get_base_dir(), folder, "results.csv")
    text = table(rows, COLUMNS[args.recipe])
    write_text_atomic(results, text)
    print(f"{text}\nWritten to {results}")
    if args.recipe == "miniseries":
        return
    found = profiles(rows)
    if not found:
        print("No budget has three sizes yet: nothing to fit")
        return
    draw(found, results.with_suffix(".png"))
    print(f"Drawn in {results.with_suffix('.png')}\n\n| FLOPs | best size | its tokens | tokens per parameter | bits per byte |\n|---:|---:|---:|---:|---:|")
    for profile in found:
        if profile.best_params is None:
            print(f"| {profile.flops:.2e} | not between {profile.params[0]:.2e} and {profile.params[-1]:.2e} | | | |")
        else:
            print(f"| {profile.flops:.2e} | {profile.best_params:.3e} | {profile.best_tokens:.3e} | {profile.best_tokens / profile.best_params:.2f} | {profile.best_bpb:.4f} |")
    bottoms = [profile for profile in found if profile.best_params is not None]
    if len(bottoms) >= 2:
        a, b = power_laws(bottoms)
        print(f"\nThe best size grows with FLOPs^{a:.3f}, its tokens with FLOPs^{b:.3f}")


if __name__ == "__main__":
    sys.exit(main())
