"""What is saved comes back; what is broken, missing or of another shape is refused by name."""
import json
import os
import shutil
from dataclasses import asdict

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.cli import UsageError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from tests import tiny

CONFIG = GPTConfig(sequence_len=16, vocab_size=64, n_layer=3, n_head=1, n_kv_head=1, n_embd=32, window_pattern="SL")
FILES = ["model_000003.pt", "optim_000003_rank0.pt", "state_000003_rank0.pt", "meta_000003.json"]


def save(folder, step: int, value: float = 1.0, meta: dict | None = None):
    checkpoints.save_checkpoint(folder, step, {"w": torch.full((3,), value)}, {"m": torch.full((2,), value)},
                                meta or {"step": step, "model_config": asdict(CONFIG)}, train_state={"rng": torch.arange(4)})


def load(folder, step: int = 3):
    return *checkpoints.load_checkpoint(folder, step, "cpu", load_optimizer=True), checkpoints.load_train_state(folder, step, 0)


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, 3)
    return tmp_path


def test_round_trip(folder):
    model, optimizer, meta, state = load(folder)
    assert torch.equal(model["w"], torch.ones(3)) and torch.equal(optimizer["m"], torch.ones(2)) and torch.equal(state["rng"], torch.arange(4))
    assert meta == {"step": 3, "model_config": asdict(CONFIG)}
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert checkpoints.load_checkpoint(folder, 3, "cpu")[1] is None
    (folder / FILES[2]).unlink()
    assert checkpoints.load_train_state(folder, 3, 0) is None  # as in nanochat's checkpoints


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_file(folder, name, keep):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:int(keep * len(data))])
    with pytest.raises(UsageError, match=name):
        load(folder)


@pytest.mark.parametrize("name", FILES[:3])
def test_flipped_byte(folder, name):
    """Wherever the byte is, the file loads as it was or is refused by name."""
    path = folder / name
    data = path.read_bytes()
    expected = torch.load(path, weights_only=True)
    refused = 0
    for position in range(0, len(data), 5):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1:])
        try:
            assert tiny.identical(checkpoints._load(path, "cpu"), expected), position
        except UsageError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"model_config": 3}', '{"model_config": null}', '{"model_config": {}, "loop_state": null}',
                                  '{"model_config": {}, "user_config": []}', '{"model_config": {}, "step": "3"}', '{"model_config": {}, "frozen": null}',
                                  '{"model_config": {}, "world_size": "two"}', '{"model_config": {}, "world_size": 2.0}', '{"model_config": {}, "val_bpb": "good"}', '{"model_config": {}, "growth": ["3x64"]}',
                                  '{"model_config": {}, "growth": [{"from": "2x64"}]}'])
def test_broken_meta(folder, text):
    (folder / FILES[3]).write_text(text)
    with pytest.raises(UsageError, match=FILES[3]):
        load(folder)


def test_missing_files(folder):
    save(folder, 12)
    with pytest.raises(checkpoints.CheckpointNotFound, match="step 5 .* step 3, 12"):
        load(folder, 5)
    (folder / FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=FILES[1]):
        load(folder)
    with pytest.raises(UsageError, match="there is none"):
        load(folder / "nothing")


@pytest.mark.parametrize("config", [{"n_head": 5}, {"n_embd": "many"}, {"colour": 3}, {"window_pattern": "X"}, {"n_layer": -1}, {"n_head": 0},
                                    {"sequence_len": 0}, {"sequence_len": 64.0}, {"sequence_len": True}, {"vocab_size": "many"}])
def test_strange_model_config(config):
    with pytest.raises(UsageError):
        checkpoints.model_from_config({**asdict(CONFIG), **config})


def make_model(**changes) -> GPT:
    model = checkpoints.model_from_config({**asdict(CONFIG), **changes})
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def test_weights_of_another_shape():
    model = make_model()
    weights = model.state_dict()
    for wrong in ({**weights, "lm_head.weight": torch.zeros(2, 2)}, {**weights, "more": torch.zeros(1)},
                  {key: value for key, value in weights.items() if key != "smear_lambda"}):
        with pytest.raises(UsageError, match="another shape"):
            checkpoints.load_weights(model, dict(wrong), "cpu")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), None])
def test_a_file_that_holds_no_state(content):
    with pytest.raises(UsageError, match="no state_dict"):
        checkpoints.load_weights(make_model(), content, "cpu")


def test_full_memory_is_no_damage(folder, monkeypatch):
    """Who reads that a good file is corrupt may delete it."""
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="allocate memory"):
        load(folder)


def test_overwriting_leaves_the_other_steps(folder):
    save(folder, 4, 2.0)
    save(folder, 3, 5.0)
    assert load(folder, 3)[0]["w"][0] == 5 and load(folder, 4)[0]["w"][0] == 2
    assert checkpoints.list_steps(folder) == [3, 4]


def test_a_failing_write_leaves_the_earlier_checkpoint(folder, monkeypatch):
    def full_disk(data, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UsageError, match="state_000004_rank0.pt: No space left on device"):
        save(folder, 4)
    assert {path.name for path in folder.iterdir()} == set(FILES)


def test_find_checkpoint(tmp_path):
    save(tmp_path / "d4", 1)
    save(tmp_path / "d12", 7)
    save(tmp_path / "d12", 20)
    assert checkpoints.find_checkpoint(tmp_path) == (tmp_path / "d12", 20)
    assert checkpoints.find_checkpoint(tmp_path, "d4") == (tmp_path / "d4", 1)
    assert checkpoints.find_checkpoint(tmp_path, "d12", 7) == (tmp_path / "d12", 7)
    with pytest.raises(FileNotFoundError, match="d6.*d12, d4"):
        checkpoints.find_checkpoint(tmp_path, "d6")


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_no_model(tmp_path):
    save(tmp_path / "d4", 1)
    (tmp_path / "d99").mkdir()
    (tmp_path / "d99" / "log.jsonl").touch()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert checkpoints.list_models(tmp_path) == ["d4"] and checkpoints.find_checkpoint(tmp_path) == (tmp_path / "d4", 1)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of the model 'd99' in .*; there is d4"):
        checkpoints.find_checkpoint(tmp_path, "d99")
    shutil.rmtree(tmp_path / "d4")
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*d99"):
        checkpoints.find_checkpoint(tmp_path)


def test_without_numbers_the_latest_model_counts(tmp_path):
    for seconds, name in enumerate(["second", "third", "first"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (seconds, seconds))
    assert checkpoints.find_largest_model(tmp_path) == "first"


@pytest.fixture
def base_model(base_dir):
    """A model of the tiny tokenizer's vocabulary as base_checkpoints/d3."""
    tiny.prepare(base_dir)
    model = make_model(vocab_size=320)
    checkpoints.save_checkpoint(tiny.folder(base_dir), 3, model.state_dict(), {"m": 1}, {"model_config": asdict(model.config)}, rank=0)
    return base_dir, model


def test_load_model(base_model):
    base, model = base_model
    idx = torch.randint(0, 320, (2, 9))
    for phase in ("train", "eval"):
        loaded, tokenizer, meta = checkpoints.load_model("base", "cpu", phase, model_tag="d3", step=3)
        assert loaded.training == (phase == "train") and meta["model_config"] == asdict(model.config) and tokenizer.get_vocab_size() == 320
        assert torch.equal(loaded(idx), model(idx))
    with pytest.raises(KeyError):
        checkpoints.load_model("elsewhere", "cpu", "eval")
    with pytest.raises(UsageError, match="no model in .*; train one first$"):  # base_train would not make this one
        checkpoints.load_model("sft", "cpu", "eval")
    assert checkpoints.load_optimizer_state("base", "cpu", rank=0) == {"m": 1}
    assert checkpoints.load_optimizer_state("base", "cpu", rank=1) is None


# -----------------------------------------------------------------------------
# Other numbers of ranks


def save_ranks(folder, ranks: int, streams: int, meta: dict | None = None):
    """A trained model's step 5 as that many ranks would have saved it. Returns the optimizer, whole."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    model(torch.randint(0, 64, (2, 9)), torch.randint(0, 64, (2, 9))).backward()
    optimizer.step()
    whole = dict(optimizer.full_state_dict())
    for rank in reversed(range(ranks)):
        optimizer.load_full_state_dict(whole, rank, ranks)
        train_state = {"loader_states": [{"stream": stream} for stream in range(rank, streams, ranks)], "rng": rank}
        checkpoints.save_checkpoint(folder, 5, model.state_dict(), optimizer.state_dict(), {"model_config": asdict(CONFIG), **(meta or {})}, rank, train_state)
    optimizer.load_full_state_dict(whole)
    return optimizer


@pytest.mark.parametrize("meta", [{}, {"world_size": 3}], ids=["nanochat", "ours"])
def test_a_checkpoint_of_three_ranks_on_one(tmp_path, meta):
    expected = save_ranks(tmp_path, 3, 6, meta)
    assert checkpoints.saved_ranks(tmp_path, 5) == 3 and checkpoints.saved_ranks(tmp_path, 4) == 0
    optimizer = make_model().setup_optimizer(matrix_lr=0.5)
    checkpoints.load_optimizer(tmp_path, 5, optimizer)
    assert tiny.identical(optimizer.state_dict()["state"], expected.state_dict()["state"])
    muon = optimizer.param_groups[-1]
    assert (muon["initial_lr"], muon["weight_decay"]) == (0.5, 0.1)  # the rate is that of the flags
    (tmp_path / "optim_000005_rank1.pt").unlink()
    with pytest.raises(checkpoints.CheckpointNotFound, match="rank1.pt, though 3 ranks"):
        checkpoints.load_optimizer(tmp_path, 5, optimizer)


def test_files_of_a_larger_run_before_are_left_alone(tmp_path):
    save_ranks(tmp_path, 3, 3)
    expected = save_ranks(tmp_path, 2, 2, {"world_size": 2})
    optimizer = make_model().setup_optimizer()
    checkpoints.load_optimizer(tmp_path, 5, optimizer)
    assert tiny.identical(optimizer.state_dict()["state"], expected.state_dict()["state"])


def test_an_optimizer_of_another_model(tmp_path):
    save_ranks(tmp_path, 2, 2)
    for other in (make_model(n_layer=2), make_model(n_embd=64, n_head=2, n_kv_head=2)):
        with pytest.raises(UsageError, match="does not fit this model: .*; use another step"):
            checkpoints.load_optimizer(tmp_path, 5, other.setup_optimizer())
        with pytest.raises(UsageError, match="does not fit this model: .*; use another step"):
            checkpoints.load_optimizer(tmp_path, 5, other.setup_optimizer(), rank=0, world=2)
    with pytest.raises(checkpoints.CheckpointNotFound, match="optim_000004_rank0.pt"):
        checkpoints.load_optimizer(tmp_path, 4, make_model().setup_optimizer())


def test_an_optimizer_of_another_kind(tmp_path):
    """Its learning rates are of another size: with Muon's AdamW would move a matrix as many times too far as the root of its columns."""
    save_ranks(tmp_path, 2, 2)
    other = make_model().setup_optimizer(matrix_optimizer="adamw")
    for ranks in ({}, dict(rank=0, world=2)):
        with pytest.raises(UsageError, match="--matrix-optimizer"):
            checkpoints.load_optimizer(tmp_path, 5, other, **ranks)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 3), (3, 2), (2, 6)])
def test_data_streams_are_dealt_anew(tmp_path, before, after):
    save_ranks(tmp_path, before, 6)
    for rank in range(after):
        state = checkpoints.load_train_state(tmp_path, 5, rank, after)
        assert [position["stream"] for position in state["loader_states"]] == list(range(rank, 6, after))
        assert state["rng"] == (rank if rank < before else 0)
    with pytest.raises(UsageError, match="6 data streams, which 4 ranks cannot share evenly; use a number of ranks that divides 6"):
        checkpoints.load_train_state(tmp_path, 5, 0, 4)


def test_another_tokenizer(base_model):
    base, _ = base_model
    path = tiny.folder(base) / "meta_000003.json"
    small = make_model()
    checkpoints.save_checkpoint(tiny.folder(base), 4, small.state_dict(), None, {**json.loads(path.read_text()), "model_config": asdict(CONFIG)})
    with pytest.raises(UsageError, match="320 tokens, the model 64"):
        checkpoints.load_model("base", "cpu", "eval")
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": get_tokenizer().checksum()}))
    checkpoints.load_model("base", "cpu", "eval", step=3)
    RustBPETokenizer.train_from_iterator([chr(i) * 9 for i in range(500)], 320).save(base / "tokenizer")
    with pytest.raises(UsageError, match="was trained anew"):
        checkpoints.load_model("base", "cpu", "eval", step=3)
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(UsageError, match="tokenizer"):
        checkpoints.load_model("base", "cpu", "eval", step=3)
