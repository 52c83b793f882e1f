"""What a runner says while it works: a line for every run that ended; below them, on a terminal, the runs that go on, and when all will be done."""
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from analysis.claims import holder
from analysis.runner import Runner, Running
from analysis.trial import Trial, folder_of, last_record, read, status_of
from nanochat.cli import UsageError
from nanochat.files import parse_json
from nanochat.run_log import FILENAME

PLAIN_SECONDS = 30  # between two lines about what goes on, where nobody looks at a terminal


def share_done(log: Path, last: dict | None) -> float:
    """Of a run that goes on: from its FLOPs, those that its first record promises and, if it is a branch, those that it began with."""
    if not last or "flops" not in last:
        return 0.0
    try:
        with open(log, "rb") as f:
            start, first = parse_json(f.readline()), parse_json(f.readline())
        begin = first.get("flops", 0) if start["step"] else 0
        return min(1.0, (last["flops"] - begin) / (start["conditions"]["flops"] - begin))
    except (OSError, ValueError, KeyError, ZeroDivisionError):  # it is about to be replaced, or is of an earlier version
        return 0.0


def why(base_dir: str, trial: Trial, status: int) -> str:
    """How a run failed, and its last words."""
    folder = folder_of(base_dir, trial)
    try:
        words = (folder / "out.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        words = []
    last = next((line.strip() for line in reversed(words) if line.strip()), "")
    return (f"signal {-status}" if status < 0 else f"exit status {status}") + (f", {last}" if last else "") + f" (see {folder / 'out.txt'})"


class Display:
    """noun: what the runs are called. Writes to stderr, so that a study's table alone is its output."""

    def __init__(self, noun: str, label: Callable[[Trial], str] = lambda trial: trial.name):
        self.noun, self.label = noun, label
        self.started = self.said = time.monotonic()
        self.known: dict[str, str] = {}  # by name the state that was told
        self.drawn = 0  # lines that will be drawn over
        self.begun: dict[tuple[str, float], float] = {}  # by name and start the share that was done when a run was first seen to go on: of one that is resumed not 0

    def show(self, runner: Runner) -> None:
        lasting = []
        for trial in runner.work.trials:
            state = runner.state(trial)
            if state != self.known.get(trial.name, "waiting"):
                self.known[trial.name] = state
                if line := self._change(runner, trial, state):
                    lasting.append(line)
        live = [self._summary(runner), *(self._going(runner, running) for running in runner.running.values())]
        if sys.stderr.isatty():
            self._draw(lasting, live if runner.running else [])
            return
        now = time.monotonic()
        if lasting or now - self.said > PLAIN_SECONDS:
            self.said = now
            print(*lasting, *(live if not lasting else live[:1]), sep="\n", file=sys.stderr, flush=True)

    def _draw(self, lasting: list[str], live: list[str]) -> None:
        size = shutil.get_terminal_size()
        live = [line[:size.columns - 1] for line in live[:size.lines - 2]]
        back = f"\033[{self.drawn}A" if self.drawn else ""
        print(back + "\033[J" + "\n".join([*lasting, *live]), file=sys.stderr, flush=True, end="\n" if lasting or live else "")
        self.drawn = len(live)

    def _change(self, runner: Runner, trial: Trial, state: str) -> str:
        if state == "failed" and trial.parent is not None and (status_of(runner.base_dir, trial) or 0) == 0:
            return f"{self.label(trial)}: not begun, as {self.label(trial.parent)} failed"
        if state == "failed":
            return f"{self.label(trial)}: failed, {why(runner.base_dir, trial, status_of(runner.base_dir, trial) or 0)}"
        if state == "elsewhere" and (who := holder(folder_of(runner.base_dir, trial))):
            return f"{self.label(trial)}: with {who}"
        if state == "done" and trial.name in runner.tried:
            try:
                result = read(runner.base_dir, trial)
            except UsageError as error:
                return f"{self.label(trial)}: done, but {error}"
            return f"{self.label(trial)}: done" + (f", {result.final:.4f} bits per byte" if result and result.bpb else "")
        return ""

    def _summary(self, runner: Runner) -> str:
        states = [runner.state(trial) for trial in runner.work.trials]
        counts = ", ".join(f"{count} {state}" for state in ("done", "running", "elsewhere", "failed") if (count := states.count(state)))
        eta = self.eta(runner)
        return f"{runner.work.total} {self.noun}: {counts or 'none yet'} | {(time.monotonic() - self.started) / 60:.1f} min" + (f", eta {eta / 60:.1f} min" if eta else "")

    def _going(self, runner: Runner, running: Running) -> str:
        last = last_record(folder_of(runner.base_dir, running.trial) / FILENAME)
        share, spent, whole = self._pace(runner, running)
        loss = f" | loss {last['loss']:.4f}" if last and last.get("loss") is not None else ""
        return f"  {self.label(running.trial)} | {share:.0%}{loss} | {spent / 60:.1f} min" + (f", eta {whole * (1 - share) / 60:.1f} min" if whole else "")

    def _pace(self, runner: Runner, running: Running) -> tuple[float, float, float]:
        """(share that is done, seconds since it was started here, seconds that the whole run takes or 0 while nothing is known)."""
        log = folder_of(runner.base_dir, running.trial) / FILENAME
        share, spent = share_done(log, last_record(log)), time.monotonic() - running.started
        run = running.trial.name, running.started
        self.begun[run] = min(self.begun.get(run, share), share)  # it falls where the log of another time is replaced
        here = share - self.begun[run]
        return share, spent, spent / here if here else 0.0

    def eta(self, runner: Runner) -> float:
        """Seconds until all is done, 0 while nothing is known: what waits, or has only begun, takes as long as the mean of those before, and as those that go on will."""
        paces = [self._pace(runner, running) for running in runner.running.values()]
        takes = [*runner.seconds, *(whole for *_, whole in paces if whole)]
        if not takes:
            return 0.0
        mean = sum(takes) / len(takes)
        left = [(whole or mean) * (1 - share) for share, _, whole in paces]
        waiting = runner.work.total - sum(runner.state(trial) != "waiting" for trial in runner.work.trials)
        return max([(sum(left) + waiting * mean) / runner.places, *left])
