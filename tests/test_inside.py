"""What analysis/inside.py shows is what the model computes."""
from dataclasses import replace

import pytest
import torch

from analysis import inside
from nanochat import common, gpt
from nanochat.gpt import GPTConfig
from nanochat.growth import grow, grown_config
from nanochat.layered_gpt import LayeredGPTConfig, build_gpt
from tests import tiny

STOCK = dict(sequence_len=32, vocab_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SL")


def random_model(**layers):
    """Stock, or of layers that differ from the stock ones; all matrices random, so that everything depends on everything."""
    torch.manual_seed(1)
    model = build_gpt(GPTConfig(**STOCK))
    model.init_weights()
    if layers:
        config = LayeredGPTConfig.from_gpt(model)
        model = build_gpt(replace(config, layers=tuple(replace(layer, **layers) for layer in config.layers)))
        model.init_weights()
    for name, p in model.named_parameters():
        if p.dim() == 2 and ".h." in name:
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)
    return model.float().eval()


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    for module in (common, gpt):
        monkeypatch.setattr(module, "COMPUTE_DTYPE", torch.float32)


VARIANTS = [{}, {"attn_rank": 8, "mlp_rank": 8}, {"block": "ngpt"}, {"block": "ngpt", "activation": "swiglu"}, {"order": "parallel", "mlp_depth": 2}]


@pytest.mark.parametrize("layers", VARIANTS, ids=str)
def test_what_is_recorded_is_what_is_computed(layers):
    model, ids = random_model(**layers), torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    alone = model(ids)
    mixed, values, mlps = [], [], []
    for block in model.transformer.h:
        block.attn.c_proj.register_forward_pre_hook(lambda _, inputs: mixed.append(inputs[0].detach()))
        block.mlp.register_forward_hook(lambda _, inputs, output: mlps.append(output.detach()))
        attend = block.attn.attend  # with the values that it is given, value embeddings among them
        block.attn.attend = lambda q, k, v, *args, attend=attend: values.append(v.detach()) or attend(q, k, v, *args)
    with inside.recorded(model) as seen:
        assert torch.equal(model(ids), alone), "watching changes nothing"
    for layer, block in enumerate(model.transformer.h):
        probs = seen.attention[layer]
        assert probs.sum(-1).allclose(torch.ones(1)) and (probs.triu(1) == 0).all()
        heads = (probs @ values[layer].transpose(1, 2).repeat_interleave(2, dim=1)).transpose(1, 2)
        if "s_head" in dict(block.attn.named_parameters()):
            heads = heads * block.attn.s_head[:, None]
        assert heads.flatten(2).allclose(mixed[layer], atol=1e-5)
        assert block.mlp.c_proj(seen.units[layer]).allclose(mlps[layer], atol=1e-5)
    assert len(values) == len(mlps) == len(seen.stream) == 2
    left = seen.stream[1] - model._backout() * seen.stream[model.backout_layer]
    assert model._cap(model.lm_head(model.norm(left))).allclose(alone, atol=1e-5), "the stream is what the head reads"
    read, _ = inside.lens(model, ids[0])
    assert len(read) == 2 and read[-1].allclose(alone[0].log_softmax(-1), atol=1e-5) and not read[0].allclose(read[1], atol=1e-2)


def test_a_window_and_both_directions_hide_what_the_kernel_hides():
    q, k = (torch.randn(1, 6, 2, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    seen = lambda window: (inside.probabilities(q, k, window)[0, 0] > 0).long().tolist()
    assert seen((1, 0))[3] == [0, 0, 1, 1, 0, 0] and seen((1, 1))[3] == [0, 0, 1, 1, 1, 0]
    assert seen((-1, -1))[3] == [1] * 6 and seen((-1, 0))[3] == [1, 1, 1, 1, 0, 0]


def test_scores_of_heads_that_look_nowhere_and_of_one_that_looks_back(monkeypatch):
    model = random_model()
    def looks_back(q, k, *_):
        probs = torch.zeros(q.size(0), q.size(2), q.size(1), q.size(1))
        probs[:, 0].diagonal(-1, -2, -1).fill_(1.0)  # the token before
        probs[:, 1].diagonal(-7, -2, -1).fill_(1.0)  # 8 tokens come twice: the one after its last occurrence
        return probs
    monkeypatch.setattr(inside, "probabilities", looks_back)
    scores = inside.head_scores(model, length=8, rows=2)
    assert [[round(x, 3) for x in layer] for layer in scores["previous"]] == [[1, 0, 0, 0]] * 2
    assert [[round(x, 3) for x in layer] for layer in scores["induction"]] == [[0, 1, 0, 0]] * 2


def test_nothing_stays_behind():
    model = random_model()
    with inside.recorded(model) as seen:
        model(torch.zeros(1, 8, dtype=torch.long))
    assert len(seen.attention) == 2
    model(torch.zeros(1, 6, dtype=torch.long))
    assert seen.attention[0].size(-1) == seen.units[0].size(1) == 8 and "attend" not in model.transformer.h[0].attn.__dict__


def test_clones_are_twins():
    model, rows = random_model(), torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
    shares = lambda model: [inside.twins(values) for values in inside.neurons(model, rows)]
    grown = lambda mode: grow(model, grown_config(model.config, n_embd=128), mode=mode)[0].eval()
    assert max(shares(model)) < 0.1
    assert min(shares(grown("hyperclone"))) > 0.95
    assert inside.twins(torch.zeros(10, 3)) == 0 and inside.quiet(torch.zeros(10, 3)) == 1


def test_units_that_hardly_fire_are_no_twins():
    """Two that fire on the same two tokens of a thousand correlate by chance."""
    values = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0))
    values[:, 1:3] = 0
    values[[5, 700], 1:3] = 1.0
    assert inside.twins(values) == 0 and inside.quiet(values) == 0.5
    values[:, 3] = 2 * values[:, 0]
    assert inside.twins(values) == 1
    values[:, 1:3] = torch.nn.functional.gelu(20 * values[:, 1:3] - 6)  # GELU is never quite at 0
    assert inside.quiet(values) == 0.5


def test_pages_of_a_run(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(finished_run))
    out = tmp_path / "pages"
    text = "--text=a <b>bold</b> & strange text"
    assert inside.main(["d3@4", "d3", f"--out={out}", text, "--rows=2", "--length=16", "--neurons=2"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["d3@4.html", "d3@8.html"]
    html = (out / "d3@8.html").read_text()
    assert "<b>bold" not in html and "http" not in html and html.count("<svg") == 9, "no markup of the text, nothing loaded, a map for each head"
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[1].startswith("| d3@4 | ") and table[2].startswith("| d3@8 | ")
    for flags, says in ((["missing"], "missing"), (["d3", "--text=a"], "too short"), (["d3", "--rows=100000"], "smaller --rows")):
        assert inside.main([*flags, f"--out={tmp_path / 'none'}"]) == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "none").glob("*.html"))


def test_a_model_of_hidden_tokens_tells_no_next_one(base_dir, tmp_path, capsys):
    tiny.prepare(base_dir)
    assert tiny.train("--objective=mlm", "--num-iterations=1", "--eval-every=-1") == 0
    assert inside.main(["d3", f"--out={tmp_path / 'none'}"]) == 2 and "tells no next token" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "none").glob("*.html"))
