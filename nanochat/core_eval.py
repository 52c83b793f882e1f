"""CORE, the in-context-learning benchmark of DCLM (Li et al. 2024, 2406.11794, section 3.5): prompts, scoring and the data bundle.

Three kinds of task:
* multiple_choice: one context, several endings; the ending with the lowest mean loss per token is the answer
* schema: several contexts, one ending; the context after which the ending has the lowest mean loss is the answer
* language_modeling: right if greedy decoding would reproduce the ending

Where prompts are cut into the shared and the scored part is decided on tokens. What is shared would leave nothing to
score where one choice is a prefix of all others (or two contexts are equal): then the last token of the
shortest choice counts as scored in all of them, so that every choice has at least one.

Speed: examples of like length run through the model together, and logits are computed only where something is scored.
"""
import csv
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.cli import UsageError
from nanochat.common import PROGRESS_SECONDS, is_ddp_initialized, print0
from nanochat.eval_bundle import find_eval_bundle
from nanochat.files import parse_json

TOKENS_PER_FORWARD = {"cpu": 1024, "cuda": 16384, "mps": 8192}  # padding included; small batches stay in a CPU's cache
CORE_TASKS = 22  # in the published benchmark
EXAMPLES_SORTED = 256  # how many are tokenized, sorted by length and batched at a time

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


def find_common_length(token_sequences: Sequence[Sequence[int]], direction: str = "left") -> int:
    """Length of the common prefix (`left`) or suffix (`right`) of all sequences."""
    if direction == "right":
        token_sequences = [sequence[::-1] for sequence in token_sequences]
    length = 0
    for tokens in zip(*token_sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def stack_sequences(tokens: Sequence[Sequence[int]], pad_token_id: int) -> torch.Tensor:
    """int64 (n, longest), padded on the right."""
    longest = max(map(len, tokens))
    return torch.tensor([list(row) + [pad_token_id] * (longest - len(row)) for row in tokens], dtype=torch.long)


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


@dataclass
class Example:
    """One test item, ready for the model. Tokens `start` to `end - 1` of each sequence are scored."""
    sequences: list[list[int]]
    starts: list[int]
    ends: list[int]
    gold: int | None  # the right sequence; None: the sequence is right if the model would decode it greedily

    @property
    def width(self) -> int:
        return max(self.ends)


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
    if max_seq_len is not None:
        starts = [max(1, start - max(0, end - max_seq_len)) for start, end in zip(starts, ends, strict=True)]
        ends = [min(end, max_seq_len) for end in ends]
        sequences = [sequence[-max_seq_len:] for sequence in sequences]
    return Example(sequences, starts, ends, None if kind == "language_modeling" else item["gold"])


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


def logits_at(model, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`model(input_ids)[rows, columns]`: float32 logits (N, V) at N positions of input_ids (B, T), given by rows (N,) and columns (N,).

    A model that ends in an `lm_head` computes no others: with a large vocabulary and few scored positions most of a small
    model's work is the head.
    """
    head = getattr(model, "lm_head", None)
    if head is None:
        return model(input_ids)[rows, columns]
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][rows, columns],))
    try:
        return model(input_ids)
    finally:
        hook.remove()


@torch.no_grad()
def score_examples(model, examples: Sequence[Example], device) -> list[bool]:
    """Whether the model gets each example right. All examples are of one task and run in one forward pass."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    spans = [torch.arange(start, end) for example in examples for start, end in zip(example.starts, example.ends, strict=True)]
    lengths = [len(span) for span in spans]
    input_ids = stack_sequences(sequences, pad_token_id=0)  # attention is causal: what pads the right changes nothing
    rows, columns = torch.arange(len(spans)).repeat_interleave(torch.tensor(lengths)), torch.cat(spans)
    targets = input_ids[rows, columns].to(device)
    logits = logits_at(model, input_ids.to(device), rows.to(device), (columns - 1).to(device))
    if examples[0].gold is None:
        return [bool(hits.all()) for hits in (logits.argmax(dim=-1) == targets).cpu().split(lengths)]
    means = iter([losses.mean() for losses in F.cross_entropy(logits, targets, reduction="none").cpu().split(lengths)])
    return [int(torch.stack([next(means) for _ in example.sequences]).argmin()) == example.gold for example in examples]


def _forward_batches(examples: list[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Examples of like length together, each batch within `max_tokens` padded tokens or a single example."""
    batch: list[Example] = []
    rows = 0
    for example in sorted(examples, key=lambda example: example.width, reverse=True):
        if batch and (rows + len(example.sequences)) * batch[0].width > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(example)
        rows += len(example.sequences)
    if batch:
        yield batch


def _max_positions(model) -> int | None:
    """`max_seq_len`, for a model that has one, else the end of the rotary table; None for a model without a limit."""
    return getattr(model, "max_seq_len", getattr(model, "rotary_seq_len", None))


def evaluate_example(idx: int, model, tokenizer, data: Sequence[dict], device, task_meta: dict) -> bool:
    """Whether the model gets item `idx` of `data` right."""
    example = prepare_example(idx, tokenizer, data, task_meta, _max_positions(model))
    return score_examples(model, [example], device)[0]


def evaluate_task(model, tokenizer, data: Sequence[dict], device, task_meta: dict, progress: Callable[[float], None] | None = None) -> float:
    """Accuracy on all of `data`, shared out over the ranks. `task_meta` has task_type, num_fewshot and continuation_delimiter.

    `progress` is called with the fraction that this rank has done.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp_initialized() else (0, 1)
    mine = range(rank, len(data), world_size)
    max_seq_len = _max_positions(model)
    correct = done = 0
    for first in range(0, len(mine), EXAMPLES_SORTED):
        examples = [prepare_example(idx, tokenizer, data, task_meta, max_seq_len) for idx in mine[first:first + EXAMPLES_SORTED]]
        for batch in _forward_batches(examples, TOKENS_PER_FORWARD[torch.device(device).type]):
            correct += sum(score_examples(model, batch, device))
            done += len(batch)
            if progress is not None:
                progress(done / len(mine))
    if world_size > 1:
        total = torch.tensor(correct, device=device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
        correct = int(total)
    return correct / len(data)


# -----------------------------------------------------------------------------
# Bundle


@dataclass
class CoreTask:
    label: str
    meta: dict[str, Any]  # as `evaluate_task` takes it
    baseline: float  # accuracy of guessing, in percent
    data: list[dict]

    @property
    def work(self) -> int:
        """Characters the model has to read, roughly: the measure of progress."""
        render = _RENDER[self.meta["task_type"]]
        prompts = (prompt for item in self.data for prompt in render(item, self.meta["continuation_delimiter"]))
        return (1 + self.meta["num_fewshot"]) * sum(map(len, prompts))

    def centered(self, accuracy: float) -> float:
        """Accuracy rescaled so that guessing is 0 and perfection 1."""
        return (accuracy - 0.01 * self.baseline) / (1 - 0.01 * self.baseline)


def load_bundle(bundle_dir: Path, max_per_task: int = -1) -> tuple[list[CoreTask], list[str]]:
    """(tasks, labels of tasks that have no data file) of a CORE bundle: core.yaml, eval_meta_data.csv and eval_data/.

    With `max_per_task` above 0 each task keeps that many rows, the first ones after a shuffle with a fixed seed.
    Raises UsageError, with file and line, for anything that could not be evaluated.
    """
    baselines = _read_baselines(bundle_dir / "eval_meta_data.csv")
    tasks, missing = [], []
    for label, uri, meta in _read_task_list(bundle_dir / "core.yaml"):
        path = bundle_dir / "eval_data" / uri
        if not path.exists():
            missing.append(label)
            continue
        if label not in baselines:
            raise UsageError(f"{bundle_dir / 'eval_meta_data.csv'} has no row for the task {label} of core.yaml: add its random baseline")
        data = _read_rows(path, meta["task_type"])
        random.Random(1337).shuffle(data)
        if max_per_task > 0:
            data = data[:max_per_task]
        if len(data) <= meta["num_fewshot"]:
            raise UsageError(f"task {label} shows {meta['num_fewshot']} solved examples beside each item, but has only {len(data)} rows: "
                             f"use at least {meta['num_fewshot'] + 1} rows a task")
        tasks.append(CoreTask(label, meta, baselines[label], data))
    if not tasks:
        raise UsageError(f"{bundle_dir} holds no data for any task of its core.yaml: delete it, so that the bundle is downloaded again")
    return tasks, missing


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path} ({error}): delete the eval_bundle folder, so that it is downloaded again") from error


def _read_task_list(path: Path) -> list[tuple[str, str, dict]]:
    """(label, dataset_uri, task_meta) of every task."""
    import yaml
    try:
        entries = yaml.safe_load(_read_text(path))["icl_tasks"]
        tasks = [(entry["label"], entry["dataset_uri"], dict(
            task_type=entry["icl_task_type"], num_fewshot=entry["num_fewshot"][0],
            continuation_delimiter=entry.get("continuation_delimiter", " "))) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a list of CORE tasks ({type(error).__name__}: {error}): each entry of icl_tasks needs label, "
                         "dataset_uri, num_fewshot as a list, and icl_task_type") from error
    for label, _, meta in tasks:
        if meta["task_type"] not in _RENDER:
            raise UsageError(f"{path}: task {label} has the unknown icl_task_type {meta['task_type']!r}: use one of {', '.join(_RENDER)}")
        if type(meta["num_fewshot"]) is not int or meta["num_fewshot"] < 0:
            raise UsageError(f"{path}: task {label} has num_fewshot {meta['num_fewshot']!r}: use whole numbers of 0 or more")
    return tasks


def _read_baselines(path: Path) -> dict[str, float]:
    try:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(_read_text(path).splitlines())}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} needs the columns 'Eval Task' and 'Random baseline' (percent) in every row ({error})") from error
    for label, baseline in baselines.items():
        if not 0 <= baseline < 100:
            raise UsageError(f"{path}: the random baseline of {label} is {baseline}, which is not in the range of 0 to below 100 percent")
    return baselines


def _read_rows(path: Path, task_type: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is not JSON ({error}): mend the line or take it out") from error
        if complaint := _row_complaint(row, task_type):
            raise UsageError(f"{path}, line {number}: {complaint}; mend the line or take it out")
        rows.append(row)
    return rows


def _row_complaint(row: Any, task_type: str) -> str | None:
    """What is wrong with a row of this type of task, or None."""
    if not isinstance(row, dict):
        return "not a JSON object"
    text, ending, options = {
        "multiple_choice": ("query", None, "choices"),
        "schema": (None, "continuation", "context_options"),
        "language_modeling": ("context", "continuation", None)}[task_type]
    for name in (text, ending):
        if name and not isinstance(row.get(name), str):
            return f"{name!r} is missing or is not text"
    if ending and not row[ending]:
        return f"{ending!r} is empty"
    if options:
        if not isinstance(row.get(options), list) or not row[options] or not all(isinstance(option, str) and option for option in row[options]):
            return f"{options!r} is not a list of texts"
        if type(row.get("gold")) is not int or not 0 <= row["gold"] < len(row[options]):
            return f"'gold' is {row.get('gold')!r}, which is no index into the {len(row[options])} {options}"
    return None


# -----------------------------------------------------------------------------
# The whole benchmark


def evaluate_core(model, tokenizer, device, max_per_task: int = -1) -> dict:
    """{"results": accuracy by task, "centered_results", "core_metric": the mean of the centered results}.

    All ranks call it and get the same. `max_per_task` above 0 takes that many rows of each task. A bundle may lack tasks; the
    output says so. Raises UsageError for data that cannot be evaluated, before anything is.
    """
    tasks, missing = load_bundle(find_eval_bundle(), max_per_task)
    total_work, done_work = sum(task.work for task in tasks), 0
    started = shown = time.perf_counter()

    def progress(fraction: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        if now - shown > PROGRESS_SECONDS:
            shown = now
            done = (done_work + fraction * task.work) / total_work
            print0(f"{fraction:.0%} (all of CORE: {done:.0%}, eta {(now - started) * (1 - done) / done / 60:.1f}m) ", end="", flush=True)

    results, centered_results = {}, {}
    for task in tasks:
        task_started = time.perf_counter()
        print0(f"Evaluating: {task.label} ({task.meta['num_fewshot']}-shot, type: {task.meta['task_type']})... ", end="", flush=True)
        accuracy = evaluate_task(model, tokenizer, task.data, device, task.meta, progress)
        results[task.label], centered_results[task.label] = accuracy, task.centered(accuracy)
        done_work += task.work
        print0(f"accuracy: {accuracy:.4f} | centered: {task.centered(accuracy):.4f} | time: {time.perf_counter() - task_started:.2f}s", flush=True)
    if len(tasks) != CORE_TASKS:
        print0(f"The CORE metric is the mean of {len(tasks)} of {CORE_TASKS} tasks, not comparable with published numbers"
               + (f"; no data for {', '.join(missing)}" if missing else ""))
    return {"results": results, "centered_results": centered_results, "core_metric": sum(centered_results.values()) / len(tasks)}


def core_csv(core: dict) -> str:
    """What `evaluate_core` returns as a table of three padded columns."""
    def line(name: str, accuracy: str, centered: str) -> str:
        return f"{name:<35}, {accuracy:<10}, {centered:<10}\n"
    rows = [line(label, f"{accuracy:.6f}", f"{core['centered_results'][label]:.6f}") for label, accuracy in core["results"].items()]
    return line("Task", "Accuracy", "Centered") + "".join(rows) + line("CORE", "", f"{core['core_metric']:.6f}")
