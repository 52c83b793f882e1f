"""Growing inside base_train: decisions, exact resumption, ranks, and flags that contradict each other."""
import contextlib
import io
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import report
from nanochat.fp8 import Float8Linear
from nanochat.growth.stages import shares_of_flops
from nanochat.run_log import read_run_log
from nanochat.run_report import TrainingRun, find_run_log
from scripts import base_train
from tests import tiny

# 2x64 to 3x96, so early that eight steps of the final model's budget see it
GROW = ["--grow-path=2x64,3x96", "--head-dim=32", "--eval-every=2", "--save-every=2", "--warmup-steps=0"]
AT = [*GROW, "--grow-at=0.4"]


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """(the base directory of a run that has grown, not to be written to; what the run has printed)."""
    directory, printed = tmp_path_factory.mktemp("grown"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        tiny.prepare(directory)
        assert tiny.train(*AT) == 0
    return directory, printed.getvalue()


def grows(base_dir, tag: str = "d3") -> list[dict]:
    return [record for record in read_run_log(tiny.folder(base_dir, tag) / "log.jsonl") if record["kind"] == "grow"]


def last_step(base_dir, tag: str = "d3") -> int:
    return checkpoints.list_steps(tiny.folder(base_dir, tag))[-1]


def test_a_growth_at_a_share_of_the_budget_changes_no_loss(grown, monkeypatch):
    base, _ = grown
    (grow,) = grows(base)
    assert grow["share"] == pytest.approx(0.4, abs=0.1) and grow["share"] >= 0.4
    assert grow["loss_after"] == pytest.approx(grow["loss_before"], abs=1e-5)
    meta = checkpoints.load_meta(tiny.folder(base), last_step(base))
    assert meta["growth"] == [{**meta["growth"][0], "from": "2x64", "to": "3x96", "step": grow["step"]}]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    model, _, _ = checkpoints.load_model("base", torch.device("cpu"), phase="eval")
    assert (model.config.n_layer, model.config.n_embd) == (3, 96)


def test_the_budget_is_that_of_the_final_model_alone(grown, finished_run):
    """The run ends with the step that spends it, and takes more steps, since those of the small model are cheaper."""
    scratch, ours = ([record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "end"][0] for base in (finished_run, grown[0]))
    start = next(record for record in read_run_log(tiny.folder(finished_run) / "log.jsonl") if record["kind"] == "start")
    per_step = start["flops_per_token"] * start["total_batch_size"]
    assert scratch["total_flops"] <= ours["total_flops"] < scratch["total_flops"] + per_step
    assert ours["step"] > scratch["step"]


@pytest.mark.parametrize("flags", [
    AT, *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
        [*AT, "--grow-path=3x64,3x96"], [*GROW, "--kappa=0.9", "--kappa-final-loss=2"], [*AT, "--grow-mode=random", "--grow-optimizer=reset", "--grow-rewarm=3"],
        [*AT, "--grow-path=2x64,3x64", "--grow-freeze"], [*AT, "--block=ngpt", "--grow-path=2x64x8,3x96x12"]))], ids=lambda f: " ".join(f[5:]))
def test_resumed_anywhere_it_ends_with_the_same_bits(base, flags):
    """Before the growth, at its step, and after it."""
    assert tiny.train(*flags, "--model-tag=whole") == 0
    steps = checkpoints.list_steps(tiny.folder(base, "whole"))
    (grow,) = grows(base, "whole")
    assert steps[0] < grow["step"] < steps[-1] or steps[0] == grow["step"]
    expected = tiny.losses(base, "whole")
    weights = torch.load(tiny.folder(base, "whole") / f"model_{steps[-1]:06d}.pt", weights_only=True)
    at = max(i for i, step in enumerate(steps) if step <= grow["step"])  # the last checkpoint of the small model
    for step in {steps[0], steps[at], steps[min(at + 1, len(steps) - 2)]}:
        shutil.rmtree(tiny.folder(base, "part"), ignore_errors=True)
        shutil.copytree(tiny.folder(base, "whole"), tiny.folder(base, "part"))
        for later in steps[steps.index(step) + 1:]:
            for path in tiny.folder(base, "part").glob(f"*_{later:06d}*"):
                path.unlink()
        assert tiny.train(*flags, "--model-tag=part", "--resume") == 0
        assert tiny.losses(base, "part") == expected
        assert tiny.identical(torch.load(tiny.folder(base, "part") / f"model_{steps[-1]:06d}.pt", weights_only=True), weights)


@pytest.mark.slow
def test_nothing_is_lost_when_the_larger_model_does_not_fit(base, monkeypatch, capsys):
    """The state is saved before each growth, whatever --save-every says; a resumed run grows at the same place and ends with the same bits."""
    flags = [*AT, "--save-every=-1"]
    assert tiny.train(*flags, "--model-tag=whole") == 0
    (grow,) = grows(base, "whole")
    assert checkpoints.list_steps(tiny.folder(base, "whole"))[0] == grow["step"]

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.growth.controller.grow", full)
        assert tiny.train(*flags, "--model-tag=part") == 2
    assert "out of memory" in capsys.readouterr().err
    assert checkpoints.list_steps(tiny.folder(base, "part")) == [grow["step"]]
    assert checkpoints.load_meta(tiny.folder(base, "part"), grow["step"])["model_config"]["n_embd"] == 64
    assert tiny.train(*flags, "--model-tag=part", "--resume") == 0
    assert tiny.losses(base, "part") == tiny.losses(base, "whole")


def scaled_mm(a, b, scale_a, scale_b, out_dtype=None, use_fast_accum=False):
    """The same products; PyTorch's own take seconds each on some CPUs."""
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


@pytest.mark.slow
def test_fp8_grows(base, capsys):
    """What grows are the plain layers; both models train in FP8, and on a CPU it is said that this is a simulation."""
    converted = []

    class Watched(base_train.Pretraining):
        def use_model(self, model, optimizer):
            super().use_model(model, optimizer)
            converted.append([name for name, layer in model.named_modules() if isinstance(layer, Float8Linear)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_train, "Pretraining", Watched)
        patch.setattr(torch, "_scaled_mm", scaled_mm)
        assert tiny.train(*AT, "--grow-path=1x128,3x256", "--fp8") == 0
    small, large = converted
    assert "transformer.h.0.mlp.c_fc" in small and "transformer.h.1.attn.c_q" in large
    (grow,) = grows(base)
    assert grow["loss_after"] == pytest.approx(grow["loss_before"], abs=1e-5)
    assert "FP8 on a CPU is a simulation" in capsys.readouterr().out


def test_a_growing_run_does_not_claim_a_number_of_steps(grown):
    """It ends with its FLOPs; a report in the middle must not say step 12 of 8."""
    base, _ = grown
    start = next(record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "start")
    assert start["num_iterations"] is None and last_step(base) > 8


@pytest.mark.slow
def test_never_validating_is_obeyed(base, monkeypatch, capsys, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))

    def refuse(*args):
        raise AssertionError("a validation")

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.train_loop.evaluate_bpb", refuse)
        assert tiny.train(*AT, "--eval-every=-1") == 0
    (grow,) = grows(base)
    assert grow["loss_before"] is grow["loss_after"] is None and "bpb unknown -> unknown" in capsys.readouterr().out
    expected = tiny.losses(base)
    steps = checkpoints.list_steps(tiny.folder(base))
    for step in steps[1:]:
        for path in tiny.folder(base).glob(f"*_{step:06d}*"):
            path.unlink()
    assert tiny.train(*AT, "--eval-every=-1", "--resume") == 0 and tiny.losses(base) == expected
    assert report.main([]) == 0


def test_kappa_grows_when_the_target_is_reached(base, capsys):
    """With a prediction just below the loss that is there, the first steps are enough."""
    assert tiny.train(*GROW, "--kappa=0.999", "--kappa-final-loss=0.1", "--save-every=-1") == 0
    (soon,) = grows(base)
    assert soon["share"] < 0.4 and soon["reason"].startswith("kappa") and soon["loss_before"] <= soon["target"] and soon["left"] <= 0.999
    assert soon["predicted"] == pytest.approx(0.1, abs=1e-3) and soon["predicted_error"] < 0.01 and soon["predicted_by"] == "--kappa-final-loss"
    assert "Stage 0: 2x64 begins at" in capsys.readouterr().out


@pytest.mark.slow
def test_the_cap_decides_where_the_target_is_far_off(base):
    assert tiny.train(*GROW, "--kappa=0.01", "--kappa-final-loss=0.1") == 0
    (cap,) = grows(base)
    assert cap["share"] >= 0.5 and "before the loss" in cap["reason"] and cap["loss_before"] > cap["target"]


def test_kappa_validates_briefly_without_any_other_validation(base, monkeypatch):
    """At the start of a stage, when a growth is due, and after it: few tokens, whatever --eval-tokens says."""
    tokens = []

    def count(model, batches, steps, token_bytes):
        tokens.append(steps)
        return 3.0 - 0.01 * len(tokens)

    monkeypatch.setattr("nanochat.train_loop.evaluate_bpb", count)
    assert tiny.train(*GROW, "--kappa=0.999", "--kappa-final-loss=0.1", "--eval-every=-1", "--eval-tokens=41943040") == 0
    assert len(grows(base)) == 1 and set(tokens) == {1} and 3 <= len(tokens) <= 6


def test_the_line_of_a_step_tells_the_flops_that_are_spent(grown):
    base, printed = grown
    shown = [float(share) for share in re.findall(r"step \d+ \((\d+\.\d+)%\)", printed)]
    train = [record for record in read_run_log(tiny.folder(base) / "log.jsonl") if record["kind"] == "train"]
    assert shown == [pytest.approx(100 * min(1.0, record["flops"] / budget_of(base)), abs=0.01) for record in train]
    assert shown == sorted(shown) and shown[-1] == 100


@pytest.mark.slow
def test_the_time_left_does_not_climb_at_a_growth(base, monkeypatch, capsys):
    """Steps that take equally long, whatever the model: the FLOPs of the larger one pass faster."""
    clock = itertools.count(step=36)
    monkeypatch.setattr("nanochat.train_loop.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tiny.train(*AT, "--num-iterations=24", "--eval-every=-1", "--save-every=-1") == 0
    left = [float(minutes) for minutes in re.findall(r"eta: (\d+\.\d)m", capsys.readouterr().out)]
    assert left == sorted(left, reverse=True) and left[0] > 5 and left[-1] < 0.7


def budget_of(base_dir, tag: str = "d3") -> float:
    return next(record for record in read_run_log(tiny.folder(base_dir, tag) / "log.jsonl") if record["kind"] == "start")["conditions"]["flops"]


def test_layer_by_layer_freezes_what_was_there(base):
    assert tiny.train(*AT, "--grow-path=2x64,3x64", "--grow-freeze", "--grow-depth-mode=append") == 0
    folder, step, at = tiny.folder(base), last_step(base), grows(base)[0]["step"]
    frozen = checkpoints.load_meta(folder, step)["frozen"]
    assert "transformer.h.0.attn.c_q.weight" in frozen and "transformer.h.2.attn.c_q.weight" not in frozen
    before, after = (torch.load(folder / f"model_{s:06d}.pt", weights_only=True) for s in (at, step))  # a growth saves first
    assert torch.equal(before["transformer.h.0.attn.c_q.weight"], after["transformer.h.0.attn.c_q.weight"])
    optimizer = torch.load(folder / f"optim_{step:06d}_rank0.pt", weights_only=True)
    kept = sum(len(group["params"]) for group in optimizer["param_groups"])
    assert kept == len(after) - len(frozen)


def test_the_plan_trains_nothing(base, capsys):
    assert tiny.train("--grow-from=1", "--grow-stages=2", "--kappa=0.2", "--grow-plan") == 0
    out = capsys.readouterr().out
    assert "1x32" in out and "2x64" in out and "3x96" in out and "Budget" in out
    assert not (base / "base_checkpoints").exists()


@pytest.mark.parametrize("flags, reason", [
    (["--kappa=0.2"], "not into what"), (["--grow-from=1"], "nothing says when"), (["--grow-from=3", "--kappa=0.2"], "less than --depth"),
    (["--grow-from=1", "--grow-path=1x32,2x64", "--kappa=0.2"], "one of them"), (["--grow-from=1", "--kappa=0.2", "--grow-at=0.5"], "one of them"),
    (["--grow-path=2x64,1x96", "--kappa=0.2"], "only grows"), (["--grow-path=2x64,3x80", "--kappa=0.2"], "not made of heads"),
    (["--grow-path=2x64", "--kappa=0.2"], "one shape"), (["--grow-path=2by64", "--kappa=0.2"], "not a shape"),
    (["--grow-from=1", "--grow-at=0.5,0.2"], "must rise"), (["--grow-from=1", "--grow-at=0.2,0.5"], "2 moments for 1"),
    (["--grow-from=1", "--grow-stages=3", "--kappa=0.2"], "do not fit"),
    (["--grow-from=1", "--grow-at=0.5", "--grow-budget=1e-12"], "less than one step"),
    (["--grow-from=1", "--grow-at=0.5", "--grow-theta=50"], "0 to 45 degrees"), (["--grow-path=2x64,3x96", "--grow-at=0.5", "--grow-mode=hyperclone"], "whole multiples"),
    (["--grow-from=1", "--grow-at=0.5", "--grow-mode=bus", "--grow-noise=1"], "has no parameters"),
    (["--grow-from=1", "--grow-at=0.5", "--grow-budget=1e308"], "more than there can be"),
    *(([flag], "add --grow-from or --grow-path") for flag in ("--grow-budget=0.5", "--grow-freeze", "--grow-mode=bus", "--grow-open=5", "--grow-stages=3", "--kappa=0.2")),
])
def test_contradictions(base, capsys, flags, reason):
    assert tiny.train(*flags) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(base.glob("base_checkpoints/*/model_*.pt"))


@pytest.mark.parametrize("flags, message", [
    (["--grow-path=2x64,4x96"], "grow_path 2x64,3x96 -> 2x64,4x96"), (["--grow-at=0.6"], "grow_at 0.4 -> 0.6"), (["--num-iterations=9"], "num_iterations 8 -> 9"),
    (["--final-lr-frac=0.5"], "final_lr_frac 0.05 -> 0.5"),
])
def test_another_plan_does_not_continue_a_growing_run(grown, base_dir, capsys, flags, message):
    """Its trigger is the checkpoint's, whatever the new plan says."""
    shutil.copytree(grown[0], base_dir, dirs_exist_ok=True)
    assert tiny.train(*AT, *flags, "--model-tag=d3", "--resume") == 2
    assert message in capsys.readouterr().err


def test_what_grows_otherwise_than_its_flags_say_is_told(base_dir, capsys):
    tiny.prepare(base_dir)
    assert tiny.train("--grow-path=2x64,3x128", "--head-dim=32", "--grow-at=0.5", "--n-head=2", "--grow-plan") == 0
    assert "one of these flags that does not grow" in capsys.readouterr().out
    assert tiny.train(*AT, "--grow-plan") == 0
    assert "one of these flags that does not grow" not in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_grow_to_what_one_has(base):
    for ranks in (0, 2):
        result = tiny.run(base, *AT, "--data-streams=2", f"--model-tag=ranks{ranks}", ranks=ranks)
        assert result.returncode == 0, result.stderr
    one, two = (tiny.losses(base, f"ranks{ranks}") for ranks in (0, 2))
    assert [record[:2] for record in one] == [record[:2] for record in two]
    bpb = [(a[4], b[4]) for a, b in zip(one, two) if a[0] == "eval"]
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in bpb)
    assert json.dumps(grows(base, "ranks0")[0]["counts"]) == json.dumps(grows(base, "ranks2")[0]["counts"])


@pytest.mark.slow
def test_a_family_from_one_trunk(base_dir, capsys):
    """Each size is finished by a branch; the trunk is at a constant rate, and only what is missing is trained by a resume."""
    tiny.prepare(base_dir)
    flags = ("--grow-path=2x64,2x96,3x96", "--grow-at-tokens=0.4,0.7", "--grow-family", "--warmdown-ratio=0.25", "--warmup-steps=0", "--num-iterations=40", "--model-tag=family")
    assert tiny.train(*flags) == 0
    out = capsys.readouterr().out
    tags = ["family-2x64", "family-2x96", "family-3x96"]
    runs = {tag: read_run_log(tiny.folder(base_dir, tag) / "log.jsonl") for tag in ["family", *tags]}
    assert {record["lrm"] for record in runs["family"] if record["kind"] == "train"} == {1.0}
    for tag in tags:
        assert [record["lrm"] for record in runs[tag] if record["kind"] == "train"][-1] < 0.7
        assert tag in out and next(record for record in runs[tag] if record["kind"] == "end")
    budget = runs["family"][0]["flops_per_token"]  # of the first model
    assert budget and runs["family-3x96"][-1]["total_flops"] > runs["family"][-1]["total_flops"] > runs["family-2x64"][-1]["total_flops"]
    shutil.rmtree(tiny.folder(base_dir, "family-2x96"))
    before = (tiny.folder(base_dir, "family-2x64") / "log.jsonl").read_bytes()
    assert tiny.train(*flags, "--resume") == 0
    assert "family-2x64 is finished" in capsys.readouterr().out
    assert (tiny.folder(base_dir, "family-2x64") / "log.jsonl").read_bytes() == before
    assert read_run_log(tiny.folder(base_dir, "family-2x96") / "log.jsonl")[-1]["min_val_bpb"] == runs["family-2x96"][-1]["min_val_bpb"]
    report = TrainingRun(find_run_log(base_dir))
    assert report.tag == "family" and all(tag in report.markdown("") for tag in tags) and report.picture()


@pytest.mark.parametrize("flags, message", [
    (["--grow-family"], "add --grow-from or --grow-path"),
    (["--grow-path=2x64,3x64", "--grow-at=0.5", "--grow-family", "--warmdown-ratio=0"], "--warmdown-ratio"),
    (["--grow-path=2x64,3x64", "--grow-at=0.5", "--grow-at-tokens=0.5"], "give one of them"),
    (["--grow-path=2x64,3x64", "--grow-at-tokens=0.5,0.7"], "2 moments for 1 growths"),
])
def test_flags_of_families_that_contradict_each_other(base_dir, capsys, flags, message):
    tiny.prepare(base_dir)
    assert tiny.train(*flags) == 2
    assert message in capsys.readouterr().err


def test_shares_of_tokens_as_shares_of_flops():
    assert shares_of_flops([0.8], [3, 10]) == pytest.approx([2.4 / 4.4])
    assert shares_of_flops([0.2, 0.5], [1, 1, 1]) == pytest.approx([0.2, 0.5])
