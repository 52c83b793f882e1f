"""Writes a trained model in the format of others, as a new folder.

    python -m scripts.export --to=hf -g d12 --out=d12-hf
    python -m scripts.export --to=nanochat --dense -g d12r64 --out=for-nanochat
    python -m scripts.export --to=base-dir --from-folder=d12-hf --out=back

| --to | what | read by |
|---|---|---|
| hf | safetensors, tokenizer, chat template and the model's own code | transformers, with trust_remote_code=True |
| onnx | the decoding step with its cache | onnxruntime |
| nanochat | a base directory with a stock model | nanochat |
| base-dir | a base directory with the model as it is | this project |

Everything is computed in float32. A folder is written as a whole or not at all, and nothing is overwritten.
"""
import os

os.environ["NANOCHAT_DTYPE"] = "float32"  # what is exported is compared with the model in it
os.environ.setdefault("NANOCHAT_KERNELS", "attention=torch,window=torch,backward=torch,long-backward=torch,decode=torch,position=matrix")  # no stopwatch for that

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import SOURCES, CheckpointSettings
from nanochat.cli import REQUIRED, UsageError, command, flag, parse_settings
from nanochat.export.base_dir import export_base_dir, to_stock
from nanochat.export.exported import Exported, from_checkpoint
from nanochat.export.hf import export_hf, from_folder
from nanochat.files import check_free, new_folder


def size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMG]?B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return text


def _onnx(subject: Exported, settings: "Settings", folder: Path) -> str:
    from nanochat.export.onnx import export_onnx
    return export_onnx(subject, folder)


# what fills the folder, checks it and says what it is
FORMATS: dict[str, Callable[[Exported, "Settings", Path], str]] = {
    "hf": lambda subject, settings, folder: export_hf(subject, folder, settings.shard_size),
    "onnx": _onnx,
    "nanochat": lambda subject, settings, folder: export_base_dir(to_stock(subject, settings.dense), folder),
    "base-dir": lambda subject, settings, folder: export_base_dir(subject, folder),
}


@dataclass(kw_only=True)
class Settings(CheckpointSettings):
    to: str = flag(REQUIRED, "Format", choices=tuple(FORMATS))
    out: str = flag(REQUIRED, "Folder to write, which must not exist")
    source: str = flag("base", "Stage of training that the model comes from", choices=SOURCES, short="-i")
    from_folder: str | None = flag(None, "Export this folder, one of --to=hf, instead of a checkpoint")
    dense: bool = flag(False, "nanochat: multiply low-rank matrices out")
    shard_size: str = flag("5GB", "hf: a file of weights is not larger than this", type=size)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(Settings, argv, "Export a model")
    out = Path(settings.out)
    check_free(out, "--out")
    if settings.dense and settings.to != "nanochat":
        raise UsageError("--dense is for --to=nanochat, the only format that cannot hold low-rank matrices")
    if settings.from_folder == "":
        raise UsageError("--from-folder is empty; give a folder, or leave it out for a checkpoint")
    if settings.from_folder and (settings.source != "base" or settings.model_tag or settings.step is not None):
        raise UsageError("--from-folder and a checkpoint's --source, --model-tag or --step both say what to export; give one of them")
    subject = from_folder(Path(settings.from_folder)) if settings.from_folder else from_checkpoint(*settings.find())
    with new_folder(out, "--out") as folder:
        found = FORMATS[settings.to](subject, settings, folder)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"Written to {out} ({size / 1e6:,.1f} MB): {found}")


if __name__ == "__main__":
    sys.exit(main())
