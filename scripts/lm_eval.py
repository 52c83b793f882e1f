"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness, or on your own.

    python -m scripts.lm_eval --tasks=lambada_openai,arc_easy -g d12
    python -m scripts.lm_eval --tasks=my_task --include-path=my_tasks --limit=100

A task is a YAML file (docs/export.md shows one); its data may be a local file. The table is printed, and all results go to
base_dir/lm_eval/<source>_<tag>_<step>.json, which a later call completes. Needs the harness: pip install -e '.[eval]'.
"""
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import SOURCES, CheckpointSettings, build_model
from nanochat.cli import REQUIRED, UsageError, command, flag, listed, non_negative_int, parse_settings, positive_int
from nanochat.common import autodetect_device_type, compute_cleanup, compute_init, get_base_dir
from nanochat.files import check_writable, locked, parse_json, write_text_atomic


@dataclass(kw_only=True)
class Settings(CheckpointSettings):
    tasks: list[str] = flag(REQUIRED, "Tasks, joined by commas", type=listed())
    source: str = flag("base", "Stage of training that the model comes from", choices=SOURCES, short="-i")
    include_path: str | None = flag(None, "Folder with tasks of your own")
    num_fewshot: int | None = flag(None, "Solved examples before each question (default: as many as the task says)", type=non_negative_int)
    limit: int | None = flag(None, "Questions of each task (default: all)", type=positive_int)
    batch_size: int = flag(16, "Requests that run through the model together", type=positive_int)
    device_type: str = flag("", "Device to run on: cuda, mps or cpu (default: the best one here)")


def harness():
    """The package. Raises UsageError where it is missing."""
    try:
        import lm_eval
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise UsageError(f"the lm-evaluation-harness is not installed ({error}): pip install -e '.[eval]'") from error
    return lm_eval


def load_tasks(names: list[str], include_path: str | None) -> Any:
    """The task manager, after a look at every task's file and data. Raises UsageError for a task that is not there or cannot be loaded."""
    lm_eval = harness()
    if include_path is not None and not Path(include_path).is_dir():
        raise UsageError(f"--include-path={include_path} is no folder")
    try:
        manager = lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            manager = lm_eval.tasks.TaskManager(include_path=include_path)  # reads all of the harness's, which takes seconds
    except Exception as error:  # of a broken file in the folder
        raise UsageError(f"the tasks in {include_path} cannot be read: {error}") from error
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f"there is no task {name!r} in the harness{f' or in {include_path}' if include_path else ''}; lm_eval ls tasks lists them, and "
                             "--include-path names a folder with others")
    try:
        loaded = manager.load(names)
    except Exception as error:  # files that are missing, data that cannot be downloaded, columns that are not there
        raise UsageError(f"the data of {', '.join(names)} cannot be loaded ({type(error).__name__}: {error})") from error
    if unsafe := [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UsageError(f"{', '.join(unsafe)} would run code that the model writes outside of any sandbox; leave it out (chat_eval has HumanEval, in one)")
    return manager


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, "Evaluate a model with the lm-evaluation-harness")
    lm_eval = harness()
    from nanochat.lm_eval_model import NanochatLM
    ddp, *_, device = compute_init(settings.device_type or autodetect_device_type())
    try:
        if ddp:
            raise UsageError("lm_eval runs as one process: start it without torchrun")
        _, folder, step = settings.find()
        manager = load_tasks(settings.tasks, settings.include_path)
        model, tokenizer, _ = build_model(folder, step, device, phase="eval")
        path = Path(get_base_dir(), "lm_eval", f"{settings.source}_{folder.name}_{step:06d}.json")
        check_writable(path.parent)
        read_saved(path)
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        found = lm_eval.simple_evaluate(NanochatLM(model, tokenizer, settings.batch_size), tasks=list(settings.tasks), task_manager=manager, num_fewshot=settings.num_fewshot,
                                        limit=settings.limit, log_samples=False, bootstrap_iters=0)
        print(lm_eval.utils.make_table(found))
        if found.get("groups"):
            print(lm_eval.utils.make_table(found, "groups"))
        shots = found.get("n-shot", {})
        for name, count in shots.items():
            if settings.num_fewshot is not None and count != settings.num_fewshot:
                print(f"{name} has {count} solved examples, as the task says, whatever --num-fewshot says")
        save(path, found["results"], shots, settings)
    finally:
        compute_cleanup()


def read_saved(path: Path) -> dict:
    """What the file has, nothing where there is none. Raises UsageError for one that is no such file."""
    try:
        known = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is not a file of results ({error}); delete it") from error
    if not isinstance(known, dict):
        raise UsageError(f"{path} is not a file of results; delete it")
    return known


def save(path: Path, results: dict, shots: dict, settings: Settings) -> None:
    """Adds the tasks' results to the file of the checkpoint; those of a part of a task, as TASK:LIMIT, beside those of all of it."""
    with locked(path):
        known = read_saved(path) | {name if settings.limit is None else f"{name}:{settings.limit}":
                                    {**numbers, "num_fewshot": shots.get(name, settings.num_fewshot), "limit": settings.limit} for name, numbers in results.items()}
        write_text_atomic(path, json.dumps(known, indent=2, default=str) + "\n")
    print(f"Written to {path}")


if __name__ == "__main__":
    sys.exit(main())
