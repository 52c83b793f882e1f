"""Pretraining text as parquet shards: how they lie on disk, read and written.

* `base_dir/base_data_climbmix/shard_00000.parquet, ...`, one string column `text`, zstd, and `source.json`, which says where they come from
* the last shard in name order is the validation split, the others are training
* data-parallel ranks share out row groups, so a small source gets small ones: 64 in a file where it can
"""
import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.cli import UsageError
from nanochat.common import get_base_dir, logger
from nanochat.files import atomic_path, parse_json, write_text_atomic
from nanochat.tokenizer import replace_surrogates

MAX_SHARD = 6542  # index of ClimbMix's last shard, which is validation; other sources number theirs alike
SHARD_CHARS = 250_000_000  # about 100 MB on disk


def data_directory() -> Path:
    return Path(get_base_dir(), "base_data_climbmix")


def index_to_filename(index: int) -> str:
    return f"shard_{index:05d}.parquet"


# -----------------------------------------------------------------------------
# Reading


class Shard:
    """A parquet file with documents in its column `text`; UsageError where it is anything else.

    Texts may also be dictionary-encoded, string views or the bytes of UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        except UnicodeEncodeError:
            raise UsageError(f"the path {os.fsencode(path)!r} is no UTF-8, which pyarrow needs; rename that file or folder") from None
        schema = self._file.schema_arrow
        if "text" not in schema.names:
            raise UsageError(f"{path} has no column 'text' but {', '.join(schema.names) or 'none at all'}; "
                             "rename the one with the documents")
        if (columns := schema.names.count("text")) > 1:
            raise UsageError(f"{path} has {columns} columns 'text'; rename or drop those that do not hold the documents")
        kind = schema.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not any(is_text(kind) for is_text in _TEXTS):
            raise UsageError(f"the column 'text' of {path} holds {kind}; convert it to strings")
        self.num_row_groups: int = self._file.num_row_groups
        self._warned = False

    def documents(self, row_group: int) -> list[str]:
        """The texts of one row group. Null rows are left out, with one warning."""
        try:
            column = self._file.read_row_group(row_group, columns=["text"], use_threads=False).column("text")
            texts = [text.decode() if isinstance(text, bytes) else text for text in column.to_pylist()]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(f"row group {row_group} of {self.path}", error) from error
        if None in texts:
            if not self._warned:
                logger.warning(f"{self.path}: {texts.count(None)} null rows in row group {row_group}; null rows are left out")
                self._warned = True
            texts = [text for text in texts if text is not None]
        return texts


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def damaged(what: str | os.PathLike, error: Exception) -> UsageError:
    reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).partition("\n")[0]
    return UsageError(f"{what} is damaged or not parquet ({reason}); delete the file and get it again")


def shard_files(directory: Path) -> list[Path]:
    """Sorted; without hidden files, as macOS and copying programs leave them (`._shard_00000.parquet`)."""
    return sorted(path for path in directory.glob("*.parquet") if not path.name.startswith("."))


def intact(path: str | os.PathLike) -> bool:
    """Whether the file is there and ends as a parquet file does: one that was cut short does not."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.path.getsize(path) - 4))
            return f.read() == b"PAR1"
    except FileNotFoundError:
        return False


def list_parquet_files(data_dir: str | os.PathLike | None = None, warn_on_legacy: bool = False) -> list[str]:
    """Sorted paths of the shards. Where there are none, those of nanochat's older FineWeb-Edu folder, `base_dir/base_data`."""
    directory = Path(data_dir) if data_dir is not None else data_directory()
    if files := list(map(str, shard_files(directory))):
        return files
    legacy = list(map(str, shard_files(Path(get_base_dir(), "base_data"))))
    if legacy and warn_on_legacy:
        logger.warning(f"no data in {directory}: using the older FineWeb-Edu data in {Path(legacy[0]).parent}; "
                       "for ClimbMix run: python -m nanochat.dataset -n 170")
    return legacy


def split_files(split: str, warn_on_legacy: bool = False) -> list[str]:
    """Paths of the shards of `train` (all but the last) or `val` (the last).

    Raises UsageError where the split is empty or a file is cut short, so that it shows now and not hours into a run.
    """
    assert split in ("train", "val"), f"split must be train or val, not {split!r}"
    files = list_parquet_files(warn_on_legacy=warn_on_legacy)
    chosen = files[:-1] if split == "train" else files[-1:]
    if not chosen:
        found = f"only {files[0]}, and the last shard is validation" if files else f"nothing in {data_directory()}"
        raise UsageError(f"there is no training data: {found}; run python -m nanochat.dataset --source=stdlib (needs no network) "
                         "or python -m nanochat.dataset -n 8")
    if read_record().get("unfinished"):
        raise UsageError(f"the data in {data_directory()} are being replaced, or that was interrupted; wait, or run python -m nanochat.dataset again")
    for path in chosen:
        if not intact(path):
            raise damaged(path, ValueError("it has no end mark"))
    return chosen


def parquets_iter_batched(split: str, start: int = 0, step: int = 1) -> Iterator[list[str]]:
    """Yields the documents of row groups `start, start + step, ...` of each file of the split, one list a group."""
    for path in split_files(split):
        shard = Shard(path)
        for row_group in range(start, shard.num_row_groups, step):
            yield shard.documents(row_group)


def text_bytes(split: str, most: int = 32) -> float:
    """About how many bytes of text a split has, by what the files say of themselves; of more than `most` files some are looked into, evenly chosen."""
    files = split_files(split)
    looked_into = files[::-(-len(files) // most)]
    size = 0
    for path in looked_into:
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
        size += sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return size * len(files) / len(looked_into)


def data_source() -> str | None:
    """What the data directory was filled from; None where it is empty. Shards without `source.json` are nanochat's own."""
    record = read_record()
    return record["source"] if record else "climbmix" if shard_files(data_directory()) else None


def read_record() -> dict:
    path = data_directory() / "source.json"
    if not path.exists():
        return {}
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
        record["source"]
        return record
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged; delete it together with the shards beside it") from error


# -----------------------------------------------------------------------------
# Writing


def write_record(directory: Path, **record: Any) -> None:
    write_text_atomic(directory / "source.json", json.dumps(record) + "\n")


def write_shard(directory: Path, index: int, documents: list[str]) -> None:
    random.Random(index).shuffle(documents)
    try:
        column = pa.array(documents, pa.string())
    except UnicodeEncodeError:
        column = pa.array(map(replace_surrogates, documents), pa.string())
    with atomic_path(directory / index_to_filename(index)) as temporary:
        pq.write_table(pa.table({"text": column}), temporary, row_group_size=min(1024, max(1, len(documents) // 64)),
                       compression="zstd", use_dictionary=False, write_statistics=False)


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder; on success its files take the place of all that `directory` holds, else nothing changes.

    A kill while they do leaves a record that says so: nobody reads such data, and the next call replaces them.
    """
    fresh = directory / ".new"  # nobody else's: the directory is locked
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        write_record(directory, **json.loads((fresh / "source.json").read_text(encoding="utf-8")), unfinished=True)
        for old in shard_files(directory):
            old.unlink()
        for new in [*shard_files(fresh), fresh / "source.json"]:
            os.replace(new, directory / new.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class Progress:
    """Prints amount, speed and, where the total is known, the time left; at most every five seconds."""

    def __init__(self, total_mb: float | None = None):
        self.start = self.printed = time.monotonic()
        self.documents, self.characters, self.total_mb = 0, 0, total_mb

    def add(self, text: str) -> None:
        self.documents += 1
        self.characters += len(text)
        if self.documents % 256 == 0 and time.monotonic() - self.printed > 5:
            self.printed = time.monotonic()
            mb = self.characters / 1e6
            speed = mb / (self.printed - self.start)
            left = f", {(self.total_mb - mb) / speed / 60:.0f} min left" if self.total_mb else ""
            print(f"{self.documents:,} documents, {mb:,.0f} MB, {speed:.1f} MB/s{left}", flush=True)
