"""CORE and BLiMP scored in batches against one example at a time with all logits, in turns in one call:

    python -m dev.bench_evals --examples 4
    python -m dev.bench_evals --model-tag d4 --examples 100 --batches-only
    python -m dev.bench_evals --model-tag d4 --blimp DATA/blimp.jsonl.gz --examples 5

Examples are per task or paradigm; the times are CPU seconds, which other work on the machine does not change much (OMP_NUM_THREADS=1: threads that wait count). Without --model-tag a random model of --depth 4; tokenizer and evaluation bundle are those of NANOCHAT_BASE_DIR.
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat import checkpoint_manager, core_eval
from nanochat.cli import ArgumentParser, command, non_negative_int, positive_int
from nanochat.common import compute_init
from nanochat.eval_bundle import find_eval_bundle, load_bundle
from nanochat.evals import blimp, scoring
from nanochat.gpt import GPT
from nanochat.recipe import gpt_config
from nanochat.tokenizer import get_tokenizer


def one_by_one(model, example) -> bool:
    """The definition: every logit of every sequence, one example per pass."""
    ids = core_eval.stack_sequences(example.sequences, pad_token_id=0)
    losses, predictions = core_eval.forward_model(model, ids)
    spans = list(zip(example.starts, example.ends))
    if example.gold is None:
        start, end = spans[0]
        return bool((predictions[0, start - 1:end - 1] == ids[0, start:end]).all())
    means = [losses[row, start - 1:end - 1].mean().item() for row, (start, end) in enumerate(spans)]
    return means.index(min(means)) == example.gold


def sentence_by_sentence(model, example) -> bool:
    """The definition: the likelier of two whole sentences, each read alone."""
    costs = [core_eval.forward_model(model, torch.tensor([sentence]))[0][0, :-1].double().sum().item() for sentence in example.sequences]
    return costs[0] < costs[1]


def in_batches(score: Callable, examples: list) -> list:
    got: dict = {}
    for batch in scoring.batches_by_length(examples, scoring.TOKENS_PER_FORWARD["cpu"]):
        got.update(zip(map(id, batch), score(batch)))
    return [got[id(example)] for example in examples]


def random_model(depth: int, vocab_size: int) -> GPT:
    with torch.device("meta"):
        model = GPT(gpt_config(depth, 64, 64, 2048, vocab_size, "SSSL"))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.cast_for_inference()
    return model


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description="Evaluation in batches against one by one")
    parser.add_argument("--depth", type=positive_int, default=4)
    parser.add_argument("--model-tag")
    parser.add_argument("--step", type=non_negative_int)
    parser.add_argument("--blimp", type=Path, help="Minimal pairs instead of CORE")
    parser.add_argument("--examples", type=positive_int, default=4, help="of each task or paradigm")
    parser.add_argument("--batches-only", action="store_true", help="Leave out the slow side")
    args = parser.parse_args(argv)
    compute_init("cpu")
    tokenizer, cpu = get_tokenizer(), torch.device("cpu")
    model = random_model(args.depth, tokenizer.get_vocab_size()) if args.model_tag is None else checkpoint_manager.load_model("base", cpu, "eval", args.model_tag, args.step)[0]
    one, score = one_by_one, lambda batch: core_eval.score_examples(model, batch, cpu)
    if args.blimp:
        one, costs = sentence_by_sentence, blimp._costs(model, tokenizer, cpu)
        score = lambda batch: blimp.prefer_good(batch, costs(batch))
        pairs = [pair for group in blimp.read_set(args.blimp, args.examples)[0].values() for pair in group]
        work = {"BLiMP": lambda: [blimp.pair_example(pair, tokenizer) for pair in pairs]}
    else:
        tasks, _ = load_bundle(find_eval_bundle())
        work = {task.label: lambda task=task: [core_eval.prepare_example(i, tokenizer, task.data, task.meta) for i in range(min(args.examples, len(task.data)))]
                for task in tasks}
    totals, differing, count = [0.0, 0.0], 0, 0
    with torch.no_grad():
        for label, prepare in work.items():
            examples = prepare()
            started = time.process_time()
            wanted = None if args.batches_only else [one(model, example) for example in examples]
            between = time.process_time()
            got = in_batches(score, prepare())  # the time to make examples of texts counts
            seconds = (between - started, time.process_time() - between)
            totals, count = [total + s for total, s in zip(totals, seconds)], count + len(examples)
            differing += sum(a != b for a, b in zip(wanted or (), got))
            ratio = f"{seconds[0]:.2f} s one by one, {seconds[0] / seconds[1]:.1f}x" if wanted else ""
            print(f"{label}: {len(examples)} in {seconds[1]:.2f} s, {len(examples) / seconds[1]:.1f}/s; {ratio}", flush=True)
    print(f"all {count} examples: {totals[1]:.1f} s in batches" + ("" if args.batches_only else f", {totals[0]:.1f} s one by one, {totals[0] / totals[1]:.1f}x; {differing} decisions differ"))


if __name__ == "__main__":
    sys.exit(main())
