"""A model of nanochat with growth hooks for Hugging Face `transformers` (4.57 and newer), which loads it with `trust_remote_code=True`.

Copied beside exported weights together with nanochat_reference.py, where the computation is; here it only meets the conventions of `transformers`.
"""
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MaskedLMOutput, SequenceClassifierOutput

from .nanochat_reference import Head, Stack

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its name in outputs, which has changed


class NanochatConfig(PretrainedConfig):
    """layers: for each the fields of nanochat's LayerSpec. causal: False where attention looks both ways. loops: how often each layer is run.
    padded_vocab_size: rows of the embeddings."""

    model_type = "nanochat_layered"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
                     "max_position_embeddings": "sequence_len"}

    def __init__(self, vocab_size=1, padded_vocab_size=1, sequence_len=1, n_layer=0, n_head=1, n_kv_head=1, n_embd=1, layers=(), backout_layer=0,
                 lm_head_rank=0, causal=True, loops=1, use_cache=True, pad_token_id=None, bos_token_id=None, eos_token_id=None, **kwargs):
        self.vocab_size, self.padded_vocab_size, self.sequence_len = vocab_size, padded_vocab_size, sequence_len
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.layers, self.backout_layer, self.lm_head_rank, self.causal = list(layers), backout_layer, lm_head_rank, causal
        self.loops, self.use_cache = loops, use_cache and causal
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


class NanochatPreTrainedModel(PreTrainedModel):
    config_class = NanochatConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _no_split_modules = ["Block"]


class NanochatModel(NanochatPreTrainedModel):
    """The stream behind the last layer, normed: `last_hidden_state` (B, T, C)."""

    def __init__(self, config):
        super().__init__(config)
        self.stack = Stack(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.stack.transformer["wte"]

    def set_input_embeddings(self, value):
        self.stack.transformer["wte"] = value

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, output_hidden_states=None, past_key_values=None, **kwargs):
        """attention_mask (B, S), of what the cache holds too: 1 for tokens, 0 for padding."""
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache()
        if cache is not None:
            while len(cache.layers) <= self.config.loops * self.config.n_layer:  # one more for the embeddings, which the smear looks back at
                cache.layers.append(DynamicLayer())
        states = [] if (self.config.output_hidden_states if output_hidden_states is None else output_hidden_states) else None
        x = self.stack(input_ids, attention_mask, cache, states, position_ids)
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states and tuple(states), **{CACHE: cache})


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.head = Head(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, cache=None, labels=None, logits_to_keep=0, position_ids=None, use_cache=None,
                output_hidden_states=None, past_key_values=None, **kwargs):
        """Logits (B, T, V), of the last `logits_to_keep` positions alone if it is not 0. labels (B, T): the input again, -100 where nothing is asked."""
        out = self.model(input_ids, attention_mask, position_ids, past_key_values if cache is None else cache, use_cache, output_hidden_states)
        logits = self.head(out.last_hidden_state[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **{CACHE: out.get(CACHE)})


class NanochatForMaskedLM(NanochatPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.head = Head(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, output_hidden_states=None, **kwargs):
        """Logits (B, T, V) of the tokens themselves. labels (B, T): what was hidden, -100 elsewhere."""
        out = self.model(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.head(out.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class NanochatForSequenceClassification(NanochatPreTrainedModel):
    """A linear layer on the stream: of the last token, which has seen all others, or where attention looks both ways on the mean of all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = NanochatModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, output_hidden_states=None, **kwargs):
        """Logits (B, num_labels). Without an attention mask every token counts."""
        out = self.model(input_ids, attention_mask, use_cache=False, output_hidden_states=output_hidden_states)
        x_BTC = out.last_hidden_state
        mask_BT = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).to(x_BTC.dtype)
        if self.config.causal:
            last = (mask_BT * torch.arange(1, mask_BT.size(1) + 1, device=mask_BT.device)).argmax(-1)
            pooled = x_BTC[torch.arange(len(x_BTC), device=x_BTC.device), last]
        else:
            pooled = (x_BTC * mask_BT.unsqueeze(-1)).sum(1) / mask_BT.sum(1, keepdim=True)
        logits = self.score(nn.functional.rms_norm(pooled, (pooled.size(-1),)))  # of one size, on the unit sphere too
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)
