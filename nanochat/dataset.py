"""Pretraining text as parquet shards, and the command that gets it:

    python -m nanochat.dataset -n 8                  nanochat's ClimbMix shards from the hub
    python -m nanochat.dataset --source=stdlib       the Python standard library's own source: needs no network
    python -m nanochat.dataset --source=tinystories  or fineweb-edu, openwebtext, text8: streamed from the hub
    python -m nanochat.dataset --source=PATH         a folder or a file of .txt, .jsonl or .parquet, also as .gz or .zst
    python -m nanochat.dataset --source='PATH/**/*.py'   all files that the pattern matches, as plain text

* data_shards.py has the layout on disk, data_local.py and data_hub.py the sources. Nothing else knows where text comes from.
* Validation is shard 6542, as in nanochat, and comes first: however early you look, the split is the same.
* A download that was killed goes on after its last complete shard and ends in the same files.
* Data of another source are replaced with --force only, and not before the new ones have begun to arrive.
* One process at a time writes to the folder; another waits.
"""
import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.cli import ArgumentParser, UsageError, command, int_or_off, positive_int
from nanochat.data_hub import HUB, download_single_file, get_climbmix, get_streamed
from nanochat.data_local import get_local
from nanochat.data_shards import (
    MAX_SHARD,
    data_directory,
    data_source,
    index_to_filename,
    list_parquet_files,
    parquets_iter_batched,
    read_record,
)
from nanochat.files import locked

__all__ = ["MAX_SHARD", "data_source", "download_single_file", "index_to_filename", "list_parquet_files", "parquets_iter_batched"]  # nanochat's names
SOURCES = ["climbmix", *HUB, "stdlib"]


def __getattr__(name: str) -> Any:
    if name == "DATA_DIR":  # where NANOCHAT_BASE_DIR points now, not where it did at import
        return str(data_directory())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Get pretraining text")
    parser.add_argument("--source", default="climbmix", metavar="NAME|PATH",
                        help=f"{', '.join(SOURCES)}, or a folder or file of .txt, .jsonl or .parquet, also as .gz or .zst, or a pattern such as 'lib/**/*.py' of other texts")
    parser.add_argument("-n", "--num-files", type=int_or_off, default=-1,
                        help="training shards to get from the hub (-1 = all); the validation shard always comes along")
    parser.add_argument("-w", "--num-workers", type=positive_int, default=4, help="parallel downloads (climbmix)")
    parser.add_argument("--force", action="store_true", help="replace the data that are there")
    args = parser.parse_args(argv)

    if not args.source:
        raise UsageError("--source is empty; give a name or a path")
    source, directory = args.source, data_directory()
    local = source not in HUB and source != "climbmix"
    if local and args.num_files != -1:
        raise UsageError(f"--num-files counts shards of the hub; {source} is taken whole, so leave it out")
    if source not in SOURCES:
        path = Path(os.path.expanduser(source)).resolve()
        if not path.exists() and not glob.has_magic(source):
            raise UsageError(f"--source={source} is neither a path that exists nor one of {', '.join(SOURCES)}")
        if directory.resolve() == path or path in directory.resolve().parents:
            raise UsageError(f"--source={source} contains the data directory {directory} itself; give the folder of the texts alone")
        source = str(path)
    with locked(directory):
        held = data_source()
        if held not in (None, source) and not args.force:
            raise UsageError(f"{directory} holds data of {held}; add --force to replace them, or choose another NANOCHAT_BASE_DIR")
        force = args.force or read_record().get("unfinished", False)
        if local:
            get_local(source, force)
        elif source == "climbmix":
            get_climbmix(args.num_files, args.num_workers, force)
        else:
            get_streamed(source, args.num_files, force)


if __name__ == "__main__":
    sys.exit(main())
