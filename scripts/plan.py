"""Says what to train in the time that you have, what will come out, and what to type.

    python -m scripts.plan --hours=8                                       on this machine, which is measured for half a minute
    python -m scripts.plan --hours=4 --gpus=8 --card="H100=80" --price-per-hour=3
    python -m scripts.plan --flops=1e18 --card="RTX 3090=24"

Times are from a few training steps here (step_time.py), or with --card from its data sheet. Losses are from a law fitted to the finished runs below
NANOCHAT_BASE_DIR if there are enough of one recipe (scaling_law.py), whose flags the plan then takes over; else from published constants. docs/planning.md has more.
"""
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from nanochat import compiler
from nanochat.checkpoint_manager import checkpoints_dir_of
from nanochat.cli import UsageError, command, flag, fraction, int_or_off, parse_settings, positive_float, positive_int
from nanochat.common import COMPUTE_DTYPE, autodetect_device_type, compute_init, get_base_dir, get_peak_flops, print0
from nanochat.data_shards import data_source, parquets_iter_batched, text_bytes
from nanochat.dataloader import TrainingData
from nanochat.files import check_writable, write_text_atomic
from nanochat.gpt import GPTConfig
from nanochat.memory import can_compile, card, device_bytes
from nanochat.objectives import OBJECTIVES
from nanochat.planning.finished_runs import finished_runs, of_one_recipe
from nanochat.planning.page import Page, duration
from nanochat.planning.planner import RECIPE, Memory, Planner, fitting, lowest, usable, vocabulary_rule
from nanochat.planning.scaling_law import MIN_DIFFERENT, MIN_RUNS, Law, effective_tokens, enough, fit, published
from nanochat.planning.step_time import Batch, Card, Measured, random_batches
from nanochat.resources import usable_cpus
from nanochat.run_plan import LearningSettings
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

MOST_HOURS, MOST_FLOPS = 1e6, 1e30
FIRST_VOCABULARY = 32768  # until the rule has a model to name another


@dataclass
class Settings(LearningSettings):
    hours: float | None = flag(None, "Hours to train", type=positive_float)
    flops: float | None = flag(None, "Training FLOPs to spend, instead of --hours", type=positive_float)
    gpus: int = flag(1, "How many of the device; with several the command is torchrun's", type=positive_int)
    card: tuple[str, float, float] | None = flag(None, "Plan for a card that is not here, as name=GiB or name=GiB@TFLOPS: 'H100=80' (default: measure this machine)", type=card)
    mfu: float = flag(0.4, "Share of its peak that the --card is assumed to reach", type=fraction)
    price_per_hour: float | None = flag(None, "Price of one device for an hour", type=positive_float)
    rho: float = flag(0.5, "What a token of a small model is assumed to be worth to the one that it grows into", type=fraction)
    depth: int = flag(-1, "Depth of the model; -1: the best one", type=int_or_off)
    vocab_size: int | None = flag(None, "Size of the vocabulary (default: the tokenizer's, without one by a rule)", type=positive_int)
    device_type: str = flag("", "Device to measure: cuda, mps or cpu (default: the best one here)")
    device_batch_size: int = flag(-1, "Rows per device and pass; -1: as many as fit", type=int_or_off)
    total_batch_size: int = flag(-1, "Tokens per step; -1: by the recipe", type=int_or_off)
    json: str | None = flag(None, "File to write the plan to as JSON")

    def check(self) -> None:
        """Raises UsageError for flags that contradict each other."""
        if (self.hours is None) == (self.flops is None):
            raise UsageError("say how much there is to spend: --hours=8, or --flops=1e18; one of the two")
        if (self.hours or 0) > MOST_HOURS or (self.flops or 0) > MOST_FLOPS:
            raise UsageError(f"no more than --hours={MOST_HOURS:g} or --flops={MOST_FLOPS:g} can be planned for")
        if self.mfu == 0:
            raise UsageError("--mfu=0 trains nothing; give the share of its peak that the card reaches, for example 0.4")
        if self.card and self.device_type:
            raise UsageError("--card plans for a device that is not here, --device-type measures one that is; give one of them")
        if self.json:
            check_writable(Path(self.json).parent)

    def spent(self) -> str:
        return duration(self.hours * 3600) if self.hours else f"{self.flops:g} FLOPs"


@dataclass
class Text:
    """What lies below NANOCHAT_BASE_DIR; what does not is None, and the text then without end."""

    tokenizer: RustBPETokenizer | None = None
    tokens: float = math.inf  # of the training text
    bytes_per_token: float | None = None

    def commands(self, vocab_size: int, device_type: str) -> list[str]:
        """What is missing, as commands."""
        get = "python -m nanochat.dataset " + ("-n 8" if device_type == "cuda" else "--source=stdlib")
        fits = self.tokenizer and self.tokenizer.get_vocab_size() == vocab_size
        return ([] if self.bytes_per_token else [get]) + ([] if fits else [f"python -m scripts.tok_train --vocab-size={vocab_size}"])


def find_text() -> Text:
    try:
        size = text_bytes("train")
        sample = next(parquets_iter_batched("val"), [])[:200]
    except UsageError:
        return Text()
    if not any(sample):
        return Text()
    try:
        tokenizer = get_tokenizer()
    except UsageError:
        return Text(bytes_per_token=4.0)  # only that there is a text counts
    bytes_per_token = sum(len(document.encode(errors="replace")) for document in sample) / sum(map(len, tokenizer.encode(sample)))
    return Text(tokenizer, size / bytes_per_token, bytes_per_token)


def find_law(settings: Settings, text: Text) -> tuple[Law, Settings]:
    """The law of the finished runs here and the settings with their recipe, or the published one."""
    if text.tokenizer is None or settings.vocab_size:
        return published(), settings
    here = [run for run in finished_runs(Path(checkpoints_dir_of("base")), text.tokenizer.checksum(), data_source()) if run.vocab_size == text.tokenizer.get_vocab_size()]
    defaults = {field.name: field.default for field in fields(Settings)}
    runs, recipe = of_one_recipe(here, {name: (defaults[name], getattr(settings, name)) for name in [*RECIPE, "total_batch_size"]})
    params, tokens = [run.params for run in runs], [effective_tokens(run.tokens, text.tokens) for run in runs]
    if not enough(params, tokens):
        print0(f"{len(runs)} finished runs of one recipe with this tokenizer are in {get_base_dir()}; from {MIN_RUNS} on, of {MIN_DIFFERENT} sizes and lengths, a law is fitted to them")
        return published(), settings
    names = ", ".join(run.tag for run in runs)
    return fit(params, tokens, [run.bpb for run in runs], "bits per byte", f"fitted to {len(runs)} finished runs here ({names})"), replace(settings, **recipe)


def first_guess(device: torch.device, gpus: int) -> Card:
    """The speed here, for choosing what to measure: by a few matrix products, or a share of the peak."""
    if device.type == "cpu":
        return Card(1e9 / compiler.expected_seconds(1e9), gpus, 1.0)
    peak = get_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else math.inf
    return Card(peak if math.isfinite(peak) else 50e12, gpus, 0.3)


def others_work() -> float:
    """CPUs that were busy in the last minute, before anything was measured; 0 where the system does not tell."""
    return min(os.getloadavg()[0], usable_cpus()) if hasattr(os, "getloadavg") else 0.0


def measure_here(planner: Planner, device: torch.device, batches) -> Measured:
    """Times small models of three widths around the one that the planner's present speed leads to."""
    guesses = planner.candidates([planner.settings.depth] if planner.settings.depth > 0 else [])
    depth = lowest(guesses).size.config.n_layer if guesses else 2
    speed = Measured(lambda depth, width: planner.settings.config(planner.vocab_size, depth, width), batches, device, planner.devices)
    sizes = {planner.size(near).config.n_embd: planner.size(near) for near in (max(1, depth // 2), depth, depth + max(1, depth // 2))}
    for width, size in sizes.items():
        rows = planner.rows_of(planner.whole_rows(size.batch), size)
        print0(f"Measuring models of width {width}, {rows} rows of {size.config.sequence_len} tokens", flush=True)
        speed.probe(width, rows)
    return speed


def batches_of(settings: Settings, text: Text, device: torch.device):
    """Where batches for a configuration come from: the text, with the time that its tokens take, or chance."""
    def batches(config: GPTConfig, rows: int) -> Iterator[Batch]:
        if text.tokenizer is None or text.bytes_per_token is None or text.tokenizer.get_vocab_size() != config.vocab_size:
            yield from random_batches(config, rows, device)
        else:
            prepare = OBJECTIVES[settings.objective].prepare(text.tokenizer, settings)
            for number, (x, y) in enumerate(TrainingData(text.tokenizer, rows, config.sequence_len, device, range(1), 1).take(1_000_000)):
                yield prepare(x, y, number)[:2]  # passes of all kinds take about as long
    return batches


@command
def main(argv=None) -> None:
    settings = parse_settings(Settings, argv, "Say what to train in the time that you have")
    settings.check()
    text = find_text()
    law, settings = find_law(settings, text)
    device_type = "cuda" if settings.card else settings.device_type or autodetect_device_type()
    planner = Planner(settings, settings.vocab_size or FIRST_VOCABULARY, settings.hours * 3600 if settings.hours else settings.flops or 0, settings.hours is None,
                      law, device_type, settings.gpus, settings.device_batch_size, settings.total_batch_size, text.tokens, settings.rho)
    depths = [settings.depth] if settings.depth > 0 else []
    measured = None
    if settings.card:
        name, gib, peak = settings.card
        limit, planner.speed = gib * 2 ** 30, Card(peak, settings.gpus, settings.mfu)
        print0(f"Plan for {settings.spent()} on {settings.gpus} x {name}, of whose {peak / 1e12:g} TFLOP/s {settings.mfu:.0%} are assumed (--mfu)")
    else:
        if settings.gpus > 1 and device_type != "cuda":
            raise UsageError(f"--gpus={settings.gpus}, and there is no GPU here to measure; name one: --card='H100=80'")
        *_, device = compute_init(device_type)
        limit, planner.speed = device_bytes(device), first_guess(device, settings.gpus)
        sharing = "" if settings.gpus == 1 else ", which are assumed to lose nothing by sharing the work"
        print0(f"Plan for {settings.spent()} on {settings.gpus} x {device_type} as here, {COMPUTE_DTYPE}{sharing}", flush=True)
        if (busy := others_work()) > 0.5:
            print0(f"Other programs keep about {busy:.1f} of the {usable_cpus()} CPUs busy: the times below are those of a busy machine", flush=True)
    if text.tokenizer and not settings.vocab_size:
        planner.vocab_size = text.tokenizer.get_vocab_size()
    elif not settings.vocab_size and (guesses := planner.candidates(depths)):
        planner.change_vocabulary(vocabulary_rule(lowest(guesses).size))
    if not settings.card:
        planner.speed = measured = measure_here(planner, device, batches_of(settings, text, device))
    if not (candidates := planner.candidates(depths)):
        raise UsageError("that is too little for even the smallest model; raise --hours or --flops, or give a smaller --total-batch-size or --max-seq-len")
    if device_type == "cpu":
        compiler.decide("cpu", lowest(candidates).flops)
    compiled = can_compile(device_type) if settings.card else not compiler.why_not_compile(device_type)
    memory, limit = Memory(device_type, compiled, settings.matrix_optimizer), usable(limit, device_type)
    print0(f"Counting the memory of {lowest(candidates).name}", flush=True)
    best, too_large = fitting(candidates, planner, memory, limit)
    planner.most_rows = best.rows
    if measured:
        print0(f"Measuring {best.name} itself" + (", compiled, which takes up to a minute the first time" if compiled else ""), flush=True)
        measured.correct(best.size.config, best.rows, compiled)
    candidates = [one for one in planner.candidates(depths) if memory.bytes(one.size, one.rows) <= limit]
    best = lowest(candidates)
    head = measured.head_share(best.size.config, best.rows, best.batch) if measured else 6 * planner.vocab_size * best.size.config.n_embd / best.size.flops_per_token
    page = Page(planner, memory, candidates, best, head, settings.price_per_hour, text.bytes_per_token, text.commands(planner.vocab_size, device_type), too_large)
    print0(f"\n{page.text()}")
    if settings.json:
        write_text_atomic(settings.json, json.dumps(page.as_json(), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
