"""What the stock model promises beyond nanochat's numbers."""
import pytest
import torch

from nanochat import kernel_choice
from nanochat.gpt import GPT, GPTConfig, linear
from tests.golden.fixtures import batch, build_model

CONFIG = dict(sequence_len=32, vocab_size=50, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")


@pytest.mark.parametrize("n_layer", [1, 2])
def test_backout_gets_no_update_where_the_final_norm_cancels_it(n_layer):
    """At depth 1 and 2 the layer backed out is the last one: nanochat's scalar has a noise gradient that Adam blows up."""
    model = build_model({**CONFIG, "n_layer": n_layer}, seed=1)
    optimizer = model.setup_optimizer()
    before = model.backout_lambda.clone()
    for step in range(3):
        idx, targets = batch(step, 2, 16, 50)
        model(idx, targets).backward()
        assert model.backout_lambda.grad == 0
        optimizer.step()
        model.zero_grad(set_to_none=True)
    assert torch.equal(model.backout_lambda, before)


def test_backout_learns_from_depth_3_on():
    model = build_model({**CONFIG, "n_layer": 3}, seed=1)
    idx, targets = batch(0, 2, 16, 50)
    model(idx, targets).backward()
    assert model.backout_lambda.grad.abs() > 1e-4


def test_the_future_does_not_leak():
    model = build_model(CONFIG, seed=2)
    idx, _ = batch(3, 1, 20, 50)
    changed = idx.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 50
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[:, :12], model(changed)[:, :12], rtol=0, atol=1e-6)


def test_padded_vocabulary_is_never_predicted_nor_trained_towards():
    model = build_model(CONFIG, seed=2)
    assert model.lm_head.weight.size(0) == 64
    idx, targets = batch(3, 2, 20, 50)
    assert model(idx).size(-1) == 50
    model(idx, targets).backward()
    assert (model.lm_head.weight.grad[50:] == 0).all()


def test_inference_cast_changes_no_logit_and_no_weight():
    model = build_model(CONFIG, seed=2)
    idx, _ = batch(3, 1, 20, 50)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model(idx)
        model.cast_for_inference()
        torch.testing.assert_close(model(idx), before, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_position_as_a_vector(monkeypatch, dtype):
    x, weight = torch.randn(1, 1, 48).to(dtype), torch.randn(32, 48).to(dtype)
    kernel_choice.settle()
    for alternative in kernel_choice.KERNELS["position"]:
        monkeypatch.setitem(kernel_choice._settled, "position", alternative)
        y = linear(x, weight)
        assert y.shape == (1, 1, 32) and y.dtype == dtype
        torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)


def test_greedy_generation_ignores_the_seed_and_sampling_does_not():
    model = build_model(CONFIG, seed=2)
    greedy = [list(model.generate([1, 2, 3], 8, temperature=0.0, seed=seed)) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    sampled = [list(model.generate([1, 2, 3], 16, seed=seed)) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_missing_parameter_in_the_counts_is_noticed():
    with torch.device("meta"):
        model = GPT(GPTConfig(**CONFIG))
    model.extra = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(AssertionError, match="missing"):
        model.num_scaling_params()
