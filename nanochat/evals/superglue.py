"""SuperGLUE (1905.00537) by fine-tuning: BoolQ, CB, COPA, MultiRC, RTE, WiC and WSC, each `NAME/train.jsonl` and `NAME/val.jsonl` in the published form.

The score is accuracy on val.jsonl (the published test rows have no labels), for CB also the macro F1, for MultiRC also the F1 over all answers. Tasks that are not
in the folder are left out and named.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.cli import UsageError
from nanochat.common import print0
from nanochat.evals.classification import FineTuneSettings, Item, encode, finetune, predict
from nanochat.evals.jsonl import Rows, read_rows
from nanochat.evals.results import Results, Row, mean_row

Texts = tuple[tuple[str, ...], int]  # what is to be read, one text or one for each answer; the label


class Task(NamedTuple):
    texts: Callable[[dict], list[Texts]]  # of a row; raises KeyError, TypeError, ValueError or AttributeError for one that is none of the task's
    classes: int = 2
    f1: str = ""  # binary: of class 1; macro: the mean over the classes


def _text(row: dict, name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name!r} is no text")
    return row[name].strip()


def _index(value, among: Sequence) -> int:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if value not in among:
        raise ValueError(f"'label' is {value!r}")
    return list(among).index(value)


def _boolq(row: dict) -> list[Texts]:
    return [((f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?",), _index(row["label"], (False, True)))]


def _pair(labels: Sequence[str]) -> Callable[[dict], list[Texts]]:
    return lambda row: [((f"{_text(row, 'premise')}\n{_text(row, 'hypothesis')}",), _index(row["label"], labels))]


def _copa(row: dict) -> list[Texts]:
    link = {"cause": "because", "effect": "so"}[row["question"]]
    premise = _text(row, "premise").rstrip(".")
    return [(tuple(f"{premise} {link} {(choice := _text(row, name))[0].lower()}{choice[1:]}" for name in ("choice1", "choice2")), _index(row["label"], (0, 1)))]


def _multirc(row: dict) -> list[Texts]:
    passage = row["passage"]
    return [((f"{_text(passage, 'text')}\nQuestion: {_text(question, 'question')}\nAnswer: {_text(answer, 'text')}",), _index(answer["label"], (0, 1)))
            for question in passage["questions"] for answer in question["answers"]]


def _wic(row: dict) -> list[Texts]:
    return [((f"{_text(row, 'sentence1')}\n{_text(row, 'sentence2')}\nThe word is: {_text(row, 'word')}",), _index(row["label"], (False, True)))]


def _wsc(row: dict) -> list[Texts]:
    target = row["target"]
    return [((f"{_text(row, 'text')}\n{_text(target, 'span2_text')} is {_text(target, 'span1_text')}",), _index(row["label"], (False, True)))]


TASKS = {
    "BoolQ": Task(_boolq),
    "CB": Task(_pair(("entailment", "contradiction", "neutral")), 3, "macro"),
    "COPA": Task(_copa),
    "MultiRC": Task(_multirc, f1="binary"),
    "RTE": Task(_pair(("entailment", "not_entailment"))),
    "WiC": Task(_wic),
    "WSC": Task(_wsc),
}


def _complaint(task: Task, row: dict) -> str | None:
    try:
        return None if task.texts(row) else "it asks nothing"
    except KeyError as error:
        return f"{error} is missing or has another value than those of the task"
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return str(error)


class Split(NamedTuple):
    name: str
    train: Rows
    val: Rows


def read_tasks(folder: Path) -> list[Split]:
    """Those that are in the folder. Raises UsageError where there are none, or one lacks a file or all of its rows."""
    found = []
    for name, task in TASKS.items():
        train, val = (folder / name / f"{split}.jsonl" for split in ("train", "val"))
        if not (folder / name).is_dir():
            continue
        splits = [read_rows(path, lambda row, task=task: _complaint(task, row)) for path in (train, val)]  # type: ignore[misc]
        for rows in splits:
            rows.require(f"give those of SuperGLUE's {name}")
        found.append(Split(name, *splits))
    if not found:
        raise UsageError(f"{folder} has none of the folders {', '.join(TASKS)}: give --superglue=FOLDER, with train.jsonl and val.jsonl in each of them")
    return found


def f1_score(predicted: torch.Tensor, labels: torch.Tensor, classes: Sequence[int]) -> float:
    """The mean over these classes of 2TP / (2TP + FP + FN); of a class that is neither there nor predicted it is 0."""
    values = []
    for c in classes:
        hits, errors = ((predicted == c) & (labels == c)).sum().item(), ((predicted == c) != (labels == c)).sum().item()
        values.append(2 * hits / max(1, 2 * hits + errors))
    return sum(values) / len(values)


def evaluate_split(model, tokenizer, split: Split, limit: int | None, settings: FineTuneSettings) -> Results:
    """limit: rows of val.jsonl, the first ones."""
    task, context = TASKS[split.name], model.config.sequence_len
    train, val = ([Item(tuple(encode(tokenizer, text, context) for text in texts), label) for row in rows for texts, label in task.texts(row)]
                  for rows in (settings.rows_of(split.train.good), split.val.good[:limit]))
    predicted, labels = predict(finetune(model, train, task.classes, settings, split.name), val), torch.tensor([item.label for item in val])
    commonest = labels.bincount().max().item() / len(labels)
    found = {split.name: mean_row((predicted == labels).double(), baseline=commonest, label=split.name, counts={"not usable": len(split.train.bad) + len(split.val.bad)})}
    if task.f1:
        value = f1_score(predicted, labels, (1,) if task.f1 == "binary" else range(task.classes))
        found[f"{split.name}/f1"] = Row(value, len(labels), metric=f"{task.f1} F1")
    return found


def tell_left_out(found: Sequence[Split], folder: Path) -> None:
    """Names what is not evaluated."""
    if missing := set(TASKS) - {split.name for split in found}:
        print0(f"SuperGLUE: not in {folder}: {', '.join(name for name in TASKS if name in missing)}")
    for split in found:
        split.train.tell(f"{split.name} (train)")
        split.val.tell(f"{split.name} (val)")
