"""Tokenizer training, pretraining, resuming and evaluation end to end against nanochat's losses, checkpoints and tables."""
import json
import shutil

import pytest
import torch

from nanochat.optim import MuonAdamW
from nanochat.run_log import read_run_log
from scripts import base_eval, base_train
from tests import tiny
from tests.golden.fixtures import HERE, load

GOLDEN = load("scripts_trace")
TRAIN = GOLDEN["base_train"]
LOSS = 1e-4
FIRST_GRADIENT = 4.05e-10


def pretrain(directory, patch) -> None:
    """The pretraining run of the fixture, from the same rounding noise.

    All layers start as 0, so all that the residual scalars and backout_lambda do before the first step is scale the stream, which the last
    norm cancels. Their gradients are exactly 0 but for rounding, and Adam (epsilon 1e-10) makes up to a whole step of that: backout_lambda
    is 0.59 to 0.73 after 4 steps, by the CPU, and all of fine-tuning follows it. So here the noise is given: 0 for the residual scalars,
    and for backout_lambda what leads to its value in nanochat's checkpoint of step 4 (found by bisection).

    Then losses are within 9e-6 of nanochat's in pretraining and 2.3e-3 in fine-tuning (whose x0_lambdas begin 0.007 off in sum, nanochat's
    own noise), and MKL_CBWR=COMPATIBLE, MKL_CBWR=AVX2, MKL_ENABLE_INSTRUCTIONS=SSE4_2, ATEN_CPU_CAPABILITY=avx2 and default,
    ONEDNN_MAX_CPU_ISA=AVX2, 2 and 4 threads move them by 1e-6. The tolerances follow from these two numbers.
    """
    step = MuonAdamW.step

    def first_step(self, *args):
        if not self.state:
            resid, x0, (_, _, backout) = (group["params"] for group in self.param_groups[3:6])
            for p, gradient in ((*resid, 0.0), (*x0, 0.0), (backout, FIRST_GRADIENT)):
                assert p.grad.abs().max() < 1e-8
                p.grad.fill_(gradient)
        return step(self, *args)

    patch.setattr(MuonAdamW, "step", first_step)
    patch.setenv("NANOCHAT_BASE_DIR", str(directory))
    tiny.prepare(directory, as_they_are=True)
    assert base_train.main(TRAIN["flags"]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory after the pretraining run of the fixture."""
    directory = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        pretrain(directory, patch)
    return directory


@pytest.fixture
def copy(base, base_dir):
    shutil.copytree(base, base_dir, dirs_exist_ok=True)
    return base_dir


def printed(text: str) -> list:
    """[step, loss, multiplier, epoch, file, row group] of the lines that base_train prints."""
    rows = []
    for line in text.splitlines():
        if line.startswith("step "):
            parts = line.split(" | ")
            epoch, _, pq, _, rg = parts[6].removeprefix("epoch: ").split()
            rows.append([int(line[5:10]), float(parts[1].split()[1]), float(parts[2].split()[1]), int(epoch), int(pq), int(rg)])
    return rows


def check_rows(rows: list, expected: list) -> None:
    assert [[row[0], *row[2:]] for row in rows] == [[row[0], *row[2:]] for row in expected]
    assert [row[1] for row in rows] == pytest.approx([row[1] for row in expected], abs=LOSS)


def check_weights(folder, step: int, expected: dict) -> None:
    weights = torch.load(folder / f"model_{step:06d}.pt", weights_only=True)
    assert set(weights) == set(expected)
    for key, (norm, total) in expected.items():
        value = weights[key].double()
        assert value.norm().item() == pytest.approx(norm, rel=1e-3, abs=0.01), key
        assert value.sum().item() == pytest.approx(total, abs=2e-3 * norm + 0.01), key


def check_optimizer(folder, step: int, expected: dict) -> None:
    optimizer = torch.load(folder / f"optim_{step:06d}_rank0.pt", weights_only=True)
    layout = {str(index): {key: list(value.shape) if torch.is_tensor(value) else value for key, value in state.items()}
              for index, state in optimizer["state"].items()}
    assert layout == expected["state"]
    for group, want in zip(optimizer["param_groups"], expected["groups"], strict=True):
        assert group["kind"] == want["kind"] and group["params"] == want["params"]
        for key in want.keys() - {"kind", "params"}:
            assert group[key] == pytest.approx(want[key], rel=1e-12), key


def check_meta(got, want, path: str = "meta") -> None:
    """Every one of nanochat's keys with its value; more keys are fine."""
    if isinstance(want, dict):
        for key, value in want.items():
            assert key in got, f"{path}.{key}"
            if key != "total_training_time":
                check_meta(got[key], value, f"{path}.{key}")
    else:
        assert got == (pytest.approx(want, abs=LOSS) if isinstance(want, float) else want), path


def test_pretraining(base):
    folder = tiny.folder(base)
    log = read_run_log(folder / "log.jsonl")
    rows = [[r["step"], r["loss"], round(r["lrm"], 2), r["epoch"]] for r in log if r["kind"] == "train"]
    check_rows(rows, [row[:4] for row in TRAIN["train"]])
    evaluations = [[r["step"], r["val_bpb"]] for r in log if r["kind"] == "eval"]
    assert evaluations == [[step, pytest.approx(bpb, abs=LOSS)] for step, bpb in TRAIN["val_bpb"]]
    assert log[-1]["min_val_bpb"] == pytest.approx(TRAIN["minimum_val_bpb"], abs=LOSS)
    assert set(TRAIN["last_checkpoint"]["files"]) <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("step, which", [(4, "mid_checkpoint"), (8, "last_checkpoint")])
def test_checkpoint(base, step, which):
    folder, expected = tiny.folder(base), TRAIN[which]
    check_weights(folder, step, expected["norm_and_sum"])
    check_meta(json.loads((folder / f"meta_{step:06d}.json").read_text()), expected["meta"])
    check_optimizer(folder, step, expected["optimizer"])


def test_resuming_nanochats_checkpoint(copy, capsys):
    """Without the files that only we write, the run goes on at the approximate place where nanochat's does."""
    folder = tiny.folder(copy)
    for path in folder.glob("state_*.pt"):
        path.unlink()
    capsys.readouterr()
    assert base_train.main([*TRAIN["flags"], f"--resume-from-step={TRAIN['resumed']['from_step']}"]) == 0
    check_rows(printed(capsys.readouterr().out), TRAIN["resumed"]["train"])
    log = read_run_log(folder / "log.jsonl")
    assert [[r["step"], r["val_bpb"]] for r in log if r["kind"] == "eval"][-2:] == [
        [step, pytest.approx(bpb, abs=LOSS)] for step, bpb in TRAIN["resumed"]["val_bpb"]]
    check_weights(folder, 8, TRAIN["resumed"]["norm_and_sum"])


def test_bits_per_byte_of_both_splits(copy, capsys):
    assert base_eval.main([*GOLDEN["base_eval"]["flags"], "--device-type=cpu"]) == 0
    out = capsys.readouterr().out
    for split in ("train", "val"):
        value = next(float(line.split(": ")[1]) for line in out.splitlines() if line.startswith(f"{split} bpb: "))
        assert value == pytest.approx(GOLDEN["base_eval"][f"{split}_bpb"], abs=LOSS)


def test_core_table(copy):
    shutil.copytree(HERE / "core_bundle", copy / "eval_bundle")
    expected = GOLDEN["base_eval_core"]
    assert base_eval.main(["--eval=core", f"--max-per-task={expected['max_per_task']}", "--model-tag=d3", "--device-type=cpu"]) == 0
    lines = (copy / "base_eval" / expected["file"]).read_text().splitlines()
    assert lines[:-1] == expected["lines"][:-1]
    (ours, theirs) = (line.rsplit(", ", 1) for line in (lines[-1], expected["lines"][-1]))
    assert ours[0] == theirs[0] and len(ours[1]) == len(theirs[1])
    assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=1.1e-6)  # nanochat's accuracies are float32
