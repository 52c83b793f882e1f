"""A folder for Hugging Face `transformers`, loaded with `trust_remote_code=True`, and the way back.

    config.json, generation_config.json      every layer spelled out; `auto_map` names the classes
    model.safetensors, or shards of it       float32
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    modeling_nanochat.py, nanochat_reference.py   the model's code, copied from here
    README.md                                where it comes from and how it is loaded

Before the folder gets its name, its files are read back: the model's code that lies in it must give the logits of the checkpoint, and the tokenizer its ids.
"""
import argparse
import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import torch

from nanochat.checkpoint_manager import SOURCES, load_weights, model_from_config
from nanochat.cli import UsageError, folder_name
from nanochat.export import nanochat_reference as reference
from nanochat.export.exported import Exported, optional_packages
from nanochat.export.hf_tokenizer import CHAT_TEMPLATE, from_hf, to_hf
from nanochat.files import parse_json
from nanochat.gpt import GPTConfig
from nanochat.growth.target import layered_config, stock_config
from nanochat.layered_gpt import LayeredGPTConfig
from nanochat.mlm import MASK
from nanochat.tokenizer import SPECIAL_TOKENS

HERE = Path(__file__).parent
CODE = "modeling_nanochat"
MOST_DIFFERENCE = 1e-4  # of a logit, in float32: rounding is a tenth of it in models of a few layers and grows with depth, a mistake is far above
BOS, EOS = SPECIAL_TOKENS[0], "<|assistant_end|>"
NASTY = ["", " ", "the cat sat on the mat, the end.", "  two  blanks\n\n\n \t x\r\n", "it's I'LL we'Ve 12345 6 7", "naïve café 漢字 한국어 ﬆ ſ \u0301\u200d",
         "🤷🏽‍♀️\x00\x7f\x1c\x85\u2028", "<|bos|> <|user_start|>", "!" * 300, "a" * 300, " " * 300]


def reference_config(config: GPTConfig, padded_vocab_size: int) -> dict:
    """What the model's code wants to know: the layered configuration and the rows of the embedding tables."""
    return {**asdict(layered_config(config)), "padded_vocab_size": padded_vocab_size}


def reference_model(config: dict, state: dict[str, torch.Tensor]) -> reference.LanguageModel:
    """In float32. state: by the names that parameters have in nanochat's model."""
    with torch.device("meta"):
        model = reference.LanguageModel(SimpleNamespace(**config))
    model.load_state_dict({reference.place(name): value.float() for name, value in state.items()}, strict=True, assign=True)
    return model.eval()


def hf_name(name: str) -> str:
    """Of a parameter of nanochat's model in the exported files: that of NanochatForCausalLM."""
    return reference.place(name) if reference.place(name).startswith("head.") else "model." + reference.place(name)


def nanochat_name(name: str) -> str:
    return name.removeprefix("model.").partition(".")[2]


@torch.no_grad()
def largest_difference(subject: Exported, state: dict[str, torch.Tensor], config: dict) -> float:
    """Of a logit of random tokens, between the checkpoint's model and the exported one."""
    length = min(subject.config.sequence_len, 64)
    tokens = torch.randint(subject.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    return float((reference_model(config, state)(tokens) - subject.model()(tokens)).abs().max())


def export_hf(subject: Exported, folder: Path, shard_size: str) -> str:
    """Fills the folder; returns what was checked. Raises UsageError where packages are missing or the result is not the same model."""
    with optional_packages():
        from huggingface_hub import split_torch_state_dict_into_shards
        from safetensors.torch import save_file
    config, tokenizer = reference_config(subject.config, subject.state["transformer.wte.weight"].size(0)), subject.tokenizer
    state = {hf_name(name): value.float().contiguous() for name, value in subject.state.items()}
    shards = split_torch_state_dict_into_shards(state, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        write_json(folder / "model.safetensors.index.json", {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})
    to_hf(tokenizer).save(str(folder / "tokenizer.json"))
    causal = config["causal"]
    head = "NanochatForCausalLM" if causal else "NanochatForMaskedLM"
    classes = {"AutoConfig": "NanochatConfig", "AutoModel": "NanochatModel", head.replace("Nanochat", "AutoModel"): head,
               "AutoModelForSequenceClassification": "NanochatForSequenceClassification"}
    ids = {name: tokenizer.encode_special(token) for name, token in (("bos_token_id", BOS), ("eos_token_id", EOS), ("pad_token_id", EOS))}
    write_json(folder / "config.json", {
        "model_type": "nanochat_layered", "architectures": [head], "auto_map": {auto: f"{CODE}.{name}" for auto, name in classes.items()},
        "dtype": "float32", **config, **ids,
        "nanochat": {"tag": subject.name, "source": subject.source, "step": subject.step, "val_bpb": subject.meta.get("val_bpb")}})
    if causal:  # an answer ends where the engine ends it
        write_json(folder / "generation_config.json", {**ids, "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]]})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS, **({} if causal else {"mask_token": MASK}),
        "model_max_length": config["sequence_len"], "padding_side": "left" if causal else "right", "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"]})
    if causal:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name in (f"{CODE}.py", "nanochat_reference.py"):
        shutil.copy(HERE / name, folder / name)
    (folder / "README.md").write_text(card(subject, head.replace("Nanochat", "AutoModel")), encoding="utf-8")
    return check(subject, folder)


def check(subject: Exported, folder: Path) -> str:
    """Reads the folder back. Raises UsageError if it holds another model or tokenizer."""
    from tokenizers import Tokenizer
    written, state = read_hf(folder)
    difference = largest_difference(subject, state, written)
    if not difference <= MOST_DIFFERENCE:
        raise UsageError(f"the exported model's logits differ by {difference:.1e} from the checkpoint's, more than {MOST_DIFFERENCE:.0e}; nothing was written")
    hf_tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    hf_tokenizer.encode_special_tokens = True
    for text in NASTY:
        if hf_tokenizer.encode(text, add_special_tokens=False).ids != subject.tokenizer.encode(text):
            raise UsageError(f"the exported tokenizer has other tokens for {text[:40]!r} than the model's; nothing was written")
    return f"logits equal to {difference:.1e}, tokens of {len(NASTY)} texts equal"


def read_hf(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, parameters by their names in nanochat's model) of an exported folder.

    Raises UsageError for a folder that is none, lacks a shard, or is damaged.
    """
    with optional_packages():
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != "nanochat_layered":
            raise UsageError(f"{folder} holds no model that this project has exported; give a folder made by scripts.export --to=hf")
        index = folder / "model.safetensors.index.json"
        shards = sorted(set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())) if index.exists() else ["model.safetensors"]
        state: dict[str, torch.Tensor] = {}
        for shard in shards:
            if not (folder / shard).is_file():
                raise UsageError(f"{folder} lacks {shard}{f', one of {len(shards)} shards' if len(shards) > 1 else ''}; copy the whole folder, or export again")
            try:
                state |= load_file(folder / shard)
            except SafetensorError as error:
                raise UsageError(f"{folder / shard} is damaged ({error}); copy it again, or export again") from error
    except FileNotFoundError as error:
        raise UsageError(f"there is no {error.filename}; give a folder made by scripts.export --to=hf") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"the files in {folder} are damaged ({type(error).__name__}: {error}); export again") from error
    return config, {nanochat_name(name): value for name, value in state.items()}


def from_folder(folder: Path) -> Exported:
    """The model of an exported folder, to be exported in another format. Raises UsageError."""
    config, state = read_hf(folder)
    model_config = {field.name: config[field.name] for field in fields(LayeredGPTConfig) if field.name in config}
    model = model_from_config(model_config)
    load_weights(model, dict(state), "cpu")
    model_config = asdict(stock_config(model.config))  # which is the same where it is no stock model
    try:
        tag, source, step, val_bpb = (config["nanochat"][name] for name in ("tag", "source", "step", "val_bpb"))
        if folder_name(tag) == "" or source not in SOURCES or type(step) is not int or step < 0 or not isinstance(val_bpb, (int, float, type(None))):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError, argparse.ArgumentTypeError):
        raise UsageError(f"{folder / 'config.json'} does not say where the model comes from (nanochat: tag, source, step, val_bpb); export it again") from None
    return Exported(tag, source, model_from_config(model_config).config, state, from_hf(folder / "tokenizer.json"),
                   {"step": step, "val_bpb": val_bpb, "model_config": model_config})


def card(subject: Exported, auto: str) -> str:
    """The README of the folder."""
    bpb = subject.meta.get("val_bpb")
    return f"""\
---
library_name: transformers
---
# {subject.name}

Trained with nanochat with growth hooks ({subject.source}, step {subject.step}{f", {bpb:.4f} bits per byte of validation text" if bpb else ""}).

    from transformers import AutoTokenizer, {auto}
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = {auto}.from_pretrained(FOLDER, trust_remote_code=True)

The code that is trusted is in this folder: `modeling_nanochat.py` and `nanochat_reference.py`, which holds the whole computation and needs PyTorch alone.
A text begins with `<|bos|>`; the tokenizer puts it there. In a text from outside, `tokenizer(text, split_special_tokens=True)` takes the names of special tokens
for text.
"""


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
