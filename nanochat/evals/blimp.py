"""BLiMP (Warstadt et al. 2020, 1912.00582): of two sentences that differ in one point of grammar the right one should be the likelier.

A pair counts 1 where the model gives the good sentence the higher probability, 0 where it gives it the lower one, and 1/2 at a tie, which is counted. What both
sentences begin with costs both the same and is read, but not scored. A model of hidden tokens is asked for pseudo-log-likelihoods (Salazar et al. 1910.14659),
and one that knows both kinds (--objective=mixed) can be (`hidden`).

The score of a set is the mean over its paradigms, so that they weigh the same where they are not of one size. A set is one file, or the files of one folder:
BLiMP's own, BabyLM's filtered one and its supplement are three sets, whose rows in the results bear their names, and which are never averaged.
"""
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nanochat.cli import UsageError
from nanochat.common import telling
from nanochat.evals.jsonl import SUFFIXES, Rows, files_of, missing_text, plain_name, read_rows
from nanochat.evals.results import Results, Row, average, mean_row
from nanochat.evals.scoring import Example, find_common_length, max_positions, score_all, token_nats
from nanochat.mlm import MASK, pseudo_log_likelihoods
from nanochat.tokenizer import special_ids

# What is spelled in several ways in the published files: the paper has 12 terms, in which s-selection is a part of argument structure, and 4 fields
SPELLINGS = {"s_selection": "argument_structure", "filler_gap": "filler_gap_dependency", "island_effect": "island_effects"}


def normalized(name: str) -> str:
    """A field or term in one spelling: `syntax/semantics` and `syntax_semantics` are the same."""
    name = re.sub(r"\W+", "_", name.strip().lower())
    return SPELLINGS.get(name, name)


def _complaint(row: dict) -> str | None:
    return missing_text(row, ("sentence_good", "sentence_bad", *(name for name in ("UID", "field", "linguistics_term") if row.get(name) is not None)))


def read_set(path: Path, per_paradigm: int | None = None) -> tuple[dict[str, list[dict]], Rows]:
    """(pairs by paradigm, all rows) of a file or of a folder's files; a file whose rows have no UID is one paradigm.

    per_paradigm: as many of each, the first ones after a shuffle with a fixed seed. Raises UsageError where nothing can be used, and where a paradigm is in
    two files, as in a folder that holds the full and the filtered set.
    """
    paradigms: dict[str, list[dict]] = {}
    origin: dict[str, Path] = {}
    good, bad = [], []
    for file in files_of(path):
        rows = read_rows(file, _complaint)
        good += rows.require("give BLiMP's JSON lines, with sentence_good and sentence_bad")
        bad += rows.bad
        for row in rows.good:
            name = row.get("UID") or plain_name(file)
            if origin.setdefault(name, file) != file:
                raise UsageError(f"{path} has the paradigm {name} twice, in {origin[name].name} and {file.name}: put different sets (the full and the filtered one) "
                                 "into folders of their own, and give --blimp=FOLDER,FOLDER")
            paradigms.setdefault(name, []).append(row)
    if per_paradigm is not None:
        for rows_of_one in paradigms.values():
            random.Random(1337).shuffle(rows_of_one)
            del rows_of_one[per_paradigm:]
    return paradigms, Rows(good, bad)


def check_sets(paths: Sequence[Path]) -> None:
    """Raises UsageError for paths of no set, for two of one name, and for a folder of sets."""
    names = [plain_name(path) for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"--blimp: two sets are called {', '.join(sorted(twice))}, and their results would be mixed; rename one")
    for path in paths:
        if path.is_dir() and not any(file.name.endswith(SUFFIXES) for file in path.iterdir()) and (sets := sorted(p.name for p in path.iterdir() if p.is_dir())):
            raise UsageError(f"{path} holds folders and no file of pairs: give the sets themselves, such as --blimp={path / sets[0]}")
        read_set(path)


def pair_example(pair: dict, tokenizer, limit: int | None = None) -> Example:
    """Both sentences behind BOS, the good one first; scored from where they part. What the model has no room for is left off at the end."""
    sequences = tokenizer([pair["sentence_good"], pair["sentence_bad"]], prepend=tokenizer.get_bos_token_id())
    notes = ["cut to what the model takes"] if limit is not None and max(map(len, sequences)) > limit else []
    sequences = [sequence[:limit] for sequence in sequences]
    start = find_common_length(sequences)
    return Example(sequences, [start, start], [len(sequence) for sequence in sequences], 0, notes)


def prefer_good(examples: Sequence[Example], costs: Sequence[Sequence[float]]) -> list[float]:
    """1, 0 or 1/2 of each; costs: nats of the good and of the bad sentence. A tie is noted."""
    for example, (good, bad) in zip(examples, costs, strict=True):
        if good == bad:
            example.notes.append("ties")
    return [0.5 if good == bad else float(good < bad) for good, bad in costs]


def _costs(model, tokenizer, device, hidden: bool) -> Callable[[Sequence[Example]], list[list[float]]]:
    """A function of examples that run in one forward pass: for each the nats of its sentences."""
    if not hidden and getattr(getattr(model, "config", None), "causal", True):
        return lambda examples: [[nats.double().sum().item() for nats in pair] for pair in token_nats(model, examples, device)]
    mask, special = tokenizer.encode_special(MASK), special_ids(tokenizer)
    return lambda examples: [[-sum(pseudo_log_likelihoods(model, sentence, mask, special)) for sentence in example.sequences] for example in examples]


def score_pairs(model, tokenizer, pairs: Sequence[dict], device, progress: Callable[[float], None] | None = None,
                hidden: bool = False) -> tuple[torch.Tensor, list[int]]:
    """(1, 0 or 1/2 for each pair; the numbers of the ties). All ranks call it and get the same. hidden: also of a causal model pseudo-log-likelihoods."""
    limit, costs = max_positions(model), _costs(model, tokenizer, device, hidden)
    scores, _ = score_all(len(pairs), lambda i: pair_example(pairs[i], tokenizer, limit), lambda batch: prefer_good(batch, costs(batch)), device, progress)
    return scores, (scores == 0.5).nonzero().flatten().tolist()


def evaluate_set(model, tokenizer, path: Path, device, per_paradigm: int | None = None, hidden: bool = False) -> Results:
    """Of one set: "" is the whole, then field/..., term/... and paradigm/..., each the mean over its paradigms."""
    name = plain_name(path)
    paradigms, rows = read_set(path, per_paradigm)
    rows.tell(f"BLiMP {name}")
    pairs = [pair for group in paradigms.values() for pair in group]
    scores, _ = score_pairs(model, tokenizer, pairs, device, telling(f"BLiMP {name}"), hidden)
    by_paradigm: Results = {}
    groups: dict[str, list[Row]] = {}
    for (uid, group), part in zip(paradigms.items(), scores.split([len(group) for group in paradigms.values()]), strict=True):
        row = mean_row(part, baseline=0.5, counts={"ties": int((part == 0.5).sum())})
        by_paradigm[f"paradigm/{uid}"] = row
        for kind, field in ("field", "field"), ("term", "linguistics_term"):
            if value := group[0].get(field):
                groups.setdefault(f"{kind}/{normalized(value)}", []).append(row)
    total = average(list(by_paradigm.values()), baseline=0.5, label=f"BLiMP {name}" + " by hidden tokens" * hidden, metric="accuracy")
    if rows.bad:
        total.counts["not usable"] = len(rows.bad)
    return {"": total, **{key: average(group, baseline=0.5) for key, group in sorted(groups.items())}, **by_paradigm}
