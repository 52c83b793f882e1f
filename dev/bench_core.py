"""CORE scored in batches against one example at a time with all logits, in turns in one call:

    python -m dev.bench_core --examples 4

A random model of --depth 4; tokenizer and evaluation bundle are those of NANOCHAT_BASE_DIR.
"""
import sys
import time

import torch

from nanochat import core_eval
from nanochat.cli import ArgumentParser, command, positive_int
from nanochat.common import compute_init
from nanochat.eval_bundle import find_eval_bundle, load_bundle
from nanochat.evals import scoring
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


@command
def main(argv=None) -> None:
    parser = ArgumentParser(description="CORE in batches against one by one")
    parser.add_argument("--depth", type=positive_int, default=4)
    parser.add_argument("--examples", type=positive_int, default=4, help="of each task")
    args = parser.parse_args(argv)
    compute_init("cpu")
    tokenizer = get_tokenizer()
    with torch.device("meta"):
        model = GPT(gpt_config(args.depth, 64, 64, 2048, tokenizer.get_vocab_size(), "SSSL"))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.cast_for_inference()
    tasks, _ = load_bundle(find_eval_bundle())
    totals = [0.0, 0.0]
    differing = 0
    with torch.no_grad():
        for task in tasks:
            examples = [core_eval.prepare_example(i, tokenizer, task.data, task.meta) for i in range(min(args.examples, len(task.data)))]
            started = time.perf_counter()
            wanted = [one_by_one(model, example) for example in examples]
            between = time.perf_counter()
            got: dict = {}
            for batch in scoring.batches_by_length(examples, scoring.TOKENS_PER_FORWARD["cpu"]):
                got.update(zip(map(id, batch), core_eval.score_examples(model, batch, torch.device("cpu"))))
            seconds = (between - started, time.perf_counter() - between)
            totals = [total + s for total, s in zip(totals, seconds)]
            differing += sum(want != got[id(example)] for want, example in zip(wanted, examples))
            print(f"{task.label}: {seconds[0]:.2f} s one by one, {seconds[1]:.2f} s in batches, {seconds[0] / seconds[1]:.1f}x", flush=True)
    print(f"all {len(tasks)} tasks: {totals[0]:.1f} s against {totals[1]:.1f} s, {totals[0] / totals[1]:.1f}x; {differing} decisions differ")


if __name__ == "__main__":
    sys.exit(main())
