"""Pretraining text as parquet shards, and the command that gets it:

    python -m nanochat.dataset -n 8                  nanochat's ClimbMix shards from the hub
    python -m nanochat.dataset --source=stdlib       the Python standard library's own source: needs no network
    python -m nanochat.dataset --source=tinystories  or fineweb-edu, openwebtext, text8: streamed from the hub
    python -m nanochat.dataset --source=PATH         a folder or a file of .txt, .jsonl or .parquet, also as .gz or .zst

* Layout: `base_dir/base_data_climbmix/shard_00000.parquet, ...`, one string column `text`, zstd, and `source.json`,
  which says where they come from. The last shard in name order is the validation split, the others are training.
* Validation is shard 6542, as in nanochat, and comes first: however early you look, the split is the same.
* Data-parallel ranks share out row groups, so a small source gets small ones: 64 in a file where it can.
* A download that was killed goes on after its last complete shard and ends in the same files.
* Data of another source are replaced with --force only, and not before the new ones have begun to arrive.
* One process at a time writes to the folder; another waits.
* Documents of local sources are cut to 2,000 characters, because the loader drops what no row can hold.

The hub could not be reached when this was written: names in `HUB` are from memory.
"""
import contextlib
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.cli import ArgumentParser, UsageError, command, int_or_off, positive_int
from nanochat.common import atomic_path, get_base_dir, hub_unreachable, locked, logger, open_text, parse_json, write_text_atomic
from nanochat.tokenizer import replace_surrogates

MAX_SHARD = 6542  # index of ClimbMix's last shard
CLIMBMIX = "karpathy/climbmix-400b-shuffle"  # already in this layout: its files are taken as they are


@dataclass(frozen=True)
class HubDataset:
    repo: str
    config: str | None = None
    validation: str | None = None  # name of its validation split; without one the first shard of train is held out
    cut: bool = False  # its rows are whole corpora, to be cut into documents


HUB = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", config="sample-100BT"),
    "openwebtext": HubDataset("Skylion007/openwebtext"),
    "text8": HubDataset("afmck/text8", validation="validation", cut=True),
    "tinystories": HubDataset("roneneldan/TinyStories", validation="validation"),
}
SOURCES = ["climbmix", *HUB, "stdlib"]

SHARD_CHARS = 250_000_000  # about 100 MB on disk
DOCUMENT_CHARS = 2000  # plain text is cut to this, because the loader drops what no row can hold: at 6000 the most of it
VALIDATION_SHARE, MAX_VALIDATION_DOCUMENTS = 0.05, 20_000  # of sources without a validation split of their own


def data_directory() -> Path:
    return Path(get_base_dir(), "base_data_climbmix")


def __getattr__(name: str) -> Any:
    if name == "DATA_DIR":  # where NANOCHAT_BASE_DIR points now, not where it did at import
        return str(data_directory())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
            raise _damaged(path, error) from error
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
            column = self._file.read_row_group(row_group, columns=["text"]).column("text")
            texts = [text.decode() if isinstance(text, bytes) else text for text in column.to_pylist()]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(f"row group {row_group} of {self.path}", error) from error
        if None in texts:
            if not self._warned:
                logger.warning(f"{self.path}: {texts.count(None)} null rows in row group {row_group}; null rows are left out")
                self._warned = True
            texts = [text for text in texts if text is not None]
        return texts


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


def _damaged(what: str | os.PathLike, error: Exception) -> UsageError:
    reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).partition("\n")[0]
    return UsageError(f"{what} is damaged or not parquet ({reason}); delete the file and get it again")


def _shards(directory: Path) -> list[Path]:
    """Sorted; without hidden files, as macOS and copying programs leave them (`._shard_00000.parquet`)."""
    return sorted(path for path in directory.glob("*.parquet") if not path.name.startswith("."))


def _intact(path: str | os.PathLike) -> bool:
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
    if files := list(map(str, _shards(directory))):
        return files
    legacy = list(map(str, _shards(Path(get_base_dir(), "base_data"))))
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
    if _read_record().get("unfinished"):
        raise UsageError(f"the data in {data_directory()} are being replaced, or that was interrupted; wait, or run python -m nanochat.dataset again")
    for path in chosen:
        if not _intact(path):
            raise _damaged(path, ValueError("it has no end mark"))
    return chosen


def parquets_iter_batched(split: str, start: int = 0, step: int = 1) -> Iterator[list[str]]:
    """Yields the documents of row groups `start, start + step, ...` of each file of the split, one list a group."""
    for path in split_files(split):
        shard = Shard(path)
        for row_group in range(start, shard.num_row_groups, step):
            yield shard.documents(row_group)


def data_source() -> str | None:
    """What the data directory was filled from; None where it is empty. Shards without `source.json` are nanochat's own."""
    record = _read_record()
    return record["source"] if record else "climbmix" if _shards(data_directory()) else None


def _read_record() -> dict:
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


def _write_record(directory: Path, **record: Any) -> None:
    write_text_atomic(directory / "source.json", json.dumps(record) + "\n")


def _write_shard(directory: Path, index: int, documents: list[str]) -> None:
    random.Random(index).shuffle(documents)
    try:
        column = pa.array(documents, pa.string())
    except UnicodeEncodeError:
        column = pa.array(map(replace_surrogates, documents), pa.string())
    with atomic_path(directory / index_to_filename(index)) as temporary:
        pq.write_table(pa.table({"text": column}), temporary, row_group_size=min(1024, max(1, len(documents) // 64)),
                       compression="zstd", use_dictionary=False, write_statistics=False)


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder; on success its files take the place of all that `directory` holds, else nothing changes.

    A kill while they do leaves a record that says so: nobody reads such data, and the next call replaces them.
    """
    fresh = directory / ".new"  # nobody else's: the directory is locked
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        _write_record(directory, **json.loads((fresh / "source.json").read_text(encoding="utf-8")), unfinished=True)
        for old in _shards(directory):
            old.unlink()
        for new in [*_shards(fresh), fresh / "source.json"]:
            os.replace(new, directory / new.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class _Progress:
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


_BOUNDARIES = [re.compile(pattern) for pattern in (r"\n\n(?=\S)", r"\n\n", r"\n", r"\s")]


def cut(text: str, size: int = DOCUMENT_CHARS) -> list[str]:
    """Cuts `text` into pieces of at most `size` characters, which joined give it back.

    Each cut is the last one in the second half of its piece at the best boundary found there: a blank line before
    an unindented line, a blank line, a line, a word.
    """
    pieces, start = [], 0
    while len(text) - start > size:
        end = start + size
        for boundary in _BOUNDARIES:
            if ends := [match.end() for match in boundary.finditer(text, start + size // 2, end)]:
                end = ends[-1]
                break
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


# -----------------------------------------------------------------------------
# Local sources: groups of documents, each of which stays on one side of the split


def stdlib_groups() -> Iterator[list[str]]:
    """One group per source file of the standard library; without its tests, IDLE and character tables."""
    root = sysconfig.get_path("stdlib")
    left_out = {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
    seen = set()
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(files):
            if name.endswith(".py"):
                try:
                    text = Path(folder, name).read_text(encoding="utf-8")
                except UnicodeDecodeError:
                    continue
                if text not in seen:
                    seen.add(text)
                    yield cut(text)


def path_groups(path: Path) -> Iterator[list[str]]:
    """One group per document of all .txt, .jsonl and .parquet files at or below `path`, files in random order, documents cut. Says what is left out."""
    readers = {".txt": _txt_documents, ".jsonl": _jsonl_documents, ".parquet": _parquet_documents}

    def kind(file: Path) -> str:
        """`.txt` also of a.txt.gz; parquet is packed inside."""
        suffix = file.suffix.lower()
        inner = Path(file.stem).suffix.lower()
        return inner if suffix in (".gz", ".zst") and inner != ".parquet" else suffix

    found = [path] if path.is_file() else list(_files_below(path))
    files = [file for file in found if file.is_file() and kind(file) in readers]
    if others := [str(file.relative_to(path)) if file != path else file.name for file in found if file not in files]:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        print(f"Left out, as neither .txt, .jsonl nor .parquet (nor these as .gz or .zst): {', '.join(others[:5])}{more}", flush=True)
    if not files:
        raise UsageError(f"found no .txt, .jsonl or .parquet file in {path}")
    random.Random(42).shuffle(files)
    for file in files:
        try:
            for document in readers[kind(file)](file):
                yield cut(document)
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 ({error.reason}); convert it first, for example with iconv") from error
        except OSError as error:
            if error.filename is not None or error.errno is not None:
                raise
            raise UsageError(f"{file} is damaged ({error}); get it again") from error  # how a broken .gz or .zst comes out


def _files_below(path: Path) -> Iterator[Path]:
    """Sorted, with what links to a folder, which is not followed; without hidden files and folders, as macOS and version control leave them."""
    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(path, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*names, *links]) if not name.startswith("."))


def _txt_documents(path: Path) -> Iterator[str]:
    """Parts between `<|endoftext|>` marks; a text without marks comes in pieces."""
    with open_text(path) as f:
        marked, rest = False, ""
        while block := f.read(1 << 24):
            text = rest + block
            if marked := marked or "<|endoftext|>" in text:
                *documents, rest = text.split("<|endoftext|>")
            else:
                *documents, rest = cut(text)
            yield from documents
        yield rest


def _jsonl_documents(path: Path) -> Iterator[str]:
    """The "text" of each line. Lines with null are left out, with one warning."""
    nulls = 0
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = parse_json(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f'line {number} of {path} is not a JSON object with "text" ({type(error).__name__}: {error})') from error
            if text is None:
                nulls += 1
            elif not isinstance(text, str):
                raise UsageError(f'"text" in line {number} of {path} is a {type(text).__name__}, not a string')
            else:
                yield text
    if nulls:
        logger.warning(f'{path}: {nulls} lines whose "text" is null are left out')


def _parquet_documents(path: Path) -> Iterator[str]:
    shard = Shard(path)
    for row_group in range(shard.num_row_groups):
        yield from shard.documents(row_group)


def _convert(groups: Iterable[list[str]], directory: Path) -> None:
    """Writes the documents, about one in twenty (or one at least) for validation. Holds one shard in memory."""
    draw, progress = random.Random(42), _Progress()
    train: list[str] = []
    val: list[str] = []
    shards, characters = 0, 0
    for group in groups:
        group = [text for text in group if text.strip()]
        for text in group:
            progress.add(text)
        if draw.random() < VALIDATION_SHARE and len(val) < MAX_VALIDATION_DOCUMENTS:
            val += group
            continue
        train += group
        characters += sum(map(len, group))
        if characters >= SHARD_CHARS:
            _write_shard(directory, shards, train)
            train, shards, characters = [], shards + 1, 0
    if not val and train:
        val.append(train.pop())
    if not val or not (train or shards):
        raise UsageError(f"found {progress.documents} document(s), but it takes one for training and one for validation")
    if train:
        _write_shard(directory, shards, train)
    _write_shard(directory, MAX_SHARD, val)
    print(f"{progress.documents:,} documents, {progress.characters / 1e6:,.1f} MB, of which {len(val):,} documents are for validation")


def get_local(source: str, force: bool) -> None:
    directory = data_directory()
    if data_source() == source and not force:
        shards = _shards(directory)
        if len(shards) >= _read_record().get("shards", 2) and all(map(_intact, shards)):
            print(f"{source} is already in {directory} (--force reads it anew)")
            return
        print(f"Shards of {source} are missing or cut short in {directory}: it is read anew", flush=True)
    path = Path(source)
    shards = _shards(path)
    with _replacing(directory) as fresh:
        if source == "stdlib":
            _convert(stdlib_groups(), fresh)
        elif len(shards) > 1 and all(re.fullmatch(r"shard_\d{5}\.parquet", shard.name) for shard in shards):
            for shard in shards:  # already in this layout: keep its split
                Shard(shard)
                shutil.copyfile(shard, fresh / shard.name)
        else:
            _convert(path_groups(path), fresh)
        _write_record(fresh, source=source, shards=len(_shards(fresh)))
    print(f"{source} is in {directory}")


# -----------------------------------------------------------------------------
# Hub sources


def download_single_file(index: int, directory: Path | None = None) -> bool:
    """Fetches one ClimbMix shard; True if it is there afterwards. The hub's client retries and continues part files."""
    directory = directory or data_directory()
    name = index_to_filename(index)
    if _intact(directory / name):
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
        with _replacing(directory) as fresh:
            if not download_single_file(MAX_SHARD, fresh):
                raise UsageError("cannot get ClimbMix from the hub; check the network, or use --source=stdlib, which needs none")
            _write_record(fresh, source="climbmix")
    wanted = [MAX_SHARD, *range(MAX_SHARD if num_files == -1 else min(num_files, MAX_SHARD))]
    missing = [index for index in wanted if not _intact(directory / index_to_filename(index))]
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
    record = {} if force else _read_record()
    if not record:
        print(f"Streaming the validation shard of {hub.repo}", flush=True)
        with _replacing(directory) as fresh:
            with contextlib.closing(_rows(source, hub.validation or "train")) as rows:
                documents, position, _ = _take(rows, hub.cut, _Progress())
            if hub.validation:
                position = (0, 0)
            _write_shard(fresh, MAX_SHARD, documents)
            _write_record(fresh, source=source, train_shards=0, finished=False, position=position)
        record = _read_record()
    if lost := [index for index in [MAX_SHARD, *range(record["train_shards"])] if not _intact(directory / index_to_filename(index))]:
        raise UsageError(f"{index_to_filename(lost[0])} is missing or cut short in {directory}, and {len(lost) - 1} more; use --force to stream {source} anew")
    if not record["finished"] and record["train_shards"] < wanted:
        progress = _Progress(None if num_files == -1 else (wanted - record["train_shards"]) * SHARD_CHARS / 1e6)
        with contextlib.closing(_rows(source, "train", *record["position"])) as rows:
            while record["train_shards"] < wanted and not record["finished"]:
                documents, record["position"], record["finished"] = _take(rows, hub.cut, progress)
                if documents:
                    _write_shard(directory, record["train_shards"], documents)
                    record["train_shards"] += 1
                _write_record(directory, **record)
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


def _open_stream(hub: HubDataset, split: str) -> Any:
    import datasets
    try:
        return datasets.load_dataset(hub.repo, hub.config, split=split, streaming=True)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # the repository holds a script, which `datasets` 4 and newer refuse (huggingface/datasets#7693): take the hub's conversion
        return datasets.load_dataset(hub.repo, split=split, streaming=True, revision="refs/convert/parquet")


def _take(rows: Iterator[tuple[Position, str]], cut_rows: bool, progress: _Progress) -> tuple[list[str], Position, bool]:
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


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Get pretraining text")
    parser.add_argument("--source", default="climbmix", metavar="NAME|PATH",
                        help=f"{', '.join(SOURCES)}, or a folder or file of .txt, .jsonl or .parquet, also as .gz or .zst")
    parser.add_argument("-n", "--num-files", type=int_or_off, default=-1,
                        help="training shards to get from the hub (-1 = all); the validation shard always comes along")
    parser.add_argument("-w", "--num-workers", type=positive_int, default=4, help="parallel downloads (climbmix)")
    parser.add_argument("--force", action="store_true", help="replace the data that are there")
    args = parser.parse_args(argv)

    source, directory = args.source, data_directory()
    local = source not in HUB and source != "climbmix"
    if local and args.num_files != -1:
        raise UsageError(f"--num-files counts shards of the hub; {source} is taken whole, so leave it out")
    if source not in SOURCES:
        path = Path(os.path.expanduser(source)).resolve()
        if not path.exists():
            raise UsageError(f"--source={source} is neither a path that exists nor one of {', '.join(SOURCES)}")
        if directory.resolve() == path or path in directory.resolve().parents:
            raise UsageError(f"--source={source} contains the data directory {directory} itself; give the folder of the texts alone")
        source = str(path)
    with locked(directory):
        held = data_source()
        if held not in (None, source) and not args.force:
            raise UsageError(f"{directory} holds data of {held}; add --force to replace them, or choose another NANOCHAT_BASE_DIR")
        force = args.force or _read_record().get("unfinished", False)
        if local:
            get_local(source, force)
        elif source == "climbmix":
            get_climbmix(args.num_files, args.num_workers, force)
        else:
            get_streamed(source, args.num_files, force)


if __name__ == "__main__":
    sys.exit(main())
