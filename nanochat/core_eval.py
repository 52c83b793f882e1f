"""CORE, the in-context-learning benchmark of DCLM (Li et al. 2024, 2406.11794, section 3.5): prompts and scoring.

Three kinds of task:
* multiple_choice: one context, several endings; the ending with the lowest mean loss per token is the answer
* schema: several contexts, one ending; the context after which the ending has the lowest mean loss is the answer
* language_modeling: right if greedy decoding would reproduce the ending

Where prompts are cut into the shared and the scored part is decided on tokens. What is shared would leave nothing to
score where one choice is a prefix of all others (or two contexts are equal): then the last token of the
shortest choice counts as scored in all of them, so that every choice has at least one.

Examples of like length run through the model together (evals/scoring.py); the data are read by eval_bundle.py.
"""
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from nanochat.cli import UsageError
from nanochat.common import PROGRESS_SECONDS, print0
from nanochat.eval_bundle import CoreTask, find_eval_bundle, load_bundle, tell_left_out
from nanochat.evals.results import Results, average, mean_row
from nanochat.evals.scoring import Example, find_common_length, max_positions, score_all, scored_logits
from nanochat.evals.scoring import stack_sequences as stack_sequences  # nanochat has it here

CORE_TASKS = 22  # in the published benchmark

# -----------------------------------------------------------------------------
# Prompts


def _shots(blocks: Iterator[str]) -> str:
    return "".join(f"{block}\n\n" for block in blocks)


def render_prompts_mc(item: dict, continuation_delimiter: str, fewshot_examples: Sequence[dict] | None = None) -> list[str]:
    """One prompt per choice: solved examples, the query, the choice."""
    shots = _shots(e["query"] + continuation_delimiter + e["choices"][e["gold"]] for e in fewshot_examples or ())
    return [shots + item["query"] + continuation_delimiter + choice for choice in item["choices"]]


def render_prompts_schema(item: dict, continuation_delimiter: str, fewshot_examples: Sequence[dict] | None = None) -> list[str]:
    """One prompt per context option: solved examples, the option, the continuation."""
    shots = _shots(e["context_options"][e["gold"]] + continuation_delimiter + e["continuation"] for e in fewshot_examples or ())
    return [shots + option + continuation_delimiter + item["continuation"] for option in item["context_options"]]


def render_prompts_lm(item: dict, continuation_delimiter: str, fewshot_examples: Sequence[dict] | None = None) -> list[str]:
    """Two prompts, without and with the continuation. The first is stripped, or its trailing space would be a token of its own."""
    shots = _shots(e["context"].strip() + continuation_delimiter + e["continuation"] for e in fewshot_examples or ())
    prompt = shots + item["context"].strip() + continuation_delimiter
    return [prompt.strip(), prompt + item["continuation"]]


# -----------------------------------------------------------------------------
# Tokens


class MergedContinuation(UsageError, AssertionError):
    """The tokens of context plus continuation do not begin with those of the context, so it is not clear what to score."""


def _encode(tokenizer, prompts: list[str]) -> list[list[int]]:
    return tokenizer(prompts, prepend=tokenizer.get_bos_token_id())


def batch_sequences_mc(tokenizer, prompts: list[str]) -> tuple[list[list[int]], list[int], list[int]]:
    """(sequences, starts, ends): what follows the common prefix is scored, and at least one token of each."""
    tokens = _encode(tokenizer, prompts)
    ends = [len(row) for row in tokens]
    start = min(find_common_length(tokens, "left"), min(ends) - 1)
    return tokens, [start] * len(tokens), ends


def batch_sequences_schema(tokenizer, prompts: list[str]) -> tuple[list[list[int]], list[int], list[int]]:
    """(sequences, starts, ends): the common suffix is scored, at least one token and never BOS."""
    tokens = _encode(tokenizer, prompts)
    ends = [len(row) for row in tokens]
    suffix = max(1, min(find_common_length(tokens, "right"), min(ends) - 1))
    return tokens, [end - suffix for end in ends], ends


def batch_sequences_lm(tokenizer, prompts: list[str]) -> tuple[list[list[int]], list[int], list[int]]:
    """([sequence], [start], [end]): what the second prompt adds to the first is scored. Raises MergedContinuation."""
    without, complete = _encode(tokenizer, prompts)
    if len(without) == len(complete) or complete[:len(without)] != without:
        raise MergedContinuation(f"the continuation at the end of {prompts[1][-80:]!r} is empty or shares a token with its context: "
                                 "put a space between them, or take the row out")
    return [complete], [len(without)], [len(complete)]


_RENDER: dict[str, Callable] = {
    "multiple_choice": render_prompts_mc, "schema": render_prompts_schema, "language_modeling": render_prompts_lm}
_BATCH: dict[str, Callable] = {
    "multiple_choice": batch_sequences_mc, "schema": batch_sequences_schema, "language_modeling": batch_sequences_lm}


def prepare_example(idx: int, tokenizer, data: Sequence[dict], task_meta: dict, max_seq_len: int | None = None) -> Example:
    """Item `idx` of `data` behind its few-shot examples, drawn from all other items with a seed of its own.

    Sequences beyond `max_seq_len` lose tokens on the left. Raises ValueError for an unknown task type.
    """
    kind = task_meta["task_type"]
    if kind not in _RENDER:
        raise ValueError(f"unknown task type {kind!r}")
    draw = random.Random(1234 + idx).sample(range(len(data) - 1), task_meta["num_fewshot"])
    shots = [data[other + (other >= idx)] for other in draw]  # skips the item itself
    item = data[idx]
    sequences, starts, ends = _BATCH[kind](tokenizer, _RENDER[kind](item, task_meta["continuation_delimiter"], shots))
    notes = ["with a choice that is the beginning of all others"] if kind == "multiple_choice" and find_common_length(sequences) == min(ends) else []
    if max_seq_len is not None:
        notes += ["cut to what the model takes"] if max(ends) > max_seq_len else []
        starts = [max(1, start - max(0, end - max_seq_len)) for start, end in zip(starts, ends, strict=True)]
        ends = [min(end, max_seq_len) for end in ends]
        sequences = [sequence[-max_seq_len:] for sequence in sequences]
    return Example(sequences, starts, ends, None if kind == "language_modeling" else item["gold"], notes)


# -----------------------------------------------------------------------------
# Scoring


@torch.no_grad()
def forward_model(model, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (B, T) in nats, of predicting the token after each position, and greedy predictions (B, T).

    The last column of the losses is NaN: what follows is not known.
    """
    logits = model(input_ids)
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids.roll(-1, dims=1).flatten(), reduction="none").view_as(input_ids)
    losses[:, -1] = float("nan")
    return losses, logits.argmax(dim=-1)


@torch.no_grad()
def score_examples(model, examples: Sequence[Example], device) -> list[bool]:
    """Whether the model gets each example right. All examples are of one task and run in one forward pass."""
    logits, targets, lengths = scored_logits(model, examples, device)
    if examples[0].gold is None:
        return [bool(hits.all()) for hits in (logits.argmax(dim=-1) == targets).cpu().split(lengths)]
    means = iter([losses.mean() for losses in F.cross_entropy(logits, targets, reduction="none").cpu().split(lengths)])
    return [int(torch.stack([next(means) for _ in example.sequences]).argmin()) == example.gold for example in examples]


def evaluate_example(idx: int, model, tokenizer, data: Sequence[dict], device, task_meta: dict) -> bool:
    """Whether the model gets item `idx` of `data` right."""
    example = prepare_example(idx, tokenizer, data, task_meta, max_positions(model))
    return score_examples(model, [example], device)[0]


def score_task(model, tokenizer, data: Sequence[dict], device, task_meta: dict, progress: Callable[[float], None] | None = None) -> tuple[torch.Tensor, dict[str, int]]:
    """(1 or 0 for each item of `data`, NaN where it is not clear what to score; what there is to count), shared out over the ranks."""
    limit, context = max_positions(model), getattr(getattr(model, "config", None), "sequence_len", None)

    def prepare(idx: int) -> Example | None:
        try:
            example = prepare_example(idx, tokenizer, data, task_meta, limit)
        except MergedContinuation:
            return None
        if context is not None and example.width > context:
            example.notes.append("longer than the training context")
        return example
    return score_all(len(data), prepare, lambda examples: score_examples(model, examples, device), device, progress)


def evaluate_task(model, tokenizer, data: Sequence[dict], device, task_meta: dict, progress: Callable[[float], None] | None = None) -> float:
    """Accuracy on `data`, shared out over the ranks. `task_meta` has task_type, num_fewshot and continuation_delimiter.

    `progress` is called with the fraction that this rank has done.
    """
    return mean_row(score_task(model, tokenizer, data, device, task_meta, progress)[0]).value


# -----------------------------------------------------------------------------
# The whole benchmark


def _work(task: CoreTask) -> int:
    """Characters the model has to read, roughly: the measure of progress."""
    render = _RENDER[task.meta["task_type"]]
    prompts = (prompt for item in task.data for prompt in render(item, task.meta["continuation_delimiter"]))
    return (1 + task.meta["num_fewshot"]) * sum(map(len, prompts))


def evaluate_core(model, tokenizer, device, max_per_task: int = -1, bundle: Path | None = None, labels: Sequence[str] | None = None) -> dict:
    """{"results": accuracy by task, "centered_results", "core_metric": the mean of the centered results, "rows": all of it with standard errors}.

    All ranks call it and get the same. `max_per_task` above 0 takes that many rows of each task. bundle: the folder of the data, None for that of the
    base directory. labels: the tasks, None for all. A bundle may lack tasks; the output says so. Raises UsageError for data that cannot be evaluated,
    before anything is.
    """
    tasks, missing = load_bundle(bundle or find_eval_bundle(), max_per_task, labels)
    tell_left_out(tasks)
    total_work, done_work = sum(map(_work, tasks)), 0
    started = shown = time.perf_counter()

    def progress(fraction: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            done = (done_work + fraction * _work(task)) / total_work
            print0(f"{fraction:.0%} (all of CORE: {done:.0%}, eta {(now - started) * (1 - done) / done / 60:.1f}m) ", end="", flush=True)

    rows: Results = {}
    centered: Results = {}
    for task in tasks:
        task_started = time.perf_counter()
        print0(f"Evaluating: {task.label} ({task.meta['num_fewshot']}-shot, type: {task.meta['task_type']})... ", end="", flush=True)
        scores, counts = score_task(model, tokenizer, task.data, device, task.meta, progress)
        row = mean_row(scores, baseline=0.01 * task.baseline, counts=counts)
        if row.n == 0:
            print0("left out: every continuation shares a token with its context, so it is not clear what to score", flush=True)
            missing.append(task.label)
            continue
        rows[task.label] = replace(row, counts=row.counts | ({"not usable": len(task.bad)} if task.bad else {}))
        scale = 1 - 0.01 * task.baseline
        centered[task.label] = replace(row, value=task.centered(row.value), se=None if row.se is None else row.se / scale)
        done_work += _work(task)
        noted = "".join(f" | {count} {name}" for name, count in rows[task.label].counts.items())
        print0(f"accuracy: {row.value:.4f} | centered: {centered[task.label].value:.4f} | time: {time.perf_counter() - task_started:.2f}s{noted}", flush=True)
    if not rows:
        raise UsageError("no task of CORE could be scored; the lines above say why")
    if len(rows) != CORE_TASKS:
        print0(f"The CORE metric is the mean of {len(rows)} of {CORE_TASKS} tasks, not comparable with published numbers"
               + (f"; no data for {', '.join(missing)}" if missing else ""))
    core = average(list(centered.values()), metric=f"mean centered accuracy of {len(rows)} tasks", baseline=0.0, label="CORE metric")
    return {"results": {label: row.value for label, row in rows.items()}, "centered_results": {label: row.value for label, row in centered.items()},
            "core_metric": core.value, "rows": {"": replace(core, counts={}), **rows}}


def core_csv(core: dict) -> str:
    """What `evaluate_core` returns as a table of three padded columns."""
    def line(name: str, accuracy: str, centered: str) -> str:
        return f"{name:<35}, {accuracy:<10}, {centered:<10}\n"
    rows = [line(label, f"{accuracy:.6f}", f"{core['centered_results'][label]:.6f}") for label, accuracy in core["results"].items()]
    return line("Task", "Accuracy", "Centered") + "".join(rows) + line("CORE", "", f"{core['core_metric']:.6f}")
