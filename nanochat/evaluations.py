"""What can be measured of a base model, each by name. A new evaluation is a function here and a line in the registry at the end.

`base_eval` runs them on checkpoints, `base_train --eval-tasks` on the model that is being trained. What they find goes into a file beside the checkpoint
(evals/results.py).
"""
import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat.cli import UsageError, flag, listed, positive_int
from nanochat.common import get_base_dir, get_dist_info, print0, with_progress
from nanochat.core_eval import core_csv, evaluate_core
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as data_loader
from nanochat.engine import Engine, check_causal
from nanochat.eval_bundle import find_eval_bundle, load_bundle
from nanochat.evals import blimp, decode, nli, superglue, text
from nanochat.evals.classification import FineTuneSettings, share_jobs
from nanochat.evals.results import Results, Row
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
class EvaluationSettings(FineTuneSettings):
    """Where the evaluations find their data, and how they go about it."""

    eval_bundle: str | None = flag(None, "Folder of CORE's data (default: eval_bundle in the base directory, downloaded if it is not there)")
    core_tasks: list[str] | None = flag(None, "Tasks of CORE to run, by their labels, joined by commas (default: all)", type=listed())
    blimp: list[str] | None = flag(None, "Sets of minimal pairs, joined by commas: JSON lines, or folders of them (default: blimp in the base directory)", type=listed())
    nli: str | None = flag(None, "Folder of NLI sets, NAME_train.jsonl and NAME_test.jsonl, packed or not (default: nli in the base directory)")
    superglue: str | None = flag(None, "Folder of SuperGLUE's tasks, BoolQ/train.jsonl and so on (default: superglue in the base directory)")
    text: list[str] | None = flag(None, "Text files of the evaluation text, joined by commas", type=listed())
    text_stride: int | None = flag(None, "Tokens by which its window moves (default: half of the context)", type=positive_int)


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated, that of a step of its training, and how."""

    model: Any
    tokenizer: Any
    device: torch.device
    settings: EvaluationSettings
    step: int = 0
    device_batch_size: int = 32  # rows per rank and forward pass of bpb
    split_tokens: int = 40 * 524288  # that bpb reads of each split
    max_per_task: int = -1  # rows of each task of CORE; -1: all
    tables: Path | None = None  # folder for tables besides the results

    @property
    def tokens_per_pass(self) -> int:
        """Over all ranks."""
        return self.device_batch_size * self.model.config.sequence_len * get_dist_info()[3]


Findings = tuple[Results, list[dict | str]]  # rows by key ("" is the evaluation's own); lists for the report that follow them

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


def write_samples(subject: Subject, limit: int | None) -> Findings:
    if get_dist_info()[1] != 0:
        return {}, []
    engine = Engine(subject.model, subject.tokenizer)
    details: list[dict | str] = []
    unconditioned = sample_unconditioned(engine, subject.tokenizer, 8 if limit is None else limit)
    for name, texts in ("sample", sample_prompts(engine, subject.tokenizer)), ("unconditioned", unconditioned):
        for i, one in enumerate(texts):
            print0(f"[{name} {i}] {one}")
        details.append({f"{name} {i}": one for i, one in enumerate(texts)})
    return {}, details


def measure_decoding(subject: Subject, limit: int | None) -> Findings:
    if get_dist_info()[1] != 0:
        return {}, []
    rows = decode.evaluate_decoding(subject.model, subject.tokenizer, min(limit or 128, subject.model.config.sequence_len))
    for name, row in rows.items():
        print0(f"decoding: {row} tokens/s ({name})")
    return rows, []


# -----------------------------------------------------------------------------
# Likelihoods


def check_bpb(subject: Subject, limit: int | None) -> None:
    split_tokens, tokens = limit or subject.split_tokens, subject.tokens_per_pass
    if split_tokens < tokens:
        raise UsageError(f"{f'--eval=bpb:{limit}' if limit else f'--split-tokens={split_tokens}'} is less than one batch of {tokens} tokens "
                         f"({subject.device_batch_size} sequences of {subject.model.config.sequence_len} on {get_dist_info()[3]} ranks): "
                         "raise it, or lower --device-batch-size")


def measure_bpb(subject: Subject, limit: int | None) -> Findings:
    token_bytes, steps = get_token_bytes(subject.device), (limit or subject.split_tokens) // subject.tokens_per_pass
    rows: Results = {}
    for split in ("train", "val"):
        batches = data_loader(subject.tokenizer, subject.device_batch_size, subject.model.config.sequence_len, split, device=subject.device)
        bpb = evaluate_bpb(subject.model, with_progress(batches, steps, f"{split} bpb"), steps, token_bytes)
        rows[split] = Row(bpb, steps * subject.tokens_per_pass, metric="bits per byte", label=f"{split} bpb")
        print0(f"{split} bpb: {bpb:.6f}")
    return rows, []


def measure_pll(subject: Subject, limit: int | None) -> Findings:
    sequence_len = subject.model.config.sequence_len
    rows = -(-(limit or 4096) // sequence_len)
    batches = data_loader(subject.tokenizer, 1, sequence_len, "val", device=subject.device)
    perplexity, bits = pseudo_perplexity(subject.model, with_progress(batches, rows, "pseudo-log-likelihood"), rows, subject.tokenizer)
    print0(f"val pseudo-perplexity: {perplexity:.3f}, {bits:.6f} bits per byte")
    tokens = rows * sequence_len
    return {"perplexity": Row(perplexity, tokens, metric="perplexity per token", label="val pseudo-perplexity"),
            "bpb": Row(bits, tokens, metric="bits per byte", label="val pseudo bpb")}, []


def check_text(subject: Subject, limit: int | None) -> None:
    if not subject.settings.text:
        raise UsageError("--eval=text needs to know of which files: give --text=FILE,FILE")
    stems = [Path(path).name for path in subject.settings.text]
    if twice := {name for name in stems if stems.count(name) > 1}:
        raise UsageError(f"--text: two files are called {', '.join(sorted(twice))}, and their results would be mixed; rename one")
    for path in map(Path, subject.settings.text):
        if not path.is_file():
            raise UsageError(f"--text: there is no file {path}")


def measure_text(subject: Subject, limit: int | None) -> Findings:
    found: Results = {}
    for path in map(Path, subject.settings.text or ()):
        rows = text.evaluate_text(subject.model, subject.tokenizer, path, subject.device, subject.settings.text_stride, limit)
        print0(f"{path.name}: " + ", ".join(f"{row.metric}: {row}" for row in rows.values()))
        found |= {f"{path.name}/{key}": row for key, row in rows.items()}
    return found, []


# -----------------------------------------------------------------------------
# Minimal pairs


def blimp_sets(subject: Subject) -> list[Path]:
    """Raises UsageError where there are none."""
    if subject.settings.blimp:
        paths = [Path(path) for path in subject.settings.blimp]
    elif not (paths := [path for path in (Path(get_base_dir(), "blimp"),) if path.is_dir()]):
        raise UsageError(f"no pairs for --eval=blimp: give --blimp=FILE or FOLDER (JSON lines with sentence_good and sentence_bad, packed or not), "
                         f"or put them into {Path(get_base_dir(), 'blimp')}")
    for path in paths:
        if not path.exists():
            raise UsageError(f"--blimp: there is no file or folder {path}")
    return paths


def measure_blimp(subject: Subject, limit: int | None, hidden: bool = False) -> Findings:
    found: Results = {}
    for path in blimp_sets(subject):
        name = blimp.plain_name(path)
        rows = blimp.evaluate_set(subject.model, subject.tokenizer, path, subject.device, limit, hidden)
        print0(f"BLiMP {name}: {rows['']} over {rows[''].n:,} pairs, {rows[''].counts.get('ties', 0)} ties"
               + "".join(f" | {key}: {row}" for key, row in rows.items() if key.startswith("field/")))
        found |= {f"{name}/{key}".rstrip("/"): row for key, row in rows.items()}
    return found, []


# -----------------------------------------------------------------------------
# Classification


def nli_folder(subject: Subject) -> Path:
    return Path(subject.settings.nli or Path(get_base_dir(), "nli"))


def told(results: Results, details: list[dict | str]) -> Findings:
    for row in results.values():
        if row.label:
            print0(f"{row.label}: {row} over {row.n:,} rows")
    return results, details


def nli_by(method: str) -> Callable[[Subject, int | None], Findings]:
    def measure(subject: Subject, limit: int | None) -> Findings:
        model, tokenizer, device = subject.model, subject.tokenizer, subject.device
        sets = nli.read_sets(nli_folder(subject), trained=method != "prompt")
        for one in sets:
            one.train.tell(f"{one.name} (train)")
            one.test.tell(f"{one.name} (test)")
        if method == "prompt":
            results = {key: row for one in sets for key, row in nli.by_prompt(model, tokenizer, one, device, limit).items()}
        else:
            results = share_jobs([partial(nli.TRAINED[method], model, tokenizer, one, device, limit, subject.settings) for one in sets])
        if method != "finetune":
            return told(results, [])
        beside = nli.beside_drafts(results)
        print0(beside)
        return told(results, ["\n" + beside])
    return measure


def superglue_folder(subject: Subject) -> Path:
    return Path(subject.settings.superglue or Path(get_base_dir(), "superglue"))


def measure_superglue(subject: Subject, limit: int | None) -> Findings:
    splits = superglue.read_tasks(superglue_folder(subject))
    superglue.tell_left_out(splits, superglue_folder(subject))
    return told(share_jobs([partial(superglue.evaluate_split, subject.model, subject.tokenizer, split, limit, subject.settings) for split in splits]), [])


# -----------------------------------------------------------------------------
# CORE


def core_bundle(subject: Subject) -> Path:
    if (folder := subject.settings.eval_bundle) is None:
        return find_eval_bundle()
    if not Path(folder, "core.yaml").is_file():
        raise UsageError(f"--eval-bundle={folder} holds no core.yaml: give the folder that has it")
    return Path(folder)


def check_core(subject: Subject, limit: int | None) -> None:
    if subject.tables is not None and get_dist_info()[1] == 0:
        check_writable(subject.tables)
    load_bundle(core_bundle(subject), limit or subject.max_per_task, subject.settings.core_tasks)


def core_of(subject: Subject, limit: int | None) -> dict:
    """What `evaluate_core` returns; the mean of a part of the tasks has a name that says so."""
    core = evaluate_core(subject.model, subject.tokenizer, subject.device, limit or subject.max_per_task, core_bundle(subject), subject.settings.core_tasks)
    if (part := subject.settings.core_tasks) is None:
        return core
    mean = {f"mean of {', '.join(sorted(part))}": replace(core["rows"][""], label=f"CORE of {len(part)} tasks")}
    return core | {"rows": mean | {key: row for key, row in core["rows"].items() if key}}


def measure_core(subject: Subject, limit: int | None) -> Findings:
    core = core_of(subject, limit)
    print0(f"CORE metric: {next(iter(core['rows'].values()))}")
    if subject.tables is not None and get_dist_info()[1] == 0:
        path = subject.tables / f"base_model_{subject.step:06d}.csv"
        write_text_atomic(path, core_csv(core))
        print0(f"Written to {path}")
    return core["rows"], []


# -----------------------------------------------------------------------------


class Evaluation(NamedTuple):
    run: Callable[[Subject, int | None], Findings]  # called on all ranks; the number is that of --eval=NAME:N, or None
    check: Callable[[Subject, int | None], Any] = lambda subject, limit: None  # raises UsageError now for what would fail after an hour
    counts: str = ""  # what N is a number of
    causal: bool = True  # for models that predict the next token?
    masked: bool = False  # for models of hidden tokens?
    default: bool = False  # where no names are given?


# In the order in which they run: the longest last
EVALUATIONS = {
    "sample": Evaluation(write_samples, counts="texts from nothing", default=True),
    "decode": Evaluation(measure_decoding, counts="tokens of a text"),
    "bpb": Evaluation(measure_bpb, check_bpb, "tokens of each split", default=True),
    "pll": Evaluation(measure_pll, counts="tokens", causal=False, masked=True, default=True),
    "text": Evaluation(measure_text, check_text, "tokens of each file"),
    "blimp": Evaluation(measure_blimp, lambda subject, limit: blimp.check_sets(blimp_sets(subject)), "pairs of each paradigm", masked=True),
    "blimp-pll": Evaluation(partial(measure_blimp, hidden=True), lambda subject, limit: blimp.check_sets(blimp_sets(subject)), "pairs of each paradigm"),
    "nli-prompt": Evaluation(nli_by("prompt"), lambda subject, limit: nli.read_sets(nli_folder(subject), trained=False), "rows of each test set"),
    "nli-probe": Evaluation(nli_by("probe"), lambda subject, limit: nli.read_sets(nli_folder(subject)), "rows of each test set", masked=True),
    "nli-finetune": Evaluation(nli_by("finetune"), lambda subject, limit: nli.read_sets(nli_folder(subject)), "rows of each test set", masked=True),
    "superglue": Evaluation(measure_superglue, lambda subject, limit: superglue.read_tasks(superglue_folder(subject)), "rows of each val.jsonl", masked=True),
    "core": Evaluation(measure_core, check_core, "rows of each task", default=True),
}


def requests(text: str) -> list[str]:
    """The type of a flag: evaluations joined by commas, each with or without a number, such as blimp:10,core."""
    found = listed()(text)
    asked = [request.partition(":")[0] for request in found]
    for request in found:
        name, colon, limit = request.partition(":")
        if asked.count(name) > 1:
            raise argparse.ArgumentTypeError(f"{text!r} asks for {name} {asked.count(name)} times; give each evaluation once")
        if name not in EVALUATIONS:
            raise argparse.ArgumentTypeError(f"unknown evaluation {name!r}: use any of {', '.join(EVALUATIONS)}, joined by commas")
        if colon:
            positive_int(limit)
    return found


class Chosen(NamedTuple):
    """An evaluation as it was asked for."""

    name: str
    limit: int | None
    evaluation: Evaluation

    def within(self, limit: int | None) -> "Chosen":
        """With this limit, if it has none."""
        return self if self.limit is not None else self._replace(limit=limit)

    @property
    def key(self) -> str:
        """What the keys of its results begin with."""
        return self.name if self.limit is None else f"{self.name}:{self.limit}"


def choose(asked: Iterable[str] | None, model: Any) -> list[Chosen]:
    """The evaluations asked for (NAME or NAME:N), or those that are the default for such a model. Raises UsageError for one that does not suit it."""
    suitable = {name for name, evaluation in EVALUATIONS.items() if (evaluation.causal if model.config.causal else evaluation.masked)}
    if asked is None:
        return [Chosen(name, None, evaluation) for name, evaluation in EVALUATIONS.items() if name in suitable and evaluation.default]
    limits = {name: int(limit) if limit else None for name, _, limit in (request.partition(":") for request in asked)}
    for name in limits:
        if name not in suitable:
            check_causal(model)
            raise UsageError(f"--eval={name} is for a model of hidden tokens (--objective=mlm); use bpb for this one")
    return [Chosen(name, limits[name], evaluation) for name, evaluation in EVALUATIONS.items() if name in limits]


def check(chosen: Sequence[Chosen], subject: Subject) -> None:
    """Raises UsageError for what cannot be evaluated."""
    for one in chosen:
        one.evaluation.check(subject, one.limit)


def evaluate(chosen: Sequence[Chosen], subject: Subject) -> Findings:
    """What all of them find; the keys are those of the results' file. Call `check` before."""
    results: Results = {}
    details: list[dict | str] = []
    for one in chosen:
        rows, lists = one.evaluation.run(subject, one.limit)
        results |= {f"{one.key}/{key}".rstrip("/"): row for key, row in rows.items()}
        details = lists + details  # those of the longest come first
    return results, details
