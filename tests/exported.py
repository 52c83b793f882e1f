"""A base directory with a small model of every kind, whose weights hide nothing, and their exports."""
import json
from dataclasses import asdict, replace
from pathlib import Path

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.gpt import GPTConfig
from nanochat.growth.target import grown_config
from scripts import export
from tests import growing
from tests.golden.fixtures import tokenizer_512

STEP = 7
VOCAB = 512
STOCK = replace(growing.STOCK, vocab_size=VOCAB)
KINDS: dict[str, GPTConfig] = {
    "stock": STOCK,
    "lowrank": grown_config(STOCK, attn_rank=8, mlp_rank=8, lm_head_rank=16),
    "mixed": growing.mixed(vocab_size=VOCAB),
    "ngpt": growing.mixed("ngpt", vocab_size=VOCAB),
    "grown": grown_config(STOCK, n_layer=5, n_embd=48),
    "looped": growing.mixed(vocab_size=VOCAB, loops=2),
    "masked": growing.mixed(vocab_size=VOCAB, causal=False),
    "masked-ngpt": growing.mixed("ngpt", vocab_size=VOCAB, causal=False),
}
CAUSAL = [kind for kind, config in KINDS.items() if config.causal]


def prepare(base_dir: Path, kinds: dict[str, GPTConfig]) -> None:
    tokenizer = tokenizer_512()
    tokenizer.save(base_dir / "tokenizer")
    for kind, config in kinds.items():
        model = growing.random_model(config)
        meta = {"step": STEP, "val_bpb": 1.25, "model_config": asdict(config), "tokenizer": tokenizer.checksum()}
        save_checkpoint(base_dir / "base_checkpoints" / kind, STEP, model.state_dict(), None, meta)


def run(to: str, kind: str, out: Path, *flags: str) -> int:
    """scripts.export in this process: the exit status."""
    return export.main([f"--to={to}", f"--model-tag={kind}", f"--out={out}", *flags])


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
