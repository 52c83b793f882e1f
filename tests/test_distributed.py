"""Training under torchrun on the CPU (gloo): as many ranks as you like, the same model."""
import json
import shutil

import pytest
from torch.distributed.run import get_args_parser

from scripts.base_train import build_parser
from tests import tiny

STREAMS = ("--data-streams=4", "--device-batch-size=1")  # the same batches for 1, 2 and 4 ranks


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


def assert_ok(done):
    assert done.returncode == 0, done.stderr[-3000:]


def bpb(base, tag: str) -> list:
    return [(step, value) for kind, step, _, _, value, _ in tiny.losses(base, tag) if kind == "eval"]


def test_two_ranks_as_one(base):
    flags = (*STREAMS, "--num-iterations=4", "--eval-every=2")
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

    # one rank cannot go on with the shards of two, and a shard that only rank 1 reads is missed by name
    done = tiny.run(other, "--resume-from-step=4")
    assert done.returncode == 2 and "written by 2 ranks" in done.stderr
    (tiny.folder(other) / "optim_000004_rank1.pt").write_bytes(b"")
    done = tiny.run(other, "--resume-from-step=4", ranks=2)
    assert done.returncode != 0 and "error on rank 1" in done.stderr and "optim_000004_rank1.pt" in done.stderr


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
    for action in build_parser()._actions:
        for flag in action.option_strings:
            if flag.startswith("--") and flag != "--run":
                for ours in ([flag], [flag, "1"], [f"{flag}=1"]):
                    parsed = get_args_parser().parse_args(["--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", *ours, "--depth=3"])
                    assert parsed.training_script_args == [*ours, "--depth=3"]
