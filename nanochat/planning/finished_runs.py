"""The pretraining runs below NANOCHAT_BASE_DIR that are finished: what each had and what it reached, for whoever learns from them.

Left out are runs that grew or began with another run's weights: their loss is not that of their size and tokens alone.
"""
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import list_steps, load_meta
from nanochat.cli import UsageError
from nanochat.run_log import FILENAME, is_finished, last_of_each_kind, read_run_log


@dataclass(frozen=True)
class FinishedRun:
    tag: str
    params: float  # of blocks and head, in which scaling laws are stated
    tokens: float
    bpb: float  # bits per byte of the validation text, at the end
    vocab_size: int
    flags: dict  # all of base_train's
    text: str | None = None  # its source, where the log tells


def finished_runs(folder: Path, tokenizer: str | None = None, text: str | None = None) -> list[FinishedRun]:
    """Those in the folders below `folder`, by name. tokenizer: checksum of the one that they must have been trained with, where their checkpoints tell;
    text: the source (`data_source`) that they must have read, where their logs tell."""
    found = []
    for path in sorted(folder.glob(f"*/{FILENAME}")):
        try:
            run = _read(path)
            trained_with = _tokenizer(path.parent) if run and tokenizer else None
        except (UsageError, AttributeError, KeyError, TypeError, ValueError):
            continue  # the log of something else
        if run and (trained_with is None or trained_with == tokenizer) and (text is None or run.text in (None, text)):
            found.append(run)
    return found


def _read(log: Path) -> FinishedRun | None:
    records = read_run_log(log)
    of = last_of_each_kind(records)
    if not is_finished(records) or not {"start", "eval"} <= of.keys() or "grow" in of:
        return None
    start, bpb = of["start"], of["eval"]["val_bpb"]
    flags, counts, tokens = start["config"], start["counts"], start["total_tokens"]
    if tokens is None or flags.get("branch_from") or flags.get("init_from") or bpb is None:
        return None
    return FinishedRun(log.parent.name, float(counts["transformer_matrices"] + counts["lm_head"]), float(tokens), float(bpb), start["model_config"]["vocab_size"], flags,
                       start.get("conditions", {}).get("data"))


def _tokenizer(folder: Path) -> str | None:
    steps = list_steps(folder)
    return load_meta(folder, steps[-1]).get("tokenizer") if steps else None


def of_one_recipe(runs: list[FinishedRun], flags: dict) -> tuple[list[FinishedRun], dict]:
    """The largest group of runs that agree in all of these flags, and its flags; at equal sizes the first.

    flags: by name (default, value asked for). Where what is asked for differs from the default, the group must have it; a log without the flag had the default.
    """
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        had = {name: run.flags.get(name, default) for name, (default, _) in flags.items()}
        if all(asked == default or had[name] == asked for name, (default, asked) in flags.items()):
            groups.setdefault(tuple(had.items()), []).append(run)
    if not groups:
        return [], {}
    recipe, largest = max(groups.items(), key=lambda group: len(group[1]))
    return largest, dict(recipe)
