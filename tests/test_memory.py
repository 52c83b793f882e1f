"""The memory planner against what a real training step on this CPU allocates, as PyTorch's profiler saw it."""
import argparse
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanochat import compiler, cross_entropy, flash_attention, memory
from nanochat.layered_gpt import empty_gpt
from nanochat.recipe import LayerChanges, gpt_config
from scripts import base_train
from tests.tiny import ROOT

ROWS, CONTEXT = 4, 256


def config(**changes):
    return LayerChanges(**changes).apply(gpt_config(4, 32, 32, CONTEXT, 2048, "SL"))


def measured(config, tmp_path, compiled: bool = False) -> int:
    """Bytes at the fullest moment of a training step of two passes: the model and the optimizer's state, and what the step allocates."""
    model = empty_gpt(config)
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = model.setup_optimizer()
    if compiled:
        model.run_layer = compiler.compiled(model.run_layer, dynamic=False)
    tokens = torch.zeros(ROWS, CONTEXT, dtype=torch.long)

    def step():
        for _ in range(2):
            model(tokens, tokens).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    step()  # compiles, makes the optimizer's state
    kept = [*model.parameters(), *model.buffers(), *(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    events = [event["args"] for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]  # in earlier profiles of this process
    return max(event["Total Allocated"] for event in events) - before + sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("changes", [pytest.param({}, id="stock"), *(pytest.param(changes, id=name, marks=pytest.mark.slow) for name, changes in {
    "low rank": {"attn_rank": 16, "mlp_rank": 16}, "ngpt": {"block": "ngpt"}, "looped": {"loops": 2}, "swiglu": {"activation": "swiglu", "n_kv_head": 2, "order": "parallel"}}.items())])
def test_estimate_is_what_a_step_allocates(changes, tmp_path):
    estimate = sum(memory.training_memory(config(**changes), ROWS, "cpu", compiled=False).values())
    assert estimate == pytest.approx(measured(config(**changes), tmp_path), rel=0.03)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_estimate_is_what_a_compiled_step_allocates(tmp_path):
    """In a process of its own, as the others here run without the compiler."""
    code = "import sys, pathlib, tests.test_memory as t; print('bytes', t.measured(t.config(), pathlib.Path(sys.argv[1]), compiled=True))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TORCHDYNAMO_DISABLE": "0"})
    assert done.returncode == 0, done.stderr
    allocated = int(done.stdout.split("bytes ")[1])
    assert sum(memory.training_memory(config(), ROWS, "cpu", compiled=True).values()) == pytest.approx(allocated, rel=0.1)


@pytest.mark.slow
def test_estimate_is_what_an_h100_allocated():
    """Depth 12, 8 rows of 2,048 tokens, one pass, bfloat16, compiled: torch.cuda.max_memory_allocated was 9,345 MiB (docs/gpus.md)."""
    code = ("from nanochat.memory import training_memory; from nanochat.recipe import gpt_config; "
            "print('bytes', sum(training_memory(gpt_config(12, 64, 128, 2048, 32768, 'SSSL'), 8, 'cuda', True, passes=1).values()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NANOCHAT_DTYPE": "bfloat16"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("bytes ")[1]) / 2 ** 20 == pytest.approx(9345, rel=0.05)


def test_base_train_shows_every_stage_without_data_or_device(base_dir, capsys):
    shape = ["--aspect-ratio=32", "--head-dim=32", "--max-seq-len=64", "--device-batch-size=2"]
    assert base_train.main([*shape, "--grow-path=1x32,2x64", "--kappa=0.1", "--memory", "--device-type=cpu"]) == 0
    table = capsys.readouterr().out.split("Memory of one training step")[1]
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in table.splitlines()[2:4]}
    assert list(rows) == ["1x32", "2x64"] and os.listdir(base_dir) == []
    for *parts, total, _ in rows.values():
        assert total == pytest.approx(sum(parts), abs=0.003)
    assert rows["2x64"][0] > rows["1x32"][0]


@pytest.mark.parametrize("flags, message", [
    (["--device-batch-size=-1"], "--device-batch-size"), (["--device-type=tpu"], "unknown device type"), (["--max-seq-len=1"], "nothing to predict"),
    (["--grow-path=2x16,2x32", "--head-dim=16", "--grow-at=0.5"], "too small"), (["--lm-head-rank=400", "--aspect-ratio=256"], "vocabulary of 320"),
])
def test_what_has_no_memory_is_refused(base_dir, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("nanochat.run_plan.get_tokenizer", lambda: SimpleNamespace(get_vocab_size=lambda: 320))
    assert base_train.main(["--depth=2", "--memory", "--device-type=cpu", *flags]) == 2
    assert message in capsys.readouterr().err


def test_rows_multiply_activations_and_nothing_else():
    small, large = (memory.training_memory(config(), rows, "cuda", compiled=False) for rows in (8, 16))
    assert {role: small[role] for role in ("weights", "gradients", "optimizer")} == {role: large[role] for role in ("weights", "gradients", "optimizer")}
    assert large["activations"] == pytest.approx(2 * small["activations"], rel=0.05)


@pytest.mark.slow
def test_compiled_layers_take_less_and_leave_everything_as_it_was():
    """The stand-ins for kernels are gone afterwards, and a model in between is a real one."""
    eager = memory.training_memory(config(), ROWS, "cuda", compiled=False)
    compiled = memory.training_memory(config(), ROWS, "cuda", compiled=True)
    assert compiled["activations"] < eager["activations"] and compiled["logits"] < eager["logits"]
    assert flash_attention.flash_attn.flash_attn_func is flash_attention.flash_attn_func and "meta" not in cross_entropy.CHUNK_ELEMENTS


@pytest.mark.parametrize("text", ["RTX 3060", "RTX 2080=8", "A=8@0", "A=8@inf", "A=8@nan", "=8@1", "A=0@1"])
def test_cards_of_which_too_little_is_known(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a card; write name=GiB"):
        memory.card(text)


def test_no_share_of_the_peak(capsys):
    assert memory.main(["--mfu=0"]) == 2 and "--mfu=0" in capsys.readouterr().err


@pytest.mark.slow
def test_larger_cards_fit_more_rows_and_faster_ones_take_less_time(capsys):
    assert memory.main(["--depths", "2", "12", "--max-seq-len=512", "--eager", "--cards", "A=2@1", "B=3@4"]) == 0
    small, large = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    (rows_a, hours_a), (rows_b, hours_b) = (cell.strip(" |h").split(": ") for cell in small[3:])
    assert int(rows_a) <= int(rows_b) and float(hours_a) == pytest.approx(4 * float(hours_b), rel=0.1)
    assert large[3].strip(" |") == "no"
