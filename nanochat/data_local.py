"""Local sources of pretraining text: the standard library's own source, folders of .txt, .jsonl or .parquet, also as .gz or .zst, and whatever a pattern matches.

Documents are cut to 2,000 characters, because the loader drops what no row can hold. They come in groups, each of which stays on one side of the split.
"""
import glob
import hashlib
import os
import random
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanochat.cli import UsageError
from nanochat.common import logger
from nanochat.data_shards import (
    MAX_SHARD,
    SHARD_CHARS,
    Progress,
    Shard,
    data_directory,
    data_source,
    intact,
    read_record,
    replacing,
    shard_files,
    write_record,
    write_shard,
)
from nanochat.files import open_text, parse_json

DOCUMENT_CHARS = 2000  # plain text is cut to this, because the loader drops what no row can hold: at 6000 the most of it
VALIDATION_SHARE, MAX_VALIDATION_DOCUMENTS = 0.05, 20_000  # of sources without a validation split of their own
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
                except (UnicodeDecodeError, OSError):  # distributions link some into /etc, which need not be there
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

    if glob.has_magic(str(path)) and not path.exists():
        yield from _pattern_groups(path, readers, kind)
        return
    found = [path] if path.is_file() else list(_files_below(path))
    files = [file for file in found if file.is_file() and kind(file) in readers]
    known = set(files)
    if others := [str(file.relative_to(path)) if file != path else file.name for file in found if file not in known]:
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


def _pattern_groups(pattern: Path, readers: dict, kind: Callable) -> Iterator[list[str]]:
    """Those of the files that a pattern such as `lib/**/*.py` matches, also in hidden folders; what is of no kind of its own is plain text. Equal files count once.

    Source trees hold a few files that are no text: they are left out with a count, where a folder of texts would be refused.
    """
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    try:
        files = sorted(file for file in Path(*pattern.parts[:fixed]).glob("/".join(pattern.parts[fixed:])) if file.is_file())
    except ValueError as error:  # `**.py`, until Python 3.13
        raise UsageError(f"{pattern} is no pattern ({error}); for all folders below write PATH/**/*.py") from error
    if not files:
        raise UsageError(f"no file matches {pattern}; put the pattern into quotes, and ** for folders within folders")
    random.Random(42).shuffle(files)
    seen, damaged = set(), 0
    for file in files:
        try:
            documents = list(readers.get(kind(file), _txt_documents)(file))
        except (UnicodeDecodeError, OSError):
            damaged += 1
            continue
        checksum = hashlib.sha256("\0".join(documents).encode("utf-8", "surrogatepass")).digest()
        if checksum not in seen:
            seen.add(checksum)
            yield [piece for document in documents for piece in cut(document)]
    if damaged:
        print(f"Left out, as unreadable or not UTF-8: {damaged} of {len(files)} files", flush=True)


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


def _convert(groups: Iterable[list[str]], directory: Path, shuffled: bool = False) -> None:
    """Writes the documents, about one in twenty (or one at least) for validation. Holds one shard in memory.

    shuffled: within a shard they come in random order, for sources in which many neighbours are pieces of one text.
    """
    draw, progress = random.Random(42), Progress()
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
            if shuffled:
                draw.shuffle(train)
            write_shard(directory, shards, train)
            train, shards, characters = [], shards + 1, 0
    if not val and train:
        val.append(train.pop())
    if not val or not (train or shards):
        raise UsageError(f"found {progress.documents} document(s), but it takes one for training and one for validation")
    if shuffled:
        draw.shuffle(train)
        draw.shuffle(val)  # a validation reads its beginning
    if train:
        write_shard(directory, shards, train)
    write_shard(directory, MAX_SHARD, val)
    print(f"{progress.documents:,} documents, {progress.characters / 1e6:,.1f} MB, of which {len(val):,} documents are for validation")


def get_local(source: str, force: bool) -> None:
    directory = data_directory()
    if data_source() == source and not force:
        shards = shard_files(directory)
        if len(shards) >= read_record().get("shards", 2) and all(map(intact, shards)):
            print(f"{source} is already in {directory} (--force reads it anew)")
            return
        print(f"Shards of {source} are missing or cut short in {directory}: it is read anew", flush=True)
    path = Path(source)
    shards = shard_files(path)
    with replacing(directory) as fresh:
        if source == "stdlib":
            _convert(stdlib_groups(), fresh)
        elif len(shards) > 1 and all(re.fullmatch(r"shard_\d{5}\.parquet", shard.name) for shard in shards):
            for shard in shards:  # already in this layout: keep its split
                Shard(shard)
                shutil.copyfile(shard, fresh / shard.name)
        else:
            _convert(path_groups(path), fresh, shuffled=glob.has_magic(source) and not path.exists())
        write_record(fresh, source=source, shards=len(shard_files(fresh)))
    print(f"{source} is in {directory}")
