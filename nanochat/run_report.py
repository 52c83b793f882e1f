"""One pretraining run, finished or still going on, as Markdown and as pictures, drawn from its log alone."""
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat.cli import UsageError
from nanochat.drawing import COLORS, INK, as_png, new_figure
from nanochat.growth.kappa import earlier_runs
from nanochat.growth.stages import describe
from nanochat.layered_gpt import config_from
from nanochat.run_log import FILENAME, read_run_log

# USD per GPU and hour by a word in the device name, and for any other GPU
_HOURLY_RATES = {"H100": 3.00, "A100": 1.79, "V100": 0.55}
_OTHER_HOURLY_RATE = 2.00

_SILENT_AFTER = 3600  # seconds without a record after which a run counts as stopped; a CORE evaluation is silent for long


def hourly_rate(gpu_name: str) -> float:
    """USD per hour of one such GPU, at the usual price of a rented one."""
    return next((rate for word, rate in _HOURLY_RATES.items() if word in gpu_name), _OTHER_HOURLY_RATE)


def find_run_log(base_dir: str | Path, model_tag: str | None = None) -> Path | None:
    """The log of the run `model_tag`, else the one written to last (of a branch the trunk's), or None where nothing was trained yet."""
    logs = {path.parent.name: path for path in Path(base_dir, "base_checkpoints").glob(f"*/{FILENAME}")}
    if model_tag is None:
        path = max(logs.values(), key=lambda path: path.stat().st_mtime, default=None)
        seen: set[str] = set()  # a run that was trained anew may branch off its own branch
        while path is not None and (trunk := TrainingRun(path).branched_off()[0]) in logs.keys() - seen:
            path = logs[trunk]
            seen.add(trunk)
        return path
    if model_tag not in logs:
        raise UsageError(f"no run log for --model-tag={model_tag} in {base_dir}; there are: {', '.join(sorted(logs)) or 'none'}")
    return logs[model_tag]


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def count(value: float) -> str:
    """Whole up to a billion (1,234,567), then 1.23e+15."""
    return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def decimals(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def table(header: list[str], rows: list[list], align: str = "---:") -> str:
    """A Markdown table; `align` is that of all columns but the first."""
    def line(cells: list) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(header), line(["---"] + [align] * (len(header) - 1)), *map(line, rows)]) + "\n"


def bullets(items: dict) -> str:
    return "".join(f"- {key}: {value}\n" for key, value in items.items())


def verbatim(text: str) -> str:
    """`text` as a code block that no backticks in it can end, its control characters as their symbols (a young model writes any byte)."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}\n"


def _shape(config: dict | None) -> str:
    """Of a model_config, where there is one that this version reads."""
    try:
        return describe(config_from(config)) if config else ""
    except (TypeError, ValueError, AssertionError):
        return ""


def _asked_and_got(growth: dict) -> tuple[str, str]:
    """kappa, and the share of the gain that was left by the prediction of then, where a growth was decided so."""
    kappa = growth.get("kappa")
    return ("" if kappa is None else f"{kappa:g}", "" if growth.get("left") is None else f"{growth['left']:.2f}")


class TrainingRun:
    """What a run log says. Raises UsageError where the log is broken."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tag = self.path.parent.name
        self.records = read_run_log(path)
        self.silence = max(0.0, time.time() - Path(path).stat().st_mtime)
        last_start = max((i for i, record in enumerate(self.records) if record["kind"] == "start"), default=0)
        self.finished = any(record["kind"] == "end" for record in self.records[last_start:])

    def of(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    def first(self, kind: str) -> dict:
        return next((record for record in self.records if record["kind"] == kind), {})

    def last(self, kind: str) -> dict:
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})

    def latest(self, field: str, *kinds: str):
        """The newest value of a field among records of these kinds, or None."""
        return next((record[field] for record in reversed(self.records) if record["kind"] in kinds and record.get(field) is not None), None)

    def status(self) -> str:
        step = max((record["step"] + (record["kind"] == "train") for record in self.records), default=0)  # steps done
        total = self.latest("num_iterations", "start", "grow")
        if self.finished:
            return f"finished after {step:,} steps"
        of_total = f"step {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else "")
        if self.silence > _SILENT_AFTER:
            return f"stopped: {of_total}; the last record is {duration(self.silence)} old"
        recent = [record["dt"] for record in self.of("train")[-50:] if record.get("dt")]
        eta = f", ETA {duration(np.median(recent) * max(0, total - step))}" if recent and total else ""
        return f"running: {of_total}{eta}; the last record is {duration(self.silence)} old"

    def _device(self) -> str:
        """By its name, where the log tells it, and not as cuda:0."""
        start = self.last("start")
        return str(start.get("device_name") or start.get("device") or "cpu")

    def cost(self) -> str:
        device, gpus = self._device(), self.last("start").get("world_size", 1)
        if device.startswith(("cpu", "mps")):
            return "none (no rented GPU)"
        hours = (self.latest("time", "train") or 0) / 3600
        rate = hourly_rate(device)
        return f"${hours * gpus * rate:,.2f} ({hours * gpus:.2f} GPU-hours of training at ${rate:.2f})"

    def markdown(self, pictures: str) -> str:
        """The run's section; `pictures` is the Markdown that shows its curves."""
        parts = [f"## Pretraining run {self.tag}\n", table(["", ""], self._at_a_glance(), align="---"), pictures]
        if self.of("grow"):
            parts += ["### Growth\n", self.stages_table()]
        if self.branches():
            parts += ["### Branches\n", self.branches_table()]
        if counts := self.latest("counts", "start", "grow"):
            total = counts.get("total") or sum(counts.values())
            rows = [[f"`{name}`", f"{value:,}", f"{value / total:.1%}"] for name, value in counts.items()]
            parts += ["### Parameters\n", table(["Parameters", "Count", "Share"], rows)]
        if core := self.last("core"):
            centered = core.get("centered_results", {})
            rows = [[task, decimals(accuracy), decimals(centered.get(task))] for task, accuracy in core.get("results", {}).items()]
            parts += [f"### CORE at step {core['step']:,}\n",
                      table(["Task", "Accuracy", "Centered"], [*rows, ["**CORE**", "", f"**{decimals(core.get('core_metric'))}**"]])]
        if samples := self.last("sample"):
            parts += [f"### Samples at step {samples['step']:,}\n", *map(verbatim, samples.get("samples", []))]
        for title, key in (("Configuration", "config"), ("Model", "model_config")):
            if items := self.latest(key, "start", "grow"):
                parts += [f"### {title}\n", bullets(items)]
        return "\n".join(parts)

    def shape(self) -> str:
        """Of the model that it ended with, or that it trains now."""
        return _shape(self.latest("model_config", "start", "grow"))

    def stages_table(self) -> str:
        """A line for each size of a run that grew: what it cost, how far it came, and why it ended. A branch counts what its trunk spent as its own."""
        start, grows = self.first("start"), self.of("grow")  # a resumed run has another start, of the model that it has grown to
        budget = self.latest("flops", "train", "eval", "grow") or 0
        rows, before = [], {"tokens": 0, "flops": 0, "time": 0.0}
        for number in range(len(grows) + 1):
            opening = grows[number - 1] if number else start
            growth = grows[number] if number < len(grows) else None
            end = growth or {name: self.latest(name, "train", "eval", "grow") or 0 for name in before}
            counts, config = opening.get("counts") or {}, opening.get("model_config") or {}
            first = opening.get("loss_after") if number else next((record["val_bpb"] for record in self.of("eval") if record.get("val_bpb") is not None), None)
            last = growth.get("loss_before") if growth else self.latest("val_bpb", "eval")
            spent = {name: (end.get(name) or 0) - before[name] for name in before}
            rows.append([
                number, _shape(config), counts and count(counts.get("total", 0)), count(spent["tokens"]),
                f"{spent['flops']:.2e}" + (f" ({spent['flops'] / budget:.0%})" if budget else ""), duration(spent["time"]), decimals(first), decimals(last),
                *_asked_and_got(growth or {}), (growth or {}).get("reason", "the end")])
            before = {name: end.get(name) or 0 for name in before}
        return table(["Stage", "Shape", "Parameters", "Tokens", "FLOPs", "Time", "bpb at its start", "at its end", "kappa asked", "gain left", "Why it ended"], rows)

    def branches(self) -> list["TrainingRun"]:
        """The runs beside this one that branch off it, by the step they do it at."""
        found = []
        for path in self.path.parent.parent.glob(f"*/{FILENAME}"):
            with open(path, encoding="utf-8", errors="replace") as f:
                first = f.readline()  # the flags; there may be hundreds of runs, and most of them are others
            if f'"{self.tag}@' in first:
                try:
                    found.append(TrainingRun(path))
                except UsageError:
                    continue
        return sorted((run for run in found if run.branched_off()[0] == self.tag), key=lambda run: (run.branched_off()[1], run.tag))

    def branched_off(self) -> tuple[str, int]:
        """(tag, step) of the trunk; ("", 0) of a run that has none."""
        tag, _, step = str((self.last("start").get("config") or {}).get("branch_from") or "").rpartition("@")
        return (tag, int(step)) if tag and step.isdecimal() else ("", 0)

    def branches_table(self) -> str:
        """A line for each branch; its tokens, FLOPs and time hold those of the trunk up to where it begins."""
        rows = []
        for run in self.branches():
            counts = run.latest("counts", "start", "grow") or {}
            own = (run.latest("flops", "train", "eval") or 0) - (run.of("train")[0]["flops"] - self._flops_of_a_step(run) if run.of("train") else 0)
            rows.append([run.tag, run.shape(), count(counts.get("total", 0)), f"{run.branched_off()[1]:,}",
                         count(run.latest("tokens", "train", "eval") or 0), f"{run.latest('flops', 'train', 'eval') or 0:.2e}", f"{own:.1e}",
                         duration(run.latest("time", "train", "eval") or 0), decimals(run.latest("val_bpb", "eval"))])
        return table(["Branch", "Shape", "Parameters", "from step", "Tokens", "FLOPs", "of them its own", "Time", "Validation bpb"], rows)

    @staticmethod
    def _flops_of_a_step(run: "TrainingRun") -> float:
        start = run.last("start")
        return (run.latest("flops_per_token", "start", "grow") or 0) * (start.get("total_batch_size") or 0)

    def _at_a_glance(self) -> list[list[str]]:
        start, end, evals = self.last("start"), self.last("end"), [record for record in self.of("eval") if record.get("val_bpb")]
        counts = self.latest("counts", "start", "grow") or {}
        tokens, speed = self.latest("tokens", "train", "eval"), [record["tok_per_sec"] for record in self.of("train")[-100:] if record.get("tok_per_sec")]
        mfu = self.latest("mfu", "train")
        scaling_params = counts.get("transformer_matrices", 0) + counts.get("lm_head", 0)
        rows = {
            "Status": self.status(),
            "Validation bpb": evals and f"{evals[-1]['val_bpb']:.4f} at step {evals[-1]['step']:,}, lowest {min(record['val_bpb'] for record in evals):.4f}",
            "CORE metric": (core := self.last("core")) and f"{decimals(core.get('core_metric'))} at step {core['step']:,}",
            "Parameters": counts.get("total") and count(counts["total"]),
            "Training tokens": tokens and count(tokens) + (f" ({tokens / scaling_params:.2f} per scaling parameter)" if scaling_params else ""),
            "Training FLOPs": (flops := self.latest("flops", "train", "eval")) and f"{flops:.3e}",
            "FLOPs per token": (per_token := self.latest("flops_per_token", "start", "grow")) and count(per_token),
            "Tokens per step": start.get("total_batch_size") and count(start["total_batch_size"]),
            "Training time": (seconds := self.latest("time", "train", "eval")) and duration(seconds),
            "Speed": speed and f"{np.median(speed):,.0f} tokens/s" + (f", MFU {mfu:.1f} %" if mfu else ""),
            "Device": start.get("device") and f"{start.get('world_size', 1)} × {self._device()}, {str(start.get('dtype', '')).removeprefix('torch.')}",
            "Peak memory": end.get("peak_memory_mib") and f"{end['peak_memory_mib']:,.0f} MiB",
            "Cost estimate": start and self.cost(),
        }
        return [[name, value] for name, value in rows.items() if value]

    # -------------------------------------------------------------------------
    # Pictures

    @property
    def axes(self) -> tuple[str, str]:
        """What the curves are drawn over. A token costs each stage of a growing run something else: FLOPs are what counts there."""
        return ("flops" if self.of("grow") else "tokens", "time")

    def from_scratch(self) -> "TrainingRun | None":
        """Of a run that grew: the finished run beside it that trained the same final model from its start on the same text, of those the one with the nearest FLOPs."""
        try:
            config = config_from(self.of("grow")[-1]["model_config"])
        except (IndexError, KeyError, TypeError, ValueError, AssertionError):  # it did not grow, or its log is of another version
            return None
        runs = [run for path, _ in earlier_runs(self.path.parent.parent, config) if (run := TrainingRun(path))._task() == self._task()]
        spent = lambda run: run.latest("flops", "train", "eval", "grow") or 0
        return min(runs, key=lambda run: abs(spent(run) - spent(self)), default=None) if all(self._task()) else None

    def _task(self) -> list:
        """What must be equal for losses to be comparable, None where the log does not tell."""
        return [(self.first("start").get("conditions") or {}).get(name) for name in ("data", "tokenizer", "objective")]

    def _curve(self, kind: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(record[x], record[y]) for record in self.of(kind) if record.get(x) is not None and record.get(y) is not None]
        xs, ys = np.array(points, dtype=float).reshape(-1, 2).T
        return xs, ys

    def picture(self, axes: tuple[str, ...] | None = None) -> bytes:
        """PNG of train loss above validation bpb, one column per x axis: `tokens` (FLOPs on top), `flops` or `time`; default `self.axes`.

        Growths are marked, and the validation of the same model trained from scratch is drawn beside if there is one. The background is transparent and the lines are mid-tones, for light and dark pages.
        """
        axes = axes or self.axes
        scratch, branches = self.from_scratch(), self.branches()
        beside = [*branches, *filter(None, [scratch])]
        figure = new_figure(5 * len(axes), 5)
        from matplotlib.ticker import EngFormatter, MaxNLocator
        panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
        for column, x in enumerate(axes):
            loss_panel, bpb_panel = panels[:, column]
            scale, unit = 1.0, ""
            if x == "time":
                seconds = self.latest("time", "train", "eval") or 0
                scale, unit = next(((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= 2 * size), (1, "s"))
            for y, points, style in (("raw_loss", 1500, {"alpha": 0.25, "linewidth": 0.6}), ("loss", 200, {"linewidth": 1.8})):
                xs, ys = self._curve("train", x, y)
                starts = np.arange(0, len(xs), 1 + len(xs) // points)  # a point of the drawing is the mean of the steps it stands for
                size = np.diff(np.r_[starts, len(xs)])
                if len(xs):
                    loss_panel.plot(np.add.reduceat(xs, starts) / size / scale, np.add.reduceat(ys, starts) / size, color=COLORS[0], **style)
            xs, ys = self._curve("eval", x, "val_bpb")
            bpb_panel.plot(xs / scale, ys, color=COLORS[1], linewidth=1.8, marker="o", markersize=3, label=self.tag)
            for i, branch in enumerate(branches):
                xs, ys = branch._curve("eval", x, "val_bpb")
                bpb_panel.plot(xs / scale, ys, color=f"C{2 + i % 6}", linewidth=1.4, marker="o", markersize=2, label=branch.tag)
            if scratch:
                xs, ys = scratch._curve("eval", x, "val_bpb")
                bpb_panel.plot(xs / scale, ys, color=INK, linewidth=1.4, marker="o", markersize=2, label=f"{scratch.tag}, from scratch")
            if beside:
                bpb_panel.legend(frameon=False, labelcolor=INK, fontsize=8)
            for record in self.of("grow"):
                before = [r[x] for r in self.records if r["step"] <= record["step"] and r["kind"] in ("train", "eval") and r.get(x) is not None]
                at = record.get(x, before[-1] if before else 0) / scale
                for panel in (loss_panel, bpb_panel):
                    panel.axvline(at, color=INK, linestyle="--", linewidth=1)
                bpb_panel.annotate(str(record.get("label", "growth")), (at, 0.97), xycoords=("data", "axes fraction"), xytext=(3, 0),
                                   textcoords="offset points", rotation=90, va="top", fontsize=8, color=INK)
            bpb_panel.set_xlabel({"time": f"training time ({unit})", "flops": "training FLOPs"}.get(x, "training tokens"), color=INK)
            if x == "tokens":
                bpb_panel.xaxis.set_major_formatter(EngFormatter(sep=""))
                tokens, flops = self._curve("train", "tokens", "flops")
                if len(tokens) > 1:
                    right = max([tokens[-1], *(run._curve("eval", x, "val_bpb")[0].max(initial=0) for run in beside)])
                    bpb_panel.set_xlim(0, right)
                    beyond = 2 * right / tokens[-1]
                    t, f = np.r_[0, tokens, beyond * tokens[-1]], np.r_[0, flops, beyond * flops[-1]]  # from 0 to beyond the last tick
                    top = loss_panel.secondary_xaxis("top", functions=(lambda v, t=t, f=f: np.interp(v, t, f), lambda v, t=t, f=f: np.interp(v, f, t)))
                    top.xaxis.set_major_locator(MaxNLocator(4))
                    top.xaxis.set_major_formatter(lambda v, _: f"{v:.2g}".replace("e+", "e"))
                    top.set_xlabel(f"training FLOPs of {self.tag}" if beside else "training FLOPs", color=INK)
                    top.tick_params(colors=INK)
                    top.spines[:].set_visible(False)
        losses = lambda *runs: [run._curve("eval", "step", "val_bpb")[1] for run in runs]
        self._frame(panels[0, 0], [self._curve("train", "step", "loss")[1]])
        self._frame(panels[1, 0], losses(self, *filter(None, [scratch])), losses(*branches))
        panels[0, 0].set_ylabel("train loss (nats per token)", color=INK)
        panels[1, 0].set_ylabel("validation bits per byte", color=INK)
        return as_png(figure, panels.flat)

    @staticmethod
    def _frame(panel, fresh: list[np.ndarray], others: Sequence[np.ndarray] = ()) -> None:
        """Leaves the first steps of fresh models out of sight: they fall so far that the rest would look flat."""
        if len(fresh[0]) >= 10:
            low = np.concatenate([*fresh, *others]).min()
            high = np.concatenate([*(values[1 + len(values) // 50:] for values in fresh), *others]).max()
            margin = 0.1 * (high - low)
            panel.set_ylim(low - margin, high + margin)
