"""scripts.export from flags to folders: what is written, the way back, and what is refused. test_export_transformers.py loads it elsewhere."""
import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.checkpoint_manager import build_model, find_checkpoint, load_checkpoint
from nanochat.export import hf
from nanochat.export.hf_tokenizer import from_hf, to_hf
from nanochat.gpt import GPT, GPTConfig
from nanochat.layered_gpt import LayeredGPT
from nanochat.tokenizer import SPECIAL_TOKENS
from scripts import export
from tests import exported, growing
from tests.golden.fixtures import tokenizer_512


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared")
    exported.prepare(directory, exported.KINDS)
    return directory


@pytest.fixture
def base(base_dir, prepared):
    """A base directory with a checkpoint of every kind."""
    return shutil.copytree(prepared, base_dir, dirs_exist_ok=True)


def logits(folder, tag, tokens):
    model, _, _ = build_model(*find_checkpoint(folder / "base_checkpoints", tag), "cpu", "train")
    with torch.no_grad():
        return model.eval()(tokens)


# -----------------------------------------------------------------------------
# transformers' format


@pytest.mark.parametrize("kind", exported.KINDS)
def test_to_hf_and_back(base, monkeypatch, kind, capsys):
    """Through the exported folder a model of any kind becomes a checkpoint again, bit for bit, with its tokenizer."""
    assert exported.run("hf", kind, base / "hf") == 0
    assert "logits equal to" in capsys.readouterr().out
    assert export.main(["--to=base-dir", f"--from-folder={base / 'hf'}", f"--out={base / 'back'}"]) == 0
    original, _, meta = load_checkpoint(base / "base_checkpoints" / kind, exported.STEP, "cpu")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "back"))
    model, tokenizer, back = build_model(base / "back" / "base_checkpoints" / kind, exported.STEP, "cpu", "train")
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items()) and len(original) == len(model.state_dict())
    assert back["model_config"] == meta["model_config"] and back["val_bpb"] == 1.25
    assert tokenizer.checksum() == tokenizer_512().checksum()


def test_what_lies_in_the_folder(base):
    assert exported.run("hf", "mixed", base / "hf", "--shard-size=60KB") == 0
    names = {path.name for path in (base / "hf").iterdir()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 2 and names - shards == {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
                                                  "chat_template.jinja", "modeling_nanochat.py", "nanochat_reference.py", "README.md"}
    assert all((base / "hf" / shard).stat().st_size < 70_000 and (base / "hf" / shard).stat().st_mode & 0o777 == 0o644 for shard in shards)
    assert set(json.loads((base / "hf" / "model.safetensors.index.json").read_text())["weight_map"].values()) == shards
    assert "mixed" in (base / "hf" / "README.md").read_text() and "1.2500 bits per byte" in (base / "hf" / "README.md").read_text()
    for code in ("modeling_nanochat.py", "nanochat_reference.py"):
        assert "nanochat." not in "".join(line for line in (base / "hf" / code).read_text().splitlines() if "import" in line), "it stands alone"


def test_no_other_model_gets_out(base, monkeypatch, capsys):
    """What is written is compared with the checkpoint, and a difference leaves nothing behind."""
    monkeypatch.setattr(hf.reference, "SHARPNESS", 1.19)
    assert exported.run("hf", "stock", base / "hf") == 2
    assert "logits differ" in capsys.readouterr().err
    assert not any("hf" in path.name for path in base.iterdir())


def test_no_other_tokenizer_gets_out(base, monkeypatch, capsys):
    monkeypatch.setattr(hf, "NASTY", ["ab  cd"])
    monkeypatch.setattr("nanochat.export.hf_tokenizer.SPLIT_PATTERN", r"\s+")
    assert exported.run("hf", "stock", base / "hf") == 2
    assert "other tokens" in capsys.readouterr().err and not (base / "hf").exists()


# -----------------------------------------------------------------------------
# Tokenizer

TOKENIZER = tokenizer_512()
HF_TOKENIZER = to_hf(TOKENIZER)


@pytest.mark.slow
@given(st.lists(st.one_of(st.text(), st.sampled_from([*SPECIAL_TOKENS, "'LL", "12345", " \n ", "the cat", "ſ", "\u2028", "a" * 50, "!" * 30]))).map("".join))
def test_equal_tokens(text):
    """Names of special tokens stay text, if asked for as for all text from outside; else they are those tokens."""
    HF_TOKENIZER.encode_special_tokens = True
    ids = HF_TOKENIZER.encode(text, add_special_tokens=False).ids
    HF_TOKENIZER.encode_special_tokens = False
    assert ids == TOKENIZER.encode(text)
    assert HF_TOKENIZER.decode(ids) == text


def test_special_tokens():
    names = "".join(SPECIAL_TOKENS)
    assert HF_TOKENIZER.encode(names, add_special_tokens=False).ids == [TOKENIZER.encode_special(name) for name in SPECIAL_TOKENS]
    assert HF_TOKENIZER.encode("a").ids == TOKENIZER.encode("a", prepend="<|bos|>")
    assert HF_TOKENIZER.get_vocab_size() == TOKENIZER.get_vocab_size()


@given(st.lists(st.integers(0, 511)))
def test_equal_texts_of_any_tokens(ids):
    """Bytes that are no UTF-8 too."""
    assert HF_TOKENIZER.decode(ids, skip_special_tokens=False) == TOKENIZER.decode(ids)


def test_the_tokenizer_comes_back(tmp_path):
    HF_TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert from_hf(tmp_path / "tokenizer.json").checksum() == TOKENIZER.checksum()


# -----------------------------------------------------------------------------
# nanochat's format


@pytest.mark.parametrize("kind, flags", [("stock", []), ("layered", []), ("lowrank", ["--dense"])], ids=lambda value: str(value))
def test_to_nanochat(base, kind, flags):
    """The stock GPT with nanochat's names takes it strictly and gives the logits of the layered model."""
    if kind == "layered":  # a stock model, spelled out layer by layer
        exported.prepare(base, {"layered": LayeredGPT.from_gpt(growing.random_model(exported.STOCK)).config})
    assert exported.run("nanochat", kind, base / "out", *flags) == 0
    state, _, meta = load_checkpoint(base / "out" / "base_checkpoints" / kind, exported.STEP, "cpu")
    assert list(meta["model_config"]) == ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern"]
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]))
    model.to_empty(device="cpu")
    model.init_weights()
    model.load_state_dict(state, strict=True, assign=True)
    tokens = growing.tokens()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), logits(base, kind, tokens), rtol=0, atol=5e-5)
    assert torch.load(base / "out" / "tokenizer" / "token_bytes.pt", weights_only=True).tolist()[:2] == [1, 1]


def test_storage_dtypes_are_kept_for_nanochat(base):
    """On a GPU it keeps embeddings in bfloat16."""
    path = base / "base_checkpoints" / "stock" / f"model_{exported.STEP:06d}.pt"
    state = torch.load(path, weights_only=True)
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    torch.save(state, path)
    assert exported.run("nanochat", "stock", base / "out") == 0
    written = torch.load(base / "out" / "base_checkpoints" / "stock" / path.name, weights_only=True)
    assert {name: value.dtype for name, value in written.items()} == {name: value.dtype for name, value in state.items()}


@pytest.mark.parametrize("kind, flags, reason", [
    ("lowrank", [], "--dense multiplies them out"), ("masked", [], "both ways"), ("mixed", ["--dense"], "layer 0 has"), ("ngpt", ["--dense"], "layer 0 has"),
    ("grown", [], "where nanochat's has"),
])
def test_nanochat_has_no_such_model(base, capsys, kind, flags, reason):
    assert exported.run("nanochat", kind, base / "out", *flags) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (base / "out").exists()


# -----------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("flags, reason", [
    (["--to=hf", "-g", "nope"], "no model 'nope'"), (["--to=hf", "-g", "stock", "-s", "8"], "there is step 7"), (["--to=hf", "-g", "stock", "-i", "sft"], "no model"),
    (["--to=hf", "-g", "stock", "--dense"], "--dense is for"), (["--to=hf", "--from-folder=x", "-g", "stock"], "give one of them"),
    (["--to=hf", "--from-folder=x", "-i", "sft"], "give one of them"), (["--to=hf", "--from-folder="], "--from-folder is empty"),
    (["--to=hf", "--from-folder=nowhere"], "no nowhere"), (["--to=hf", "--from-folder=tests"], "config.json"),
])
def test_bad_flags(base, capsys, flags, reason):
    assert export.main([*flags, f"--out={base / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not [path for path in base.iterdir() if "out" in path.name]


@pytest.mark.parametrize("to", export.FORMATS)
def test_a_model_without_layers_is_refused(base_dir, capsys, to):
    """The first stage of --grow-path=0x128,4x128."""
    exported.prepare(base_dir, {"none": replace(exported.STOCK, n_layer=0)})
    assert exported.run(to, "none", base_dir / "out") == 2
    error = capsys.readouterr().err
    assert "a model without layers is not exported; take a checkpoint of a later stage" in error and error.count("\n") == 1 and not (base_dir / "out").exists()


@pytest.mark.parametrize("to, package", [("hf", "tokenizers"), ("hf", "safetensors.torch"), ("onnx", "onnx")])
def test_missing_packages_are_named(base, monkeypatch, capsys, to, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert exported.run(to, "stock", base / "out") == 2
    error = capsys.readouterr().err
    assert package.partition(".")[0] in error and "pip install -e '.[export]'" in error and error.count("\n") == 1 and not (base / "out").exists()


@pytest.mark.parametrize("size", ["5", "0GB", "-1MB", "many"])
def test_bad_sizes(base, capsys, size):
    with pytest.raises(SystemExit) as end:
        export.main(["--to=hf", f"--out={base / 'out'}", f"--shard-size={size}"])
    assert end.value.code == 2 and "is not a size" in capsys.readouterr().err


def test_nothing_is_overwritten(base, capsys):
    (base / "out").mkdir()
    assert exported.run("hf", "stock", base / "out") == 2
    assert "exists already" in capsys.readouterr().err and not any((base / "out").iterdir())


@pytest.mark.parametrize("damage, reason", [
    (lambda folder: next(folder.glob("model-00002*")).unlink(), "lacks model-00002"),
    (lambda folder: next(folder.glob("model-00002*")).write_bytes(b"\0" * 99), "is damaged"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "damaged"),
    (lambda folder: (folder / "config.json").write_text("[]"), "no model that this project"),
    (lambda folder: exported.edit_json(folder / "config.json", model_type="llama"), "no model that this project"),
    (lambda folder: exported.edit_json(folder / "config.json", n_embd=64), "shape"),
    (lambda folder: exported.edit_json(folder / "config.json", layers=[]), "model_config"),
    (lambda folder: exported.edit_json(folder / "config.json", nanochat={"tag": "../x", "source": "base", "step": 7}), "does not say where"),
    (lambda folder: exported.edit_json(folder / "config.json", nanochat={"tag": "x", "source": "hub", "step": 7}), "does not say where"),
    (lambda folder: exported.edit_json(folder / "config.json", nanochat={"tag": 5, "source": "base", "step": 7, "val_bpb": 1.0}), "does not say where"),
    (lambda folder: exported.edit_json(folder / "config.json", nanochat={"tag": "x", "source": "base", "step": 7, "val_bpb": "good"}), "does not say where"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer of nanochat"),
], ids=["shard missing", "shard damaged", "index damaged", "config of nothing", "another model", "another width", "no layers", "a tag outside", "an unknown source", "a tag of a number", "a loss of words", "no tokenizer", "another tokenizer"])
def test_damaged_folders(base, capsys, damage, reason):
    assert exported.run("hf", "mixed", base / "hf", "--shard-size=60KB") == 0
    damage(base / "hf")
    capsys.readouterr()
    assert export.main(["--to=base-dir", f"--from-folder={base / 'hf'}", f"--out={base / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (base / "out").exists()


def test_a_failed_write_leaves_nothing(base, monkeypatch, capsys):
    def fill(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copy", fill)
    assert exported.run("hf", "stock", base / "hf") == 2
    assert "No space left" in capsys.readouterr().err
    assert not [path for path in base.iterdir() if "hf" in path.name]
