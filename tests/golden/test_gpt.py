"""The stock model against nanochat's numbers: shapes, logits, losses, gradients, counts, initialization, whole training steps."""
import math

import numpy as np
import pytest
import torch

from nanochat.gpt import GPT, GPTConfig, apply_rotary_emb, has_ve, norm
from tests.golden import inputs
from tests.golden.exceptions import EXCEPTIONS
from tests.golden.fixtures import arrays, batch, build_model, load, tensor

BY_NAME = dict(ids=lambda case: case["name"])


def close(got, want, tolerance):
    got = got.detach().double().numpy() if torch.is_tensor(got) else np.asarray(got, dtype=np.float64)
    np.testing.assert_allclose(got, np.asarray(want, dtype=np.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", load("gpt_forward")["cases"], **BY_NAME)
def test_forward(case):
    expected, name = arrays("gpt_forward"), case["name"]
    model = build_model(case["config"], case["seed"], case["pad_vocab_size_to"])
    state = model.state_dict()
    assert list(state) == case["state_dict_order"]
    assert [[key, list(state[key].shape), str(state[key].dtype).removeprefix("torch.")] for key in sorted(state)] == case["state_dict_sorted"]
    assert [key for key, _ in model.named_parameters()] == case["parameter_order"]
    assert [list(window) for window in model.window_sizes] == case["window_sizes"]

    idx, targets = batch(case["batch_seed"], case["B"], case["T"], case["config"]["vocab_size"])
    with torch.no_grad():
        logits = model(idx)
        close(model(idx, targets, loss_reduction="none"), expected[f"{name}/loss_none"], 1e-4)
        assert float(model(idx, targets, loss_reduction="sum")) == pytest.approx(case["loss_sum"], rel=1e-5)
    assert logits.dtype == torch.float32 and list(logits.shape) == case["logits_shape"]
    close(logits[:, case["logits_positions"]], expected[f"{name}/logits"], 1e-5)

    loss = model(idx, targets)
    close(loss, case["loss_mean"], 2e-5)
    loss.backward()
    scale = case["grad_global_norm"]
    for key, parameter in model.named_parameters():
        want, grad = case["grads"][key], parameter.grad.double()
        close(grad.norm() / scale, want["norm"] / scale, 1e-5)
        close(grad.sum() / scale, want["sum"] / scale, 1e-4)
        close(grad.reshape(-1)[:4] / scale, np.array(want["first"]) / scale, 1e-6)

    assert model.num_scaling_params() == case["num_scaling_params"]
    assert model.num_matmul_params() == case["num_matmul_params"]
    assert model.estimate_flops() == case["estimate_flops"]
    assert model.kv_bytes_per_token() == case["kv_bytes_per_token"]
    for method in ("estimate_decode_flops", "estimate_prefill_flops", "kv_read_bytes"):
        assert {n: getattr(model, method)(int(n)) for n in case[method]} == case[method], method


PARTS = load("gpt_parts")


def meta_model(**config) -> GPT:
    with torch.device("meta"):
        return GPT(GPTConfig(**config))


@pytest.mark.parametrize("case", PARTS["refused_configs"], ids=lambda case: str(list(case["config"].values())))
def test_refused_configs(case):
    if case["config"]["window_pattern"]:
        assert case["raises"] == "AssertionError"
    else:
        assert ("gpt_parts", "empty window_pattern") in EXCEPTIONS
    with pytest.raises(AssertionError):
        meta_model(**case["config"])


def test_sequence_lengths():
    model = build_model(PARTS["sequence_lengths_config"], 1)
    for case in PARTS["sequence_lengths"]:
        tokens = torch.zeros((1, case["T"]), dtype=torch.long)
        if case["raises"]:
            with pytest.raises(AssertionError):
                model(tokens)
        else:
            model(tokens)


def test_windows_and_value_embeddings():
    for length, pattern, n_layer, left, right in PARTS["windows"]:
        sizes = meta_model(sequence_len=length, vocab_size=64, n_layer=n_layer, n_head=1, n_kv_head=1, n_embd=32, window_pattern=pattern).window_sizes
        assert ([a for a, _ in sizes], sorted({b for _, b in sizes})) == (left, right)
    for n_layer, wanted in PARTS["has_value_embedding"].items():
        assert [has_ve(i, int(n_layer)) for i in range(int(n_layer))] == wanted


def test_rotary_and_norm():
    expected = arrays("gpt_parts")
    x, y = inputs.normals(PARTS["seed"], [PARTS["rotary_input_shape"], PARTS["norm_input_shape"]], [1.0, PARTS["norm_input_scale"]])
    model = build_model(PARTS["sequence_lengths_config"], 1)
    first, end = PARTS["rotary_positions"]
    for head_dim in (16, 64):
        cos, sin = model._precompute_rotary_embeddings(600, head_dim)
        close(cos[0, PARTS["rotary_table_rows"], 0], expected[f"cos{head_dim}"], 1e-4)
        close(sin[0, PARTS["rotary_table_rows"], 0], expected[f"sin{head_dim}"], 1e-4)
        if head_dim == 16:
            close(apply_rotary_emb(tensor(x), cos[:, first:end], sin[:, first:end]), expected["rotary_out"], 1e-4)
    close(norm(tensor(y)), expected["norm_out"], 1e-5)


@pytest.mark.parametrize("case", load("init_weights")["cases"], ids=lambda case: f"d{case['config']['n_layer']}")
def test_init_weights(case):
    model = meta_model(**case["config"])
    model.to_empty(device="cpu")
    torch.manual_seed(case["torch_seed"])
    model.init_weights()
    for key, value in model.state_dict().items():
        want, exact = case["parameters"][key], value.double()
        close([exact.mean(), exact.std(unbiased=False), exact.min(), exact.max()], [want["mean"], want["std"], want["min"], want["max"]], 1e-5)
        close(value.reshape(-1)[:6], want["first"], 1e-6)
        assert bool((value == 0).all()) == want["exactly_zero"]


@pytest.mark.parametrize("table", load("param_groups")["tables"], ids=lambda table: f"{table['case']}-{table['label']}")
def test_param_groups(table):
    model = build_model(table["config"], 1, table["pad_vocab_size_to"])
    names = {id(p): key for key, p in model.named_parameters()}
    optimizer = model.setup_optimizer(**table["arguments"])
    assert len(optimizer.param_groups) == len(table["groups"])
    for group, want in zip(optimizer.param_groups, table["groups"]):
        assert [names[id(p)] for p in group["params"]] == want["params"]
        for key in want.keys() - {"params", "shapes", "numel"}:
            assert group[key] == (pytest.approx(want[key], rel=1e-12) if isinstance(want[key], (float, list)) else want[key]), key


@pytest.mark.parametrize("case", load("train_trace")["cases"], **BY_NAME)
def test_training_steps(case):
    model = build_model(case["config"], case["seed"])
    optimizer = model.setup_optimizer(**case["optimizer_arguments"])
    micro_batches = case["micro_batches"]
    for step, (multiplier, momentum, weight_decay) in enumerate(case["lr_mult_momentum_wd"]):
        for micro in range(micro_batches):
            idx, targets = batch(case["seed"] + 1 + step * micro_batches + micro, case["B"], case["T"], case["token_range"], case["ignore_frac"])
            loss = model(idx, targets)
            close(loss, case["micro_losses"][step][micro], 1e-3)
            (loss / micro_batches).backward()
        grad_norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in model.parameters()))
        assert grad_norm == pytest.approx(case["grad_norms"][step], rel=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"], group["weight_decay"] = momentum, weight_decay
        optimizer.step()
        model.zero_grad(set_to_none=True)
    for key, value in model.state_dict().items():
        assert float(value.double().norm()) == pytest.approx(case["final_state"][key]["norm"], rel=1e-3), key
