"""Where the CORE data come from: the folder base_dir/eval_bundle, downloaded and unpacked where it is not there."""
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

from filelock import FileLock

from nanochat.cli import UsageError
from nanochat.common import download_file_with_lock, get_base_dir

EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def place_eval_bundle(file_path: str | os.PathLike) -> None:
    """Unpacks the zip's folder `eval_bundle` into the base directory, as a whole or not at all. Raises UsageError for a bad zip."""
    base_dir = Path(get_base_dir()).resolve()
    with tempfile.TemporaryDirectory(dir=base_dir, prefix=".eval_bundle.") as temporary:
        try:
            with zipfile.ZipFile(file_path) as archive:
                for name in archive.namelist():
                    if not Path(temporary, name).resolve().is_relative_to(temporary):
                        raise UsageError(f"{file_path} would write outside its folder ({name!r}): delete it, it is not the CORE bundle")
                archive.extractall(temporary)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{file_path} is not an intact zip file ({error}): delete it, so that it is downloaded again") from error
        bundle = Path(temporary, "eval_bundle")
        if not bundle.is_dir():
            raise UsageError(f"{file_path} has no folder eval_bundle: delete it, it is not the CORE bundle")
        bundle.rename(base_dir / "eval_bundle")


def find_eval_bundle() -> Path:
    """The CORE data in the base directory, downloaded if need be. Raises UsageError without data and network."""
    bundle = Path(get_base_dir(), "eval_bundle")
    if not bundle.is_dir():
        try:
            archive = download_file_with_lock(EVAL_BUNDLE_URL, "eval_bundle.zip")
        except UsageError as error:
            raise UsageError(f"{error}, or its unpacked content at {bundle}") from error
        with FileLock(f"{archive}.lock"):
            if not bundle.is_dir():
                place_eval_bundle(archive)
    return bundle
