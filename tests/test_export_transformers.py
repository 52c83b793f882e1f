"""Exported folders where they are read: in transformers, with the model's own code, and in onnxruntime."""
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.cache_utils import DynamicCache

from nanochat.checkpoint_manager import build_model
from nanochat.engine import Engine
from nanochat.mlm import pseudo_log_likelihoods
from nanochat.tokenizer import get_tokenizer
from tests import exported, growing

TEXT = "the cat sat on the mat, the end."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with every kind, and each exported to hf/KIND; not to be written to."""
    transformers.logging.set_verbosity_error()
    directory = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(directory))
        exported.prepare(directory, exported.KINDS)
        for kind in exported.KINDS:
            assert exported.run("hf", kind, directory / "hf" / kind, "--shard-size=100KB") == 0
        yield directory


def ours(base, kind):
    model, tokenizer, _ = build_model(base / "base_checkpoints" / kind, exported.STEP, "cpu", "train")
    return model.eval(), tokenizer


def theirs(base, kind, auto=AutoModelForCausalLM, **more):
    return auto.from_pretrained(base / "hf" / kind, trust_remote_code=True, **more).eval()


def tokenizer_of(base, kind):
    return AutoTokenizer.from_pretrained(base / "hf" / kind, trust_remote_code=True)


@pytest.mark.parametrize("kind", exported.KINDS)
@torch.no_grad()
def test_logits_and_loss(base, kind):
    causal = kind in exported.CAUSAL
    model, tokens = ours(base, kind)[0], growing.tokens()
    out = theirs(base, kind, AutoModelForCausalLM if causal else AutoModelForMaskedLM)(tokens, labels=tokens)
    assert float((out.logits - model(tokens)).abs().max()) <= 5e-5  # rounding
    expected = model(tokens[:, :-1], tokens[:, 1:]) if causal else F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert out.loss.item() == pytest.approx(expected.item(), abs=5e-5)


@pytest.mark.parametrize("kind", exported.CAUSAL)
def test_greedy_text_is_the_engines(base, kind):
    """With a cache, without one, and beside a longer text that pads it on the left."""
    model, own = ours(base, kind)
    other, tokenizer, engine = theirs(base, kind), tokenizer_of(base, kind), Engine(model, own)
    prompt = tokenizer(TEXT, return_tensors="pt")
    (expected,), _ = engine.generate_batch(prompt["input_ids"][0].tolist(), max_tokens=30, temperature=0.0)
    ends = (engine.bos, engine.assistant_end)
    plain = lambda row: row[:-1] if row[-1] in ends else row
    for use_cache in (True, False):
        assert plain(other.generate(**prompt, max_new_tokens=30, do_sample=False, use_cache=use_cache)[0].tolist()) == expected
    both = tokenizer([TEXT, TEXT * 2], return_tensors="pt", padding=True)
    assert both["attention_mask"][0, 0] == 0
    row = other.generate(**both, max_new_tokens=30, do_sample=False)[0].tolist()[len(both["input_ids"][0]) - len(prompt["input_ids"][0]):]
    while len(row) > len(expected) and row[-1] in ends:  # the longer text went on
        row.pop()
    assert row == expected


@torch.no_grad()
def test_a_cache_made_for_the_model_serves_pieces_and_beams(base):
    model, tokens = theirs(base, "mixed"), growing.tokens()
    cache = DynamicCache(config=model.config)
    pieces = [model(tokens[:, a:b], cache=cache).logits for a, b in ((0, 7), (7, 8), (8, 24))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens).logits, rtol=0, atol=5e-5)
    beams = [model.generate(tokens[:1], max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use_cache).tolist() for use_cache in (True, False)]
    assert beams[0] == beams[1]
    assert model(tokens, logits_to_keep=1).logits.shape == (2, 1, exported.VOCAB)


def test_tokens_of_a_text(base):
    own, tokenizer = ours(base, "stock")[1], tokenizer_of(base, "stock")
    for text in (TEXT, "  naïve\n\n\tcafé 12345 <|bos|>", "🤷🏽‍♀️"):
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == own.encode(text, prepend="<|bos|>")
        assert tokenizer.decode(own.encode(text)) == text
    assert tokenizer("<|user_end|>", add_special_tokens=False)["input_ids"] == [own.encode_special("<|user_end|>")]
    assert len(tokenizer) == own.get_vocab_size() and tokenizer.bos_token_id == own.get_bos_token_id() and tokenizer.model_max_length == 64


PARTS = [{"type": "text", "text": " so: "}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "\ntwo "}]
CONVERSATIONS = [
    [("user", " hi\n")], [("system", "S "), ("user", "hi")], [("user", "hi"), ("assistant", " ho ")], [("user", "a"), ("assistant", PARTS), ("user", ""), ("assistant", "")],
    [("system", ""), ("user", "{{ x }} <b> 'q' \"q\" \\n"), ("assistant", "naïve 🤷🏽‍♀️"), ("user", "c"), ("assistant", "d")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_the_chat_template_renders_like_training(base, turns):
    """The ids, and which of them the assistant learns."""
    own, tokenizer = ours(base, "stock")[1], tokenizer_of(base, "stock")
    messages = [{"role": role, "content": content} for role, content in turns]
    ids, mask = own.render_conversation({"messages": messages})
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert out["input_ids"] == ids and [int(learn) for learn in out["assistant_masks"]] == mask
    if turns[-1][0] == "user":
        primed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert primed == own.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})


@pytest.mark.parametrize("turns, reason", [([("assistant", "a")], "alternate"), ([("system", "a"), ("assistant", "a")], "followed by a user"),
                                           ([("user", "a"), ("user", "a")], "alternate"), ([("user", "a"), ("assistant", [{"type": "image", "text": ""}])], "image")])
def test_the_chat_template_refuses_what_training_does(base, turns, reason):
    with pytest.raises(Exception, match=reason):
        tokenizer_of(base, "stock").apply_chat_template([{"role": role, "content": content} for role, content in turns])


@pytest.mark.parametrize("kind", ["stock", "ngpt", "masked"])
def test_fine_tuning_as_a_classifier(base, kind):
    """Of texts of unequal length; what pads them has no say."""
    model, tokenizer = theirs(base, kind, AutoModelForSequenceClassification, num_labels=2), tokenizer_of(base, kind)
    texts, labels = ["the cat", "the mat, the end of it all."] * 2, torch.tensor([0, 1, 0, 1])
    rows = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts])
        torch.testing.assert_close(model(**rows).logits, alone, rtol=0, atol=5e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**rows, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_hidden_states_of_the_model_without_a_head(base):
    out = theirs(base, "mixed", AutoModel)(growing.tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 5 and torch.equal(out.hidden_states[-1], out.last_hidden_state) and out.last_hidden_state.shape == (2, 24, 32)


@torch.no_grad()
def test_saved_again_it_is_the_same(base, tmp_path):
    model = theirs(base, "ngpt")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(model(growing.tokens()).logits, again(growing.tokens()).logits)


# -----------------------------------------------------------------------------
# As the BabyLM challenge evaluates: a model by its folder, pairs of sentences by their likelihoods

PAIRS = [{"sentence_good": "The cat sits on the mat.", "sentence_bad": "The cat sit on the mat.", "UID": "agreement"},
         {"sentence_good": "Who did the cats see?", "sentence_bad": "Who did the cats see the end?", "UID": "gap"}]


@torch.no_grad()
def test_minimal_pairs_of_a_causal_model(base, tmp_path):
    """Padded on the right, and scored by log-probabilities of the tokens that count: as our model scores each sentence alone."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    sentences = [row[name] for row in map(json.loads, (tmp_path / "pairs.jsonl").open()) for name in ("sentence_good", "sentence_bad")]
    model, own = ours(base, "grown")
    tokenizer = AutoTokenizer.from_pretrained(base / "hf" / "grown", trust_remote_code=True, padding_side="right")
    rows = tokenizer(sentences, return_tensors="pt", padding=True)
    logits = theirs(base, "grown")(**rows).logits
    nats = F.log_softmax(logits[:, :-1], dim=-1).gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
    sums = (nats * rows["attention_mask"][:, 1:]).sum(-1)
    for sentence, found in zip(sentences, sums.tolist()):
        ids = torch.tensor([own.encode(sentence, prepend="<|bos|>")])
        assert found == pytest.approx(-model(ids[:, :-1], ids[:, 1:], loss_reduction="sum").item(), abs=1e-3)


@torch.no_grad()
def test_minimal_pairs_of_a_masked_model(base):
    """Each token told from all others: as `base_eval --eval=pll` does."""
    (model, own), tokenizer, other = ours(base, "masked"), tokenizer_of(base, "masked"), theirs(base, "masked", AutoModelForMaskedLM)
    for pair in PAIRS:
        ids = tokenizer(pair["sentence_good"], return_tensors="pt")["input_ids"]
        places = range(1, ids.size(1))
        rows = ids.repeat(len(places), 1)
        rows[range(len(places)), places] = tokenizer.mask_token_id
        logits = other(rows, attention_mask=torch.ones_like(rows)).logits[range(len(places)), places]
        found = F.log_softmax(logits, dim=-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        special = {own.encode_special(name) for name in own.get_special_tokens()}
        assert found == pytest.approx(pseudo_log_likelihoods(model, ids[0].tolist(), tokenizer.mask_token_id, special), abs=1e-4)


# -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "ngpt"])
def test_onnx_decodes_greedily_like_the_engine(base, tmp_path, kind):
    import onnxruntime
    assert exported.run("onnx", kind, tmp_path / "onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = json.loads((tmp_path / "onnx" / "model.json").read_text())["cache"]
    engine = Engine(*ours(base, kind))
    prompt = get_tokenizer().encode(TEXT, prepend="<|bos|>")
    (expected,), _ = engine.generate_batch(prompt, max_tokens=20, temperature=0.0)
    cache = {name: torch.zeros(1, shape["heads"], 0, shape["width"]).numpy() for name, shape in shapes.items()}
    row, new = list(prompt), prompt
    for _ in range(len(expected) - len(prompt)):
        logits, *held = session.run(None, {"ids": torch.tensor([new]).numpy(), **cache})
        cache = dict(zip(shapes, held))
        new = [int(logits[0, -1].argmax())]
        row += new
    assert row == expected


def test_a_model_that_looks_both_ways_has_no_decoding_step(base, tmp_path, capsys):
    assert exported.run("onnx", "masked", tmp_path / "onnx") == 2
    assert "no decoding step" in capsys.readouterr().err and not (tmp_path / "onnx").exists()
