"""The decoding step as an ONNX graph, for a prompt as for a token: from tokens and what a cache holds to logits and what it holds then.

| input, output | shape | |
|---|---|---|
| `ids` | (batch, new) int64 | |
| `key_i`, `value_i` | (batch, heads, past, width) | of layer i (of a looped model the layers once more for each loop); past is 0 at the beginning, and a later step gets what the one before gave |
| `embeddings` | (batch, 1, past, C) | of the tokens so far, to the last of which the smear looks back |
| `new_key_i`, `new_value_i`, `new_embeddings` | the same with past + new | |
| `logits` | (batch, new, V) float32 | |

Before the folder gets its name onnxruntime decodes with the graph: a prompt, a piece and single tokens must give the checkpoint's logits.
"""
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from nanochat.cli import UsageError
from nanochat.export.exported import Exported, optional_packages
from nanochat.export.hf import MOST_DIFFERENCE, reference_config, reference_model, write_json
from nanochat.export.hf_tokenizer import to_hf
from nanochat.export.nanochat_reference import LanguageModel, ListCache

OPSET = 20


class Step(nn.Module):
    """The model with its cache as plain tensors: keys and values of each layer in turn, then the embeddings."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, ids, *past):
        cache = ListCache([*zip(past[0:-1:2], past[1:-1:2]), (past[-1], past[-1][..., :0])])
        logits = self.model(ids, cache=cache)
        return logits, *(tensor for pair in cache.pairs[:-1] for tensor in pair), cache.pairs[-1][0]


def cache_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """Heads and width of each tensor of the cache, by its name."""
    shapes: dict[str, tuple[int, int]] = {}
    for i, spec in enumerate(config["layers"] * config["loops"]):
        shapes |= {f"key_{i}": (spec["n_kv_head"], spec["qk_dim"]), f"value_{i}": (spec["n_kv_head"], spec["head_dim"])}
    return shapes | {"embeddings": (1, config["n_embd"])}


def export_onnx(subject: Exported, folder: Path) -> str:
    """Fills the folder with model.onnx, tokenizer.json and model.json, which says the shapes; returns what was checked. Raises UsageError."""
    config = reference_config(subject.config, subject.state["transformer.wte.weight"].size(0))
    if not config["causal"]:
        raise UsageError("a model that looks both ways has no decoding step; export it with --to=hf")
    with optional_packages():
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401  # which torch's exporter needs
    shapes = cache_shapes(config)
    step = Step(reference_model(config, subject.state)).requires_grad_(False)
    batch, new, past = (torch.export.Dim(name) for name in ("batch", "new", "past"))
    example = (torch.zeros(2, 3, dtype=torch.long), *(torch.zeros(2, heads, 5, width) for heads, width in shapes.values()))
    for name in ("torch.onnx", "onnx_ir", "onnxscript"):  # which tell of every pass
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        torch.onnx.export(step, example, folder / "model.onnx", input_names=["ids", *shapes], output_names=["logits", *(f"new_{name}" for name in shapes)],
                          dynamic_shapes=({0: batch, 1: new}, tuple({0: batch, 2: past} for _ in shapes)), opset_version=OPSET, dynamo=True, verbose=False)
    to_hf(subject.tokenizer).save(str(folder / "tokenizer.json"))
    write_json(folder / "model.json", {"vocab_size": config["vocab_size"], "bos_token_id": subject.tokenizer.get_bos_token_id(),
                                       "cache": {name: {"heads": heads, "width": width} for name, (heads, width) in shapes.items()}})
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    difference = check(subject, session, shapes)
    if not difference <= MOST_DIFFERENCE:
        raise UsageError(f"the graph's logits differ by {difference:.1e} from the checkpoint's, more than {MOST_DIFFERENCE:.0e}; nothing was written")
    return f"logits of a prompt and of single steps equal to {difference:.1e} (onnxruntime {onnxruntime.__version__})"


@torch.no_grad()
def check(subject: Exported, session, shapes: dict[str, tuple[int, int]]) -> float:
    """The largest difference of a logit: of random tokens, decoded in pieces by the graph and at once by the model."""
    length = min(subject.config.sequence_len, 40)
    tokens = torch.randint(subject.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    cache = {name: torch.zeros(2, heads, 0, width).numpy() for name, (heads, width) in shapes.items()}
    pieces, cuts = [], [0, *range(length * 2 // 3, length + 1)]
    for start, end in zip(cuts, cuts[1:]):
        logits, *held = session.run(None, {"ids": tokens[:, start:end].numpy(), **cache})
        cache = dict(zip(shapes, held))
        pieces.append(torch.from_numpy(logits))
    return float((torch.cat(pieces, dim=1) - subject.model()(tokens)).abs().max())
