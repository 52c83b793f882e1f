"""The kinds of blocks that layers are made of (`LayerSpec.block`, `--block`). A new kind is a file with its class, and a line here."""
from nanochat.layered_gpt import LayeredBlock
from nanochat.ngpt import NormalizedBlock

BLOCKS: dict[str, type[LayeredBlock]] = {
    "prenorm": LayeredBlock,  # nanochat's
    "ngpt": NormalizedBlock,
}
