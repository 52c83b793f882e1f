"""Runs that begin where another one stands: branches of a trunk, and runs with the weights of another."""
import dataclasses
import shutil

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.layered_gpt import build_gpt
from nanochat.run_log import read_run_log
from nanochat.run_plan import RunPlan
from nanochat.schedules import Schedule, ScheduleSettings
from nanochat.training import Process
from scripts import grow_checkpoint
from tests import tiny
from tests.growing import mixed

TRUNK = ("--warmdown-ratio=0", "--weight-decay=0", "--model-tag=trunk")


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A base directory with a trunk of eight steps; not to be written to."""
    directory = tmp_path_factory.mktemp("trunk")
    tiny.train_apart(directory, *TRUNK)
    return directory


@pytest.fixture
def with_trunk(trunk, base_dir):
    """A copy of it."""
    shutil.copytree(trunk, base_dir, dirs_exist_ok=True)
    return base_dir


@pytest.fixture
def finished(finished_run, base_dir):
    """A copy of the finished run d3."""
    shutil.copytree(finished_run, base_dir, dirs_exist_ok=True)
    return base_dir


def weights(base, tag: str, step: int) -> dict:
    return torch.load(tiny.folder(base, tag) / f"model_{step:06d}.pt", weights_only=True)


@pytest.mark.slow
def test_a_branch_is_the_run_that_decays_from_there_on(with_trunk):
    """Bit for bit, and so is one that was stopped in the middle and resumed."""
    base = with_trunk
    assert tiny.train("--warmdown-ratio=0.5", "--weight-decay=0", "--model-tag=straight") == 0
    flags = ("--branch-from=trunk@4", "--warmdown-steps=4", "--device-type=cpu")
    assert tiny.base_train.main([*flags, "--save-every=2"]) == 0
    straight = weights(base, "straight", 8)
    assert tiny.identical(weights(base, "trunk@4", 8), straight)
    (tiny.folder(base, "trunk@4") / "model_000008.pt").unlink()
    assert tiny.base_train.main([*flags, "--resume"]) == 0
    assert tiny.identical(weights(base, "trunk@4", 8), straight)
    log = read_run_log(tiny.folder(base, "trunk@4") / "log.jsonl")
    assert [record["step"] for record in log if record["kind"] == "train"] == [4, 5, 6, 7]
    assert [record["lrm"] for record in log if record["kind"] == "train"] == pytest.approx([1, 0.7625, 0.525, 0.2875])
    assert checkpoints.load_meta(tiny.folder(base, "trunk@4"), 8)["loop_state"]["flops"] == \
        checkpoints.load_meta(tiny.folder(base, "straight"), 8)["loop_state"]["flops"], "the trunk's are counted"


@pytest.mark.slow
def test_a_branch_of_a_growing_trunk_stays_as_large_as_it_is(base):
    assert tiny.train("--grow-path=2x64,3x96", "--head-dim=32", "--grow-at=0.5", "--save-every=2", *TRUNK) == 0
    small = checkpoints.load_meta(tiny.folder(base, "trunk"), 2)["model_config"]
    assert tiny.base_train.main(["--branch-from=trunk@2", "--warmdown-steps=3", "--model-tag=small", "--warmdown-shape=sqrt"]) == 0
    meta = checkpoints.load_meta(tiny.folder(base, "small"), 5)
    assert meta["model_config"] == small and meta["growth"] == []


@pytest.mark.slow
def test_a_branch_that_goes_on_steadily_is_the_trunk(with_trunk):
    """And can be branched off itself; its warm-down is that of a branch off the trunk."""
    base = with_trunk
    flags = ("--device-type=cpu", "--save-every=-1")
    assert tiny.base_train.main(["--branch-from=trunk@4", "--steady-steps=4", "--model-tag=on", *flags]) == 0
    assert tiny.identical(weights(base, "on", 8), weights(base, "trunk", 8))
    assert tiny.base_train.main(["--branch-from=on@8", "--steady-steps=1", "--warmdown-steps=2", "--model-tag=twice", *flags]) == 0
    assert tiny.base_train.main(["--branch-from=trunk@8", "--steady-steps=1", "--warmdown-steps=2", "--model-tag=once", *flags]) == 0
    assert tiny.identical(weights(base, "twice", 11), weights(base, "once", 11))
    rates = lambda tag: [record["lrm"] for record in read_run_log(tiny.folder(base, tag) / "log.jsonl") if record["kind"] == "train"]
    assert rates("twice") == pytest.approx([1, 1, 0.525])
    assert tiny.base_train.main(["--branch-from=twice@11", "--steady-rate=0.5", "--steady-steps=1", "--warmdown-steps=2", "--model-tag=again", *flags]) == 0
    assert rates("again") == pytest.approx([0.5, 0.5, 0.2625]), "a finished run is trained on at rates of its own"


def test_hyperparameters_at_the_end_of_a_run_without_a_warm_down():
    """Checkpoints of the last step know them too."""
    now = Schedule(ScheduleSettings(warmup_steps=0, warmdown_ratio=0.0), 500, 0.1).at(500)
    assert (now.lr, now.momentum) == (1.0, 0.97)


@pytest.mark.slow
def test_a_branch_that_grows_at_its_beginning(base):
    """Losslessly, on the trunk's next batch, resumable, and its own branches know of both growths."""
    assert tiny.train(*TRUNK, "--depth=2") == 0
    flags = ("--device-type=cpu", "--eval-every=1", "--save-every=1")
    branch = ["--branch-from=trunk@4", "--grow-to=3x96", "--steady-steps=3", "--model-tag=larger", *flags]
    assert tiny.base_train.main(branch) == 0
    log = read_run_log(tiny.folder(base, "larger") / "log.jsonl")
    growth = next(record for record in log if record["kind"] == "grow")
    assert growth["step"] == 4 and growth["loss_after"] == pytest.approx(growth["loss_before"], abs=1e-4)
    final = weights(base, "larger", 7)
    for step in (6, 7):
        (tiny.folder(base, "larger") / f"model_{step:06d}.pt").unlink()
    assert tiny.base_train.main([*branch, "--resume"]) == 0
    assert tiny.identical(weights(base, "larger", 7), final)
    assert tiny.base_train.main(["--branch-from=larger@7", "--grow-to=4x96", "--grow-depth-mode=stack", "--warmdown-steps=2", "--model-tag=largest", *flags]) == 0
    meta = checkpoints.load_meta(tiny.folder(base, "largest"), 9)
    assert [(growth["from"], growth["to"], growth["step"]) for growth in meta["growth"]] == [("2x64", "3x96", 4), ("3x96", "4x96", 7)]
    assert meta["loop_state"]["flops"] > checkpoints.load_meta(tiny.folder(base, "larger"), 7)["loop_state"]["flops"]


@pytest.mark.parametrize("flags, message", [
    (["--branch-from=trunk@4"], "give --warmdown-steps, --steady-steps or both"),
    (["--steady-steps=3"], "add --branch-from"),
    (["--grow-to=3x96"], "add --branch-from"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--grow-to=1x96", "--model-tag=x"], "only grows"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--objective=mlm"], "the weights of trunk@4 were trained with another objective"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--depth=4"], "--depth is not for a branch"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--max-seq-len=128"], "--max-seq-len is not for a branch"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--grow-path=3x96,3x128", "--grow-at=0.5"], "is not for a branch"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--grow-freeze"], "--grow-freeze is not for a branch"),
    (["--branch-from=trunk@4", "--steady-steps=3", "--grow-to=3x128", "--grow-at=0.5"], "--grow-at is not for a branch"),
])
def test_branches_that_cannot_be(with_trunk, capsys, flags, message):
    assert tiny.base_train.main([*flags, "--device-type=cpu"]) == 2
    assert message in capsys.readouterr().err


def plan(*flags: str) -> RunPlan:
    return RunPlan(tiny.base_train.parse(list(flags)), 320, Process(0, 1, torch.device("cpu")))


def test_a_branch_is_planned_by_its_trunk_and_not_by_its_trunks_flags(finished, monkeypatch):
    """The trunk's shape was a checkpoint's, of which its flags say nothing."""
    monkeypatch.setattr("nanochat.recipe.REFERENCE_BATCH", 2 ** 11)  # or a step of so small a model would have 131,072 tokens
    flags = ("--init-from=d3", "--depth=6", "--max-seq-len=128", "--total-batch-size=-1", "--weight-decay=0.1", "--num-iterations=2", "--model-tag=second")
    trunk = plan(*tiny.FLAGS, *flags)
    assert tiny.train(*flags, "--save-every=1", "--eval-every=-1") == 0
    branch = plan("--branch-from=second@1", "--warmdown-steps=2", "--device-type=cpu")
    assert branch.settings.max_seq_len == trunk.settings.max_seq_len == 64
    for name in ("total_batch_size", "lr_scale", "weight_decay_scale"):
        assert getattr(branch.horizon, name) == getattr(trunk.horizon, name), name
    assert branch.weight_decay == trunk.weight_decay > 0 and branch.model.config == trunk.model.config


def test_a_finished_run_learns_again_with_its_weight_decay(finished):
    branch = plan("--branch-from=d3@8", "--steady-rate=0.5", "--steady-steps=2", "--model-tag=again", "--device-type=cpu")
    now = branch.schedule.at(8)
    assert now.lr == 0.5 and now.weight_decay == pytest.approx(0.5 * branch.weight_decay) and branch.weight_decay > 0


def test_the_memory_of_a_branch_is_that_of_its_models(with_trunk, capsys):
    assert tiny.base_train.main(["--branch-from=trunk@4", "--steady-steps=3", "--grow-to=4x96", "--memory", "--device-type=cpu"]) == 0
    table = capsys.readouterr().out.split("Memory of one training step")[1]
    assert [line.split()[0] for line in table.splitlines()[2:4]] == ["3x96", "4x96"]


def test_normalized_weights_of_another_run_have_no_weight_decay(base_dir):
    config = mixed("ngpt")
    model = build_gpt(config)
    folder = tiny.folder(base_dir, "sphere")
    checkpoints.save_checkpoint(folder, 1, model.state_dict(), None, dict(step=1, model_config=dataclasses.asdict(config)))
    settings = tiny.base_train.parse(["--init-from=sphere"])
    assert (settings.weight_decay, settings.warmup_steps) == (0, 0)


def test_a_grown_checkpoint_grows_on_in_a_new_run(finished):
    assert grow_checkpoint.main(["--to=3x128", "--model-tag=d3", "--to-tag=grown", "--eval-tokens=512", "--device-type=cpu"]) == 0
    assert tiny.train("--init-from=grown", "--grow-path=3x128,4x128", "--grow-at=0.5", "--num-iterations=4", "--model-tag=on", "--save-every=-1") == 0
    step = checkpoints.list_steps(tiny.folder(finished, "on"))[-1]
    assert [growth["to"] for growth in checkpoints.load_meta(tiny.folder(finished, "on"), step)["growth"]] == ["4x128"]


@pytest.mark.parametrize("shape, message", [("3x96,4x96", "several shapes"), ("3", "is not a shape"), ("0x0", "must be")])
def test_shapes_that_are_none(base_dir, capsys, shape, message):
    with pytest.raises(SystemExit, match="2"):
        tiny.base_train.main(["--branch-from=trunk@4", "--steady-steps=3", f"--grow-to={shape}"])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_layers_that_were_frozen(base):
    """A branch leaves them so, also when it is resumed; a run that only takes the weights trains all."""
    flags = ("--grow-path=2x64,3x64", "--head-dim=32", "--grow-at=0.2", "--grow-freeze", "--save-every=2")
    assert tiny.train(*flags, *TRUNK) == 0
    step = checkpoints.list_steps(tiny.folder(base, "trunk"))[-1]
    frozen = checkpoints.load_meta(tiny.folder(base, "trunk"), step)["frozen"]
    branch = (f"--branch-from=trunk@{step}", "--warmdown-steps=2", "--model-tag=branch", "--save-every=1")
    assert frozen and tiny.base_train.main(list(branch)) == 0
    folder = tiny.folder(base, "branch")
    (folder / f"model_{step + 2:06d}.pt").unlink()
    assert tiny.base_train.main([*branch, "--resume"]) == 0
    assert checkpoints.load_meta(folder, step + 2)["frozen"] == frozen
    before, after = weights(base, "trunk", step), weights(base, "branch", step + 2)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert tiny.train(f"--init-from=trunk@{step}", "--model-tag=all", "--warmup-steps=0", "--num-iterations=2", "--save-every=-1") == 0
    assert not any(torch.equal(before[name], tensor) for name, tensor in weights(base, "all", 2).items() if name in frozen and name.endswith("mlp.c_fc.weight"))


@pytest.mark.slow
def test_the_weights_of_another_run(base):
    """A new run with the shape of the checkpoint, whatever it is; its optimizer begins anew or goes on."""
    assert tiny.train("--model-tag=first", "--rank=8") == 0
    assert grow_checkpoint.main(["--to=4x128", "--model-tag=first", "--to-tag=grown", "--eval-tokens=8192", "--device-type=cpu"]) == 0
    for tag, optimizer in (("new", "new"), ("kept", "keep")):
        assert tiny.train("--init-from=grown", f"--init-optimizer={optimizer}", f"--model-tag={tag}", "--eval-every=8", "--warmup-steps=0") == 0
    first, new, kept = (checkpoints.load_meta(tiny.folder(base, tag), 8) for tag in ("first", "new", "kept"))
    assert (new["model_config"]["n_layer"], new["model_config"]["n_embd"]) == (4, 128)
    evals = [record["val_bpb"] for record in read_run_log(tiny.folder(base, "new") / "log.jsonl") if record["kind"] == "eval"]
    assert evals[0] == pytest.approx(first["val_bpb"], abs=1e-4), "the growth is lossless"
    assert new["val_bpb"] != kept["val_bpb"]
    steps = [torch.load(tiny.folder(base, tag) / "optim_000008_rank0.pt", weights_only=True)["state"][0]["step"] for tag in ("new", "kept")]
    assert steps == [8, 16]


@pytest.mark.parametrize("flags, message", [
    (["--branch-from=d3@4"], "--warmdown-steps"), (["--warmdown-steps=4"], "--branch-from=TAG@STEP"), (["--branch-from=d3", "--warmdown-steps=4"], "lacks the step"),
    (["--branch-from=d9@4", "--warmdown-steps=4"], "no model 'd9'"), (["--init-from=d9"], "no model 'd9'"), (["--init-from=../x"], "is not a checkpoint"),
    (["--init-from=d3", "--model-tag=d3"], "would write over d3"), (["--branch-from=d3@4", "--warmdown-steps=2", "--model-tag=d3"], "would write over d3"),
    (["--init-from=d3", "--model-tag=other", "--objective=mlm"], "another objective"),
    (["--init-from=d3", "--branch-from=d3@4", "--warmdown-steps=4"], "give one of them"), (["--branch-from=d3@x", "--warmdown-steps=4"], "is not a checkpoint"),
])
def test_what_cannot_be_begun_with(finished, capsys, flags, message):
    try:
        status = tiny.train(*flags)
    except SystemExit as error:  # argparse's
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_grown_checkpoint_says_what_its_flags_lack(finished, capsys):
    assert grow_checkpoint.main(["--to=4x128", "--to-tag=grown", "--eval-tokens=8192", "--device-type=cpu"]) == 0
    assert tiny.train("--model-tag=grown", "--resume") == 2
    assert "n_layer 4 -> 3, n_head 4 -> 3" in (err := capsys.readouterr().err) and "--init-from" in err
