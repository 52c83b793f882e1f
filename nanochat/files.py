"""Files that are whole or not there at all, folders that one process at a time writes to, text in any wrapping."""
import contextlib
import dataclasses
import errno
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanochat.cli import UsageError


def check_writable(folder: str | os.PathLike) -> None:
    """To be called before a long computation whose result goes to `folder`. Creates it; raises UsageError where nothing can be written."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=str(folder)) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UsageError(f"cannot write to {folder} ({error.strerror}); set NANOCHAT_BASE_DIR to a folder you can write to") from error


@contextlib.contextmanager
def locked(folder: str | os.PathLike, wait: bool = True) -> Iterator[None]:
    """Holds `folder` against other processes that lock it, by a file beside it; the lock ends with the process, however that ends.

    While another process holds it, waits and says so, or with `wait=False` raises UsageError. The holder may lock it again. On a file system
    that knows no locks there is none.
    """
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), is_singleton=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.acquire(timeout=0))
        except Timeout:
            if not wait:
                raise UsageError(f"another process is writing to {folder}; wait until it has ended, or choose another --model-tag") from None
            print(f"Waiting for another process that is writing to {folder}", flush=True)
            stack.enter_context(lock.acquire())
        except NotImplementedError:
            pass
        except OSError as error:  # NFS without its lock daemon and others say so in their own ways
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL) or error.filename is not None:
                raise
        yield


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def apply_umask(path: str | os.PathLike) -> None:
    """Gives a file or folder that was made private, as tempfile and safetensors do, the permissions that the umask asks for."""
    with contextlib.suppress(PermissionError):  # a mount that gives all files to one user
        os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~current_umask())


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced to disk and renamed onto `path`.

    A kill at any moment leaves either the old file or the new one, never a part of it. On an exception the
    temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        apply_umask(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # make the rename itself durable, where folders can be synced; the file is there
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        temporary.unlink(missing_ok=True)


def check_free(folder: Path, flag: str) -> None:
    """Raises UsageError that names the flag which chooses another folder, where this one exists."""
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already and is not overwritten; choose another {flag}")


@contextlib.contextmanager
def new_folder(folder: Path, flag: str) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` once all is written, and disappears where something fails.

    Raises UsageError that names the flag where `folder` exists, or a file cannot be written.
    """
    check_free(folder, flag)
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UsageError(f"cannot write to {folder.absolute().parent} ({error.strerror}); choose another {flag}") from error
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            apply_umask(path)
        check_free(folder, flag)  # nobody was faster
        os.rename(temporary, folder)
    except UsageError:  # some are OSErrors too, and say what is wrong
        raise
    except OSError as error:
        raise UsageError(f"cannot write {folder} ({error.strerror or error}); make room or choose another {flag}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold bytes that are no text


def open_text(path: str | os.PathLike) -> io.TextIOWrapper:
    """A UTF-8 file to read, with or without byte order mark; a name that ends in .gz or .zst is unpacked."""
    content: Any = open(path, "rb")
    if compression := {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix.lower()):
        import pyarrow
        content = pyarrow.CompressedInputStream(content, compression)
    return io.TextIOWrapper(content, encoding="utf-8-sig")


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: tensors, numpy's scalars and dataclasses become what they hold, NaN and infinity null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, of which nesting deeper than Python can follow is a ValueError like all other bad JSON."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
