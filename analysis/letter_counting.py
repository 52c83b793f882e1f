"""Does a model that grew count letters better than one that was large from the beginning? The study of the BUS draft, and a language model as its twin.

    python -m nanochat.dataset --source=text8          or any other source: the text is put into text8's alphabet
    python -m analysis.letter_counting --out=letters.json --plot=dev/letter_counting.png
    python -m analysis.letter_counting --task=language

The tasks and the trainings are those of letters.py. The draft trains a transformer of one layer, one head and width n for 50 epochs from scratch ("plain"), or
one of width n/2 for 20 epochs and, grown to n, for 30 more, and says that the grown one is more accurate and varies less over seeds. Here the same is done with

* the draft's expansions: `bus` (rows and columns tiled and scaled; at a doubling it is HyperCloning too) and `identity` (the matrix added to an identity);
* ours: `lossless`;
* controls: `plain-2-heads`, since growth makes two heads of n/2 of the one, and heads help to count; `plain-identity` (two heads) and `plain-identity-1-head`,
  whose matrices begin as identities, for what the identity does by itself.

Growth at other moments is tried with `lossless` at the first of the widths, at the rate that is best for growth after 0.4 of the epochs: others may be better at their own.

What the draft does not say is chosen. An epoch is --strings strings, drawn anew each time (a fixed set of so few would be learned by heart, which is another
question), the same ones in all arms of a seed; batches of 16, hence 8 steps an epoch. AdamW at a constant rate, without weight decay for matrices, its
moments carried over at the growth; an MLP of twice the width. The rate is tuned for each task, width and arm (one before and after the growth) on five other seeds and
other strings, among --rates and beyond them where the best is at an end (rates.py). Scores are those of 500 strings that nothing else saw. Intervals are of 95 %, by bootstrap
over the seeds; they know nothing of what five seeds may have chosen amiss.

Each finished training is a file below NANOCHAT_BASE_DIR/letter_counting: interrupt it, start it again, or start it several times to share the work.
"""
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from analysis.claims import BEAT, take
from analysis.estimates import verdict
from analysis.letters import ARMS, BETTER, TASKS, Outcome, Run, Text, finish, use
from analysis.rates import best_rate, try_rates
from analysis.runner import LOOK
from analysis.study import study_parser
from nanochat.cli import UsageError, command, positive_float, positive_int, positive_ints
from nanochat.common import COMPUTE_DTYPE, get_base_dir, with_progress
from nanochat.drawing import pictures
from nanochat.files import to_json, write_text_atomic

TOGETHER = 5  # seeds
TUNING_SEEDS = tuple(range(1000, 1000 + TOGETHER))
FIRST_SEED = 42
BEFORE = 0.4  # the draft's: 20 of 50 epochs
DRAFT = {64: (81.4, 86.8), 128: (88.0, 93.6), 256: (91.2, 96.8), 512: (92.3, 97.7), 1024: (93.7, 99.1)}  # its accuracies in percent: plain, grown
DRAFTS = ("plain", "bus", "identity")  # which of the arms are its own


# -----------------------------------------------------------------------------
# Running


def path_of(run: Run) -> Path:
    """Of its outcome, on machines that compute in this dtype."""
    identity = json.dumps([dataclasses.astuple(run), str(COMPUTE_DTYPE)])
    return Path(get_base_dir(), "letter_counting", hashlib.sha256(identity.encode()).hexdigest()[:16] + ".json")


def read(run: Run) -> Outcome:
    fields = json.loads(path_of(run).read_text(encoding="utf-8"))
    return Outcome(**{**fields, "run": Run(**fields["run"])})


def begin_process(text: Text) -> None:
    import torch
    torch.set_num_threads(1)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: multiprocessing.connection.wait([parent.sentinel]) and os._exit(1), daemon=True).start()  # whatever it dies of
    use(text)


@contextlib.contextmanager
def processes(jobs: int, text: Text) -> Iterator[Callable]:
    """Yields a `map` over so many, which end at once where this one is interrupted."""
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin_process, (text,))
    try:
        yield pool.map
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def finish_and_keep(runs: Sequence[Run]) -> None:
    """Those of a piece that are not there yet, unless another process is at it."""
    claim = take(path_of(piece_of(runs[0])).with_suffix(".claims"))
    if claim is None:
        return
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT) and claim.beat():
            pass

    beats = threading.Thread(target=beat, daemon=True)
    beats.start()
    try:
        if left := [run for run in runs if not path_of(run).exists()]:
            for outcome in finish(left):
                write_text_atomic(path_of(outcome.run), json.dumps(dataclasses.asdict(outcome)))
    finally:
        ended.set()
        beats.join()
        claim.release()


def piece_of(run: Run) -> Run:
    """The first run of its piece: TOGETHER seeds in a row, whichever of them are asked for."""
    first = TUNING_SEEDS[0] if run.seed in TUNING_SEEDS else FIRST_SEED
    return dataclasses.replace(run, seed=run.seed - (run.seed - first) % TOGETHER)


def side_by_side(runs: Iterable[Run]) -> list[list[Run]]:
    """Pieces of runs that differ in their seeds alone. The first seeds of all come first: whenever it is interrupted, whole seeds are done."""
    pieces: dict[Run, list[Run]] = {}
    for run in dict.fromkeys(runs):
        pieces.setdefault(piece_of(run), []).append(run)
    return [pieces[first] for first in sorted(pieces, key=lambda first: first.seed)]


def outcomes(runs: Sequence[Run], text: Text, jobs: int, label: str) -> list[Outcome]:
    """In the order of the runs; those that are not on disk are trained, `jobs` at a time, by this process or others that want them too. Says on stderr how far it is."""
    missing = side_by_side(run for run in runs if not path_of(run).exists())
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        each: Callable = map
        if missing and jobs > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
            each = stack.enter_context(processes(jobs, text))
        else:
            begin_process(text)
        try:
            for _ in with_progress(each(finish_and_keep, missing), len(missing), label):
                pass
            while left := [piece for piece in missing if not all(path_of(run).exists() for run in piece)]:
                time.sleep(LOOK)  # until those that other processes have are done, or abandoned
                for _ in each(finish_and_keep, left):
                    pass
        except BrokenProcessPool:
            raise UsageError("a process that trained was killed, perhaps for want of memory; take fewer --jobs, and the same command goes on") from None
    return [read(run) for run in runs]


# -----------------------------------------------------------------------------
# Statistics


def interval(statistic: Callable[..., np.ndarray], *samples: Sequence[float]) -> tuple[float, float, float]:
    """(of all, low, high): a statistic of paired samples, which takes arrays whose last dimension is the pairs, and its 95 % interval by a bootstrap over them."""
    values = np.array(samples, dtype=float)
    chosen = np.random.default_rng(0).integers(values.shape[1], size=(10_000, values.shape[1]))
    low, high = np.percentile(statistic(*values[:, chosen]), [2.5, 97.5])
    return float(statistic(*values)), float(low), float(high)


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(-1)


def gain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y - x).mean(-1)


def variance_ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """That of x by that of y. What differs by rounding alone, or in a resample of one seed, counts as equal."""
    return (x.var(-1) + 1e-12) / (y.var(-1) + 1e-12)


# -----------------------------------------------------------------------------
# The study


class Study:
    """runs, rates and outcomes of one task, by width and arm. `scores` are in percent or bits per character."""

    def __init__(self, task: str, widths: list[int], arms: list[str], seeds: int, strings: int, epochs: int, rates: list[float], moments: list[float],
                 jobs: int, text: Text):
        self.task, self.widths, self.arms, self.epochs, self.text, self.jobs = task, widths, arms, epochs, text, jobs
        self.unit = 100 if task == "counting" else 1
        before = round(BEFORE * epochs)
        run = lambda arm, width, rate, seed, before=before: Run(task, text.name, arm, width, rate, seed, strings, epochs, before)

        def losses(asked: list[tuple[tuple[int, str], float]]) -> list[float]:
            tuning = [[run(arm, width, rate, seed) for seed in TUNING_SEEDS] for (width, arm), rate in asked]
            tried = iter(outcomes([run for runs in tuning for run in runs], text, jobs, "Rates"))
            return [-BETTER[task] * statistics.mean(next(tried).validation for _ in runs) for runs in tuning]

        self.rates = {key: best_rate(found) for key, found in try_rates([(width, arm) for width in widths for arm in arms], rates, losses).items()}

        self.moments = sorted({round(share * epochs) for share in moments}) if "lossless" in arms else []
        self.found: dict[tuple[str, int, int], list[Outcome]] = {}  # by arm, width and epochs before the growth: of each seed

        def train(label: str, wanted: Iterable[tuple[str, int, int]]) -> None:
            plan = {(arm, width, moment): [run(arm, width, self.rates[width, arm], seed, moment) for seed in range(FIRST_SEED, FIRST_SEED + seeds)]
                    for arm, width, moment in wanted}
            found = iter(outcomes([run for runs in plan.values() for run in runs], text, jobs, label))
            self.found |= {key: [next(found) for _ in runs] for key, runs in plan.items()}

        train("Trainings", [(arm, width, before) for width in widths for arm in arms])
        train("Moments", [("lossless", widths[0], moment) for moment in self.moments])
        self.before = before

    def of(self, arm: str, width: int, before: int | None = None) -> list[Outcome]:
        """Of each seed."""
        return self.found[arm, width, self.before if before is None else before]

    def scores(self, arm: str, width: int, before: int | None = None) -> list[float]:
        return [outcome.test * self.unit for outcome in self.of(arm, width, before)]

    def flops(self, arm: str, width: int) -> float:
        """Those of the plain model of one head are 1."""
        return self.of(arm, width)[0].flops / self.of("plain", width)[0].flops

    def table(self) -> str:
        """Every arm: what it comes to and what it costs."""
        measure = "accuracy, %" if self.task == "counting" else "bits per character"
        rows = [f"| width | arm | rate | FLOPs | {measure} | 95 % interval | standard deviation | at the growth | the draft |",
                "|---:|---|---:|---:|---:|---|---:|---|---:|"]
        for width in self.widths:
            for arm in self.arms:
                middle, low, high = interval(mean, self.scores(arm, width))
                steps = [(o.begin * self.unit, o.grown * self.unit) for o in self.of(arm, width) if o.begin is not None and o.grown is not None]
                jump = "{:.3f} → {:.3f}".format(*map(statistics.mean, zip(*steps))) if steps else ""
                draft = f"{DRAFT[width][bool(ARMS[arm].mode)]}" if self.task == "counting" and width in DRAFT and arm in DRAFTS else ""
                rows.append(f"| {width} | {arm} | {self.rates[width, arm]:g} | {self.flops(arm, width):.2f} | {middle:.3f} | {low:.3f} to {high:.3f} | "
                            f"{statistics.stdev(self.scores(arm, width)):.3f} | {jump} | {draft} |")
        return "\n".join(rows)

    def comparisons(self) -> list[dict]:
        """Each claim with its effect, interval and verdict: better than another arm, and varying less."""
        found = []
        for width in self.widths:
            for arm in self.arms:
                for other in ("plain", "plain-2-heads"):
                    if other not in self.arms or arm in ("plain", other):
                        continue
                    pair = self.scores(other, width), self.scores(arm, width)
                    sign = BETTER[self.task]
                    better = interval(lambda x, y: sign * gain(x, y), *pair)
                    steadier = interval(variance_ratio, *pair)
                    found.append(dict(width=width, arm=arm, other=other, gain=better, better=verdict(*better[1:]),
                                      variance_ratio=steadier, steadier=verdict(*steadier[1:], 1.0)))
        return found

    def claims(self) -> str:
        rows = ["| width | claim | by how much | 95 % interval | verdict | variance, the other's by its own | 95 % interval | it varies less |",
                "|---:|---|---:|---|---|---:|---|---|"]
        for c in self.comparisons():
            (gain, worst, best), (ratio, low, high) = c["gain"], c["variance_ratio"]
            rows.append(f"| {c['width']} | {c['arm']} is better than {c['other']} | {gain:+.3f} | {worst:+.3f} to {best:+.3f} | {c['better']} | "
                        f"{ratio:.2f} | {low:.2f} to {high:.2f} | {c['steadier']} |")
        return "\n".join(rows)

    def best_moment(self) -> str:
        """Growth after how many epochs, at the first width."""
        width = self.widths[0]
        scores = {moment: self.scores("lossless", width, moment) for moment in self.moments}
        rows = [f"| width {width} grown (lossless) after so many of {self.epochs} epochs | score | 95 % interval | FLOPs |", "|---:|---:|---|---:|"]
        for moment in self.moments:
            middle, low, high = interval(mean, scores[moment])
            share = self.of("lossless", width, moment)[0].flops / self.of("plain", width)[0].flops
            rows.append(f"| {moment if moment < self.epochs else 'never'} | {middle:.3f} | {low:.3f} to {high:.3f} | {share:.2f} |")
        sign = BETTER[self.task]
        best = max(self.moments, key=lambda moment: sign * statistics.mean(scores[moment]))
        equal = [str(moment) for moment in self.moments if moment != best and interval(lambda x, y: sign * gain(x, y), scores[moment], scores[best])[1] <= 0]
        return "\n".join(rows) + f"\n\nThe best moment is after {best} epochs" + (f"; not told from it: after {', '.join(equal)}" if equal else "")


def draw(study: Study, path: Path) -> None:
    """Left: scores by width. Right: by the moment of growth. Mean of the seeds with its interval."""
    def points(axes, x: Sequence[float], samples: list[list[float]], **looks) -> None:
        middle, low, high = np.array([interval(mean, sample) for sample in samples]).T
        axes.errorbar(x, middle, [middle - low, high - middle], capsize=3, **looks)

    measure, first = "accuracy, %" if study.task == "counting" else "bits per character", study.widths[0]
    with pictures(path, 12, 4.8, 2) as (left, right):
        for i, arm in enumerate(study.arms):
            looks = dict(color=f"C{i}", label=arm) | (dict(marker="o") if ARMS[arm].mode else dict(marker="s", linestyle=":"))
            beside = [width * 1.02 ** (i - len(study.arms) / 2) for width in study.widths]
            points(left, beside, [study.scores(arm, width) for width in study.widths], **looks)
            if not ARMS[arm].mode:
                right.axhline(statistics.mean(study.scores(arm, first)), color=f"C{i}", linestyle=":", label=arm)
            if arm == "lossless":
                points(right, study.moments, [study.scores(arm, first, moment) for moment in study.moments], **looks)
        if study.task == "counting":
            known = [width for width in study.widths if width in DRAFT]
            for which, name in enumerate(("plain", "grown")):
                left.plot(known, [DRAFT[width][which] for width in known], "x", color=("grey", "black")[which], label=f"the draft: {name}")
        left.set_xscale("log", base=2)
        left.set_xticks(study.widths, list(map(str, study.widths)))
        left.minorticks_off()
        left.set_xlabel("width")
        right.set_xlabel(f"epochs before the growth from {first // 2} to {first}, of {study.epochs}")
        for axes in (left, right):
            axes.set_ylabel(measure)
        left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # for both


def positive_floats(text: str) -> list[float]:
    """Several `positive_float`, joined by commas."""
    return [positive_float(part) for part in text.split(",")]


@command
def main(argv=None) -> None:
    parser = study_parser(__doc__, seeds=25)
    parser.add_argument("--task", choices=TASKS, default="counting")
    parser.add_argument("--widths", type=positive_ints, default=[64, 128, 256], help="joined by commas")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="plain is always among them")
    parser.add_argument("--strings", type=positive_int, default=128, help="in an epoch")
    parser.add_argument("--epochs", type=positive_int, default=50)
    parser.add_argument("--rates", type=positive_floats, default=[0.005, 0.01, 0.02, 0.04], help="of which, and beyond, the best is taken for each width and arm")
    parser.add_argument("--moments", type=positive_floats, default=[0.1, 0.2, 0.4, 0.6, 0.8, 1.0],
                        help="shares of the epochs after which lossless growth is tried at the first width; 1: it never grows")
    args = parser.parse_args(argv)
    if bad := [width for width in args.widths if width % 4 or width < 48]:
        raise UsageError(f"--widths: {bad[0]} cannot be the double of a model's width here; use multiples of 4 from 48 on")
    if args.seeds < 2 or args.epochs < 5:
        raise UsageError("an interval takes two seeds or more, and the moments of growth five epochs or more: raise --seeds or --epochs")
    if max(args.moments) > 1:
        raise UsageError(f"--moments: there is no growth after {max(args.moments):g} of all epochs; use shares from 0 to 1")
    arms = [arm for arm in ARMS if arm in ("plain", *args.arms)]
    study = Study(args.task, sorted(set(args.widths)), arms, args.seeds, args.strings, args.epochs, sorted(args.rates), args.moments, args.jobs,
                  Text.of_base_dir())
    print(f"{args.seeds} seeds, {args.epochs} epochs of {args.strings} strings, growth after {study.before}, {COMPUTE_DTYPE}. FLOPs: those of plain are 1.")
    print(f"\n{study.table()}\n\n{study.claims()}")
    if study.moments:
        print(f"\n{study.best_moment()}")
    if args.out:
        found = [dataclasses.asdict(outcome) for seeds in study.found.values() for outcome in seeds]
        write_text_atomic(args.out, to_json(dict(comparisons=study.comparisons(), outcomes=found)))
    if args.plot:
        draw(study, args.plot)


if __name__ == "__main__":
    sys.exit(main())
