"""Pretraining as its users meet it: it learns, repeats itself and refuses bad input in one line."""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import evaluations, loss_eval, train_loop
from nanochat.cli import UsageError
from nanochat.run_log import read_run_log
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import base_train
from tests import tiny
from tests.golden.fixtures import HERE


@pytest.fixture(autouse=True)
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


@pytest.fixture
def trained(finished_run, base):
    """A base directory with the checkpoints of steps 4 and 8."""
    shutil.copytree(tiny.folder(finished_run), tiny.folder(base))
    return base


def train_losses(base, tag: str = "d3") -> list[float]:
    return [record["raw_loss"] for record in read_run_log(tiny.folder(base, tag) / "log.jsonl") if record["kind"] == "train"]


def status_of(*flags: str):
    try:
        return tiny.train(*flags)
    except SystemExit as error:  # argparse
        return error.code


def assert_refused(capsys, message: str, *flags: str) -> None:
    capsys.readouterr()
    assert status_of(*flags) == 2
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert "error: " in last and message in last, last


# -----------------------------------------------------------------------------
# A good run


def test_the_loss_falls(base):
    assert tiny.train("--num-iterations=30", "--eval-every=-1", "--save-every=-1", "--matrix-lr=0.2", "--embedding-lr=3") == 0
    losses = train_losses(base)
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert checkpoints.list_steps(tiny.folder(base)) == [30]  # only at the end


def test_a_run_repeats_itself(base, finished_run):
    assert tiny.train() == 0
    assert tiny.losses(base) == tiny.losses(finished_run)
    again, first = (torch.load(tiny.folder(directory) / "model_000008.pt", weights_only=True) for directory in (base, finished_run))
    assert tiny.identical(again, first)


def test_the_log_is_complete(base, capsys):
    assert tiny.train("--num-iterations=12", "--eval-every=5") == 0
    start, *records, end = read_run_log(tiny.folder(base) / "log.jsonl")
    assert start["kind"] == "start" and start["num_iterations"] == 12 and start["total_batch_size"] == 256 and start["config"]["depth"] == 3
    assert start["model_config"]["n_layer"] == 3 and start["counts"]["total"] == 454_760
    trained = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in trained] == list(range(12))
    assert [record["tokens"] for record in trained] == [256 * (step + 1) for step in range(12)]
    assert trained[-1]["flops"] == start["flops_per_token"] * start["total_tokens"] == end["total_flops"]
    assert [record["step"] for record in records if record["kind"] == "eval"] == [0, 5, 10, 12]
    assert end["kind"] == "end" and end["min_val_bpb"] == min(record["val_bpb"] for record in records if record["kind"] == "eval")
    out = capsys.readouterr().out
    assert "step 00011/00012 (91.67%) | loss: " in out and "Step 00010 | Validation bpb: " in out and "Minimum validation bpb: " in out
    assert "eta: " in out.splitlines()[-5]
    assert "Base model training" in (base / "report" / "base-model-training.md").read_text()


@pytest.mark.slow
def test_an_evaluation_does_not_touch_the_training(base):
    shutil.copytree(HERE / "core_bundle", base / "eval_bundle")
    assert tiny.train("--model-tag=plain", "--eval-every=-1") == 0
    assert tiny.train("--model-tag=busy", "--sample-every=3", "--core-metric-every=4", "--core-metric-max-per-task=6") == 0
    assert train_losses(base, "plain") == train_losses(base, "busy")
    kinds = [(record["kind"], record["step"]) for record in read_run_log(tiny.folder(base, "busy") / "log.jsonl")]
    assert [step for kind, step in kinds if kind == "sample"] == [3, 6, 8] and [step for kind, step in kinds if kind == "core"] == [4, 8]
    assert json.loads((tiny.folder(base, "plain") / "meta_000008.json").read_text())["val_bpb"] is None


def test_without_the_core_data_training_goes_on(base, monkeypatch, capsys):
    def offline():
        raise UsageError("cannot download")

    monkeypatch.setattr(evaluations, "find_eval_bundle", offline)
    assert tiny.train("--core-metric-every=4", "--num-iterations=2") == 0
    assert "No CORE metric in this run: cannot download" in capsys.readouterr().out


def test_bad_core_data_is_found_before_the_training(base, capsys):
    shutil.copytree(HERE / "core_bundle", base / "eval_bundle")
    assert_refused(capsys, "at least 3 rows", "--core-metric-every=4", "--core-metric-max-per-task=2")
    assert not (tiny.folder(base) / "log.jsonl").exists()


@pytest.mark.parametrize("flag, steps", [("--target-flops=5e9", 8), ("--target-param-data-ratio=0.005", 7)])
def test_horizons(base, flag, steps):
    assert tiny.train("--num-iterations=-1", flag, "--eval-every=-1") == 0
    assert len(train_losses(base)) == steps


def test_the_share_of_the_data_that_is_used(base, capsys):
    """Documents of 20 rows each: of each document one row is trained on."""
    for path in (base / "base_data_climbmix").glob("*.parquet"):
        pq.write_table(pa.table({"text": ["abcdefgh " * 400] * 40}), path, row_group_size=10)
    assert tiny.train("--num-iterations=12", "--eval-every=-1") == 0
    share = float(re.search(r"Data: (\d+)% of the tokens of the documents read so far .* Raise --max-seq-len", capsys.readouterr().out)[1])
    tokens = len(get_tokenizer().encode("abcdefgh " * 400))
    assert share == pytest.approx(100 * 65 / tokens, abs=1)
    assert "tokens used: " in (base / "report" / "base-model-training.md").read_text()


# -----------------------------------------------------------------------------
# Nothing is lost


@pytest.mark.slow
def test_every_validation_reads_the_same_batches_which_are_drawn_once(base, monkeypatch):
    begun, draw = [], base_train.batches_in_turn
    monkeypatch.setattr(base_train, "batches_in_turn", lambda *args: begun.append(args) or draw(*args))
    assert tiny.train("--save-every=-1") == 0
    assert len(begun) == 1
    monkeypatch.setattr(loss_eval, "MOST_KEPT", 0)
    assert tiny.train("--save-every=-1", "--model-tag=drawn") == 0
    assert len(begun) == 1 + 3
    assert tiny.losses(base) == tiny.losses(base, "drawn")


@pytest.mark.parametrize("what", ["evaluate_bpb", "evaluate_core", pytest.param("sample_prompts", marks=pytest.mark.slow)])
def test_the_weights_come_before_the_evaluations(base, monkeypatch, what):
    """Whatever an evaluation of the last model dies of, the model is there and a resumed run does what is missing."""
    shutil.copytree(HERE / "core_bundle", base / "eval_bundle")
    flags = ("--save-every=-1", "--sample-every=8", "--core-metric-every=8", "--core-metric-max-per-task=3", "--eval-every=8")
    module = train_loop if what == "evaluate_bpb" else evaluations
    function, calls = getattr(module, what), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > (what == "evaluate_bpb"):  # the first validation is that of step 0
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, what, interrupted)
        assert tiny.train(*flags) == 130
    folder = tiny.folder(base)
    assert checkpoints.find_checkpoint(folder.parent) == (folder, 8)
    meta = checkpoints.load_meta(folder, 8)
    assert (meta["val_bpb"] is None) == (what == "evaluate_bpb")
    assert tiny.train(*flags, "--resume") == 0
    meta = checkpoints.load_meta(folder, 8)
    assert meta["val_bpb"] == meta["loop_state"]["min_val_bpb"] == next(r["val_bpb"] for r in read_run_log(folder / "log.jsonl") if r["kind"] == "eval" and r["step"] == 8)
    assert {record["kind"] for record in read_run_log(folder / "log.jsonl") if record["step"] == 8} == {"start", "eval", "core", "evals", "sample", "end"}


@pytest.mark.slow
def test_samples_on_a_narrow_terminal_and_a_closed_pipe(base):
    """The model writes any character, and nobody may be there to read it."""
    command = f'"{sys.executable}" -m scripts.base_train {" ".join(tiny.FLAGS)} --sample-every=4 --num-iterations=4 --eval-every=-1'
    for tag, how in (("narrow", " >/dev/null"), ("pipe", " | head -c 1"), ("closed", " <&- >&- 2>&-")):
        subprocess.run(["bash", "-c", f"{command} --model-tag={tag}{how}; exit ${{PIPESTATUS[0]}}"], cwd=tiny.ROOT, check=True, timeout=300,
                       env={**os.environ, **tiny.ENV, "NANOCHAT_BASE_DIR": str(base), "PYTHONIOENCODING": "ascii"})
        assert checkpoints.list_steps(tiny.folder(base, tag)) == [4]


def test_one_run_at_a_time_in_a_folder(trained, capsys):
    """The second must not touch what the first one writes."""
    before = {path.name: path.stat().st_mtime_ns for path in tiny.folder(trained).iterdir()}
    script = f"import sys; from nanochat.files import locked\nwith locked({str(tiny.folder(trained))!r}): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], cwd=tiny.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert_refused(capsys, "another process is writing to")
        assert {path.name: path.stat().st_mtime_ns for path in tiny.folder(trained).iterdir()} == before
        other.stdin.close()
    assert tiny.train("--resume") == 0


def test_a_report_that_cannot_be_written_is_found_before_the_training(base, capsys):
    shutil.rmtree(base / "report")  # of the tokenizer
    (base / "report").write_text("a file")
    assert_refused(capsys, f"cannot write to {base}/report")
    assert not (tiny.folder(base) / "log.jsonl").exists()


# -----------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("flags, message", [
    (["--depth=0"], "--depth"),
    (["--depth=three"], "--depth"),
    (["--head-dim=0"], "--head-dim"),
    (["--head-dim=33"], "--head-dim=33"),
    (["--aspect-ratio=1", "--head-dim=2"], "--aspect-ratio"),
    (["--max-seq-len=1", "--device-batch-size=1"], "--max-seq-len"),
    (["--window-pattern=X"], "--window-pattern"),
    (["--window-pattern="], "--window-pattern"),
    (["--device-batch-size=3"], "use --device-batch-size=2"),
    (["--device-batch-size=0"], "--device-batch-size"),
    (["--device-batch-size=-2"], "--device-batch-size"),
    (["--total-batch-size=100"], "multiple of 64"),
    (["--total-batch-size=100", "--device-batch-size=-1"], "no multiple of 64"),
    (["--device-type=tpu"], "'tpu'"),
    pytest.param(["--device-type=cuda"], "no cuda device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")),
    (["--num-iterations=-1", "--target-param-data-ratio=-1"], "no horizon"),
    (["--num-iterations=-1", "--target-flops=1"], "less than one step"),
    (["--num-iterations=many"], "--num-iterations"), (["--num-iterations=0"], "--num-iterations"),
    (["--seed=18446744073709551616"], "--seed"), (["--seed=-1"], "--seed"), (["--num-iterations=99999999999999999999"], "--num-iterations"),
    (["--target-flops=nan"], "--target-flops"),
    (["--target-param-data-ratio=inf"], "--target-param-data-ratio"),
    (["--eval-tokens=100"], "use at least 128"),
    (["--eval-tokens=0"], "--eval-tokens"),
    (["--matrix-lr=-0.1"], "--matrix-lr"),
    (["--warmup-steps=-1"], "--warmup-steps"),
    (["--warmdown-ratio=1.5"], "--warmdown-ratio"),
    (["--weight-decay=nan"], "--weight-decay"),
    (["--save-every=0"], "--save-every"),
    (["--data-streams=0"], "--data-streams"),
    (["--data-streams=3"], "--total-batch-size"),
    (["--fp8-recipe=magic"], "--fp8-recipe"),
    (["--resume-from-step=7"], "no checkpoint of step 7"),
    (["--resume-from-step=-7"], "--resume-from-step"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--dept=3"], "--dept"),
    (["stray"], "stray"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_flag(capsys, flags, message):
    assert_refused(capsys, message, *flags)


def test_no_data(base, capsys):
    shutil.rmtree(base / "base_data_climbmix")
    assert_refused(capsys, "nanochat.dataset")


def test_no_tokenizer(base, capsys):
    shutil.rmtree(base / "tokenizer")
    assert_refused(capsys, "tok_train")


def test_output_is_a_file(base, capsys):
    (base / "base_checkpoints").write_text("")
    assert_refused(capsys, "NANOCHAT_BASE_DIR")


def test_base_directory_is_a_file(base, monkeypatch, capsys):
    (base / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "file"))
    assert_refused(capsys, "NANOCHAT_BASE_DIR")


def test_the_disk_fills_up(trained, capsys):
    """The earlier checkpoint stays whole and the message names the file."""
    folder = tiny.folder(trained)
    for path in folder.glob("*_000008*"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in folder.glob("*_000004*")}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, hard))
    try:
        assert_refused(capsys, "optim_000008_rank0.pt", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert before == {path.name: path.read_bytes() for path in folder.glob("*_000004*")}
    assert checkpoints.list_steps(folder) == [4] and not list(folder.glob(".*"))
    assert tiny.train("--resume") == 0


def test_a_full_disk_is_found_before_the_training(base, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    assert_refused(capsys, "has 0 MiB free")
    assert not (tiny.folder(base) / "log.jsonl").exists()


def test_a_checkpoint_that_does_not_fit(trained, capsys):
    assert_refused(capsys, "another shape than these flags ask for: n_layer 3 -> 4", "--depth=4", "--model-tag=d3", "--resume")
    assert_refused(capsys, "window_pattern SL -> L", "--window-pattern=L", "--resume")
    assert_refused(capsys, "beyond the horizon of 6 steps", "--num-iterations=6", "--resume")
    assert_refused(capsys, "there is step 4, 8", "--resume-from-step=5")
    assert_refused(capsys, "--data-streams", "--data-streams=2", "--device-batch-size=1", "--resume")


def test_a_tokenizer_trained_anew(trained, capsys):
    RustBPETokenizer.train_from_iterator([chr(i) * 9 for i in range(500)], 320).save(trained / "tokenizer")
    assert_refused(capsys, "bring its tokenizer back", "--resume")


@pytest.mark.parametrize("name", ["model_000008.pt", "optim_000008_rank0.pt", "state_000008_rank0.pt", "meta_000008.json"])
def test_a_corrupt_checkpoint(trained, capsys, name):
    """A file cut short, or with a byte flipped in the middle of its tensors."""
    path = tiny.folder(trained) / name
    data = path.read_bytes()
    middle = len(data) // 2
    for damaged in [data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]][:2 if name.endswith(".pt") else 1]:
        path.write_bytes(damaged)
        assert_refused(capsys, name, "--resume")
    assert tiny.train("--resume-from-step=4", "--num-iterations=5", "--eval-every=-1") == 0


def test_a_meta_file_of_another_stage(trained, capsys):
    path = tiny.folder(trained) / "meta_000008.json"
    meta = json.loads(path.read_text())
    del meta["loop_state"]
    path.write_text(json.dumps(meta))
    assert_refused(capsys, "loop_state", "--resume")


def test_divergence(base, capsys):
    assert_refused(capsys, "training diverged", "--embedding-lr=1e30", "--unembedding-lr=1e30", "--warmup-steps=0", "--eval-every=-1")


def test_divergence_by_the_last_step(base, capsys, monkeypatch):
    """Its own loss was a number still; what comes of it is not taken for a result."""
    monkeypatch.setattr("nanochat.train_loop.evaluate_bpb", lambda *args: float("nan"))
    assert_refused(capsys, "the validation loss after step 0 is nan: training diverged")
