"""The edge of every command: flags, and errors that are the user's to mend.

* `UsageError` says what is wrong and what to do, in one line; `command` turns it into exit status 2.
* No command dies of its terminal: of an encoding that lacks a character, a pipe or window that was closed, a stream that never was open.
* `ArgumentParser` takes `--flag-name` and `--flag_name` alike (older nanochat used underscores) and never
  guesses an abbreviated flag.
* The flags of a command are the fields of a dataclass, so that what they are called and of which type they are is known to the type checker.
* `positive_int` and friends check a number where it enters.
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar


class UsageError(Exception):
    """A bad flag, file or setting. The message is one line: what is wrong, and what to do about it."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every flag's help, unless it is one that says nothing (None, an empty text, an unset switch)."""

    def _get_help_string(self, action):
        shown = action.default not in (None, "") and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class ArgumentParser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with dashes and underscores equal, no abbreviations and one-line errors.

    Every flag's help ends with its default, and the usage names the command as it is typed: `python -m scripts.base_train`.
    """

    def __init__(self, **kwargs):
        if spec := getattr(sys.modules["__main__"], "__spec__", None):
            kwargs.setdefault("prog", f"python -m {spec.name}")
        super().__init__(allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)

    def add_argument(self, *flags, **kwargs):
        kwargs.setdefault("help", "(default: %(default)s)")  # argparse shows none where there is no help
        return super().add_argument(*flags, **kwargs)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        args = sys.argv[1:] if args is None else list(args)
        dashed = []
        for position, arg in enumerate(args):
            if arg == "--":
                dashed += args[position:]
                break
            flag = re.match(r"--\w[\w-]*", arg)
            dashed.append(flag[0].replace("_", "-") + arg[flag.end():] if flag else arg)
        return super().parse_known_args(dashed, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _number_type(convert: Callable, accept: Callable, wanted: str) -> Callable:
    def parse(text: str):
        try:
            value = convert(text)
            accepted = math.isfinite(value) and abs(value) < (2 ** 63 if convert is int else math.inf) and accept(value)
        except (ValueError, OverflowError):
            accepted = False
        if not accepted:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value
    return parse


positive_int = _number_type(int, lambda v: v > 0, "a whole number above 0")
non_negative_int = _number_type(int, lambda v: v >= 0, "a whole number of 0 or more")
int_or_off = _number_type(int, lambda v: v == -1 or v > 0, "a whole number above 0, or -1 for off")
step_or_off = _number_type(int, lambda v: v >= -1, "a step, or -1 for off")
positive_float = _number_type(float, lambda v: v > 0, "a number above 0")
non_negative_float = _number_type(float, lambda v: v >= 0, "a number of 0 or more")
float_or_default = _number_type(float, lambda v: v == -1 or v > 0, "a number above 0, or -1 for the default")
finite_float = _number_type(float, lambda v: True, "a number")
fraction = _number_type(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
seed = _number_type(int, lambda v: 0 <= v < 2 ** 62, "a whole number from 0 to 2^62")  # PyTorch takes 64 bits, and growths count on from it


def listed(kind: Callable = str, sep: str = ",") -> Callable[[str], list]:
    """Several of a kind, joined by `sep`, with or without blanks around it; at least one, and none of them empty."""
    def parse(text: str) -> list:
        parts = [part.strip() for part in text.split(sep)]
        if not all(parts):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list: it has an empty part")
        return [kind(part) for part in parts]
    return parse


positive_ints = listed(positive_int)


def folder_name(text: str) -> str:
    """A name that stays below the folder it is put in, and is not hidden there; empty for the default."""
    if text.startswith(".") or "/" in text or "\\" in text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not a plain name")
    return text


def picture_path(text: str) -> Path:
    """Of a picture to be drawn, which its ending says the kind of."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, .svg or .pdf")
    return path


# -----------------------------------------------------------------------------
# Settings


REQUIRED: Any = dataclasses.MISSING


def flag(default: Any, help: str, type: Callable | None = None, choices: Collection | None = None, short: str = "", positional: bool = False,
         **more: Any) -> Any:
    """A field of a settings class that is the flag of its name, or the positional argument.

    default: False makes a switch, REQUIRED a flag that must be given; a text goes through `type`, as on the command line. type: one of the above, or any
    function that raises ArgumentTypeError; without it the text is taken as it is. short: another name, such as -i. more: what else `add_argument` takes.
    """
    options = dict(help=help, **({"required": True} if default is REQUIRED else {"default": default}), **more)
    if default is False:
        options["action"] = "store_true"
    else:
        options |= {name: value for name, value in (("type", type), ("choices", choices)) if value is not None}
    metadata = dict(short=short, positional=positional, options=options)
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


Settings = TypeVar("Settings")


def settings_parser(settings: type, description: str) -> ArgumentParser:
    """A parser with one flag for each field of a dataclass."""
    parser = ArgumentParser(description=description)
    for field in dataclasses.fields(settings):
        short, long = field.metadata["short"], field.name if field.metadata["positional"] else "--" + field.name.replace("_", "-")
        parser.add_argument(*[short] if short else [], long, **field.metadata["options"])
    return parser


def parse_settings(settings: type[Settings], argv: Sequence[str] | None, description: str, **defaults: Any) -> Settings:
    """The dataclass filled from the command line; `defaults` take the place of the fields' own."""
    parser = settings_parser(settings, description)
    parser.set_defaults(**defaults)
    return settings(**vars(parser.parse_args(argv)))


# -----------------------------------------------------------------------------
# Commands


class _Output(io.FileIO):
    """A stream that nobody may be reading any more (`| head`, a closed window, a full disk): what cannot be written is dropped."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
            if written is None:  # whoever started us made the pipe non-blocking, and it is full
                os.set_blocking(self.fileno(), True)
                written = super().write(data)
            return written
        except OSError:
            return len(data)


def harden_streams() -> None:
    """Makes stdin, stdout and stderr safe to use, however the process was started."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if number == 0 and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        elif stream is not getattr(sys, f"__{name}__"):
            continue  # replaced, as by a test
        elif sys.platform == "win32" and stream and stream.isatty():  # a console, which knows its encoding
            stream.reconfigure(errors="backslashreplace")
        elif stream is None:  # it is closed, and its number must not become that of the next file that is opened
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(null, True)
            stream = open(null, "w" if number else "r", encoding="utf-8", errors="backslashreplace")
        else:
            with contextlib.suppress(OSError):
                stream.flush()
            raw = _Output(number, "w", closefd=False)
            stream = io.TextIOWrapper(raw if stream.write_through else io.BufferedWriter(raw), encoding=stream.encoding,  # type: ignore[arg-type]
                                      errors="backslashreplace", line_buffering=stream.line_buffering, write_through=stream.write_through)
        setattr(sys, name, stream)


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of RuntimeError for it; MPS, cuBLAS and the CPU's allocator raise plain ones."""
    texts = "allocate memory|out of memory|not enough memory|STATUS_ALLOC_FAILED|[Ss]ize calculation overflowed|multiplication overflow"
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and re.search(texts, str(error)) is not None


def env_rank() -> int:
    """This process's number under torchrun, which sets all three variables; 0 elsewhere, whatever RANK means there."""
    values = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return int(values[0]) if all(value.isdecimal() for value in values) else 0


def command(main: Callable) -> Callable[..., int]:
    """Decorator of a script's `main(argv=None)`: a `UsageError` becomes one line on stderr and exit status 2.

    Ctrl-C ends with status 130; full memory, a full disk or a missing permission is named like any other bad input.
    Under torchrun an error that all ranks meet is said once, by rank 0; after that torchrun ends the others.
    """
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        harden_streams()
        try:
            return main(argv) or 0
        except UsageError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None and error.errno not in (28, 30, 122):  # disk full, read-only, quota
                raise
            message = f"{error.strerror}: {error.filename or 'while writing'}"
            if not isinstance(error, FileNotFoundError):
                message += "; fix permissions, free space or choose another NANOCHAT_BASE_DIR"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            message = f"out of memory ({str(error).partition(chr(10))[0] or 'of this machine'}); ask for a smaller model, context or batch"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        rank = env_rank()
        if rank > 0:
            time.sleep(10)  # still here after what rank 0 and torchrun need to end on a busy machine: rank 0 did not meet it
        print(f"error{f' on rank {rank}' if rank else ''}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        return 2
    return run
