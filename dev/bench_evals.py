"""CORE and BLiMP scored in batches against one example at a time with all logits, and against lm-eval's adapter for transformers, in turns in one call:

    python -m dev.bench_evals --examples 4
    python -m dev.bench_evals --model-tag d4 --examples 100 --batches-only
    python -m dev.bench_evals --model-tag d4 --blimp DATA/blimp.jsonl.gz --examples 5
    pip install accelerate peft && python -m scripts.export --to=hf -g d4 --out=d4-hf && python -m dev.bench_evals --model-tag d4 --examples 5 --lm-eval d4-hf

Examples are per task or paradigm; the times are CPU seconds, which other work on the machine does not change much (OMP_NUM_THREADS=1: threads that wait count). Without --model-tag a random model of --depth 4; tokenizer and evaluation bundle are those of NANOCHAT_BASE_DIR.
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat import checkpoint_manager, core_eval
from nanochat.cli import ArgumentParser, command, non_negative_int, positive_int
from nanochat.common import COMPUTE_DTYPE, compute_init
from nanochat.eval_bundle import find_eval_bundle, load_bundle
from nanochat.evals import blimp, scoring
from nanochat.gpt import GPT
from nanochat.recipe import gpt_config
from nanochat.tokenizer import get_tokenizer


LONGEST = 4096  # tokens of an example; lm-eval would cut them to those of the training


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


def by_lm_eval(folder: Path, rows: int = 8) -> Callable[[list], list[bool]]:
    """Scores CORE's examples as lm-eval would: each choice a request of its own, of the same tokens, so many at a time."""
    from lm_eval.models.huggingface import HFLM
    adapter = HFLM(pretrained=str(folder), device="cpu", dtype=COMPUTE_DTYPE, batch_size=rows, max_length=LONGEST, trust_remote_code=True)

    def decisions(examples: list) -> list[bool]:
        requests = [(n, sequence[:start], sequence[start:end]) for n, example in enumerate(examples) for sequence, start, end in zip(example.sequences, example.starts, example.ends)]
        answers = adapter._loglikelihood_tokens([(("", ""), context, ending) for _, context, ending in requests], disable_tqdm=True)
        found: list[list[tuple[float, bool]]] = [[] for _ in examples]
        for (n, _, ending), (likelihood, greedy) in zip(requests, answers):
            found[n].append((-likelihood / len(ending), greedy))
        return [each[0][1] if example.gold is None else min(range(len(each)), key=lambda i: each[i][0]) == example.gold for example, each in zip(examples, found)]
    return decisions


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
    parser.add_argument("--lm-eval", type=Path, metavar="FOLDER", help="the same model as scripts.export wrote it, scored by lm-eval beside it (CORE)")
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
    contestants: dict[str, Callable[[list], list]] = {"in batches": lambda examples: in_batches(score, examples)}
    if not args.batches_only:
        contestants["one by one"] = lambda examples: [one(model, example) for example in examples]
    if args.lm_eval:
        contestants["lm-eval"] = by_lm_eval(args.lm_eval)
    totals, differing, count = dict.fromkeys(contestants, 0.0), dict.fromkeys(contestants, 0), 0
    with torch.no_grad():
        for label, prepare in work.items():
            seconds, decisions = {}, {}
            for name, decide in contestants.items():
                started = time.process_time()
                decisions[name] = decide(prepare())  # the time to make examples of texts counts
                seconds[name] = time.process_time() - started
                totals[name] += seconds[name]
                differing[name] += sum(a != b for a, b in zip(decisions["in batches"], decisions[name]))
            number = len(decisions["in batches"])
            count += number
            others = "".join(f"; {name} {seconds[name]:.2f} s, {seconds[name] / seconds['in batches']:.1f}x" for name in list(contestants)[1:])
            print(f"{label}: {number} in {seconds['in batches']:.2f} s, {number / seconds['in batches']:.1f}/s{others}", flush=True)
    others = "".join(f"; {name} {totals[name]:.1f} s, {totals[name] / totals['in batches']:.1f}x, {differing[name]} decisions differ" for name in list(contestants)[1:])
    print(f"all {count} examples: {totals['in batches']:.1f} s in batches{others}")


if __name__ == "__main__":
    sys.exit(main())
