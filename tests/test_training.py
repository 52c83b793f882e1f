"""What all trainings share: full memory changes nothing but the speed, and wandb is optional."""
import json
import sys
import types

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import run_plan
from nanochat.accumulation import Accumulator, fit_device_batch
from nanochat.cli import UsageError, is_out_of_memory, parse_settings
from nanochat.gpt import GPT
from nanochat.training import RunSettings, init_wandb
from tests import tiny
from tests.golden.fixtures import batch, build_model


@pytest.fixture
def base(base_dir):
    tiny.prepare(base_dir)
    return base_dir


def train_losses(base, tag: str = "d3") -> list[float]:
    return [raw_loss for kind, _, raw_loss, *_ in tiny.losses(base, tag) if kind == "train"]


# -----------------------------------------------------------------------------
# Memory


@pytest.fixture
def memory(monkeypatch):
    """Sets how many rows fit into a training pass."""
    forward = GPT.forward

    def limit(rows: int) -> None:
        def limited(self, idx, *args, **kwargs):
            if self.training and idx.size(0) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(self, idx, *args, **kwargs)

        monkeypatch.setattr(GPT, "forward", limited)

    return limit


@pytest.mark.parametrize("rows", [4, 3, 2, 1])  # room for all, two unequal pieces, and less
@pytest.mark.parametrize("trained", [None, (16, 1, 0, 3, 0)], ids=["all", "few"])  # tokens per row; a piece may have none
def test_less_memory_same_gradient(memory, rows, trained):
    model = build_model(dict(sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"), seed=1)
    batches = [batch(seed, 5, 16, 64, ignore_frac=0) for seed in range(3)]
    for _, targets in batches if trained else ():
        for row, tokens in zip(targets, trained, strict=True):
            row[tokens:] = -1

    def take_gradient():
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return gradient

    losses = [model(*inputs) for inputs in batches]
    (sum(losses) / 3).backward()
    expected = take_gradient()
    memory(rows)
    passed = Accumulator(model, model, None)(iter(batches), 3)
    assert [loss.item() for loss in passed] == pytest.approx([loss.item() for loss in losses], abs=1e-5)
    assert (take_gradient() - expected).norm() < 1e-5 * expected.norm()


def test_a_loss_of_whole_sequences():
    """Classification needs no change to the loop: one label a row, -1 for none."""
    head = torch.nn.Linear(64, 3)
    model = build_model(dict(sequence_len=64, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L"), seed=3)
    ids, labels = torch.randint(512, (4, 16)), torch.tensor([2, -1, 0, 1])

    def classification(model, ids, labels):
        return torch.nn.functional.cross_entropy(head(model.embed(ids).float().mean(dim=1)), labels, ignore_index=-1, reduction="sum")

    expected = torch.nn.functional.cross_entropy(head(model.embed(ids).float().mean(dim=1)), labels, ignore_index=-1)
    gradients = torch.autograd.grad(expected, list(head.parameters()))
    accumulate = Accumulator(model, model, None, classification)
    accumulate.rows = 2  # in passes of two rows
    (loss,) = accumulate(iter([(ids, labels)]), 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(head.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)


def test_less_memory_same_losses(base, memory):
    flags = ("--num-iterations=4", "--device-batch-size=4", "--eval-every=-1")
    assert tiny.train(*flags, "--model-tag=roomy") == 0
    memory(1)
    assert tiny.train(*flags, "--model-tag=tight") == 0
    assert train_losses(base, "tight") == pytest.approx(train_losses(base, "roomy"), abs=1e-4)


def test_memory_that_runs_out_in_the_middle_of_a_step(base, monkeypatch):
    """The step begins again with the very same batches: none is skipped and no gradient counts twice."""
    flags = ("--num-iterations=4", "--eval-every=-1")
    assert tiny.train(*flags, "--model-tag=roomy") == 0
    forward, calls = GPT.forward, []

    def once(self, *args, **kwargs):
        calls.append(self.training)
        if calls.count(True) == 6:  # the second pass of the third step
            calls.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", once)
    assert tiny.train(*flags, "--model-tag=tight") == 0
    assert train_losses(base, "tight") == pytest.approx(train_losses(base, "roomy"), abs=1e-4)
    positions = [json.loads((tiny.folder(base, tag) / "meta_000004.json").read_text())["dataloader_state_dict"] for tag in ("roomy", "tight")]
    assert positions[0] == positions[1]


def test_not_even_one_row_fits(base, memory, capsys):
    memory(0)
    assert tiny.train() == 2
    assert "out of memory with one row" in capsys.readouterr().err


MPS = "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 432 KB, max allowed: 18.1 GB)"


@pytest.mark.parametrize("error, memory_is_full", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError(MPS), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True), (RuntimeError("shapes do not fit"), False),
    (ValueError("out of memory of the past"), False)])
def test_full_memory_by_all_its_names(error, memory_is_full):
    assert is_out_of_memory(error) == memory_is_full
    rows = []

    def model(x, y, loss_reduction):
        rows.append(x.size(0))
        if x.size(0) > 1:
            raise error
        return torch.zeros((), requires_grad=True)

    raw_model = types.SimpleNamespace(zero_grad=lambda set_to_none: None, get_device=lambda: torch.device("cpu"))
    batches = iter([(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long))])
    if memory_is_full:
        Accumulator(model, raw_model, None)(batches, 1)
        assert rows == [4, 2, 1, 1, 1, 1]
    else:
        with pytest.raises(type(error), match="fit|past"):
            Accumulator(model, raw_model, None)(batches, 1)


def test_full_memory_while_a_batch_is_made():
    """The steps that reinforcement learns from are sampled as they are asked for; what is drawn already could not be completed."""
    def batches():
        yield torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long)
        raise torch.OutOfMemoryError("CUDA out of memory")

    raw_model = types.SimpleNamespace(zero_grad=lambda set_to_none: None, get_device=lambda: torch.device("cpu"))
    with pytest.raises(UsageError, match="--device-batch-size"):
        Accumulator(lambda x, y, loss_reduction: torch.zeros((), requires_grad=True), raw_model, None)(batches(), 2)


def test_full_memory_in_the_optimizers_step(base, monkeypatch, capsys):
    """Fewer rows would not help there, and half of the weights may have moved already."""
    def step(self):
        raise RuntimeError(MPS)

    monkeypatch.setattr("nanochat.optim.MuonAdamW.step", step)
    assert tiny.train("--eval-every=-1") == 2
    assert "out of memory in the optimizer's step" in capsys.readouterr().err


@pytest.mark.slow
def test_every_stage_of_a_growing_run_must_fit(base, monkeypatch, capsys):
    """In memory, by the device batch; and on the disk, with a checkpoint before each growth."""
    monkeypatch.setattr(run_plan, "fit_device_batch", lambda model, rows, sequence_len: {1: 4, 2: 2, 3: 4}[model.config.n_layer])
    flags = ("--grow-path=1x64,2x64,3x96", "--head-dim=32", "--grow-at=0.2,0.4", "--device-batch-size=-1", "--eval-every=-1", "--eval-tokens=512")
    assert tiny.train(*flags) == 0
    assert "Device batch size: 2 rows" in capsys.readouterr().out
    config = json.loads(next(tiny.folder(base).glob("meta_*.json")).read_text())["model_config"]
    assert config["n_layer"] in (1, 2, 3)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=2 << 20))
    assert tiny.train("--head-dim=32", "--depth=1", "--aspect-ratio=32", "--num-iterations=1") == 0  # the first stage alone would fit
    assert tiny.train(*flags) == 2
    assert "3 checkpoints, one before each growth and the last, need" in capsys.readouterr().err


def test_device_batch_size_is_found(base, capsys):
    assert tiny.train("--device-batch-size=-1", "--eval-every=-1", "--num-iterations=2") == 0
    assert "Device batch size: 4 rows" in capsys.readouterr().out
    model = checkpoints.load_model("base", "cpu", "train", model_tag="d3")[0]
    for rows, sequence_len, best in [(300, 64, 100), (128, 64, 128), (7, 64, 7), (131, 64, 1), (12, 8192, 1)]:
        assert fit_device_batch(model, rows, sequence_len) == best


# -----------------------------------------------------------------------------
# wandb


def fake_wandb(monkeypatch, init) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs))


def test_wandb_gets_the_numbers(base, monkeypatch):
    logged, finished, modes = [], [], []

    def init(project, name, config, mode=None, **kwargs):
        modes.append(mode)
        if len(modes) == 1:
            raise ConnectionError("no network")
        assert (project, name, config["depth"]) == ("nanochat", "test", 3)
        return types.SimpleNamespace(log=logged.append, finish=lambda: finished.append(True))

    fake_wandb(monkeypatch, init)
    assert tiny.train("--run=test") == 0
    assert modes == [None, "offline"] and finished == [True]
    assert [row["step"] for row in logged if "val/bpb" in row] == [0, 4, 8]
    assert [row["step"] for row in logged if "train/loss" in row] == [0]


def test_wandb_may_break(base, monkeypatch, capsys):
    """In the middle of the run and at its end; and its files belong into the base directory."""
    def log(values):
        raise BrokenPipeError(32, "Broken pipe")

    def init(dir, **kwargs):
        assert dir == str(base)
        return types.SimpleNamespace(log=log, finish=lambda: None)

    monkeypatch.delenv("WANDB_DIR", raising=False)
    fake_wandb(monkeypatch, init)
    assert tiny.train("--run=test", "--num-iterations=2", "--eval-every=-1", "--save-every=-1") == 0
    assert capsys.readouterr().out.count("wandb failed (BrokenPipeError") == 1 and len(train_losses(base)) == 2


def test_an_empty_name_starts_no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_RUN", "")
    assert parse_settings(RunSettings, [], "").run == "dummy"
    fake_wandb(monkeypatch, lambda **kwargs: pytest.fail("a run"))
    init_wandb(types.SimpleNamespace(run=""), {}, rank=0).log({"loss": 1})


def test_no_wandb_at_all(base, monkeypatch, capsys):
    def init(**kwargs):
        raise RuntimeError("api_key not configured")

    fake_wandb(monkeypatch, init)
    assert tiny.train("--run=test", "--num-iterations=2", "--eval-every=-1", "--save-every=-1") == 0
    assert "api_key not configured" in capsys.readouterr().out
    assert len(train_losses(base)) == 2
