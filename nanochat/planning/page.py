"""What the planner (scripts/plan.py) prints: an aligned table, remarks in plain words, and the commands to paste."""
import math
import shlex
from dataclasses import dataclass, field
from typing import Any

from nanochat.planning.planner import MOST_EPOCHS, Candidate, Memory, Planner, vocabulary_rule
from nanochat.planning.scaling_law import PUBLISHED_UNIT
from nanochat.planning.step_time import Card

NEIGHBOURS = 2  # depths that are shown on each side of the best
READ_OFTEN = 8  # epochs from which on more text is the better advice


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def quantity(number: float) -> str:
    """1,234,000 as 1.23 M."""
    for unit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.0f}"


def aligned(rows: list[dict[str, str]], best: int) -> str:
    """The rows below their names, numbers to the right; a star stands before the best."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = ["  " + "  ".join(f"{name:>{width}}" for name, width in widths.items())]
    lines += [("* " if i == best else "  ") + "  ".join(f"{row[name]:>{width}}" for name, width in widths.items()) for i, row in enumerate(rows)]
    return "\n".join(line.rstrip() for line in lines)


@dataclass
class Page:
    """head: the vocabulary's share of the time of a step of `best`."""

    planner: Planner
    memory: Memory
    candidates: list[Candidate]  # by depth
    best: Candidate
    head: float
    price: float | None = None  # of a device, for an hour
    bytes_per_token: float | None = None
    setting_up: list[str] = field(default_factory=list)  # commands that come before
    too_large: list[str] = field(default_factory=list)  # models

    def __post_init__(self) -> None:
        at = self.candidates.index(self.best)
        alone = self.candidates[max(0, at - NEIGHBOURS):at + NEIGHBOURS + 1]
        self.growth = min(self.planner.growths(alone), key=lambda one: one.loss, default=None)
        self.rows = alone + ([self.growth] if self.growth else [])

    def cells(self, one: Candidate) -> dict[str, str]:
        planner = self.planner
        return dict(
            model=one.name, parameters=quantity(one.size.total_params), tokens=quantity(one.tokens), **{"per param.": f"{one.tokens / one.size.params:.1f}"},
            **({"epochs": f"{one.tokens / planner.unique:.1f}"} if math.isfinite(planner.unique) else {}), batch=quantity(one.batch), steps=f"{one.steps:,}",
            FLOPs=f"{one.flops:.1e}", time=duration(one.seconds), memory=f"{self.memory.bytes(one.size, one.rows) / 2 ** 30:.2f} GiB",
            **({} if self.price is None else dict(price=f"{self.cost(one):,.2f}")), loss=f"{one.loss:.3f} ± {one.error:.3f}" if self.says_something(one) else "?")

    def says_something(self, one: Candidate) -> bool:
        """The published law is of models of 70 M parameters and more; of very small ones it says more than guessing at random would cost."""
        return self.planner.law.unit != PUBLISHED_UNIT or one.loss < math.log(one.size.config.vocab_size)

    def cost(self, one: Candidate) -> float:
        assert self.price is not None
        return self.price * self.planner.devices * one.seconds / 3600

    def growth_pays(self) -> bool:
        """By more than the error of the prediction: an assumption alone is not enough."""
        return self.growth is not None and self.growth.loss < self.best.loss - max(self.best.error, self.growth.error)

    def commands(self) -> list[str]:
        return [*self.setting_up, shlex.join(self.planner.command(self.best))]

    def notes(self) -> list[str]:
        planner, best, law = self.planner, self.best, self.planner.law
        notes = [f"Loss in {law.unit}, {law.source}."]
        if self.bytes_per_token and law.unit == "bits per byte":
            notes[0] += f" 1 bit per byte is {math.log(2) * self.bytes_per_token:.2f} nats per token."
        if not self.says_something(best):
            notes.append("It was fitted to models of 70 M parameters and more and says nothing of such small ones: ? is a loss that cannot be. A few finished runs here will tell more.")
        factor = max(best.size.params / law.largest[0], best.worth / law.largest[1])
        if factor > 3:
            notes.append(f"This is {factor:.0f} times beyond the largest of those runs: the error is an honest guess at best. A run in between makes it smaller.")
        if math.isfinite(planner.unique) and best.tokens > READ_OFTEN * planner.unique:
            limit = "" if best.tokens < (MOST_EPOCHS - 0.1) * planner.unique else f"; after {MOST_EPOCHS} times nothing is gained, so not all of the time is used"
            notes.append(f"The text here has {quantity(planner.unique)} tokens and is read {best.tokens / planner.unique:.0f} times{limit}. More text helps more than more time: "
                         "python -m nanochat.dataset --help")
        vocab, rule = best.size.config.vocab_size, vocabulary_rule(best.size)
        notes.append(f"Vocabulary {vocab:,}: it takes {self.head:.0%} of the time{' (by FLOPs)' if isinstance(planner.speed, Card) else ''}, and one of twice the size twice as much. "
                     f"About {rule:,} are best for this size by Tao et al. (2407.13623)" + (", which is near enough." if 0.25 <= rule / vocab <= 4 else f": python -m scripts.tok_train --vocab-size={rule}, "
                     "in a NANOCHAT_BASE_DIR of its own, as models need the tokenizer that they were trained with."))
        if self.growth:
            pays = self.growth_pays()
            lower = "lower, but by less than the error" if self.growth.loss < best.loss else "no lower"
            notes.append(f"Growth, {self.growth.name}, is {'' if pays else 'not '}predicted to pay against {best.name} alone, assuming that a token of the small model is worth {planner.rho:g} to the large one (--rho)"
                         + ("." if pays else f": its loss is {lower}.") + " Measured so far: 0.25 to 0.6 in short runs, 0.7 to 0.3 and falling in a long one, and no run that beat the best single size (docs/planning.md).")
        if self.too_large:
            notes.append(f"Too large for the memory: {', '.join(self.too_large)}.")
        return notes

    def text(self) -> str:
        lines = [aligned([self.cells(one) for one in self.rows], self.rows.index(self.best)), "", *(f"- {note}" for note in self.notes()), "", "To train the model with the star:", ""]
        lines += [f"    {line}" for line in self.commands()]
        if self.growth:
            lines += ["", "The one that grows:", "", "    " + shlex.join(self.planner.command(self.growth))]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        def row(one: Candidate) -> dict[str, Any]:
            config = one.size.config
            return dict(model=one.name, depth=config.n_layer, width=config.n_embd, params=one.size.params, total_params=one.size.total_params, tokens=one.tokens, worth=one.worth,
                        batch=one.batch, rows=one.rows, steps=one.steps, flops=one.flops, seconds=one.seconds, bytes=self.memory.bytes(one.size, one.rows), loss=one.loss,
                        error=one.error, price=None if self.price is None else self.cost(one), command=self.planner.command(one))
        return dict(best=row(self.best), rows=[row(one) for one in self.rows], unit=self.planner.law.unit, law=self.planner.law.source, rho=self.planner.rho,
                    growth_pays=self.growth_pays(), head_share=self.head, notes=self.notes(), commands=self.commands())
