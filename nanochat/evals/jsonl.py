"""Rows of JSON lines. One that cannot be used is named and counted, and never scored."""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.cli import UsageError
from nanochat.common import print0
from nanochat.files import open_text, parse_json

NAMED = 3  # bad rows of a file that are named one by one
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


class Rows(NamedTuple):
    good: list[dict]
    bad: list[str]  # what is wrong with each of the others, with file and line

    def tell(self, what: str) -> None:
        """Names those that are left out."""
        for complaint in self.bad[:NAMED]:
            print0(f"{what}: left out: {complaint}")
        if len(self.bad) > NAMED:
            print0(f"{what}: {len(self.bad)} rows are left out in all, {len(self.good)} are used")

    def require(self, mend: str) -> list[dict]:
        """The good ones. Raises UsageError where there are none."""
        if not self.good:
            raise UsageError(f"{self.bad[0] if self.bad else 'there is no row in it'}; no row of that file can be used: {mend}")
        return self.good


def read_text(path: Path) -> str:
    """A UTF-8 file, also a packed one. Raises UsageError where it is missing or no text."""
    try:
        with open_text(path) as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}): give a UTF-8 text file, plain, .gz or .zst") from error


def read_rows(path: Path, complaint: Callable[[dict], str | None]) -> Rows:
    """Those of a file. `complaint` says what is wrong with a row, or None. Raises UsageError for a file that cannot be read."""
    good, bad = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            wrong = complaint(row) if isinstance(row, dict) else "not a JSON object"
        except ValueError as error:
            row, wrong = None, f"not JSON ({error})"
        if wrong:
            bad.append(f"{path}, line {number}: {wrong}")
        else:
            good.append(row)
    return Rows(good, bad)


def missing_text(row: dict, names: Sequence[str]) -> str | None:
    """Which of the fields is not there or holds no text, or None."""
    for name in names:
        value: Any = row.get(name)
        if not isinstance(value, str):
            return f"{name!r} is missing or is not text"
        if not value.strip():
            return f"{name!r} is empty"
    return None


def files_of(path: Path) -> list[Path]:
    """The file itself, or those of a folder, by name. Raises UsageError where there are none."""
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES)) if path.is_dir() else []
    if not files:
        raise UsageError(f"{path} is no {' or '.join(SUFFIXES[:2])} file and no folder with some")
    return files


def plain_name(path: Path) -> str:
    """The name of a file without its endings."""
    return path.name.split(".")[0] if path.is_file() else path.name
