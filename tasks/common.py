"""What a task is, how tasks are mixed, and where their data come from.

A task is a list of conversations, and for evaluation a way to judge an answer. Data sets of the Hugging Face hub are fetched
and cached by the `datasets` library. On a machine without network put a data set's rows, as .parquet or .jsonl files, into

    NANOCHAT_BASE_DIR/task_data/<owner>--<name>/<subset>/<split>/      for example task_data/openai--gsm8k/main/train/

which is also where nanochat keeps them. What lies there is taken instead of the hub's.
"""
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.cli import UsageError
from nanochat.common import get_base_dir, hub_unreachable, print0
from nanochat.files import open_text, parse_json

# -----------------------------------------------------------------------------
# Data


class HubDataset:
    """Rows of a table, as dicts of plain Python values, in the table's order or that of a permutation."""

    def __init__(self, table: pa.Table, permutation: np.ndarray | None = None):
        self.table, self.permutation = table, permutation

    def __len__(self) -> int:
        return len(self.table)

    def shuffle(self, seed: int) -> "HubDataset":
        """The same rows in an order that depends on the seed only; it is the one that `datasets` shuffles into."""
        return HubDataset(self.table, np.random.default_rng(seed).permutation(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index if self.permutation is None else int(self.permutation[index])
        return self.table.slice(row, 1).to_pylist()[0]


def load_hub_dataset(repo_id: str, subset: str = "default", split: str = "train", columns: dict[str, pa.DataType | None] | None = None) -> HubDataset:
    """All rows of a split. columns: those that every row must have, and what they must hold, None for anything. Raises UsageError where rows cannot be had, are damaged or are not so."""
    columns = columns or {}
    folder = Path(get_base_dir(), "task_data", repo_id.replace("/", "--"), subset, split)
    table = _read_folder(folder)
    if table is None:
        try:
            if hub_unreachable():
                import huggingface_hub.constants
                print0(f"huggingface.co cannot be reached: looking for {repo_id} among the data sets fetched before")
                huggingface_hub.constants.HF_HUB_OFFLINE = True
            import datasets
            table = datasets.load_dataset(repo_id, None if subset == "default" else subset, split=split).with_format("arrow")[:]
        except Exception as error:  # of a dozen kinds: no network, no such data set, a full disk
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"cannot get {repo_id} ({subset}, {split}) from the Hugging Face hub: {reason}; "
                             f"without network put its rows as .parquet or .jsonl files into {folder}") from error
    if missing := [name for name in columns if name not in table.column_names]:
        raise UsageError(f"the rows of {repo_id} ({subset}, {split}) have no {', '.join(missing)}, but {', '.join(table.column_names)}; "
                         f"see {folder} for local files of another kind")
    if empty := [f"{table[name].null_count:,} have no {name}" for name in columns if table[name].null_count]:
        raise UsageError(f"of the {len(table):,} rows of {repo_id} ({subset}, {split}) {', '.join(empty)}; put those that have it into files in {folder}")
    if table.num_rows and (wrong := [f"{name} is {table.schema.field(name).type}, not {kind}" for name, kind in columns.items() if kind and not _fits(table.schema.field(name).type, kind)]):
        raise UsageError(f"the rows of {repo_id} ({subset}, {split}) are of another kind: {'; '.join(wrong)}; put those that are meant into files in {folder}")
    return HubDataset(table)


TEXT, TEXTS, NUMBER = pa.string(), pa.list_(pa.string()), pa.int64()


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of a column are texts, whole numbers, lists or structures like those that are wanted, whatever Arrow stores them as."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(wanted):
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)) and _fits(kind.value_type, wanted.value_type)
    if pa.types.is_struct(wanted):
        return pa.types.is_struct(kind) and all(kind.get_field_index(field.name) >= 0 and _fits(kind.field(field.name).type, field.type) for field in wanted)
    return pa.types.is_integer(kind) if pa.types.is_integer(wanted) else pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _read_folder(folder: Path) -> pa.Table | None:
    """The rows of its .parquet and .jsonl files in order of their names, without hidden ones; None where there is no such file."""
    paths = sorted(path for path in folder.glob("*") if path.name.endswith((".parquet", *JSON_LINES)) and not path.name.startswith("."))
    try:
        tables = [pq.read_table(path) if path.suffix == ".parquet" else pa.Table.from_pylist(list(read_jsonl(path))) for path in paths]
        return pa.concat_tables(tables, promote_options="default") if tables else None
    except (pa.ArrowException, AttributeError, OSError, OverflowError, TypeError, ValueError) as error:  # also of numbers and texts that Arrow cannot hold
        if isinstance(error, OSError) and error.errno:
            raise
        raise UsageError(f"the files in {folder} are damaged or do not fit together ({str(error).partition(chr(10))[0]}); put intact ones there") from error


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def read_jsonl(path: str | os.PathLike) -> Iterator[Any]:
    """The value of each line that is not blank. Raises UsageError for a missing file or a broken line."""
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        yield parse_json(line)
                    except ValueError as error:
                        raise UsageError(f"{path}, line {number} is not JSON ({error}); repair or delete it") from error
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {path}") from error
    except OSError as error:  # also of a broken .gz or .zst
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason})") from error


def check_messages(messages: Any, where: str) -> list[dict]:
    """`messages` if they are a conversation: an optional system message, then user and assistant in turn, the assistant last.

    Raises UsageError naming the place `where` otherwise.
    """
    def bad(what: str) -> UsageError:
        return UsageError(f"{where} is no conversation: {what}; repair or delete it")

    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise bad("it must be a list of messages with role and content")
    turns = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if len(turns) < 2 or len(turns) % 2:
        raise bad(f"{len(turns)} messages of user and assistant, where they must alternate and the assistant must end")
    for message, role in zip(turns, ["user", "assistant"] * (len(turns) // 2), strict=True):
        if message.get("role") != role:
            raise bad(f"a message of {message.get('role')!r} where {role!r} must speak")
    for message in messages:
        if not isinstance(message.get("content"), str):
            raise bad(f"the content of a {message.get('role')} message is a {type(message.get('content')).__name__}, not text")
    return messages


# -----------------------------------------------------------------------------
# Tasks


class Task:
    """A list of conversations, of which `start`, `stop` and `step` select some as in a slice (but `stop` is taken at its word)."""

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        assert start >= 0, f"start must be 0 or more, not {start}"
        assert stop is None or stop >= start, f"stop={stop} is before start={start}"
        assert step >= 1, f"step must be 1 or more, not {step}"
        self.start, self.stop, self.step = start, stop, step

    @property
    def eval_type(self) -> str:
        """`generative`: the model writes an answer, `categorical`: it chooses one of the example's `letters`."""
        raise NotImplementedError

    def num_examples(self) -> int:
        """Of the whole data set."""
        raise NotImplementedError

    def get_example(self, index: int) -> dict:
        """A conversation {"messages": [...]}, with whatever else `evaluate` needs."""
        raise NotImplementedError

    def evaluate(self, problem: dict, completion: str):
        """Whether the completion solves the example."""
        raise NotImplementedError

    def reward(self, problem: dict, completion: str) -> float:
        """What reinforcement learning maximizes."""
        return float(self.evaluate(problem, completion))

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else self.stop
        return max(0, math.ceil((stop - self.start) / self.step))

    def __getitem__(self, index: int) -> dict:
        assert isinstance(index, int), f"an index is an int, not a {type(index).__name__}"
        return self.get_example(self.start + index * self.step)

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))


class TaskMixture(Task):
    """All examples of several tasks in a fixed shuffled order. A task that is listed twice comes twice as often."""

    def __init__(self, tasks: list[Task], **kwargs):
        super().__init__(**kwargs)
        self.tasks, self.lengths = tasks, [len(task) for task in tasks]
        self.num_conversations = sum(self.lengths)
        self.index_map = [(task, index) for task, length in enumerate(self.lengths) for index in range(length)]
        random.Random(42).shuffle(self.index_map)

    def num_examples(self) -> int:
        return self.num_conversations

    def get_example(self, index: int) -> dict:
        assert 0 <= index < self.num_conversations, f"example {index} of {self.num_conversations}"
        task, local_index = self.index_map[index]
        return self.tasks[task][local_index]


class TaskSequence(Task):
    """All examples of several tasks, one task after the other."""

    def __init__(self, tasks: list[Task], **kwargs):
        super().__init__(**kwargs)
        self.tasks, self.lengths = tasks, [len(task) for task in tasks]
        self.num_conversations = sum(self.lengths)

    def num_examples(self) -> int:
        return self.num_conversations

    def get_example(self, index: int) -> dict:
        assert 0 <= index < self.num_conversations, f"example {index} of {self.num_conversations}"
        task = 0
        while index >= self.lengths[task]:
            index -= self.lengths[task]
            task += 1
        return self.tasks[task][index]


def render_mc(question: str, letters: list[str], choices: list[str]) -> str:
    """A multiple-choice question. No space before the letters: the answer is the same token as there."""
    listed = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices))
    return f"Multiple Choice question: {question}\n{listed}\nRespond only with the letter of the correct answer."
