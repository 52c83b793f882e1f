"""The report of a whole pipeline, as `report.md` and as one self-contained page `report.html`.

* Every script logs a section, a Markdown file in `base_dir/report`, with `get_report().log(title, data)`.
* The pretraining run comes from its own log (see run_log.py), so that a run that is still going on has a report too.
* What a model wrote is shown as text: the page runs no scripts and loads nothing.

    python -m nanochat.report reset            before a run: forgets old sections and notes the environment and the time
    python -m nanochat.report generate         at any time: writes the report, here and in base_dir/report
    python -m nanochat.report compare d6 d12   runs side by side: what they cost, what they can do, and whether one is really better (compare.py)
"""
import datetime
import getpass
import os
import platform
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from nanochat import compare as comparison
from nanochat.cli import UsageError, command, flag, parse_settings
from nanochat.common import get_base_dir, get_dist_info, print0
from nanochat.eval_report import EvalReport
from nanochat.files import atomic_path, check_writable, write_text_atomic
from nanochat.report_page import embedded, page
from nanochat.run_report import TrainingRun, bullets, decimals, find_run_log, hourly_rate, verbatim

EXPECTED_FILES = [
    "tokenizer-training.md", "tokenizer-evaluation.md", "base-model-training.md", "base-model-evaluation.md",
    "chat-sft.md", "chat-evaluation-sft.md", "chat-rl.md", "chat-evaluation-rl.md",
]
_OLD_NAMES = {"chat-sft.md": "sft.md"}

chat_metrics = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "ChatCORE"]

_SOURCE_TYPES = ("py", "md", "rs", "html", "toml", "sh")
_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_PROJECT = Path(__file__).resolve().parent.parent


def _now() -> str:
    return datetime.datetime.now().strftime(_TIME_FORMAT)


# -----------------------------------------------------------------------------
# Environment


def run_command(cmd: str) -> str | None:
    """Standard output of a shell command run in the project folder; None if it fails or takes over 5 s."""
    try:
        result = subprocess.run(cmd, shell=True, capture_output=True, text=True, errors="replace", timeout=5, cwd=_PROJECT)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def get_git_info() -> dict[str, Any]:
    """commit (short), branch, dirty, message (first line, cut to 80 characters); "unknown" without git."""
    return {
        "commit": run_command("git rev-parse --short HEAD") or "unknown",
        "branch": run_command("git rev-parse --abbrev-ref HEAD") or "unknown",
        "dirty": bool(run_command("git status --porcelain")),
        "message": (run_command("git log -1 --pretty=%s") or "")[:80],
    }


def get_gpu_info() -> dict[str, Any]:
    """{"available": False}, or also count, names, memory_gb (sum over the GPUs) and cuda_version."""
    if not torch.cuda.is_available():
        return {"available": False}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "available": True,
        "count": len(devices),
        "names": [device.name for device in devices],
        "memory_gb": sum(device.total_memory for device in devices) / 2**30,
        "cuda_version": torch.version.cuda or "unknown",
    }


def get_system_info() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "unknown"
    return {
        "hostname": socket.gethostname(),
        "platform": platform.platform(terse=True),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "cpu_count": psutil.cpu_count(logical=False) or os.cpu_count(),
        "cpu_count_logical": os.cpu_count(),
        "memory_gb": psutil.virtual_memory().total / 2**30,
        "user": user,
        "nanochat_base_dir": get_base_dir(),
        "working_dir": os.getcwd(),
    }


def estimate_cost(gpu_info: dict, runtime_hours: float | None = None) -> dict[str, Any] | None:
    """hourly_rate of all GPUs together, gpu_type and estimated_total in USD; None without a GPU."""
    if not gpu_info.get("available"):
        return None
    gpu_type = gpu_info["names"][0] if gpu_info.get("names") else "unknown"
    rate = gpu_info.get("count", 1) * hourly_rate(gpu_type)
    return {"hourly_rate": rate, "gpu_type": gpu_type, "estimated_total": None if runtime_hours is None else rate * runtime_hours}


def _bloat() -> dict[str, str]:
    """The size of the code base, over the files under version control; empty without git."""
    listed = run_command("git ls-files -- " + " ".join(f"'*.{suffix}'" for suffix in _SOURCE_TYPES))
    if not listed:
        return {}
    texts = [path.read_text(encoding="utf-8", errors="replace") for name in listed.splitlines() if (path := _PROJECT / name).is_file()]
    characters = sum(map(len, texts))
    size = {
        "Characters": f"{characters:,}",
        "Lines": f"{sum(text.count(chr(10)) for text in texts):,}",
        "Files": f"{len(texts):,}",
        "Tokens (approx)": f"{characters // 4:,}",
    }
    lock = _PROJECT / "uv.lock"
    if lock.is_file():
        size["Dependencies (uv.lock lines)"] = f"{lock.read_text(encoding='utf-8').count(chr(10)):,}"
    return size


def generate_header() -> str:
    """Title, time and environment, as Markdown."""
    git, gpu, system = get_git_info(), get_gpu_info(), get_system_info()
    hardware = {
        "Platform": system["platform"],
        "CPUs": f"{system['cpu_count']} cores ({system['cpu_count_logical']} logical)",
        "Memory": f"{system['memory_gb']:.1f} GB",
        "GPUs": "none",
    }
    if gpu["available"]:
        hardware |= {
            "GPUs": f"{gpu['count']}x {gpu['names'][0]}",
            "GPU Memory": f"{gpu['memory_gb']:.1f} GB total",
            "CUDA Version": gpu["cuda_version"],
        }
    if cost := estimate_cost(gpu):
        hardware["Hourly Rate"] = f"${cost['hourly_rate']:.2f}/hour"
    blocks = {
        "Git Information": {"Branch": git["branch"], "Commit": git["commit"] + (" (dirty)" if git["dirty"] else " (clean)"), "Message": git["message"]},
        "Hardware": hardware,
        "Software": {"Python": system["python_version"], "PyTorch": system["torch_version"]},
        "Bloat": _bloat(),
    }
    environment = "\n".join(f"### {title}\n\n{bullets(items)}" for title, items in blocks.items() if items)
    return f"# nanochat training report\n\nGenerated: {_now()}\n\n## Environment\n\n{environment}\n"


# -----------------------------------------------------------------------------
# Sections


def slugify(text: str) -> str:
    return text.lower().replace(" ", "-")


def extract(section: str, keys: str | Sequence[str]) -> dict[str, str]:
    """Values of the bullets `- key ...: value` of a section, by key. The last such bullet of a key counts."""
    keys = [keys] if isinstance(keys, str) else keys
    found: dict[str, str] = {}
    for line in section.splitlines():
        name, colon, value = line.removeprefix("- ").partition(":")
        if line.startswith("- ") and colon:
            found |= {key: value.split(":")[0].strip() for key in keys if f"{name} ".startswith(f"{key} ")}
    return found


def extract_timestamp(content: str, prefix: str) -> datetime.datetime | None:
    """The time in the first line that starts with `prefix`, or None."""
    for line in content.splitlines():
        if line.startswith(prefix):
            try:
                return datetime.datetime.strptime(line.partition(":")[2].strip(), _TIME_FORMAT)
            except ValueError:
                return None
    return None


def _bullet_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, int) and value >= 10000:
        return f"{value:,}"
    text = str(value)
    if len(text) > 60 or not text.isprintable():  # what a model wrote: a block of its own inside the bullet
        return textwrap.indent(f"\n\n{verbatim(text)}", "  ")
    return text


class Report:
    """The sections in `report_dir`, and what is made of them.

    Pretraining runs are looked for in `base_checkpoints` beside `report_dir`.
    """

    def __init__(self, report_dir: str | os.PathLike):
        self.dir = Path(report_dir)

    def log(self, section: str, data: Sequence[str | dict | None]) -> str:
        """Writes the section's file: strings as they are, dicts as bullets, empty items not at all. Returns its path."""
        items = [item if isinstance(item, str) else bullets({key: _bullet_value(value) for key, value in item.items()})
                 for item in data if item]
        path = self.dir / f"{slugify(section)}.md"
        write_text_atomic(path, f"## {section}\ntimestamp: {_now()}\n\n" + "\n".join(items) + "\n")
        return str(path)

    def sections(self) -> dict[str, str]:
        """File name -> text: the expected ones in order, then any other that was logged."""
        logged = {path.name: text for path in sorted(self.dir.glob("*.md"))
                  if (text := path.read_text(encoding="utf-8", errors="replace")).startswith("## ") and extract_timestamp(text, "timestamp:")}
        ordered = {}
        for name in EXPECTED_FILES:
            for variant in (name, _OLD_NAMES.get(name, name)):
                if variant in logged:
                    ordered[name] = logged.pop(variant)
        return ordered | logged

    def generate(self, model_tag: str | None = None) -> str:
        """Writes report.md, its picture report.png and report.html, here and in the current folder.

        Returns the path of report.md. Raises UsageError where there is neither a section nor a run log.
        """
        log = find_run_log(self.dir.parent, model_tag)
        run = TrainingRun(log) if log else None
        sections = self.sections()
        if run and not run.records:
            run = None
        if not sections and not run:
            raise UsageError(f"nothing to report yet in {self.dir.parent}; train a model first (runs/quickstart.sh), or set NANOCHAT_BASE_DIR")
        header_file = self.dir / "header.md"
        header = header_file.read_text(encoding="utf-8") if header_file.is_file() else generate_header()
        header = re.sub(r"^Generated: .*", f"Generated: {_now()}", header, count=1, flags=re.MULTILINE)
        summary = _summary(header, sections, run)
        missing = [name.removesuffix(".md") for name in EXPECTED_FILES if name not in sections and not (run and name == "base-model-training.md")]
        if missing:
            print0(f"No section yet: {', '.join(missing)}")

        files: dict[str, str | bytes] = {}
        run_text = ""
        evals = EvalReport(run.path.parent) if run else None
        measured = evals.picture() if evals else None
        if run:
            files["report.png"] = run.picture()
            run_text = run.markdown("![Loss curves](report.png)\n")
        if evals:
            if measured:
                files["report_evals.png"] = measured
            run_text += "\n" + evals.markdown("![Evaluations](report_evals.png)\n" if measured else "")
        files["report.md"] = "\n".join([header, *filter(None, [run_text]), *sections.values(), summary])

        title, _, environment = header.partition("## Environment")
        if run:
            run_text = run.markdown("".join(embedded(run.picture((axis,)), f"Loss over {axis}") for axis in run.axes) + "\n")
        if evals:
            run_text += "\n" + evals.markdown(embedded(measured, "Evaluations") + "\n" if measured else "")
        files["report.html"] = page("\n".join([title, run_text, *sections.values(), summary, f"## Environment{environment}"]))
        return self._write(files)

    def compare(self, tags: Sequence[str]) -> str:
        """Writes compare.md, its picture compare.png and compare.html, here and in the current folder. Returns the path of compare.md. Raises UsageError for unknown tags."""
        contestants = [comparison.Contestant(self.dir.parent, tag) for tag in tags]
        picture = comparison.draw(contestants)
        return self._write({"compare.png": picture, "compare.md": comparison.compare(contestants, "![Losses and accuracies](compare.png)\n"),
                            "compare.html": page(comparison.compare(contestants, embedded(picture, "Losses and accuracies") + "\n"))})

    def _write(self, files: dict[str, str | bytes]) -> str:
        """Into the folder of the report and, if that can be, the current one. Returns the path of the Markdown file."""
        for folder in dict.fromkeys((self.dir.resolve(), Path.cwd())):  # here first
            try:
                for name, content in files.items():
                    with atomic_path(folder / name) as path:
                        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
            except OSError as error:
                if folder == self.dir.resolve():
                    raise
                print0(f"No copy of the report in the current folder ({error.strerror})")
        return str(self.dir / next(name for name in files if name.endswith(".md")))

    def reset(self) -> None:
        """Deletes all sections and the report, and notes environment and time for the run that starts now."""
        for name in [*self.sections(), *_OLD_NAMES.values(), "report.md", "report.html", "report.png", "report_evals.png"]:
            (self.dir / name).unlink(missing_ok=True)
        write_text_atomic(self.dir / "header.md", f"{generate_header()}\nRun started: {_now()}\n\n---\n\n")


class DummyReport:
    """Takes the place of the report on ranks other than 0."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        pass

    def generate(self, *args: Any, **kwargs: Any) -> None:
        pass

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass

    def compare(self, *args: Any, **kwargs: Any) -> None:
        pass


def get_report() -> "Report | DummyReport":
    """To be called before the computation that is reported: raises UsageError where the report could not be written."""
    if get_dist_info()[1] != 0:
        return DummyReport()
    folder = os.path.join(get_base_dir(), "report")
    check_writable(folder)
    return Report(folder)


def _core(section: str, run: TrainingRun | None) -> dict[str, str]:
    """What the section of base_eval says, which may be of several models, of this run as it stands (without one: of the last)."""
    step = max(record["step"] for record in run.records) if run else 0
    models = re.split(r"^- model: ", section, flags=re.MULTILINE)
    return extract(next((text for text in models if text.startswith(f"{run.tag} (step {step})\n")), "") if run else section, "CORE")


def _summary(header: str, sections: dict[str, str], run: TrainingRun | None) -> str:
    """Code size, metrics by stage and the time from `reset` to the last section before RL."""
    columns = {
        "BASE": _core(sections.get("base-model-evaluation.md", ""), run),
        "SFT": extract(sections.get("chat-evaluation-sft.md", ""), chat_metrics),
        "RL": extract(sections.get("chat-evaluation-rl.md", ""), "GSM8K"),
    }
    if run and run.finished and (core := run.latest("core_metric", "core")) is not None:
        columns["BASE"].setdefault("CORE", decimals(core))
    metrics = sorted({metric for column in columns.values() for metric in column},
                     key=lambda metric: (metric != "CORE", metric == "ChatCORE", metric))
    lines = [f"| {'Metric':<15} | " + " | ".join(f"{stage:<8}" for stage in columns) + " |", f"|{'-' * 17}|" + f"{'-' * 10}|" * len(columns)]
    lines += [f"| {metric:<15} | " + " | ".join(f"{column.get(metric, '-'):<8}" for column in columns.values()) + " |" for metric in metrics]

    started = extract_timestamp(header, "Run started:")
    ends = [end for name, text in sections.items() if "rl" not in name.removesuffix(".md").split("-") and (end := extract_timestamp(text, "timestamp:"))]
    wall_clock = "unknown"
    if started and ends and max(ends) >= started:
        minutes = int((max(ends) - started).total_seconds() // 60)
        wall_clock = f"{minutes // 60}h{minutes % 60}m"
    size = bullets(extract(header, ["Characters", "Lines", "Files", "Tokens (approx)", "Dependencies"]))
    return "\n".join(["## Summary\n", size, *(lines + [""] if metrics else []), f"Total wall clock time: {wall_clock}\n"])


# -----------------------------------------------------------------------------


@dataclass
class Settings:
    command: str = flag("generate", "What to do: write the report, restart it, or compare runs", choices=("generate", "reset", "compare"), positional=True, nargs="?")
    tags: list[str] | None = flag(None, "Runs to compare, by the names of their checkpoint folders", positional=True, nargs="*")
    model_tag: str | None = flag(None, "Pretraining run to show (default: the newest)")


@command
def main(argv: Sequence[str] | None = None) -> int:
    settings = parse_settings(Settings, argv, "Write or restart the report of a training pipeline")
    report = get_report()
    if settings.tags and settings.command != "compare":
        raise UsageError(f"{settings.command} takes no runs; python -m nanochat.report compare {' '.join(settings.tags)}")
    if settings.command == "compare":
        if len(settings.tags or ()) < 2:
            raise UsageError("it takes two runs to compare; give their names, such as d6 d12")
        print0(f"Comparison: {report.compare(settings.tags or ())}, copied with compare.html to the current folder")
    elif settings.command == "reset":
        report.reset()
        print0(f"Report restarted in {get_base_dir()}/report")
    else:
        print0(f"Report: {report.generate(settings.model_tag)}, copied with report.html to the current folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
