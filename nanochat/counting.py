"""What a model costs: parameters, FLOPs and bytes, added up from what its layers say of themselves."""
from typing import Any

from torch import nn

from nanochat.common import COMPUTE_DTYPE


def _matmul_weights(part: nn.Module) -> int:
    return sum(module.weight.numel() for module in part.modules() if isinstance(module, nn.Linear))


class Counting(nn.Module):
    """The counts of a GPT, which inherits them."""

    config: Any  # of a module's attributes the type checker knows only that they are tensors or modules
    transformer: Any
    value_embeds: Any
    lm_head: Any
    smear_gate: Any
    window_sizes: list[tuple[int, int]]
    loops: int

    def num_matmul_params(self) -> int:
        """Weights that are multiplied with activations, the padded head included."""
        return _matmul_weights(self)

    def _matmul_macs(self) -> int:
        """Multiply-adds of a token with weights: with those of the layers once in each loop."""
        return self.num_matmul_params() + (self.loops - 1) * _matmul_weights(self.transformer.h)

    def attention_shapes(self) -> list[tuple[int, int, int, int]]:
        """Per layer: query heads, key heads, width of a query or key head, width of a value head."""
        return [block.attn.shape() for block in self.transformer.h]

    def _layer_windows(self, limit: int) -> list[int]:
        return [limit if back < 0 else min(back + ahead, limit) for back, ahead in self.window_sizes]

    def _attention_macs(self, pairs: list[int]) -> int:
        """Multiply-adds of attention where a layer looks at that many (query, key) pairs."""
        return self.loops * sum(block.attn.macs(n) for block, n in zip(self.transformer.h, pairs))

    def estimate_flops(self) -> int:
        """Training FLOPs per token: 6 per multiply-add with a weight and of attention (PaLM, appendix B)."""
        return 6 * self._matmul_macs() + 6 * self._attention_macs(self._layer_windows(self.config.sequence_len))

    def estimate_decode_flops(self, context_len: int) -> int:
        """FLOPs of one decoded token behind `context_len` others."""
        return 2 * self._matmul_macs() + 2 * self._attention_macs(self._layer_windows(context_len))

    def estimate_prefill_flops(self, num_tokens: int) -> int:
        """FLOPs of a prompt; causal attention counted exactly."""
        pairs = [m * (m + 1) // 2 + (num_tokens - m) * m for m in self._layer_windows(num_tokens)]
        return 2 * self._matmul_macs() * num_tokens + 2 * self._attention_macs(pairs)

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one position, over all layers and loops, in the compute dtype."""
        return self.kv_read_bytes(1)

    def kv_read_bytes(self, context_len: int) -> int:
        """Bytes of keys and values that decoding one token reads; each use of a layer has its own."""
        return COMPUTE_DTYPE.itemsize * self.loops * sum(
            kv_heads * (qk_dim + v_dim) * window
            for (_, kv_heads, qk_dim, v_dim), window in zip(self.attention_shapes(), self._layer_windows(context_len)))

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by role; scaling laws use `transformer_matrices` + `lm_head`."""
        def count(*parameters) -> int:
            return sum(p.numel() for p in parameters)
        counts = {
            "wte": count(*self.transformer.wte.parameters()),
            "value_embeds": count(*self.value_embeds.parameters()),
            "lm_head": count(*self.lm_head.parameters()),
            "transformer_matrices": count(*self.transformer.h.parameters()),
            "scalars": count(*self._scalars()),
        }
        counts["total"] = sum(counts.values())
        assert counts["total"] == count(*self.parameters()), "a parameter is missing from the count"
        return counts

    def _scalars(self) -> list:
        return [self.resid_lambdas, self.x0_lambdas, self.smear_gate.weight, self.smear_lambda, self.backout_lambda]
