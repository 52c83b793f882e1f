"""scripts.grow_checkpoint: a finished checkpoint grows offline into an ordinary one."""
import json
import shutil

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from scripts import grow_checkpoint, tok_train
from tests import tiny


@pytest.fixture
def base(finished_run, tmp_path, monkeypatch):
    """A finished run in a base directory of one's own, with a checkpoint of width 96 and depth 3."""
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def grow(*flags: str) -> int:
    return grow_checkpoint.main(["--device-type=cpu", "--eval-tokens=512", *flags])


def loaded(folder, step: int = 8):
    model_data, optimizer_data, meta = checkpoints.load_checkpoint(folder, step, "cpu", load_optimizer=True)
    model = checkpoints.model_from_config(meta["model_config"])
    checkpoints.load_weights(model, model_data, "cpu")
    optimizer = model.setup_optimizer()
    optimizer.load_state_dict(optimizer_data)
    return model, optimizer, meta


def test_a_grown_checkpoint_is_an_ordinary_one(base, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in tiny.folder(base).iterdir()}
    assert grow("--to=5x128") == 0
    out = capsys.readouterr().out
    assert "3x96 -> 5x128" in out and "Validation bpb" in out
    folder = tiny.folder(base, "d3-5x128")
    model, tokenizer, meta = checkpoints.load_model("base", "cpu", "eval", model_tag="d3-5x128")
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (5, 128, 4)
    (record,) = meta["growth"]
    assert (record["from"], record["to"], record["step"], record["mode"], record["seed"]) == ("3x96", "5x128", 8, "lossless", 0)
    assert record["loss_after"] == pytest.approx(record["loss_before"], abs=1e-5) and record["tokens"] == 8 * 256 and record["flops"] > 0
    assert {path.name for path in folder.iterdir()} == {"model_000008.pt", "meta_000008.json", "optim_000008_rank0.pt", "state_000008_rank0.pt"}
    assert {path.name: path.stat().st_mtime_ns for path in tiny.folder(base).iterdir()} == before  # the old one is as it was
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    original, _, _ = checkpoints.load_model("base", "cpu", "eval", model_tag="d3")
    with torch.no_grad():
        torch.testing.assert_close(model(idx), original(idx), rtol=0, atol=1e-5)

    # the moments came along, and it grows again
    grown, optimizer, _ = loaded(folder)
    assert all(moments["momentum_buffer"].any() for name, moments in optimizer.full_state_dict().items() if "h.0.attn.c_proj" in name)
    assert grow("--model-tag=d3-5x128", "--to=5x160", "--noise=0.3", "--to-tag=again") == 0
    _, _, meta = loaded(tiny.folder(base, "again"))
    assert [record["to"] for record in meta["growth"]] == ["5x128", "5x160"] and meta["growth"][1]["noise"] == 0.3


def test_another_optimizer_and_layers_that_are_frozen(base):
    """Grow as they are, and can be branched off."""
    assert tiny.train("--matrix-optimizer=adamw", "--grow-path=2x96,3x96", "--grow-at=0.3", "--grow-freeze", "--num-iterations=4", "--model-tag=other", "--save-every=-1") == 0
    step = checkpoints.list_steps(tiny.folder(base, "other"))[-1]
    assert grow("--model-tag=other", "--to=4x128", "--to-tag=larger") == 0
    frozen, grown = (set(checkpoints.load_meta(tiny.folder(base, tag), step)["frozen"]) for tag in ("other", "larger"))
    assert len(grown) == len(frozen) > 0
    branch = ["--warmdown-steps=1", "--save-every=-1", "--eval-every=-1", "--device-type=cpu"]
    assert tiny.base_train.main([f"--branch-from=larger@{step}", "--model-tag=branch", *branch]) == 0
    optimizer = torch.load(tiny.folder(base, "branch") / f"optim_{step + 1:06d}_rank0.pt", weights_only=True)
    assert {group["kind"] for group in optimizer["param_groups"]} == {"adamw"}
    assert tiny.base_train.main([f"--branch-from=larger@{step}", "--model-tag=muon", "--matrix-optimizer=muon", *branch]) == 2


@pytest.mark.slow
def test_the_state_of_two_ranks_stays_one_of_two_ranks(base):
    folder = tiny.folder(base)
    model, optimizer, _ = loaded(folder)
    whole = dict(optimizer.full_state_dict())
    for rank, shard in enumerate(grow_checkpoint.optimizer_shards(optimizer, 2)):
        torch.save(shard, folder / f"optim_000008_rank{rank}.pt")
    checkpoints.save_meta(folder, 8, {**checkpoints.load_meta(folder, 8), "world_size": 2})
    assert grow("--to=3x128", "--to-tag=two", "--mode=identity") == 0
    shards = [torch.load(tiny.folder(base, "two") / f"optim_000008_rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    optimizer = checkpoints.load_model("base", "cpu", "train", "two")[0].setup_optimizer()
    optimizer.load_shards(shards)
    state = optimizer.full_state_dict()
    name = "transformer.h.1.attn.c_k.weight"
    assert torch.equal(state[name]["momentum_buffer"][:96, :96], whole[name]["momentum_buffer"]) and state["lm_head.weight"]["step"] == 8
    assert grow("--to=3x128", "--to-tag=fresh", "--optimizer=reset") == 0
    assert not torch.load(tiny.folder(base, "fresh") / "optim_000008_rank0.pt", weights_only=True)["state"]
    assert grow("--to=3x128", "--to-tag=none", "--optimizer=none") == 0
    assert not list(tiny.folder(base, "none").glob("optim*"))


def test_without_data_the_logits_are_compared(base, capsys):
    for path in (base / "base_data_climbmix").glob("*"):
        path.unlink()
    assert grow("--to=4x96") == 0
    out = capsys.readouterr().out
    assert "No validation text" in out and "Largest difference of a logit" in out
    meta = json.loads((tiny.folder(base, "d3-4x96") / "meta_000008.json").read_text())
    assert meta["growth"][0]["loss_before"] is None


@pytest.mark.parametrize("flags, reason", [
    (["--to=2x96"], "only grows"), (["--to=3x100"], "heads of 32"), (["--to=3x64"], "only grows"), (["--to=wide"], "not a shape"),
    (["--to=3x96"], "same model"), (["--to=3x128,4x128"], "one shape"), (["--to=3x128", "--step=5"], "no checkpoint of step 5"),
    (["--to=3x128", "--model-tag=d9"], "no model 'd9'"), (["--to=3x128", "--mode=bus", "--noise=1"], "lossless"), (["--to=3x128x16"], "dense to 16"),
    (["--to=3x128", "--to-tag=d3"], "exists already"), (["--to=3x128", "--theta=80"], "0 to 45"),
])
def test_errors_leave_everything_as_it_was(base, capsys, flags, reason):
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*") if not path.name.endswith(".lock")}
    assert grow(*flags) == 2
    err = capsys.readouterr().err
    assert reason in err and len(err.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*") if not path.name.endswith(".lock")} == before


def test_a_full_disk_leaves_everything_as_it_was(base, monkeypatch, capsys):
    def fill(*args):
        raise OSError(28, "No space left on device")

    before = {path for path in base.rglob("*") if not path.name.endswith(".lock")}
    monkeypatch.setattr(grow_checkpoint.shutil, "copy", fill)
    assert grow("--to=3x128", "--to-tag=big") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path for path in base.rglob("*") if not path.name.endswith(".lock")} == before


def test_folders_that_are_still_being_written_are_no_models(base):
    shutil.copytree(tiny.folder(base), tiny.folder(base).with_name(".d3-4x96.half"))
    assert checkpoints.list_models(tiny.folder(base).parent) == ["d3"]


def test_another_vocabulary_is_refused(base, capsys):
    assert tok_train.main(["--vocab-size=300"]) == 0
    assert grow("--to=3x128") == 2
    assert "tokenizer has 300 tokens, the model 320" in capsys.readouterr().err
    assert not tiny.folder(base, "d3-3x128").exists()


def test_the_grown_weights_come_before_the_comparison(base, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grow_checkpoint, "evaluate_bpb", stop)
        assert grow("--to=4x96", "--to-tag=grown") == 130
    model, _, meta = loaded(tiny.folder(base, "grown"))
    assert model.config.n_layer == 4 and meta["growth"][0]["loss_before"] is None
