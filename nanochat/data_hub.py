"""Pretraining text from the Hugging Face hub: nanochat's ClimbMix, whose files are taken as they are, and other datasets, streamed into shards.

A download that was killed goes on after its last complete shard and ends in the same files.
"""
import contextlib
import random
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.cli import UsageError
from nanochat.common import hub_unreachable, logger
from nanochat.data_local import cut
from nanochat.data_shards import (
    MAX_SHARD,
    SHARD_CHARS,
    Progress,
    data_directory,
    data_source,
    index_to_filename,
    intact,
    read_record,
    replacing,
    write_record,
    write_shard,
)

CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # already in this layout


@dataclass(frozen=True)
class HubSource:
    repo: str
    config: str | None = None
    validation: str | None = None  # name of its validation split; without one the first shard of train is held out
    cut: bool = False  # its rows are whole corpora, to be cut into documents


HUB = {
    "fineweb-edu": HubSource("HuggingFaceFW/fineweb-edu", config="sample-100BT"),
    "openwebtext": HubSource("Skylion007/openwebtext"),
    "text8": HubSource("afmck/text8", validation="validation", cut=True),
    "tinystories": HubSource("roneneldan/TinyStories", validation="validation"),
}


def download_single_file(index: int, directory: Path | None = None) -> bool:
    """Fetches one ClimbMix shard; True if it is there afterwards. The hub's client retries and continues part files."""
    directory = directory or data_directory()
    name = index_to_filename(index)
    if intact(directory / name):
        return True
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    disable_progress_bars()
    try:
        hf_hub_download(CLIMBMIX, name, repo_type="dataset", local_dir=directory)
        return True
    except Exception as error:  # network, hub or disk: the caller goes on with the other shards
        logger.warning(f"{name}: {_reason(error)}")
        return False


def _check_hub() -> None:
    if hub_unreachable():
        raise UsageError("huggingface.co cannot be reached; check the network, or use --source=stdlib, which needs none")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def get_climbmix(num_files: int, num_workers: int, force: bool) -> None:
    directory = data_directory()
    if force or data_source() is None:
        _check_hub()
        with replacing(directory) as fresh:
            if not download_single_file(MAX_SHARD, fresh):
                raise UsageError("cannot get ClimbMix from the hub; check the network, or use --source=stdlib, which needs none")
            write_record(fresh, source="climbmix")
    wanted = [MAX_SHARD, *range(MAX_SHARD if num_files == -1 else min(num_files, MAX_SHARD))]
    missing = [index for index in wanted if not intact(directory / index_to_filename(index))]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} shards are in {directory}", flush=True)
    if missing:
        _check_hub()
    start, failures, failures_in_a_row = time.monotonic(), 0, 0
    pool = ThreadPoolExecutor(num_workers)
    try:
        for number, success in enumerate(pool.map(download_single_file, missing), 1):
            failures += not success
            failures_in_a_row = 0 if success else failures_in_a_row + 1
            left = (time.monotonic() - start) / number * (len(missing) - number) / 60
            outcome = "is there" if success else "failed"
            print(f"Shard {missing[number - 1]} {outcome}: {number} of {len(missing)}, {left:.0f} min left", flush=True)
            if failures_in_a_row == 5:
                raise UsageError("the hub cannot be reached any more; run the same command again to continue")
    finally:
        pool.shutdown(cancel_futures=True)  # on an error or Ctrl-C start no further downloads
    if failures:
        raise UsageError(f"{failures} of {len(wanted)} shards could not be fetched; run the same command again to continue")


def get_streamed(source: str, num_files: int, force: bool) -> None:
    """Streams a hub dataset into shards. `source.json` keeps the position after the last one."""
    directory = data_directory()
    hub = HUB[source]
    wanted = MAX_SHARD if num_files == -1 else min(num_files, MAX_SHARD)
    record = {} if force else read_record()
    if record and not {"train_shards", "finished", "position"} <= record.keys():
        raise UsageError(f"source.json in {directory} does not say how far {source} was streamed; use --force to stream it anew")
    if not record:
        print(f"Streaming the validation shard of {hub.repo}", flush=True)
        with replacing(directory) as fresh:
            with contextlib.closing(_rows(source, hub.validation or "train")) as rows:
                documents, position, _ = _take(rows, hub.cut, Progress())
            if hub.validation:
                position = (0, 0)
            write_shard(fresh, MAX_SHARD, documents)
            write_record(fresh, source=source, train_shards=0, finished=False, position=position)
        record = read_record()
    if lost := [index for index in [MAX_SHARD, *range(record["train_shards"])] if not intact(directory / index_to_filename(index))]:
        raise UsageError(f"{index_to_filename(lost[0])} is missing or cut short in {directory}, and {len(lost) - 1} more; use --force to stream {source} anew")
    if not record["finished"] and record["train_shards"] < wanted:
        progress = Progress(None if num_files == -1 else (wanted - record["train_shards"]) * SHARD_CHARS / 1e6)
        with contextlib.closing(_rows(source, "train", *record["position"])) as rows:
            while record["train_shards"] < wanted and not record["finished"]:
                documents, record["position"], record["finished"] = _take(rows, hub.cut, progress)
                if documents:
                    write_shard(directory, record["train_shards"], documents)
                    record["train_shards"] += 1
                write_record(directory, **record)
                print(f"{record['train_shards']} training shards of {source} are written", flush=True)
    print(f"{record['train_shards']} training shards and one for validation are in {directory}")


Position = tuple[int, int]  # number of a file in reading order, row in it


def _rows(source: str, split: str, file: int = 0, row: int = 0) -> Generator[tuple[Position, str], None, None]:
    """(position after it, text) of the rows from a position on. The files of the dataset come in random order."""
    hub = HUB[source]
    _check_hub()
    try:
        stream = _open_stream(hub, split).select_columns(["text"])
        order = list(range(stream.num_shards))
        random.Random(42).shuffle(order)
        while file < len(order):
            with contextlib.closing(iter(stream.shard(len(order), order[file]).skip(row))) as records:
                for record in records:
                    row += 1
                    yield (file, row), record["text"] or ""
            file, row = file + 1, 0
    except Exception as error:
        raise UsageError(f"cannot read {hub.repo} from the hub ({_reason(error)}); check the network and run the same command again "
                         "to continue, or use --source=stdlib, which needs none") from error


def _open_stream(hub: HubSource, split: str) -> Any:
    import datasets
    try:
        return datasets.load_dataset(hub.repo, hub.config, split=split, streaming=True)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # the repository holds a script, which `datasets` 4 and newer refuse (huggingface/datasets#7693): take the hub's conversion
        return datasets.load_dataset(hub.repo, split=split, streaming=True, revision="refs/convert/parquet")


def _take(rows: Iterator[tuple[Position, str]], cut_rows: bool, progress: Progress) -> tuple[list[str], Position, bool]:
    """(documents of the next shard, position after them, whether the rows have ended)."""
    documents: list[str] = []
    characters, position = 0, (0, 0)
    for position, row in rows:
        for text in cut(row) if cut_rows else [row]:
            if text.strip():
                documents.append(text)
                characters += len(text)
                progress.add(text)
        if characters >= SHARD_CHARS:
            return documents, position, False
    return documents, position, True
