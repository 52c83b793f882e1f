"""The data of CORE: the folder base_dir/eval_bundle, downloaded and unpacked where it is not there, or any folder of that layout.

    core.yaml             the tasks: label, file, number of solved examples, type, what stands before a continuation
    eval_meta_data.csv    the accuracy of guessing, in percent
    eval_data/            a file of JSON lines for each task
"""
import csv
import os
import random
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.cli import UsageError
from nanochat.common import download_file_with_lock, get_base_dir
from nanochat.evals.jsonl import Rows, read_rows
from nanochat.files import locked

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def place_eval_bundle(file_path: str | os.PathLike) -> None:
    """Unpacks the zip's folder `eval_bundle` into the base directory, as a whole or not at all. Raises UsageError for a bad zip."""
    base_dir = Path(get_base_dir()).resolve()
    with tempfile.TemporaryDirectory(dir=base_dir, prefix=".eval_bundle.") as temporary:
        try:
            with zipfile.ZipFile(file_path) as archive:
                for name in archive.namelist():
                    if not Path(temporary, name).resolve().is_relative_to(temporary):
                        raise UsageError(f"{file_path} would write outside its folder ({name!r}): delete it, it is not the CORE bundle")
                archive.extractall(temporary)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{file_path} is not an intact zip file ({error}): delete it, so that it is downloaded again") from error
        bundle = Path(temporary, "eval_bundle")
        if not bundle.is_dir():
            raise UsageError(f"{file_path} has no folder eval_bundle: delete it, it is not the CORE bundle")
        bundle.rename(base_dir / "eval_bundle")


def find_eval_bundle() -> Path:
    """The CORE data in the base directory, downloaded if need be. Raises UsageError without data and network."""
    bundle = Path(get_base_dir(), "eval_bundle")
    if not bundle.is_dir():
        try:
            archive = download_file_with_lock(EVAL_BUNDLE_URL, "eval_bundle.zip")
        except UsageError as error:
            raise UsageError(f"{error}, or its unpacked content at {bundle}") from error
        with locked(archive):
            if not bundle.is_dir():
                place_eval_bundle(archive)
    return bundle


# -----------------------------------------------------------------------------
# Reading it

# By type of task the fields of a row: the text before, what follows it, and the list among which is the right one
FIELDS: dict[str, tuple[str | None, str | None, str | None]] = {
    "multiple_choice": ("query", None, "choices"),
    "schema": (None, "continuation", "context_options"),
    "language_modeling": ("context", "continuation", None)}


@dataclass
class CoreTask:
    """One task with its rows."""

    label: str
    meta: dict[str, Any]  # as `evaluate_task` takes it
    baseline: float  # accuracy of guessing, in percent
    data: list[dict]
    bad: list[str] = field(default_factory=list)  # what is wrong with the rows that are left out

    def centered(self, accuracy: float) -> float:
        """Accuracy rescaled so that guessing is 0 and perfection 1."""
        return (accuracy - 0.01 * self.baseline) / (1 - 0.01 * self.baseline)


def load_bundle(bundle_dir: Path, max_per_task: int = -1, labels: Sequence[str] | None = None) -> tuple[list[CoreTask], list[str]]:
    """(tasks, labels of tasks that have no data file) of a CORE bundle; with `labels` of these tasks alone.

    With `max_per_task` above 0 each task keeps that many rows, the first ones after a shuffle with a fixed seed. Rows that could not be scored are left out,
    named in `CoreTask.bad`. Raises UsageError, with file and line, for anything else that could not be evaluated.
    """
    baselines = _read_baselines(bundle_dir / "eval_meta_data.csv")
    listed = _read_task_list(bundle_dir / "core.yaml")
    if unknown := set(labels or ()) - {label for label, *_ in listed}:
        raise UsageError(f"--core-tasks: no task {', '.join(sorted(unknown))} in {bundle_dir / 'core.yaml'}; there is {', '.join(label for label, *_ in listed)}")
    tasks, missing = [], []
    for label, uri, meta in listed:
        if labels and label not in labels:
            continue
        path = bundle_dir / "eval_data" / uri
        if not path.exists():
            missing.append(label)
            continue
        if label not in baselines:
            raise UsageError(f"{bundle_dir / 'eval_meta_data.csv'} has no row for the task {label} of core.yaml: add its random baseline")
        rows = read_rows(path, lambda row: _row_complaint(row, meta["task_type"]))
        data = rows.require("mend them, or delete the file: its task is then left out, and named")
        random.Random(1337).shuffle(data)
        if max_per_task > 0:
            data = data[:max_per_task]
        if len(data) <= meta["num_fewshot"]:
            raise UsageError(f"task {label} shows {meta['num_fewshot']} solved examples beside each item, but has only {len(data)} rows: "
                             f"use at least {meta['num_fewshot'] + 1} rows a task")
        tasks.append(CoreTask(label, meta, baselines[label], data, rows.bad))
    if not tasks:
        raise UsageError(f"{bundle_dir} holds no data for any task of its core.yaml: delete it, so that the bundle is downloaded again")
    return tasks, missing


def tell_left_out(tasks: Sequence[CoreTask]) -> None:
    """Names the rows that are left out, once for each file."""
    for task in {tuple(task.bad): task for task in tasks if task.bad}.values():
        Rows(task.data, task.bad).tell(task.label)


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
    for label, uri, meta in tasks:
        if not all(isinstance(text, str) for text in (label, uri, meta["task_type"], meta["continuation_delimiter"])):
            raise UsageError(f"{path}: label, dataset_uri, icl_task_type and continuation_delimiter of task {label!r} must be texts; put them into quotes")
        if meta["task_type"] not in FIELDS:
            raise UsageError(f"{path}: task {label} has the unknown icl_task_type {meta['task_type']!r}: use one of {', '.join(FIELDS)}")
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


def _row_complaint(row: dict, task_type: str) -> str | None:
    """What is wrong with a row of this type of task, or None."""
    text, ending, options = FIELDS[task_type]
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
