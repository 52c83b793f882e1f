"""Training under torchrun on the CPU (gloo): as many ranks as you like, the same model, and no rank that goes its own way."""
import functools
import json
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from nanochat import distributed, flash_attention
from nanochat.cli import UsageError, settings_parser
from nanochat.optim import MuonAdamW
from scripts.base_train import Settings
from tests import tiny
from tests.ranks import on_ranks

STREAMS = ("--data-streams=4", "--device-batch-size=1")  # the same batches for 1, 2 and 4 ranks


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


def assert_ok(done):
    assert done.returncode == 0, done.stderr[-3000:]


def bpb(base, tag: str) -> list:
    return [(step, value) for kind, step, _, _, value, _ in tiny.losses(base, tag) if kind == "eval"]


@pytest.mark.parametrize("more", [(), pytest.param(("--objective=mixed", "--masking=static"), marks=pytest.mark.slow)], ids=["next-token", "mixed"])
def test_two_ranks_as_one(base, more):
    flags = (*STREAMS, "--num-iterations=4", "--eval-every=2", *more)
    assert tiny.train(*flags, "--model-tag=one") == 0
    assert_ok(tiny.run(base, *flags, "--model-tag=two", ranks=2))
    one, two = bpb(base, "one"), bpb(base, "two")
    assert [step for step, _ in one] == [0, 2, 4]
    assert two == [(step, pytest.approx(value, abs=1e-5)) for step, value in one]
    folder = tiny.folder(base, "two")
    assert json.loads((folder / "meta_000004.json").read_text())["world_size"] == 2
    assert {path.name for path in folder.glob("*_000004_*")} == {f"{kind}_000004_rank{rank}.pt" for kind in ("optim", "state") for rank in (0, 1)}


@pytest.mark.slow
def test_four_ranks_as_one(base):
    assert tiny.train(*STREAMS, "--model-tag=one") == 0
    assert_ok(tiny.run(base, *STREAMS, "--model-tag=four", ranks=4))
    assert bpb(base, "four") == [(step, pytest.approx(value, abs=1e-5)) for step, value in bpb(base, "one")]


@pytest.mark.slow
def test_one_rank_under_torchrun_is_the_plain_run(base):
    assert tiny.train("--model-tag=plain") == 0
    assert_ok(tiny.run(base, "--model-tag=ranked", ranks=1))
    assert tiny.losses(base, "plain") == tiny.losses(base, "ranked")


@pytest.mark.slow
def test_resuming_on_two_ranks_is_exact(base, tmp_path_factory):
    assert_ok(tiny.run(base, ranks=2))
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(base, other, dirs_exist_ok=True)
    for path in tiny.folder(other).glob("*_000008*"):
        path.unlink()
    assert_ok(tiny.run(other, "--resume", ranks=2))
    assert tiny.losses(base) == tiny.losses(other)
    assert tiny.same_checkpoint(base, other, ranks=2)

    # a shard that only rank 1 reads is missed by name
    (tiny.folder(other) / "optim_000004_rank1.pt").write_bytes(b"")
    done = tiny.run(other, "--resume-from-step=4", ranks=2)
    assert done.returncode != 0 and "error on rank 1" in done.stderr and "optim_000004_rank1.pt" in done.stderr


LOW_RANK = ("--rank=8", "--rank-schedule=linear")  # matrices are dealt


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(ranks, flags) -> the base directory of such a run, which is made once; not to be written to."""
    @functools.cache
    def run(ranks: int, flags: tuple[str, ...]):
        directory = tmp_path_factory.mktemp("whole")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", str(directory))
            tiny.prepare(directory)
        assert_ok(tiny.run(directory, *flags, ranks=ranks))
        return directory
    return run


@pytest.mark.slow
@pytest.mark.parametrize("before, after, flags", [(2, 1, ()), (2, 4, ()), (1, 2, ()), (2, 1, LOW_RANK), (2, 4, LOW_RANK), (1, 2, LOW_RANK)])
def test_resuming_on_another_number_of_ranks(whole_run, base_dir, before, after, flags):
    flags, base = (*STREAMS, *flags), base_dir
    shutil.copytree(whole_run(before, flags), base, dirs_exist_ok=True)
    uninterrupted = tiny.losses(base)
    assert uninterrupted[-1][:2] == ("eval", 8)
    done = tiny.run(base, *flags, "--resume-from-step=4", ranks=after)
    assert_ok(done)
    assert f"state of {before} ranks is shared out among {after}" in done.stderr
    resumed = tiny.losses(base)
    assert [record[:2] for record in resumed] == [record[:2] for record in uninterrupted]
    assert bpb(base, "d3") == [(step, pytest.approx(value, abs=2e-5)) for kind, step, _, _, value, _ in uninterrupted if kind == "eval"]
    assert tiny.folder(base).joinpath(f"optim_000008_rank{after - 1}.pt").exists()


@pytest.mark.slow
def test_what_cannot_be_shared_out_among_other_ranks(base, capsys):
    assert_ok(tiny.run(base, "--num-iterations=4", ranks=2))
    assert tiny.train("--resume") == 2
    assert "the checkpoint was written with --data-streams=2, not 1; use the same number" in capsys.readouterr().err
    flags = ("--resume", "--data-streams=2", "--device-batch-size=1")
    (tiny.folder(base) / "optim_000004_rank1.pt").unlink()
    assert tiny.train(*flags) == 2
    assert "rank1.pt, though 2 ranks have written step 4; bring it back, or use another step" in capsys.readouterr().err
    shutil.copy(tiny.folder(base) / "state_000004_rank1.pt", tiny.folder(base) / "optim_000004_rank1.pt")
    assert tiny.train(*flags) == 2
    assert "does not fit this model: no 'param_groups'; use another step" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flag, message", [
    (2, "--data-streams=3", "error: --data-streams=3 cannot be shared by 2 ranks; use a multiple"),
])
def test_errors_of_all_ranks_are_said_once(base, ranks, flag, message):
    done = tiny.run(base, flag, ranks=ranks)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [message]


def test_torchruns_own_parser_leaves_our_flags_alone():
    """Without `--` between them; --run is torchrun's abbreviation of two of its flags, hence the variable WANDB_RUN."""
    for action in settings_parser(Settings, "")._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--run":
                for ours in ([flag], [flag, "1"], [f"{flag}=1"]):
                    parsed = get_args_parser().parse_args(["--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", *ours, "--depth=3"])
                    assert parsed.training_script_args == [*ours, "--depth=3"]


# -----------------------------------------------------------------------------
# Ranks that differ


def of_two_minds() -> None:
    rank = dist.get_rank()
    assert distributed.agreed({"grow": rank == 0}) == {"grow": True}
    distributed.check_agreement("nothing", {"a": 1}, "")
    with pytest.raises(UsageError, match=r"do not agree on the flags: rank 0 has \{'seed': 0\}, rank 1 has \{'seed': 1\}; start all nodes alike"):
        distributed.check_agreement("the flags", {"depth": 4, "seed": rank}, "start all nodes alike")
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, rank)
    distributed.share_weights(model)
    assert not model.weight.any()
    # what one rank cannot do, all know of; what rank 0 cannot, the others do not try
    done = []
    def fetch(failing: int) -> None:
        done.append(failing)
        if rank == failing:
            raise UsageError(f"rank {rank} has no network")
    assert str(distributed.attempt(lambda: fetch(1))) == "rank 1 has no network" and done == [1]
    assert str(distributed.attempt(lambda: fetch(0))) == "rank 0 has no network" and done == ([1, 0] if rank == 0 else [1])
    assert distributed.attempt(lambda: fetch(2)) is None
    # one rank without FlashAttention-3: no rank uses it
    flash_attention.USE_FA3, flash_attention.WHY_NOT_FA3 = rank == 0, "" if rank == 0 else "no package"
    flash_attention.agree_on_kernels()
    assert not flash_attention.USE_FA3 and flash_attention.WHY_NOT_FA3 == ("rank 1: no package" if rank == 0 else "no package")


@pytest.mark.slow
def test_rank_0_decides(tmp_path):
    on_ranks(2, tmp_path, of_two_minds)


# What a rank might see otherwise than rank 0, each put into rank 1 of a growing run that decides by kappa
DIVERGENT = """
import os, sys, torch
from nanochat import distributed, loss_eval
from nanochat import run_plan, train_loop
from nanochat.growth import controller
from scripts import base_train
if os.environ["RANK"] == "1":
    plan, evaluate = run_plan.RunPlan.__init__, train_loop.evaluate_bpb
    def other_weights(self, *args):
        plan(self, *args)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(0.01)
    run_plan.RunPlan.__init__ = other_weights
    train_loop.evaluate_bpb = lambda *args: evaluate(*args) + 5  # it would never reach the target
    controller.final_loss_of_earlier_runs = lambda *args, **options: controller.Prediction(0.01, "a file that only rank 1 has")
finish = base_train.Pretraining.finish
def compare(self):
    weights = {name: p.double().sum().item() for name, p in self.model.named_parameters()}
    distributed.check_agreement("the weights", weights, "")
    finish(self)
base_train.Pretraining.finish = compare
sys.exit(base_train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_divergent_rank_follows_rank_0(base, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "divergent.py"
    script.write_text(DIVERGENT)
    done = tiny.run(base, "--data-streams=2", "--grow-path=2x64,3x96", "--head-dim=32", "--eval-every=2", "--kappa=0.999", "--kappa-final-loss=0.1", ranks=2,
                    script=[str(script)], PYTHONPATH=str(tiny.ROOT))
    assert_ok(done)
    assert done.stdout.count("| Growth 2x64 -> 3x96 |") == 1


@pytest.mark.slow
def test_flags_of_one_rank_alone_are_an_error_not_a_hang(base, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "flags.py"
    script.write_text("import os, sys\nfrom scripts import base_train\nsys.exit(base_train.main([*sys.argv[1:], f'--seed={os.environ[\"RANK\"]}']))\n")
    done = tiny.run(base, "--data-streams=2", ranks=2, script=[str(script)], PYTHONPATH=str(tiny.ROOT))
    assert done.returncode != 0
    assert "error: the ranks do not agree on the flags: rank 0 has {'seed': 0}, rank 1 has {'seed': 1}; start all nodes with the same command" in done.stderr


# -----------------------------------------------------------------------------
# Collectives


def padded_groups() -> None:
    """Three matrices for two ranks leave a place empty, whose content must not matter."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 6, 4), torch.randn(2, 3, 6, 4)
    group = dict(kind="muon", lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.1)
    ours, alone = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizer, reference = (MuonAdamW([dict(params=params, **group)]) for params in (ours, alone))
    real_empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda self, *size, **options: real_empty(self, *size, **options).fill_(float("nan"))
    for _ in range(3):
        for i, (p, q) in enumerate(zip(ours, alone)):
            p.grad, q.grad = gradients[rank][i].clone(), gradients.mean(dim=0)[i].clone()
        optimizer.step()
        reference_step(reference)
        for p, q in zip(ours, alone):
            torch.testing.assert_close(p, q)


def reference_step(optimizer: MuonAdamW) -> None:
    """As on one rank alone."""
    initialized, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        optimizer.step()
    finally:
        dist.is_initialized = initialized


@pytest.mark.slow
def test_muon_groups_with_an_empty_place(tmp_path):
    on_ranks(2, tmp_path, padded_groups)


@pytest.mark.parametrize("averages", [False, True])
def test_gradients_are_averaged_by_the_collective_that_can(averages):
    """NCCL takes the mean on the way; for gloo the gradients are divided first."""
    optimizer = MuonAdamW([dict(kind="adamw", params=[torch.nn.Parameter(torch.ones(2))], lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)])
    optimizer.averages, calls = averages, []
    gradient = torch.full((4,), 6.0)
    optimizer._mean(lambda *tensors, **options: calls.append(options), gradient, world=3)
    if averages:
        assert calls == [dict(op=dist.ReduceOp.AVG, async_op=True)] and gradient.eq(6).all()
    else:
        assert calls == [dict(async_op=True)] and gradient.eq(2).all()
