"""Few data, many epochs: where a large model would overfit, does a small one that grows late end lower?

    NANOCHAT_BASE_DIR=few python -m nanochat.dataset --source=two_megabytes.txt     # and a tokenizer of 2,048
    NANOCHAT_BASE_DIR=few python -m analysis.growth_few_data --plot=dev/growth_few_data.png

Repeated text is worth ever less (2305.16264), and to a small model less is to be learnt of it. Trunks of 4x64 and 4x128 at a constant rate over some epochs, with branches that decay after so many; and 4x64 grown to 4x128 after half and most of the epochs. What growth must
beat is the best of all others: any size, any number of epochs.
"""
import statistics
import sys
from pathlib import Path

from analysis.study import DECAY, LARGE, SMALL, nats_per_bpb, run_by_seed, study_parser
from analysis.trial import Result, Trial
from nanochat.cli import command, positive_int
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit
from nanochat.dataset import parquets_iter_batched
from nanochat.drawing import picture
from nanochat.files import to_json, write_text_atomic
from nanochat.tokenizer import get_tokenizer

MOMENTS = (0.5, 0.8)  # of the epochs, at which to grow


def steps_of(epochs: list[int]) -> dict[int, float]:
    """By the number of epochs, as the loader goes through the training text: it drops the ends of documents that no row has room for, more of them as long ones pile up."""
    tokenizer = get_tokenizer()
    tokens = sum(len(ids) + 1 for texts in parquets_iter_batched("train") for ids in tokenizer.encode(texts))
    batches = tokenizing_distributed_data_loader_with_state_bos_bestfit(tokenizer, LARGE["device-batch-size"], LARGE["max-seq-len"], "train", device="cpu")
    return {count: next(state["used"] for _, _, state in batches if state["read"] >= count * tokens) / LARGE["total-batch-size"] for count in sorted(epochs)}


def plan(lengths: dict[int, float], seed: int) -> dict[str, Trial]:
    """lengths: steps by the number of epochs. Checkpoints lie at multiples of a twentieth of the shortest run."""
    unit = max(1, round(min(lengths.values()) / 20))
    at = lambda steps: max(1, round(steps / unit)) * unit
    flags = {**LARGE, "save-every": unit, "eval-every": unit * 2, "num-iterations": at(max(lengths.values())), "seed": seed}
    trunks = {"4x64": Trial({**flags, **SMALL["4x64"]}), "4x128": Trial(flags)}
    found = {}
    for count, length in lengths.items():
        fall, end = at(length * (1 - DECAY)), at(length)
        for size, trunk in trunks.items():
            found[f"{size}, {count} epochs"] = trunk.branch(fall, warmdown_steps=end - fall)
        for moment in MOMENTS:
            begin = at(length * moment)
            grown = trunks["4x64"].branch(begin, grow_to="4x128", matrix_lr=LARGE["matrix-lr"], steady_steps=fall - begin, warmdown_steps=end - fall)
            found[f"4x64 -> 4x128 at {moment}, {count} epochs"] = grown
    return found


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=1)
    parser.add_argument("--epochs", type=positive_int, nargs="+", default=[5, 10, 20, 40])
    args = parser.parse_args(argv)
    lengths = steps_of(args.epochs)
    by_seed = run_by_seed(lambda seed: plan(lengths, seed), args.seeds, args.jobs)
    nats = nats_per_bpb()
    best = min((name for name in by_seed[0] if "->" not in name), key=lambda name: statistics.mean(runs[name].final for runs in by_seed))
    print(f"Steps, by epochs: {', '.join(f'{count}: {length:,.0f}' for count, length in lengths.items())}. The best run that does not grow: {best}\n")
    print("| run | FLOPs | bits per byte | nats per token above the best that does not grow | by seed |\n|---|---:|---:|---:|---|")
    for name in by_seed[0]:
        gaps = [(runs[name].final - runs[best].final) * nats for runs in by_seed]
        print(f"| {name} | {by_seed[0][name].flops[-1]:.2e} | {statistics.mean(runs[name].final for runs in by_seed):.4f} | {statistics.mean(gaps):+.4f} | "
              f"{', '.join(f'{gap:+.4f}' for gap in gaps)} |")
    if args.out:
        write_text_atomic(args.out, to_json(by_seed))
    if args.plot:
        draw(by_seed, args.epochs, args.plot)


def draw(by_seed: list[dict[str, Result]], epochs: list[int], path: Path) -> None:
    with picture(path, 8, 5) as axes:
        for kind in dict.fromkeys(name.rsplit(", ", 1)[0] for name in by_seed[0]):
            axes.plot(epochs, [statistics.mean(runs[f"{kind}, {count} epochs"].final for runs in by_seed) for count in epochs], "o-" if "->" in kind else "o:", label=kind)
        axes.set_xscale("log")
        axes.set_xticks(epochs, list(map(str, epochs)))
        axes.minorticks_off()
        axes.set_xlabel("epochs")
        axes.set_ylabel("final validation bits per byte")
        axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(main())
