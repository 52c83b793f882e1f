"""What can be measured of a base model, each by name. A new evaluation is a function here and a line in the registry at the end."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.cli import UsageError, flag, int_or_off, positive_int
from nanochat.common import get_base_dir, get_dist_info, print0, with_progress
from nanochat.core_eval import core_csv, evaluate_core, load_bundle
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as data_loader
from nanochat.engine import Engine, check_causal
from nanochat.eval_bundle import find_eval_bundle
from nanochat.files import check_writable, write_text_atomic
from nanochat.loss_eval import evaluate_bpb
from nanochat.mlm import pseudo_perplexity
from nanochat.tokenizer import get_token_bytes

PROMPTS = [
    "The city that serves as the capital of Italy is",
    "Chemists write silver with the symbol",
    "The day of the week that follows Monday is",
    "A word that means the opposite of big is",
    "Counted outward from the Sun, the planets are",
    "On a clear day the colour of the sky is",
    "Solving 2x + 1 = 7 for x gives x =",
]


@dataclass
class EvaluationSettings:
    """The flags of the evaluations."""

    max_per_task: int = flag(-1, "Rows of each task of CORE; -1: all", type=int_or_off)
    device_batch_size: int = flag(32, "Rows per rank and forward pass of bpb", type=positive_int)
    split_tokens: int = flag(40 * 524288, "Tokens of each split that bpb reads", type=positive_int)
    pll_tokens: int = flag(4096, "Tokens that pll hides one by one, with a forward pass for each", type=positive_int)


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, that of a step of its training, and how."""

    model: Any
    tokenizer: Any
    device: torch.device
    step: int
    settings: EvaluationSettings

    @property
    def tokens_per_pass(self) -> int:
        """Over all ranks."""
        return self.settings.device_batch_size * self.model.config.sequence_len * get_dist_info()[3]


Findings = tuple[dict[str, float], list[dict]]  # numbers by name for the report's summary; lists that follow it

# -----------------------------------------------------------------------------
# Samples


def sample_prompts(engine: Engine, tokenizer) -> list[str]:
    """Each of `PROMPTS` with the model's greedy continuation of 16 tokens."""
    texts = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, prepend=tokenizer.get_bos_token_id())
        (sample,), _ = engine.generate_batch(tokens, max_tokens=16, temperature=0.0)
        texts.append(tokenizer.decode(sample[1:]))
    return texts


def sample_unconditioned(engine: Engine, tokenizer, num_samples: int = 8) -> list[str]:
    """Texts of up to 128 tokens that the model writes from nothing, at temperature 1."""
    samples, _ = engine.generate_batch([tokenizer.get_bos_token_id()], num_samples=num_samples, max_tokens=128, temperature=1.0)
    return [tokenizer.decode(sample[1:]) for sample in samples]


def write_samples(subject: Subject) -> Findings:
    if get_dist_info()[1] != 0:
        return {}, []
    engine, details = Engine(subject.model, subject.tokenizer), []
    for name, texts in ("sample", sample_prompts(engine, subject.tokenizer)), ("unconditioned", sample_unconditioned(engine, subject.tokenizer)):
        for i, text in enumerate(texts):
            print0(f"[{name} {i}] {text}")
        details.append({f"{name} {i}": text for i, text in enumerate(texts)})
    return {}, details


# -----------------------------------------------------------------------------
# Likelihoods


def check_bpb(subject: Subject) -> None:
    settings, tokens = subject.settings, subject.tokens_per_pass
    if settings.split_tokens < tokens:
        raise UsageError(f"--split-tokens={settings.split_tokens} is less than one batch of {tokens} tokens ({settings.device_batch_size} "
                         f"sequences of {subject.model.config.sequence_len} on {get_dist_info()[3]} ranks): raise it, or lower --device-batch-size")


def measure_bpb(subject: Subject) -> Findings:
    settings, token_bytes = subject.settings, get_token_bytes(subject.device)
    summary, steps = {}, settings.split_tokens // subject.tokens_per_pass
    for split in ("train", "val"):
        batches = data_loader(subject.tokenizer, settings.device_batch_size, subject.model.config.sequence_len, split, device=subject.device)
        summary[f"{split} bpb"] = bpb = evaluate_bpb(subject.model, with_progress(batches, steps, f"{split} bpb"), steps, token_bytes)
        print0(f"{split} bpb: {bpb:.6f}")
    return summary, []


def measure_pll(subject: Subject) -> Findings:
    sequence_len = subject.model.config.sequence_len
    rows = -(-subject.settings.pll_tokens // sequence_len)
    batches = data_loader(subject.tokenizer, 1, sequence_len, "val", device=subject.device)
    perplexity, bits = pseudo_perplexity(subject.model, with_progress(batches, rows, "pseudo-log-likelihood"), rows, subject.tokenizer)
    print0(f"val pseudo-perplexity: {perplexity:.3f}, {bits:.6f} bits per byte")
    return {"val pseudo-perplexity": perplexity, "val pseudo bpb": bits}, []


# -----------------------------------------------------------------------------
# CORE


def core_folder() -> Path:
    return Path(get_base_dir(), "base_eval")


def check_core(subject: Subject) -> None:
    if get_dist_info()[1] == 0:
        check_writable(core_folder())
    load_bundle(find_eval_bundle(), subject.settings.max_per_task)


def measure_core(subject: Subject) -> Findings:
    core = evaluate_core(subject.model, subject.tokenizer, subject.device, subject.settings.max_per_task)
    print0(f"CORE metric: {core['core_metric']:.4f}")
    if get_dist_info()[1] == 0:
        path = core_folder() / f"base_model_{subject.step:06d}.csv"
        write_text_atomic(path, core_csv(core))
        print0(f"Written to {path}")
    return {"CORE metric": core["core_metric"]}, [core["centered_results"]]


# -----------------------------------------------------------------------------


class Evaluation(NamedTuple):
    run: Callable[[Subject], Findings]  # called on all ranks
    check: Callable[[Subject], None] = lambda subject: None  # raises UsageError now for what would fail after an hour
    causal: bool = True  # for models that predict the next token?
    masked: bool = False  # for models of hidden tokens?
    default: bool = True  # where no names are given?


# In the order in which they run: the longest last
EVALUATIONS = {
    "sample": Evaluation(write_samples),
    "bpb": Evaluation(measure_bpb, check_bpb),
    "pll": Evaluation(measure_pll, causal=False, masked=True),
    "core": Evaluation(measure_core, check_core),
}


def choose(names: list[str] | None, model: Any) -> list[Evaluation]:
    """The evaluations of these names, or without names those that suit the model. Raises UsageError for one that does not."""
    causal = getattr(model.config, "causal", True)
    suitable = {name for name, evaluation in EVALUATIONS.items() if (evaluation.causal if causal else evaluation.masked)}
    for name in names or ():
        if name not in suitable:
            check_causal(model)
            raise UsageError(f"--eval={name} is for a model of hidden tokens (--objective=mlm); use bpb for this one")
    return [evaluation for name, evaluation in EVALUATIONS.items() if (name in names if names else name in suitable and evaluation.default)]


def evaluate(evaluations: list[Evaluation], subject: Subject) -> Findings:
    """Findings of all. Raises UsageError before anything is measured."""
    for evaluation in evaluations:
        evaluation.check(subject)
    summary: dict[str, float] = {}
    details: list[dict] = []
    for evaluation in evaluations:
        numbers, lists = evaluation.run(subject)
        summary |= numbers
        details = lists + details  # those of the longest come first
    return summary, details
