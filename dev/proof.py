"""Proof of value: a change that should change nothing gives the same losses, checkpoints and logs, to the last bit.

    python -m dev.proof record before.json     # in the tree before the change
    python -m dev.proof compare before.json    # in the tree after it: lists what is gone or differs, exit status 1 if anything does

Short runs of all three trainings, as processes of their own: base (stock, low-rank, nGPT, growing by moment and by kappa, resumed, on two ranks),
fine-tuning (also resumed) and RL. Of each are kept the records of its log, the hash of each tensor of its checkpoints (weights, optimizer, random
states, positions in the data) and the meta data; left out is what the clock says. Recordings hold for one machine and one version of PyTorch. About four minutes.
"""
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from nanochat.cli import ArgumentParser, UsageError, command
from nanochat.kernel_choice import KERNELS

CLOCK = {"dt", "tok_per_sec", "mfu", "time", "total_training_time", "peak_memory_mib"}
BASE = ["-m", "scripts.base_train", "--depth=2", "--head-dim=32", "--aspect-ratio=32", "--max-seq-len=64", "--device-batch-size=4", "--total-batch-size=512",
        "--num-iterations=14", "--eval-every=5", "--eval-tokens=2048", "--sample-every=10", "--core-metric-every=-1", "--save-every=6", "--warmup-steps=3"]
SFT = ["-m", "scripts.chat_sft", "--mixture=spelling", "--num-iterations=24", "--max-seq-len=128", "--device-batch-size=2", "--total-batch-size=512",
       "--eval-every=4", "--eval-tokens=1024", "--chatcore-every=6", "--chatcore-max-sample=4", "--save-every=5"]
RL = ["-m", "scripts.chat_rl", "--task-name=SpellingBee", "--num-iterations=4", "--examples-per-step=2", "--num-samples=4", "--device-batch-size=2",
      "--max-new-tokens=16", "--eval-every=2", "--eval-examples=4", "--save-every=2"]
RUNS: dict[str, tuple[int, list[str]]] = {  # ranks, command
    "stock": (1, BASE),
    "stock resumed": (1, [*BASE, "--resume-from-step=6"]),
    "low rank": (1, [*BASE, "--model-tag=lowrank", "--rank=8", "--rank-schedule=linear", "--activation=swiglu", "--lm-head-rank=16", "--n-kv-head=1", "--order=parallel"]),
    "adamw": (1, [*BASE, "--model-tag=adamw", "--matrix-optimizer=adamw", "--mlp-depth=2", "--order=mlp-attn", "--window-pattern=L"]),
    "ngpt": (1, [*BASE, "--model-tag=ngpt", "--block=ngpt"]),
    "grown at moments": (1, [*BASE, "--model-tag=moments", "--grow-path=1x32,2x48,2x64", "--head-dim=16", "--grow-at=0.2,0.5", "--grow-rewarm=2"]),
    "grown by kappa": (1, [*BASE, "--model-tag=kappa", "--grow-path=1x32,2x64", "--kappa=0.9", "--eval-every=2", "--grow-optimizer=reset", "--grow-freeze"]),
    "ngpt grown": (1, [*BASE, "--model-tag=ngptgrown", "--block=ngpt", "--grow-path=1x32,2x64", "--grow-at=0.3"]),
    "two ranks": (2, [*BASE, "--model-tag=ranks", "--grow-path=1x32,2x64", "--grow-at=0.3"]),
    "fine-tuned": (1, [*SFT, "--model-tag=d2"]),
    "fine-tuned, resumed": (1, [*SFT, "--model-tag=d2", "--resume-from-step=5"]),
    "fine-tuned, ngpt": (1, [*SFT, "--model-tag=ngpt", "--load-optimizer=0", "--num-iterations=8"]),
    "fine-tuned, two ranks": (2, [*SFT, "--model-tag=ranks"]),
    "reinforced": (1, [*RL, "--model-tag=d2"]),
    "reinforced, resumed": (1, [*RL, "--model-tag=d2", "--resume-from-step=2"]),
}


def plain(value):
    """`value` for a comparison: tensors as hashes, keys sorted, without the clock's."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in CLOCK}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def run(python: list[str], environment: dict) -> None:
    result = subprocess.run([sys.executable, *python], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise UsageError(f"{' '.join(python)} failed:\n{result.stdout[-1500:]}\n{result.stderr[-1500:]}")


def record() -> dict:
    """Everything that the runs leave behind, by run and file."""
    recording: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text")
        text.mkdir()
        for source in sorted(Path(sysconfig.get_paths()["stdlib"], "email").glob("*.py")):
            (text / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        environment = {**os.environ, "NANOCHAT_BASE_DIR": folder, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(),
                       "NANOCHAT_KERNELS": ",".join(f"{kernel}={alternatives[0]}" for kernel, alternatives in KERNELS.items())}
        run(["-m", "nanochat.dataset", f"--source={text}"], environment)
        run(["-m", "scripts.tok_train", "--vocab-size=512"], environment)
        known: dict[Path, int] = {}
        for name, (ranks, python) in RUNS.items():
            print(f"{name} ...", flush=True)
            run(python if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *python], environment)
            files = {}
            for path in sorted(Path(folder).glob("*_checkpoints/*/*")):
                if known.get(path) == (changed := path.stat().st_mtime_ns):
                    continue
                known[path] = changed
                if path.suffix == ".pt":
                    content = torch.load(path, map_location="cpu", weights_only=True)
                elif path.suffix == ".jsonl":
                    content = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                elif path.suffix == ".json":
                    content = json.loads(path.read_text(encoding="utf-8"))
                else:
                    continue
                files[str(path.relative_to(folder))] = plain(content)
            recording[name] = files
    return json.loads(json.dumps(recording))


def differences(before, after, where: str):
    """Yields a line for each place where the second recording lacks or contradicts something of the first; more may be in it."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            if key in after:
                yield from differences(before[key], after[key], f"{where}/{key}")
            else:
                yield f"{where}/{key}: gone"
    elif isinstance(before, list) and isinstance(after, list) and len(before) <= len(after):
        for i, (a, b) in enumerate(zip(before, after)):
            yield from differences(a, b, f"{where}/{i}")
    elif before != after:
        yield f"{where}: {str(before)[:100]} -> {str(after)[:100]}"


@command
def main(argv=None) -> int:
    parser = ArgumentParser(description="Record short trainings, or compare them with a recording")
    parser.add_argument("what", choices=("record", "compare"), help="record: write the file; compare: read it and list what differs")
    parser.add_argument("file", type=Path, help="the recording")
    args = parser.parse_args(argv)
    if args.what == "record":
        args.file.write_text(json.dumps(record()), encoding="utf-8")
        return 0
    try:
        before = json.loads(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{args.file} is no recording ({error}); write one with `record` in the tree before the change") from error
    lines = list(differences(before, record(), ""))
    print("\n".join(lines) if lines else f"Identical: {len(RUNS)} runs, {sum(map(len, before.values()))} files")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
