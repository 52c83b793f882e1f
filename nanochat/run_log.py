"""The training log: one JSON object a line, from which reports, plots and sweeps draw.

A record is `{"kind": ..., "step": ..., ...}`. Every record goes out in a single write, so a killed run leaves at
most one broken last line, which reading ignores. A resumed run drops what it is about to do again, so that the
file always reads like the log of a run that was never interrupted.
"""
import errno
import os
from pathlib import Path
from typing import Any

from nanochat.cli import UsageError
from nanochat.common import logger
from nanochat.files import parse_json, to_json, write_text_atomic

FILENAME = "log.jsonl"  # in the checkpoint directory of its run


def _line(record: dict) -> str:
    return to_json(record) + "\n"


class RunLog:
    """Appends records to the file `path`; with `path=None` (ranks other than 0) it does nothing.

    A fresh run starts a new file. With `resume_step` the records of earlier steps are kept, whatever their kind: a
    run resumed at step s evaluates and trains step s again.
    """

    def __init__(self, path: str | os.PathLike | None, resume_step: int | None = None):
        self._file = None
        if path is None:
            return
        path = Path(path)
        kept = []
        if resume_step is not None and path.exists():
            kept = [record for record in read_run_log(path) if record["step"] < resume_step]
        write_text_atomic(path, "".join(map(_line, kept)))
        self._file = open(path, "ab", buffering=0)

    def log(self, kind: str, step: int, **fields: Any) -> None:
        """Appends one record. Tensors of any size become numbers or lists of numbers. What a full disk does not take is left out: training goes on."""
        if self._file is None:
            return
        record, end = _line({"kind": kind, "step": step, **fields}).encode(errors="replace"), self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(record) != len(record):
                self._file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            logger.warning(f"{self._file.name}: {error.strerror}; the record {kind} of step {step} is left out")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_run_log(path: str | os.PathLike) -> list[dict]:
    """The records in order. A broken last line (the run was killed, or is writing) is left out.

    Raises UsageError where the file is missing or another line is broken.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UsageError(f"there is no run log {path}; base_train writes one beside its checkpoints") from None
    complete, unfinished = lines[:-1], lines[-1]
    if unfinished:
        complete.append(unfinished)
    records = []
    for number, line in enumerate(complete, 1):
        try:
            record = parse_json(line)
            if not (isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)):
                raise ValueError
            records.append(record)
        except ValueError:
            if number < len(complete):
                raise UsageError(f"{path}, line {number} is not a log record; repair or delete the file") from None
    return records


def last_of_each_kind(records: list[dict]) -> dict[str, dict]:
    """By kind ("start", "train", "eval", "end", ...) the last record of it; kinds that the log lacks are not there."""
    return {record["kind"]: record for record in records}


def is_finished(records: list[dict]) -> bool:
    """Whether the run came to its end, and its log has the validation there, if it has any: a full disk may have left records out."""
    of = last_of_each_kind(records)
    return "end" in of and ("eval" not in of or of["eval"]["step"] >= of["end"]["step"])
