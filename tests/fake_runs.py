"""What stands in for base_train in the child processes of a runner (analysis/runner.py): takes no time, and ends as its seed says."""
import os
import signal
from pathlib import Path

from analysis import runner
from analysis.trial import Trial, folder_of
from nanochat.run_log import FILENAME, RunLog

RAISES, KILLED, REFUSED, FOR_EVER = 1, 2, 3, 4  # seeds; with any other a run ends well
ROUTINE = runner.train


def train(base_dir, folder, arguments, place) -> None:
    """In the place of runner.train."""
    from scripts import base_train
    base_train.main = main
    ROUTINE(base_dir, folder, arguments, place)


def times(base_dir, trial: Trial) -> int:
    """How often it was begun."""
    return (folder_of(str(base_dir), trial) / "out.txt").read_text(encoding="utf-8").count("begun")


def main(arguments: list[str]) -> int:
    flags = dict(word.removeprefix("--").split("=") for word in arguments if "=" in word)
    folder, seed = Path(os.environ["NANOCHAT_BASE_DIR"], "base_checkpoints", flags["model-tag"]), int(flags["seed"])
    print("begun \u4f60\ud800")
    log = RunLog(folder / FILENAME)
    log.log("start", 0, conditions={"flops": 100}, counts={"total": 7})
    log.log("eval", 0, val_bpb=3.0, tokens=0, flops=0, time=0.0)
    log.log("train", 0, loss=2.5, tokens=10, flops=25, time=1.0)
    if seed == RAISES:
        raise RuntimeError("what it died of")
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == REFUSED:
        print("error: the loss of step 1 is nan: training diverged")
        return 2
    if seed == FOR_EVER:
        signal.pause()
    log.log("eval", 1, val_bpb=float(flags.get("matrix-lr", 2)), tokens=20, flops=100, time=2.0)
    if flags.get("grow-path"):
        log.log("grow", 1, counts={"total": 9}, loss_before=3.0, loss_after=3.0, flops=50, time=1.0)
    if flags.get("eval-tasks"):
        log.log("evals", 1, rows={"core": {"value": 0.25, "label": "CORE"}})  # each kind has a record of its own
        log.log("evals", 1, rows={"blimp/pairs": {"value": 0.625, "n": 8, "label": "BLiMP pairs"}, "blimp/pairs/field/syntax": {"value": 0.5, "n": 4, "label": ""}})
    log.log("end", 1, peak_memory_mib=5.0)
    return 0
