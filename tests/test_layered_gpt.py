"""LayeredGPT: equal to the stock model where it should be, and right where layers differ."""
import json
from dataclasses import asdict, replace

import pytest
import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import LayeredGPT, LayeredGPTConfig, LayerSpec
from tests.golden.byte_tokenizer import ByteTokenizer
from tests.golden.fixtures import arrays, batch, build_model, load

STOCK = dict(sequence_len=64, vocab_size=300, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")
MIXED = (  # a layer of each kind
    LayerSpec(n_head=4, n_kv_head=2, head_dim=16, qk_dim=8, mlp_hidden=96, window=5, value_embed=True),
    LayerSpec(n_head=2, n_kv_head=1, head_dim=24, qk_dim=32, mlp_hidden=40, mlp_depth=3, order="mlp-attn"),
    LayerSpec(n_head=3, n_kv_head=3, head_dim=8, qk_dim=8, mlp_hidden=64, attn_rank=6, mlp_rank=10, order="parallel", window=20),
    LayerSpec(n_head=4, n_kv_head=2, head_dim=16, qk_dim=16, mlp_hidden=256, mlp_rank=16, value_embed=True),
)


def mixed_config(**changes) -> LayeredGPTConfig:
    return LayeredGPTConfig(**{**STOCK, "layers": MIXED, "backout_layer": 1, "lm_head_rank": 24, **changes})


def test_windows_follow_from_another_context_as_the_stock_model_s_do():
    at = lambda length: GPTConfig(**{**STOCK, "sequence_len": length})
    with torch.device("meta"):
        layered = LayeredGPTConfig.from_gpt(GPT(at(256)))
        assert LayeredGPT(layered.with_context(2048)).window_sizes == GPT(at(2048)).window_sizes
    own = mixed_config().with_context(2048)
    assert [layer.window for layer in own.layers] == [5, -1, 20, -1] and own.sequence_len == 2048


def initialized(config, seed: int = 0):
    with torch.device("meta"):
        model = (LayeredGPT if isinstance(config, LayeredGPTConfig) else GPT)(config)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


def trained(config, steps: int = 20) -> tuple[LayeredGPT, list[float]]:
    model = initialized(config)
    optimizer = model.setup_optimizer()
    losses = []
    for step in range(steps):
        idx, _ = batch(step % 2, 2, 40, 300)
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("case", load("gpt_forward")["cases"], ids=lambda case: case["name"])
def test_from_gpt_holds_the_golden_logits_and_counts(case):
    stock = build_model(case["config"], case["seed"], case["pad_vocab_size_to"])
    model = LayeredGPT.from_gpt(stock)
    idx, targets = batch(case["batch_seed"], case["B"], case["T"], case["config"]["vocab_size"])
    with torch.no_grad():
        logits = model(idx)
        assert torch.equal(logits, stock(idx)) and torch.equal(model(idx, targets), stock(idx, targets))
    torch.testing.assert_close(logits[:, case["logits_positions"]], torch.from_numpy(arrays("gpt_forward")[f"{case['name']}/logits"]), rtol=0, atol=1e-5)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for count in ("num_scaling_params", "num_matmul_params", "estimate_flops", "kv_bytes_per_token"):
        assert getattr(model, count)() == case[count], count
    for count in ("estimate_decode_flops", "estimate_prefill_flops", "kv_read_bytes"):
        assert {n: getattr(model, count)(int(n)) for n in case[count]} == case[count], count


def test_same_initialization_and_training_as_the_stock_model():
    stock = initialized(GPTConfig(**STOCK))
    config = LayeredGPTConfig.from_gpt(stock)
    layered = initialized(config)
    for model in (stock, layered):
        optimizer = model.setup_optimizer()
        for step in range(3):
            idx, targets = batch(step, 2, 30, 300)
            model(idx, targets).backward()
            optimizer.step()
            model.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), layered.state_dict().values(), strict=True))


def test_mixed_layers_learn():
    _, losses = trained(mixed_config())
    assert losses[-1] < losses[0] - 0.3


def test_mixed_layers_do_not_see_the_future_and_decode_through_a_cache():
    model, _ = trained(mixed_config(), steps=5)
    idx, _ = batch(7, 1, 30, 300)
    changed = idx.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 300
    with torch.no_grad():
        full = model(idx)
        torch.testing.assert_close(model(changed)[:, :20], full[:, :20], rtol=0, atol=1e-5)
        cache = Engine(model, ByteTokenizer(load("decode")["generate"]["special"]))._new_cache(1, 30)
        cache.last_logits_only = False
        pieces = [model(idx[:, a:b], kv_cache=cache) for a, b in ((0, 10), (10, 15), *((i, i + 1) for i in range(15, 30)))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=0, atol=2e-5)


def test_engine_equals_generation_without_a_cache():
    model, _ = trained(mixed_config(), steps=5)
    engine = Engine(model, ByteTokenizer(load("decode")["generate"]["special"]))
    (row,), _ = engine.generate_batch([1, 2, 3], max_tokens=12, temperature=0.0)
    assert row[3:] == list(model.generate([1, 2, 3], 12, temperature=0.0))[:len(row) - 3]


def test_configuration_round_trips_through_a_checkpoint(tmp_path):
    model, _ = trained(mixed_config(), steps=2)
    checkpoints.save_checkpoint(tmp_path, 2, model.state_dict(), None, {"step": 2, "model_config": asdict(model.config)})
    model_data, _, meta = checkpoints.load_checkpoint(tmp_path, 2, "cpu")
    loaded = checkpoints.model_from_config(meta["model_config"])
    checkpoints.load_weights(loaded, model_data, "cpu")
    assert isinstance(loaded, LayeredGPT) and loaded.config == model.config
    idx, _ = batch(3, 2, 20, 300)
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))
    assert json.loads(json.dumps(asdict(model.config)))["layers"][2]["order"] == "parallel"


def test_a_layer_inserted_changes_no_other():
    """Windows, value embeddings and backout are facts of the layers, not of their number."""
    config = mixed_config()
    model = initialized(config)
    deeper = LayeredGPTConfig(**{**asdict(config), "n_layer": 5, "layers": (*MIXED, replace(MIXED[1]))})
    with torch.device("meta"):
        other = LayeredGPT(deeper)
    assert other.window_sizes[:4] == model.window_sizes and other.backout_layer == model.backout_layer
    assert list(other.value_embeds) == list(model.value_embeds)


def test_flops_count_the_factors_and_both_head_widths():
    config = mixed_config()
    with torch.device("meta"):
        model = LayeredGPT(config)
    by_hand = 0
    for layer in config.layers:
        for rows, columns, rank in ((layer.n_head * layer.qk_dim, 64, layer.attn_rank), (layer.n_kv_head * layer.qk_dim, 64, layer.attn_rank),
                                    (layer.n_kv_head * layer.head_dim, 64, layer.attn_rank), (64, layer.n_head * layer.head_dim, layer.attn_rank),
                                    (layer.mlp_hidden, 64, layer.mlp_rank), (64, layer.mlp_hidden, layer.mlp_rank),
                                    *[(layer.mlp_hidden, layer.mlp_hidden, layer.mlp_rank)] * (layer.mlp_depth - 1)):
            by_hand += rank * (rows + columns) if rank else rows * columns
        by_hand += 12 * layer.n_kv_head if layer.value_embed else 0
    by_hand += 24 * (320 + 64) + 24  # the head's factors, the smear gate
    assert model.num_matmul_params() == by_hand
    windows = [5, 64, 20, 64]
    attention = sum(6 * layer.n_head * (layer.qk_dim + layer.head_dim) * window for layer, window in zip(config.layers, windows, strict=True))
    assert model.estimate_flops() == 6 * by_hand + attention


@pytest.mark.parametrize("change, reason", [
    (dict(n_head=3, n_kv_head=2), "evenly"), (dict(qk_dim=7), "pairs"), (dict(order="mlp"), "order"), (dict(mlp_hidden=0), "1 or more"),
    (dict(attn_rank=65), "attention rank"), (dict(mlp_rank=-1), "MLP rank"),
])
def test_impossible_layers_are_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=f"layer 0: .*{reason}"):
        mixed_config(layers=(replace(MIXED[0], **change), *MIXED[1:]))
    with pytest.raises(checkpoints.UsageError, match=reason):
        checkpoints.model_from_config({**asdict(mixed_config()), "layers": [asdict(replace(MIXED[0], **change)), *map(asdict, MIXED[1:])]})


@pytest.mark.parametrize("change", [dict(n_layer=3), dict(backout_layer=4), dict(lm_head_rank=65)])
def test_impossible_models_are_refused(change):
    with pytest.raises(ValueError):
        mixed_config(**change)
