"""Natural language inference, SNLI (1508.05326) and MultiNLI (1704.05426): does a sentence follow from another one, contradict it, or neither?

* prompt: the model reads the question in GPT-3's words and the likeliest of three answers counts, as in CORE's multiple choice, without examples
* probe: logistic regression on the model's states (classification.py)
* finetune: the model is trained on the training rows

A set is `NAME_train.jsonl` and `NAME_test.jsonl` in one folder, packed or not: premise, hypothesis and label (entailment, neutral, contradiction) in each row.
Rows without a gold label ("-") are left out and counted.
"""
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.cli import UsageError
from nanochat.common import telling
from nanochat.core_eval import score_task
from nanochat.evals.classification import FineTuneSettings, Item, encode, features, finetune, predict, probe
from nanochat.evals.jsonl import SUFFIXES, Rows, missing_text, read_rows
from nanochat.evals.results import Results, Row, mean_row

LABELS = {"entailment": "True", "neutral": "Neither", "contradiction": "False"}
# Test accuracy of the drafts on growing (64M parameters), in percent: what ours stand beside
DRAFTS = {"standard": {"snli": 40.4, "mnli": 37.6}, "BUS": {"snli": 41.6, "mnli": 38.6}, "HyperCloning": {"snli": 40.9, "mnli": 36.1}}


class NliSet(NamedTuple):
    name: str
    train: Rows
    test: Rows


def _complaint(row: dict) -> str | None:
    if wrong := missing_text(row, ("premise", "hypothesis", "label")):
        return wrong
    return None if row["label"] in LABELS else f"'label' is {row['label']!r}, none of {', '.join(LABELS)}"


def read_sets(folder: Path, trained: bool = True) -> list[NliSet]:
    """All sets of a folder; trained: with their training rows. Raises UsageError where there are none, or one lacks what is needed."""
    tests = sorted(path for path in folder.iterdir() if "_test.jsonl" in path.name) if folder.is_dir() else []
    if not tests:
        raise UsageError(f"{folder} has no file NAME_test.jsonl (or .jsonl.gz) such as snli_test.jsonl.gz: give --nli=FOLDER")
    sets = []
    for test in tests:
        name = test.name.partition("_test.")[0]
        train = next((path for suffix in SUFFIXES if (path := folder / f"{name}_train{suffix}").is_file()), None)
        rows = Rows([], [])
        if trained:
            if train is None:
                raise UsageError(f"there is no {name}_train.jsonl beside {test}: probe and fine-tuning need it, --eval=nli-prompt does without")
            rows = read_rows(train, _complaint)
            rows.require("give premise, hypothesis and label in each")
        tested = read_rows(test, _complaint)
        tested.require("give premise, hypothesis and label in each")
        sets.append(NliSet(name, rows, tested))
    return sets


def _items(rows: list[dict], model, tokenizer) -> list[Item]:
    return [Item((encode(tokenizer, f"{row['premise']}\n{row['hypothesis']}", model.config.sequence_len),), list(LABELS).index(row["label"])) for row in rows]


def _row(name: str, method: str, predicted: torch.Tensor, items: list[Item], bad: int) -> Row:
    right = predicted == torch.tensor([item.label for item in items])
    return mean_row(right.double(), baseline=1 / len(LABELS), label=f"{name} {method}", counts={"not usable": bad})


def by_prompt(model, tokenizer, data: NliSet, device, limit: int | None) -> Results:
    """All ranks call it and get the same."""
    questions = [dict(query=f"{row['premise']}\nQuestion: {row['hypothesis']} True, False, or Neither?\nAnswer:", choices=list(LABELS.values()),
                      gold=list(LABELS).index(row["label"])) for row in data.test.good[:limit]]
    scores, counts = score_task(model, tokenizer, questions, device, dict(task_type="multiple_choice", num_fewshot=0, continuation_delimiter=" "),
                                telling(f"{data.name} by prompt"))
    return {data.name: mean_row(scores, baseline=1 / len(LABELS), label=f"{data.name} prompt", counts=counts | {"not usable": len(data.test.bad)})}


def by_probe(model, tokenizer, data: NliSet, device, limit: int | None, settings: FineTuneSettings) -> Results:
    """Accuracy on the test set of a linear probe of the model's last states. One process does it alone."""
    train, test = (_items(rows, model, tokenizer) for rows in (settings.rows_of(data.train.good), data.test.good[:limit]))
    x = features(model, [item.texts[0] for item in train + test], device, telling(f"{data.name}: states"))
    labels = torch.tensor([item.label for item in train])
    predicted = probe(x[:len(train)].to(device), labels.to(device), x[len(train):].to(device), len(LABELS)).cpu()
    return {data.name: _row(data.name, "probe", predicted, test, len(data.test.bad))}


def by_finetuning(model, tokenizer, data: NliSet, device, limit: int | None, settings: FineTuneSettings) -> Results:
    """Accuracy on the test set of a copy of the model, fine-tuned with a head for the labels. One process does it alone."""
    train, test = (_items(rows, model, tokenizer) for rows in (settings.rows_of(data.train.good), data.test.good[:limit]))
    classifier = finetune(model, train, len(LABELS), settings, data.name)
    return {data.name: _row(data.name, "fine-tuned", predict(classifier, test), test, len(data.test.bad))}


TRAINED: dict[str, Callable] = {"probe": by_probe, "finetune": by_finetuning}


def beside_drafts(results: Results) -> str:
    """A Markdown table of accuracies in percent; ours with standard errors."""
    ours = {name: f"{100 * row.value:.1f}" + (f" ± {100 * row.se:.1f}" if row.se is not None else "") for name, row in results.items()}
    columns = sorted({*ours, "snli", "mnli"}, reverse=True)
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns), f"| this model | {' | '.join(ours.get(name, '') for name in columns)} |"]
    lines += [f"| {method}, 64M (drafts) | {' | '.join(str(values.get(name, '')) for name in columns)} |" for method, values in DRAFTS.items()]
    return "\n".join(lines) + "\n"
