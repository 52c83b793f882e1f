"""What looped layers and a mixed objective give a small model of English: BLiMP and bits per byte, at equal tokens and at equal FLOPs.

    python -m scripts.tok_train --vocab-size=8192          # on the text in NANOCHAT_BASE_DIR, beside which `blimp` holds the pairs
    python -m analysis.small_english --tune                # learning rates, by validation bits per byte of runs of half the length
    python -m analysis.small_english --seeds=3 --steps=300 --arms looped mixed --plot=dev/small_english.png        # an hour and a half of one core

The model has 4 layers of width 192 and a vocabulary of 8,192: 8.1 million parameters, of which 1.8 are in the layers, 1.6 in the embedding, 1.6 in the head
and 3.1 in two value embeddings. Loops are free of parameters and not of FLOPs (2.16 times as many here with three), so the plain model is also trained for as
many FLOPs. All arms see the same text in the same order, with one pass of four masked where the objective is mixed. BLiMP plays no part in any choice.
"""
import statistics
import sys
from pathlib import Path

from analysis.rates import rates_table, try_rates
from analysis.study import flops_per_token, run_by_seed, run_trials, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command, positive_int
from nanochat.common import get_base_dir
from nanochat.compare import paired_test
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic
from nanochat.tokenizer import get_tokenizer

MODEL = {"depth": 4, "aspect-ratio": 48, "head-dim": 64, "max-seq-len": 256, "window-pattern": "L", "device-batch-size": 4, "total-batch-size": 4096, "save-every": 10,
         "warmup-steps": 10, "eval-every": 50, "eval-tokens": 32768, "unembedding-lr": 0.08, "embedding-lr": 0.15, "scalar-lr": 0.15}
PLAIN = "causal"
ARMS: dict[str, dict] = {
    PLAIN: {},
    "looped": {"loops": 3},
    "mixed": {"objective": "mixed"},
    "looped and mixed": {"loops": 3, "objective": "mixed"},
}
RATES = (0.48, 0.96)  # of the matrices, to begin with
TUNED = {PLAIN: 0.96, "looped": 0.48, "mixed": 0.48, "looped and mixed": 0.48}  # of --tune --steps=200 on general English
MORE = "causal, FLOPs of looped"
PUBLISHED = (("GPT-Neo 9M, all of TinyStories, mean of six seeds", "57.8"), ("GPT-2 124M, BabyLM's 10M words (filtered pairs)", "65-67"),
             ("looped GPT-BERT 12M, BabyLM's 10M words (filtered pairs)", "71.2"))


def plan(steps: int, arms: list[str], seed: int) -> dict[str, Trial]:
    found = {}
    for arm, flags in ((arm, ARMS[arm]) for arm in arms):
        tasks = "blimp,blimp-pll:20" if "objective" in flags else "blimp"
        found[arm] = Trial({**MODEL, **flags, "matrix-lr": TUNED[arm], "num-iterations": steps, "seed": seed, "eval-tasks": tasks})
    vocabulary = get_tokenizer().get_vocab_size()
    if "looped" not in arms:
        return found
    longer = round(steps * flops_per_token({**MODEL, **ARMS["looped"]}, vocabulary) / flops_per_token(MODEL, vocabulary))
    found[MORE] = Trial({**found[PLAIN].flags, "num-iterations": longer})
    return found


def tune(steps: int, jobs: int) -> str:
    """A table of what rates come to, by a seed that is no other run's."""
    def losses(asked: list[tuple[str, float]]) -> list[float]:
        trials = [Trial({**MODEL, **ARMS[arm], "matrix-lr": rate, "num-iterations": steps, "seed": 41}) for arm, rate in asked]
        return [result.final for result in run_trials(get_base_dir(), trials, jobs)]
    return rates_table(try_rates(list(ARMS), RATES, losses))


def blimp(result: Result, evaluation: str = "blimp") -> dict:
    """The row of the whole set."""
    return next(row for key, row in result.rows.items() if key.startswith(f"{evaluation}/") and row["label"])


def by_paradigm(runs: list[Result]) -> dict[str, float]:
    """Means over the seeds."""
    keys = [key for key in runs[0].rows if key.startswith("blimp/") and "/paradigm/" in key]
    return {key: statistics.mean(run.rows[key]["value"] for run in runs) for key in keys}


def table(runs: dict[str, list[Result]]) -> str:
    """Accuracies in percent; ± is the standard error over the drawing of pairs, of one run. p: random signs of the paradigms' differences from the plain model."""
    lines = ["| arm | tokens | FLOPs | bits per byte | BLiMP | by seed | by hidden tokens | more than causal | p |", "|---|---:|---:|---:|---:|---|---:|---:|---:|"]
    plain = by_paradigm(runs[PLAIN])
    for arm, found in runs.items():
        rows = [blimp(run) for run in found]
        differences = [value - plain[key] for key, value in by_paradigm(found).items()]
        by_seed = ", ".join(f"{100 * row['value']:.2f}" for row in rows)
        hidden = f"{100 * statistics.mean(blimp(run, 'blimp-pll:20')['value'] for run in found):.1f}" if "mixed" in arm else ""
        against = "|" if arm == PLAIN else f"{100 * statistics.mean(differences):+.2f} | {paired_test(differences):.3f}"
        lines.append(f"| {arm} | {found[0].steps[-1] * MODEL['total-batch-size']:,} | {found[0].flops[-1]:.2e} | {statistics.mean(run.final for run in found):.4f} | "
                     f"{100 * statistics.mean(row['value'] for row in rows):.2f} ± {100 * statistics.mean(row['se'] for row in rows):.2f} | "
                     f"{by_seed} | {hidden} | {against} |")
    return "\n".join(lines + [f"| {name} (published) | | | | {value} | | | | |" for name, value in PUBLISHED])


def draw(runs: dict[str, list[Result]], path: Path) -> None:
    """Over FLOPs, one dot for each seed."""
    with pictures(path, 10, 4, 2) as (losses, accuracies):
        for color, (arm, found) in enumerate(runs.items()):
            style = dict(color=f"C{color}", label=arm)
            losses.plot([run.flops[-1] for run in found], [run.final for run in found], "o", **style)
            accuracies.errorbar([run.flops[-1] * (1 + 0.01 * i) for i, run in enumerate(found)], [100 * blimp(run)["value"] for run in found],
                                [100 * blimp(run)["se"] for run in found], fmt="o", **style)
        accuracies.axhline(50, color="#808890", linewidth=1)
        for axes, name in (losses, "validation bits per byte"), (accuracies, "BLiMP, percent"):
            axes.set_xlabel("training FLOPs")
            axes.set_ylabel(name)
        losses.legend(frameon=False)


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--steps", type=positive_int, default=300, help="of 4,096 tokens")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help=f"{PLAIN} is always among them")
    parser.add_argument("--tune", action="store_true", help="find learning rates instead, in half as many steps")
    args = parser.parse_args(argv)
    if args.tune:
        return print(tune(args.steps // 2, args.jobs))
    arms = [arm for arm in ARMS if arm in (PLAIN, *args.arms)]
    by_seed = run_by_seed(lambda seed: plan(args.steps, arms, seed), args.seeds, args.jobs)
    runs = {arm: [found[arm] for found in by_seed] for arm in by_seed[0]}
    print(table(runs))
    if args.out:
        write_text_atomic(args.out, to_json(runs))
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    sys.exit(main())
