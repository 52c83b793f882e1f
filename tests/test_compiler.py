"""Compilation changes no result, traces without breaks, and is left out where it cannot work."""
import os
import subprocess
import sys

import pytest
import torch

from nanochat import compiler, flash_attention
from nanochat.gpt import GPT, GPTConfig
from tests.golden.fixtures import batch, build_model

CONFIG = dict(sequence_len=512, vocab_size=50, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL")


def run_compiled(function: str) -> None:
    """Runs a function of this file in a process where torch.compile is on."""
    env = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    subprocess.run([sys.executable, "-c", f"from tests.test_compiler import {function}; {function}()"], env=env, check=True)


def loss_and_grads(call, model: GPT, idx, targets) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = call(idx, targets)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def check_same(call, model: GPT) -> None:
    idx, targets = batch(1, 2, 400, 50)
    for got, want in zip(loss_and_grads(call, model, idx, targets), loss_and_grads(model, model, idx, targets)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def whole_model_is_one_graph():
    """What CUDA compiles; traced here without generating code."""
    model = build_model(CONFIG, seed=1)
    check_same(torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager"), model)


def layers_share_graphs():
    from torch._dynamo.utils import counters
    graphs = []
    for n_layer in (4, 8):
        torch._dynamo.reset()
        counters.clear()
        model = build_model({**CONFIG, "n_layer": n_layer, "window_pattern": "L"}, seed=1)
        check_same(compiler.compile_model(model, "cpu"), model)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 4, graphs  # with and without a value embedding, and the two halves of the loss


def flex_attention_inside_the_model():
    """The route of CUDA without FlashAttention-3; on a CPU FlexAttention compiles too, forward only."""
    model = build_model({**CONFIG, "n_embd": 64}, seed=1)
    idx, _ = batch(1, 2, 400, 50)
    with torch.no_grad():
        want = model(idx)
        flash_attention._can_use_flex = lambda q: True
        torch.testing.assert_close(torch.compile(model, dynamic=False)(idx), want, rtol=0, atol=1e-4)
        for length in (300, 260):  # prompts, eagerly
            torch.testing.assert_close(model(idx[:, :length]), want[:, :length], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("function", [whole_model_is_one_graph, layers_share_graphs, flex_attention_inside_the_model], ids=lambda f: f.__name__)
def test_compiled(function):
    if function is flex_attention_inside_the_model and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch compiles FlexAttention for CPUs with AVX2 or newer")
    run_compiled(function.__name__)


def test_eager_where_compiling_is_off(capsys):
    compiler.why_not_compile.cache_clear()
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG))
    assert compiler.compile_model(model, "cpu") is model
    assert capsys.readouterr().out == ("Running eagerly, without torch.compile: TORCHDYNAMO_DISABLE is set\n")


def test_eager_without_a_compiler(tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("TORCHDYNAMO_DISABLE", "CXX")} | {"PATH": str(tmp_path)}
    program = "from nanochat.compiler import why_not_compile as why; print(why('cpu')); print(why('mps'))"
    result = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    cpu, mps = result.stdout.splitlines()
    assert cpu.startswith("no C++ compiler") and mps == "torch.compile is not reliable on mps"
