"""What the pretraining script derives from its flags, and its schedules, against nanochat's own numbers."""
import pytest
import torch

from nanochat.gpt import GPT
from nanochat.recipe import gpt_config, plan_horizon, scaling_params
from nanochat.schedules import lr_multiplier, muon_momentum, muon_weight_decay
from scripts.base_train import parse
from tests.golden.fixtures import load

CASES = load("recipe")["depths"] + load("recipe")["variations"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["arguments"]))
def test_recipe(case):
    args = parse(case["arguments"])
    shape = dict(aspect_ratio=args.aspect_ratio, head_dim=args.head_dim, sequence_len=args.max_seq_len,
                 vocab_size=case["vocab"], window_pattern=args.window_pattern)
    config = gpt_config(args.depth, **shape)
    assert [config.n_embd, config.n_head, config.n_kv_head] == [case["model_dim"], case["n_head"], case["n_kv_head"]]
    with torch.device("meta"):
        model = GPT(config)
    assert [left for left, _ in model.window_sizes] == case["window_sizes"]
    assert model.num_scaling_params() == case["params"]
    assert model.num_matmul_params() == case["num_matmul_params"]
    assert model.estimate_flops() == case["flops_per_token"]
    assert {n: model.estimate_decode_flops(int(n)) for n in case["decode_flops"]} == case["decode_flops"]
    assert {n: model.estimate_prefill_flops(int(n)) for n in case["prefill_flops"]} == case["prefill_flops"]
    assert model.kv_bytes_per_token() == case["kv_bytes_per_token_float32"]
    assert {n: model.kv_read_bytes(int(n)) for n in case["kv_read_bytes_float32"]} == case["kv_read_bytes_float32"]

    horizon = plan_horizon(model, shape, args.num_iterations, args.target_flops, args.target_param_data_ratio, args.total_batch_size)
    assert scaling_params(model) == case["scaling_params"]
    assert horizon.target_tokens == case["target_tokens"]
    assert horizon.total_batch_size == case["total_batch_size"]
    assert horizon.num_iterations == case["num_iterations"]
    assert horizon.total_tokens == case["total_tokens"]
    assert horizon.lr_scale == pytest.approx(case["batch_lr_scale"], rel=1e-12)
    weight_decay = args.weight_decay * horizon.weight_decay_scale
    assert weight_decay == pytest.approx(case["weight_decay_scaled"], rel=1e-12)
    assert horizon.total_batch_size // (args.device_batch_size * args.max_seq_len) == case["grad_accum_steps"]

    optimizer = model.setup_optimizer(unembedding_lr=args.unembedding_lr * horizon.lr_scale, embedding_lr=args.embedding_lr * horizon.lr_scale,
                                      matrix_lr=args.matrix_lr * horizon.lr_scale, weight_decay=weight_decay, scalar_lr=args.scalar_lr * horizon.lr_scale)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(optimizer.param_groups) == len(case["optimizer_groups"])
    for group, want in zip(optimizer.param_groups, case["optimizer_groups"]):
        assert names[id(group["params"][0])] == want["first"] and len(group["params"]) == want["count"]
        assert group["kind"] == want["kind"]
        for key in ("lr", "initial_lr", "eps", "weight_decay", "momentum", "beta2", "ns_steps"):
            assert group.get(key) == (pytest.approx(want[key], rel=1e-12) if want[key] is not None else None), key
    for step, multiplier, momentum, decay in case["lr_multiplier_momentum_weight_decay"]:
        n = horizon.num_iterations
        assert lr_multiplier(step, n, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac) == pytest.approx(multiplier, rel=1e-12)
        assert muon_momentum(step, n, args.warmdown_ratio) == pytest.approx(momentum, rel=1e-12)
        assert muon_weight_decay(step, n, weight_decay) == pytest.approx(decay, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("case", load("schedules")["pretraining"], ids=lambda case: str(case["num_iterations"]))
def test_schedules(case):
    n = case["num_iterations"]
    for step, multiplier, momentum, decay in case["rows"]:
        assert lr_multiplier(step, n, case["warmup_steps"], case["warmdown_ratio"], case["final_lr_frac"]) == pytest.approx(multiplier, rel=1e-12)
        assert muon_momentum(step, n, case["warmdown_ratio"]) == pytest.approx(momentum, rel=1e-12)
        assert muon_weight_decay(step, n, case["weight_decay"]) == pytest.approx(decay, rel=1e-12, abs=1e-15)
