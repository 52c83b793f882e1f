"""Compilation changes no result, traces without breaks, and is left out where it cannot work.

What CUDA compiles is traced here without generating code (the backends `eager` and `aot_eager`): graphs and breaks are the same.
"""
import gc
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from nanochat import compiler, flash_attention, optim
from nanochat.gpt import GPT, GPTConfig
from nanochat.growth import grow
from nanochat.growth.target import grown_config
from nanochat.kernel_choice import machine
from nanochat.layered_gpt import build_gpt
from nanochat.recipe import LayerChanges
from tests.golden.fixtures import batch, build_model
from tests.tiny import ROOT

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


def whole(model: GPT):
    """What CUDA compiles, and nothing else (the loss is on its own). A graph break would be an error."""
    compiler.why_not_compile = lambda device_type: "only this"
    return compiler.compiled(model, dynamic=False, fullgraph=True, backend="eager")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def whole_model_is_one_graph():
    model = build_model(CONFIG, seed=1)
    check_same(compiler.compiled(model, dynamic=False, fullgraph=True, backend="aot_eager"), model)


def five_stages_of_growth():
    """Training and evaluation of each stage are one graph each, without a break: ten in all, where PyTorch by default stops compiling after eight."""
    idx, targets = batch(1, 2, 100, 50)
    model, forgotten = build_model({**CONFIG, "n_layer": 2}, seed=1), []
    for stage, (depth, width) in enumerate(((2, 32), (4, 32), (6, 32), (6, 64), (8, 64)), 1):
        if stage > 1:
            forgotten.append(weakref.ref(model))
            model, _ = grow(model, grown_config(model.config, depth, width))
        run = whole(model)
        for _ in range(2):  # the second time nothing is compiled
            check_same(run, model)
            with torch.no_grad():
                torch.testing.assert_close(run(idx, targets, loss_reduction="none"), model(idx, targets, loss_reduction="none"))
            assert graphs() == 2 * stage, (graphs(), stage)
    assert not torch._dynamo.utils.counters["graph_break"]
    del run
    gc.collect()
    assert not any(old() for old in forgotten)  # what is compiled keeps no small model alive


def layers_grow_in_depth_for_nothing():
    """On a CPU only new widths are compiled."""
    model, counts = build_model({**CONFIG, "n_layer": 2}, seed=1), []
    compiler.why_not_compile = lambda device_type: "only this"
    for depth, width in ((2, 32), (4, 32), (6, 32), (6, 64), (8, 64)):
        if depth > 2:
            model, _ = grow(model, grown_config(model.config, depth, width))
        check_same(compiler.CompiledLayers(model, fullgraph=True, backend="eager"), model)
        counts.append(graphs())
    assert counts[0] < counts[1] == counts[2] < counts[3] == counts[4], counts  # the first growth makes a LayeredGPT of the stock model


def ranks_of_their_own():
    """--depth=20 --rank=8 --rank-schedule=linear: 20 kinds of layers, more than PyTorch compiles by default, and 81 groups of Muon."""
    config = GPTConfig(**{**CONFIG, "n_layer": 20, "window_pattern": "L"})
    model = build_gpt(LayerChanges(attn_rank=8, mlp_rank=8, rank_schedule="linear").apply(config))
    model.init_weights()
    idx, targets = batch(1, 2, 100, 50)
    check_same(whole(model), model)
    assert graphs() == 1
    layers = compiler.CompiledLayers(model, fullgraph=True, backend="eager")  # on a CPU
    check_same(layers, model)
    with torch.no_grad():
        layers(idx, targets)
    assert len({layer.attn_rank for layer in model.config.layers}) > 8 and graphs() <= 1 + 2 * 20, graphs()

    shapes = {(len(group["params"]), *group["params"][0].shape) for group in model.setup_optimizer().param_groups if group["kind"] == "muon"}
    assert len(shapes) > 30, len(shapes)
    torch._dynamo.utils.counters.clear()
    compiled = compiler.compiled(optim.muon_step_fused.__wrapped__, dynamic=True, fullgraph=True, backend="eager")
    for count, rows, columns in sorted(shapes):
        stacks = [torch.randn(count, rows, columns) for _ in range(3)]
        second = torch.rand(count, rows, 1) if rows >= columns else torch.rand(count, 1, columns)
        arguments = *stacks, second, *(torch.tensor(x) for x in (0.9, 0.02, 0.1, 0.9)), 5, -1 if rows >= columns else -2
        plain = [x.clone() if torch.is_tensor(x) else x for x in arguments]
        compiled(*arguments)
        optim.muon_step_fused(*plain)
        torch.testing.assert_close(arguments[1], plain[1])
    assert graphs() <= 6, graphs()  # square, tall and wide ones, one or many of them


def too_many_graphs_are_an_error():
    compiled = compiler.compiled(lambda x: x + 1, dynamic=False, backend="eager")
    torch._dynamo.config.recompile_limit = 3
    try:
        for n in range(2, 7):
            compiled(torch.ones(n))
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return
    raise AssertionError("it went on eagerly")


def layers_share_graphs():
    from torch._dynamo.utils import counters
    graphs = []
    assert compiler.why_not_compile("cpu") == ""  # it compiles something itself
    for n_layer in (4, 8):
        torch._dynamo.reset()
        counters.clear()
        model = build_model({**CONFIG, "n_layer": n_layer, "window_pattern": "L"}, seed=1)
        check_same(compiler.compile_model(model, "cpu"), model)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= 4, graphs  # with and without a value embedding, and the two halves of the loss


def flex_attention_inside_the_model():
    """The route of CUDA without FlashAttention-3, untouched but for the device; on a CPU FlexAttention compiles too, forward only."""
    model = build_model({**CONFIG, "n_embd": 64}, seed=1)
    idx, _ = batch(1, 2, 400, 50)
    with torch.no_grad():
        want = model(idx)
        flash_attention.FLEX_DEVICES = ("cpu",)
        torch.testing.assert_close(compiler.compiled(model, dynamic=False, fullgraph=True)(idx), want, rtol=0, atol=1e-4)
        for length in (300, 260):  # prompts, eagerly
            torch.testing.assert_close(model(idx[:, :length]), want[:, :length], rtol=0, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("function", [
    whole_model_is_one_graph, layers_share_graphs, five_stages_of_growth, layers_grow_in_depth_for_nothing, ranks_of_their_own, too_many_graphs_are_an_error, flex_attention_inside_the_model], ids=lambda f: f.__name__)
def test_compiled(function):
    if function is flex_attention_inside_the_model and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("PyTorch compiles FlexAttention for CPUs with AVX2 or newer")
    run_compiled(function.__name__)


def test_eager_where_compiling_is_off(capsys):
    compiler._why_not.cache_clear()
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG))
    assert compiler.compile_model(model, "cpu") is model
    assert capsys.readouterr().out == ("Running eagerly, without torch.compile: TORCHDYNAMO_DISABLE is set\n")


@pytest.mark.slow
def test_no_command_waits_for_the_compiler():
    """It takes longer to import than all else; the first compilation imports it."""
    program = "import sys, scripts.base_train, scripts.base_eval, scripts.chat_web, scripts.tok_train; sys.exit(any(name in sys.modules for name in ('torch._dynamo', 'torch._inductor.compile_fx', 'sympy')))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.slow
def test_eager_without_a_compiler(tmp_path):
    env = {key: value for key, value in os.environ.items() if key not in ("TORCHDYNAMO_DISABLE", "CXX")} | {"PATH": str(tmp_path)}
    program = "from nanochat.compiler import why_not_compile as why; print(why('cpu')); print(why('mps'))"
    result = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    cpu, mps = result.stdout.splitlines()
    assert cpu.startswith("no C++ compiler") and mps == "torch.compile is not reliable on mps"


def why_not_on_a_cpu(tmp_path, **env: str) -> str:
    env = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"} | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), **env}
    program = "from nanochat.compiler import why_not_compile as why; print('why:', why('cpu'))"
    result = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, text=True)
    return next(line for line in result.stdout.splitlines() if line.startswith("why:"))[5:]


@pytest.mark.slow
def test_eager_with_a_compiler_that_cannot_compile(tmp_path):
    """It answers to --version like any other, but lacks OpenMP's header."""
    compiler_ = tmp_path / "c++"
    compiler_.write_text(f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv:\n    print('g++ (Debian) 12.2.0')\nelse:\n"
                         "    sys.exit('kernel.cpp:3:10: fatal error: omp.h: No such file or directory')\n")
    compiler_.chmod(0o755)
    why = why_not_on_a_cpu(tmp_path, CXX=str(compiler_))
    assert why.startswith("the compiler is there, but a test failed") and "omp.h: No such file" in why


@pytest.mark.slow
def test_eager_where_nothing_can_be_cached(tmp_path):
    (tmp_path / "file").write_text("")
    why = why_not_on_a_cpu(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert why.startswith("no folder can be made at TORCHINDUCTOR_CACHE_DIR=") and why.endswith("(Not a directory)")


def test_what_triton_needs(monkeypatch, tmp_path):
    """On CUDA too a compiler and Python's headers are missed by name, not by a traceback."""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C compiler, which Triton needs" in compiler._missing("cuda")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "no Python headers" in compiler._missing("cuda")
    (tmp_path / "Python.h").write_text("")
    assert compiler._missing("cuda") == ""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "no working Triton" in compiler._missing("cuda")


# -----------------------------------------------------------------------------
# What is kept between runs


def test_a_beginning_of_a_library_is_removed(tmp_path, capsys):
    whole_ = Path(next(path for path in sys.path if (Path(path) / "torch").is_dir()), "torch", "lib", "libshm.so").read_bytes()
    names = {"cwhole.main.so": whole_, "cempty.main.so": b"", "cheader.main.so": whole_[:64], "cbuilt.main.so": whole_[:-1]}
    for name, content in names.items():
        (tmp_path / name[1:3]).mkdir()
        (tmp_path / name[1:3] / name).write_bytes(content)
    (tmp_path / "locks").mkdir()
    with FileLock(tmp_path / "locks" / "cbuilt.lock"):  # another process is at it
        compiler.remove_truncated(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*/*.so")) == ["cbuilt.main.so", "cwhole.main.so"]
    assert capsys.readouterr().out.count("is only the beginning of a file") == 2
    compiler.remove_truncated(tmp_path)
    assert [path.name for path in tmp_path.glob("*/*.so")] == ["cwhole.main.so"]


def run_once(env: dict[str, str]) -> str:
    """Compiles a function in a process of its own."""
    program = ("import torch; from nanochat import compiler; print('why:', compiler.why_not_compile('cpu'));"
               "print(compiler.compiled(lambda x: (3 * x).cos())(torch.zeros(100)).sum().item()); print(torch._dynamo.utils.counters['stats']['unique_graphs'], 'graphs')")
    env = {key: value for key, value in os.environ.items() if key not in ("TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR")} | env
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "why: \n100.0" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_what_is_compiled_is_kept_and_mended(tmp_path):
    env = {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    assert "2 graphs" in run_once(env)  # one of them the trial
    folder, = (tmp_path / "base" / "compiled").iterdir()
    assert machine() == folder.name
    assert "1 graphs" in run_once(env), "the trial is not repeated"
    for library in folder.glob("*/*.so"):
        library.write_bytes(library.read_bytes()[:1000])
    assert "is only the beginning of a file" in run_once(env)
    (folder / "works").write_text("another compiler")
    assert "2 graphs" in run_once(env)
    assert "2 graphs" in run_once(env | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "mine")})
    assert (tmp_path / "mine" / "works").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_instruction_sets_are_asked_for_only_where_the_trial_fails(tmp_path, monkeypatch):
    import torch._inductor.config as config
    monkeypatch.setattr(config.cpp, "vec_isa_ok", None)
    trials: list = []  # what was granted in each

    def first_fails(device):
        trials.append(config.cpp.vec_isa_ok)
        if len(trials) == 1:
            raise RuntimeError("unknown flag")

    monkeypatch.setattr(compiler, "_compile_a_line", first_fails)
    proof = tmp_path / "works"
    compiler._try_on_cpu(proof)
    assert trials == [True, None]
    compiler._try_on_cpu(proof)  # the next run
    assert trials == [True, None] and config.cpp.vec_isa_ok is None
    proof.write_text("another compiler")
    compiler._try_on_cpu(proof)
    compiler._try_on_cpu(proof)
    assert trials == [True, None, True] and config.cpp.vec_isa_ok is True


# -----------------------------------------------------------------------------
# Short trainings


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    monkeypatch.setattr(compiler, "_why_not", lambda device_type: "")
    for name in ("_decided", "_settled"):
        monkeypatch.setattr(compiler, name, "")


@pytest.mark.parametrize("seconds, compiled", [(5, False), (10_000, True)])
def test_a_short_training_is_not_compiled(undecided, monkeypatch, capsys, seconds, compiled):
    assert compiler.state() is None and not compiler.why_not_compile("cpu")
    monkeypatch.setattr(compiler, "expected_seconds", lambda flops: seconds)
    compiler.decide("cpu", 1e12)
    assert compiler.state() is compiled
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG))
    run = compiler.compile_model(model, "cpu")
    assert isinstance(run, compiler.CompiledLayers) is compiled
    assert ("in a run of about 5 s compiling takes longer than it saves" in capsys.readouterr().out) is not compiled

    compiler.decide("cpu", 1e12, before=not compiled)
    assert compiler.state() is not compiled, "a run goes on as it began"
    compiler.decide("cuda", 1.0)
    assert compiler.state() is True, "only a CPU's time is foreseen"


@pytest.mark.parametrize("before", [None, False])
def test_the_user_compiles_a_short_training(undecided, monkeypatch, before):
    monkeypatch.setattr(compiler, "expected_seconds", lambda flops: 1)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    compiler.decide("cpu", 1.0, before)
    assert compiler.state() is True


def test_a_longer_training_takes_longer():
    assert 0 < compiler.expected_seconds(1e9) < compiler.expected_seconds(1e14)
