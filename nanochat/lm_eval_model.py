"""A model of ours for EleutherAI's lm-evaluation-harness (lm_eval 0.4.13 and newer): any of its tasks, and one's own.

    from nanochat.lm_eval_model import NanochatLM          # also registers the name "nanochat"
    lm_eval.simple_evaluate(NanochatLM(model, tokenizer), tasks=["lambada_openai"])
    lm_eval.simple_evaluate("nanochat", model_args="model_tag=d12,source=base", tasks=["lambada_openai"])

Notable:
* every text is scored behind <|bos|>, as in training and in CORE; where a context is empty that alone stands before it
* context and continuation are cut apart on tokens, as the harness does it for all models; what is longer than the model's context loses its beginning
* requests of like length run together, and logits are computed only where something is scored
* a generation is the engine's, with the calculator; it ends at a stop text, at <|assistant_end|> and at <|bos|>
"""
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  # the names of its own, which ours would else be alone to have
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from nanochat.checkpoint_manager import SOURCES, load_model
from nanochat.cli import UsageError
from nanochat.common import autodetect_device_type, with_progress
from nanochat.engine import Engine, TextStream, check_causal
from nanochat.evals.scoring import logits_at, stack_sequences

MAX_GENERATED = 256  # tokens, where a task does not say how many (the harness's own default)
Pair = tuple[list[int], list[int]]  # what is given, at least a token, and what is scored behind it


@register_model("nanochat")
class NanochatLM(TemplateLM):
    """rows: how many requests run through the model together."""

    def __init__(self, model: Any, tokenizer: Any, rows: int = 16):
        super().__init__()
        check_causal(model)
        self.model, self.encoder, self.rows = model, tokenizer, rows
        self.max_length = model.config.sequence_len
        self._device = model.get_device()

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "NanochatLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "NanochatLM":
        """arg_dict: source (base, sft, ...), model_tag, step. Of the harness's own batch_size and device are used. Raises UsageError for anything else."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if unknown := set(arg_dict) - {"source", "model_tag", "step"}:
            raise UsageError(f"unknown model argument {min(unknown)!r}: use source, model_tag and step")
        source = arg_dict.get("source", "base")
        if source not in SOURCES:
            raise UsageError(f"unknown source {source!r}: use one of {', '.join(SOURCES)}")
        rows = str(given.get("batch_size", 16))
        if not rows.isdecimal() or int(rows) < 1:
            raise UsageError(f"batch_size={rows} is not a whole number above 0")
        device = torch.device(given.get("device") or autodetect_device_type())
        model, tokenizer, _ = load_model(source, device, phase="eval", model_tag=arg_dict.get("model_tag"), step=arg_dict.get("step"))
        return cls(model, tokenizer, int(rows))

    @property
    def eot_token_id(self) -> int:
        """What ends a document, and begins the next one."""
        return self.encoder.get_bos_token_id()

    @property
    def prefix_token_id(self) -> int:
        return self.encoder.get_bos_token_id()

    @property
    def tokenizer_name(self) -> str:
        return f"nanochat-{self.encoder.checksum()}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Without <|bos|>, which is put before what is scored."""
        return self.encoder.encode(string)

    # -------------------------------------------------------------------------
    # Likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Of each (texts, context, continuation) the log-probability of the continuation in nats, and whether greedy decoding would give it."""
        bos = self.prefix_token_id
        pairs = [([bos, *context] if context[:1] != [bos] else context, continuation) for _, context, continuation in requests]
        answers = self.score(pairs, "Likelihoods")
        for (texts, *_), answer in zip(requests, answers):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of each text the log-probability of all its tokens. A long one is cut in windows; each token is scored once, with at least one before it."""
        texts = [request.args[0] for request in requests]
        windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)]
                   for text in texts]
        scores = iter(self.score([pair for pairs in windows for pair in pairs], "Texts"))
        totals = [sum(next(scores)[0] for _ in pairs) for pairs in windows]
        for text, total in zip(texts, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def score(self, pairs: list[Pair], label: str) -> list[tuple[float, bool]]:
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # the longest first: memory runs out at once or never
        batches = [order[start:start + self.rows] for start in range(0, len(order), self.rows)]
        answers: dict[int, tuple[float, bool]] = {}
        for batch in with_progress(batches, len(batches), label):
            answers |= zip(batch, self._score_batch([pairs[i] for i in batch]))
        return [answers[i] for i in range(len(pairs))]

    @torch.no_grad()
    def _score_batch(self, pairs: list[Pair]) -> Iterator[tuple[float, bool]]:
        inputs, targets = [], []
        for context, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UsageError(f"a continuation of {len(continuation)} tokens does not fit into the model's context of {self.max_length}; leave the task out")
            inputs.append([*context, *continuation][:-1][-self.max_length:])
            targets.append(torch.tensor(continuation, dtype=torch.long))
        inputs.append([0, 0])  # the model wants two tokens at least
        ids = stack_sequences(inputs, pad_token_id=0)[:-1]  # attention is causal: what pads the right changes nothing
        lengths = [len(target) for target in targets]
        rows = torch.arange(len(pairs)).repeat_interleave(torch.tensor(lengths))
        columns = torch.cat([torch.arange(len(row) - length, len(row)) for row, length in zip(inputs, lengths)])
        device, wanted = self.model.get_device(), torch.cat(targets)
        logits = logits_at(self.model, ids.to(device), rows.to(device), columns.to(device)).float()
        nats = F.log_softmax(logits, dim=-1).gather(1, wanted.to(device)[:, None])[:, 0].double().cpu()
        hits = logits.argmax(dim=-1).cpu() == wanted
        return zip((part.sum().item() for part in nats.split(lengths)), (bool(part.all()) for part in hits.split(lengths)))

    # -------------------------------------------------------------------------
    # Texts

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Of each (context, options) what the model writes; options: until, max_gen_toks, do_sample, temperature, top_k. One that comes again is drawn anew."""
        answers: list[str] = []
        times: Counter[str] = Counter()
        for request in with_progress(requests, len(requests), "Texts"):
            context, options = request.args
            answers.append(self.write(context, seed=42 + times[context], **options))
            times[context] += 1
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def write(self, context: str, until: str | Sequence[str] = (), max_gen_toks: int = MAX_GENERATED, do_sample: bool | None = None,
              temperature: float | None = None, top_k: int | None = None, seed: int = 42, **unknown) -> str:
        """Up to the first of the texts in `until`, without it. Temperature 0 unless another is given, or do_sample without any. Raises UsageError for
        options that there are none of."""
        if unknown:
            raise UsageError(f"the generation option {min(unknown)!r} is not supported: until, max_gen_toks, do_sample, temperature and top_k are")
        if max_gen_toks >= self.max_length:
            raise UsageError(f"max_gen_toks={max_gen_toks} leaves no room for a prompt in the model's context of {self.max_length}; set fewer (--max-gen-toks)")
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        if temperature is None:
            temperature = 1.0 if do_sample else 0.0
        engine = Engine(self.model, self.encoder)
        room = self.max_length - max_gen_toks - 1
        prompt = [self.prefix_token_id, *self.tok_encode(context)[-room:]] if room else [self.prefix_token_id]
        stream, text = TextStream(self.encoder), ""
        for (token,), _ in engine.generate(prompt, max_tokens=max_gen_toks, temperature=0.0 if do_sample is False else temperature, top_k=top_k, seed=seed):
            if engine.is_terminal(token):
                break
            text += stream.push(token)
            if found := [place for stop in stops if (place := text.find(stop)) >= 0]:
                return text[:min(found)]
        return text + stream.flush()
