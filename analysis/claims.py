"""Claims: who does what, where several processes, perhaps of several machines, work through the same folders.

    claim = take(folder)          # None: another process has it
    claim.beat()                  # every BEAT seconds while the work goes on; False: it was taken over, stop
    claim.release()

A claim is a file `claim-N` in the folder of the work. One that is no longer held is followed by N + 1, and the one with the highest number counts. It is
created by a hard link, which a file system grants to exactly one, also over NFS (Linux: open(2), O_EXCL); flock, which many an NFS mount does not pass on, is not
needed. No claim is ever removed. So whoever found claim N abandoned, however long ago, can only create N + 1, and only if nobody else has: there is
no moment in which one could take a claim that another has just taken over.

A claim is held until EXPIRES seconds after its last beat, by the clock of the file system, since those of two machines may differ by more than that. That of a
process of this machine ends with the process.
"""
import contextlib
import json
import os
import platform
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nanochat.cli import UsageError
from nanochat.files import apply_umask

BEAT = 15.0  # seconds
EXPIRES = 300.0  # seconds; an NFS client may show another's beat up to a minute late


def create_once(path: Path, text: str) -> bool:
    """Creates the file, whole or not at all. False if it is there: of any number of processes that try exactly one gets True.

    Raises UsageError where there are no hard links.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        apply_umask(temporary)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
            return True
        return os.stat(temporary).st_nlink > 1  # NFS: the answer was lost, and the request sent a second time
    except OSError as error:
        raise UsageError(f"cannot create {path} by a hard link ({error.strerror}); make room, or choose another NANOCHAT_BASE_DIR") from error
    finally:
        os.unlink(temporary)


@dataclass
class Claim:
    folder: Path
    number: int
    beaten: float = field(default_factory=time.monotonic)  # when it last was, with success

    @property
    def path(self) -> Path:
        return self.folder / f"claim-{self.number}"

    def beat(self) -> bool:
        """Says that the work goes on. False if it was taken over: this process was stopped for longer than EXPIRES, or the folder is gone.

        A file system that fails for a moment (NFS: ESTALE, EIO) tells nothing, and until EXPIRES has passed nobody else can have it.
        """
        try:
            if _last(self.folder) != self.number:
                return False
            os.utime(self.path)  # without a time: over NFS the server puts in its own
            self.beaten = time.monotonic()
            return True
        except FileNotFoundError:
            return False
        except OSError:
            return time.monotonic() - self.beaten < EXPIRES

    def release(self) -> None:
        """For others to take at once. Harmless where it was taken over; where the file system fails, it expires."""
        with contextlib.suppress(OSError):
            os.utime(self.path, (0, 0))


def take(folder: Path) -> Claim | None:
    """The claim on `folder`, which is created where it is missing; None while another holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    last = Claim(folder, _last(folder))
    if _holder(last):
        return None
    claim = Claim(folder, last.number + 1)  # after that one, whatever has come since: then this one is there already
    return claim if create_once(claim.path, json.dumps({"host": platform.node(), "pid": os.getpid(), "machine": _machine()})) else None


def holder(folder: Path) -> str:
    """Who holds the claim on `folder`, as host:pid; empty if nobody does."""
    return _holder(Claim(folder, _last(folder)))


def _holder(claim: Claim) -> str:
    if not claim.number:
        return ""
    with open(claim.path, encoding="utf-8") as f:  # opened, not only looked at: an NFS client asks the server anew
        beat = os.fstat(f.fileno()).st_mtime
        try:
            who = json.load(f)
        except ValueError:  # a power cut has emptied it: it expires
            who = {"host": "?", "pid": "?", "machine": ""}
    here = who["machine"] and who["machine"] == _machine()
    if beat == 0 or here and not _alive(who["pid"]) or abs(_now(claim.folder) - beat) > EXPIRES:
        return ""
    return f"{who['host']}:{who['pid']}"


def _last(folder: Path) -> int:
    try:
        names = os.listdir(folder)  # unlike a glob it passes over no errors
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := re.fullmatch(r"claim-(\d+)", name))), default=0)


def _now(folder: Path) -> float:
    """The time by the clock that the modification times in `folder` are taken from."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock.") as probe:
        os.utime(probe.name)
        return os.stat(probe.name).st_mtime


def _machine() -> str:
    """Where process numbers mean the same as here: one start of one kernel, and one container of it. Empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
