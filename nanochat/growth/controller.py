"""Growth as something that happens between two steps of a training: the stages of the run, when the next one begins, and what it leaves behind."""
import copy
import gc
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from nanochat.cli import UsageError, finite_float, flag, fraction, non_negative_float, non_negative_int, positive_float, positive_int
from nanochat.common import print0
from nanochat.distributed import agreed
from nanochat.fp8 import disable_fp8
from nanochat.gpt import GPTConfig
from nanochat.growth.added import Entering
from nanochat.growth.kappa import Decision, GrowthTrigger, Prediction, final_loss_of_earlier_runs
from nanochat.growth.lineage import Lineage
from nanochat.growth.model import grow
from nanochat.growth.modes import MODES, width_mode
from nanochat.growth.optimizer import OPTIMIZER_MODES
from nanochat.growth.stages import (
    Shape,
    Stage,
    describe,
    dial_path,
    growth_record,
    latest_growths,
    parse_fractions,
    parse_path,
    shares_of_flops,
    show_plan,
)
from nanochat.growth.target import DEPTH_MODES, layered_config
from nanochat.ngpt import NormalizedWeights


@dataclass
class GrowthOperatorSettings:
    """The flags that say how a model grows."""

    grow_mode: str = flag("lossless", "How width grows", choices=MODES)
    grow_depth_mode: str = flag("identity", "How depth grows", choices=DEPTH_MODES)
    grow_optimizer: str = flag("transport", "What becomes of the optimizer's state when the model grows", choices=OPTIMIZER_MODES)
    grow_noise: float | None = flag(None, "Noise of the lossless mode, relative to the weights", type=non_negative_float)
    grow_theta: float | None = flag(None, "Angle of the lossless mode in degrees; 45: copies of channels, 0: fresh ones", type=finite_float)
    grow_spread: float | None = flag(None, "How unequally copies of heads and units are read in the lossless mode, from 0 to 1", type=fraction)
    grow_rewarm: int = flag(0, "Steps over which the learning rates come back after a growth; 0: they stay", type=non_negative_int)
    grow_rewarm_new: bool = flag(False, "Let --grow-rewarm hold for what a growth adds alone; the old weights' learning rates stay")
    grow_open: int = flag(0, "Steps over which masks over what a growth adds open, so that --grow-mode=masked and depth modes that copy no layers begin lossless; 0: no masks",
                          type=non_negative_int)
    grow_freeze: bool = flag(False, "Layers that were there before a growth stay as they are; new ones, embedding and head are trained")

    def growth_parameters(self) -> dict[str, float]:
        """Those of the mode that are given."""
        given = {"theta": self.grow_theta, "spread": self.grow_spread, "noise": self.grow_noise}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class GrowthSettings(GrowthOperatorSettings):
    """The flags of growth: start smaller than --depth and grow into it; the horizon becomes a budget of FLOPs."""

    grow_from: int | None = flag(None, "Depth of the first model; width and heads follow as for --depth (default: no growth)", type=positive_int)
    grow_stages: int = flag(1, "Growths between --grow-from and --depth", type=positive_int)
    grow_path: str | None = flag(None, "Shapes instead of --grow-from, each depth x width [x rank], the first and the last included: 10x640,15x1024,20x1280")
    kappa: float | None = flag(None, "Share of the gain that the model can still make at which to grow: as soon as loss <= p + kappa (s - p)", type=fraction)
    kappa_final_loss: float | None = flag(None, "The p of --kappa in bits per byte (default: of a finished run like this stage without growth, else foretold)", type=positive_float)
    grow_at: str | None = flag(None, "Shares of the FLOPs at which to grow, instead of --kappa, one for each growth: 0.2,0.5")
    grow_at_tokens: str | None = flag(None, "Shares of the tokens at which to grow, as --grow-at of the FLOPs")
    grow_budget: float = flag(1.0, "FLOPs of the whole run, as a share of what the final model would get without growth", type=positive_float)
    grow_family: bool = flag(False, "Finish a model of every size: the run grows at a constant rate, and of each size a branch decays over --warmdown-ratio")

    def growth_path(self, depth: int, aspect_ratio: int, head_dim: int) -> list[Shape]:
        """The shapes of all stages up to a model of `depth`; none without growth. Raises UsageError for flags that contradict each other."""
        if self.grow_path and self.grow_from:
            raise UsageError("--grow-path and --grow-from both say where to start; give one of them")
        if not (self.grow_path or self.grow_from):
            for field in fields(GrowthSettings):
                if getattr(self, field.name) != field.default:
                    raise UsageError(f"--{field.name.replace('_', '-')} says how or when to grow, but not into what; add --grow-from or --grow-path")
            return []
        if sum(given is not None for given in (self.kappa, self.grow_at, self.grow_at_tokens)) > 1:
            raise UsageError("--kappa, --grow-at and --grow-at-tokens all decide when to grow; give one of them")
        if self.kappa is None and not self.grow_at and not self.grow_at_tokens:
            raise UsageError("nothing says when to grow; add --kappa=0.15, or --grow-at with the shares of the FLOPs")
        path = parse_path(self.grow_path) if self.grow_path else dial_path(self.grow_from, depth, self.grow_stages, aspect_ratio, head_dim)  # type: ignore[arg-type]
        if len(path) < 2:
            raise UsageError(f"--grow-path={self.grow_path} has one shape; write the last one too")
        return path


RATES = 256  # moments at which a trigger knows the schedule


class GrowthController:
    """Grows a training's model stage by stage. `loop` is the training (train_loop.py); what it must offer is what is used of it here.

    budget: FLOPs of the whole run. growths_at: shares of it, instead of those that the settings ask for. earlier: growths of the run that this one goes on from,
    which are told in its checkpoints too. Raises UsageError for a path that cannot be grown along, before the run begins.
    """

    def __init__(self, settings: GrowthSettings, stages: list[Stage], budget: int, padded_vocab: int, seed: int, measured: bool,
                 growths_at: list[float] | None = None, earlier: list[dict] | None = None):
        self.settings, self.seed, self.measured = settings, seed, measured
        self.stages = stages
        self.padded_vocab = padded_vocab
        for number in range(1, len(stages)):  # what cannot grow is refused now, not in the middle of the run
            self.lineage(number)
        if settings.grow_open and stages[-1].config.normalized:
            raise UsageError("--grow-open is for pre-norm blocks: on the sphere (--block=ngpt) weights keep their lengths and cannot rise from 0; leave it out")
        if settings.grow_rewarm_new and not settings.grow_rewarm:
            raise UsageError("--grow-rewarm-new says what re-warms, but not how long; add --grow-rewarm with the steps")
        if not math.isfinite(settings.grow_budget * budget):
            raise UsageError(f"--grow-budget={settings.grow_budget:g} is more than there can be; it is a share of what the final model would get without growth")
        self.budget = round(settings.grow_budget * budget)
        growths = len(self.stages) - 1
        self.growths_at = growths_at or (parse_fractions(settings.grow_at) if settings.grow_at else latest_growths(growths))
        if settings.grow_at_tokens and not growths_at:
            self.growths_at = shares_of_flops(parse_fractions(settings.grow_at_tokens), [stage.flops_per_token for stage in stages])
        if len(self.growths_at) != growths:
            raise UsageError(f"--grow-at={settings.grow_at or settings.grow_at_tokens} has {len(self.growths_at)} moments for {growths} growths")
        self.earlier = earlier or []
        self.history: list[dict] = []  # of the growths so far, for the checkpoints
        self.grown_at = -1  # step
        self.trigger: GrowthTrigger | None = None

    def show_plan(self) -> str:
        return show_plan(self.stages, self.budget, self.growths_at, fixed=self.settings.kappa is None)

    def stage(self) -> Stage:
        return self.stages[len(self.history)]

    def begin_stage(self, loop: Any, before: GrowthTrigger | None = None, loss_before: float | None = None) -> None:
        """Sets up the trigger that ends the present stage; the last one has none. `before` ended the stage before, at this validation loss."""
        self.trigger = None
        number, settings = len(self.history), self.settings
        if number + 1 == len(self.stages):
            return
        cap, kappa, stage = self.growths_at[number] * self.budget, settings.kappa, self.stages[number]
        if kappa is None:
            self.trigger = GrowthTrigger(None, cap)
            return
        step_flops = stage.flops_per_token * loop.total_batch_size
        steps = (self.budget - loop.flops) / step_flops
        final = Prediction(settings.kappa_final_loss, "--kappa-final-loss") if settings.kappa_final_loss else \
            agreed(final_loss_of_earlier_runs(loop.folder.parent, stage.config, loop.conditions(), grown=number > 0))
        self.trigger = GrowthTrigger(kappa, cap, steps, [loop.at(loop.flops + share * (self.budget - loop.flops), loop.step + share * steps).lr
                                                         for share in (i / RATES for i in range(RATES + 1))],
                                     check_steps=loop.plan.check_tokens / 3 / loop.total_batch_size, final=final)  # a validation has no backward pass
        if before is not None and loss_before is not None:
            self.trigger.follow(before, loss_before)

    def loop_state(self) -> dict:
        """For the checkpoint: what `restore` takes up. The history is kept with the model, of which it is a fact."""
        return dict(grown_at=self.grown_at, growth_trigger=self.trigger and self.trigger.state())

    def restore(self, loop_state: dict, loop: Any) -> None:
        """Raises KeyError or TypeError for the state of something else."""
        self.grown_at = loop_state.get("grown_at", -1)
        if self.trigger is not None:
            self.trigger = GrowthTrigger(**loop_state["growth_trigger"])
        self.ease_in(loop, len(self.history), closed=False)

    def lineage(self, number: int) -> Lineage:
        """Of the model of that stage (from 1). Raises UsageError for a growth that cannot be."""
        before, after = self.stages[number - 1:number + 1]
        width = width_mode(self.settings.grow_mode, **self.settings.growth_parameters())
        return Lineage(width, layered_config(before.config), layered_config(after.config), after.layers, self.padded_vocab)

    def ease_in(self, loop: Any, number: int, closed: bool) -> None:
        """Lets what the growth into that stage has added get going, after a growth (`closed`: from masks of 0) and after a resume."""
        settings = self.settings
        if not (settings.grow_open or settings.grow_rewarm_new) or number < 1:
            return
        lineage, optimizer = self.lineage(number), loop.optimizer
        shapes = {name: p.shape for p, name in optimizer.names.items()}
        age = lambda: loop.step - self.grown_at
        if settings.grow_rewarm_new:
            Entering(optimizer, {name: lineage.added(name, shape) for name, shape in shapes.items()}, settings.grow_rewarm, age)
        if settings.grow_open:
            masks = Entering(optimizer, {name: lineage.masked(name, shape) for name, shape in shapes.items()}, settings.grow_open, age, masks=True)
            if closed:
                masks.close()
        if loop.model.config.normalized:
            normalize = NormalizedWeights(loop.model)
            optimizer.register_step_post_hook(lambda *_: normalize())

    def rewarming(self, step: int) -> float:
        """A factor of the learning rates of all weights."""
        rewarm = 0 if self.settings.grow_rewarm_new else self.settings.grow_rewarm
        return min(1.0, (step - self.grown_at + 1) / rewarm) if self.grown_at >= 0 and rewarm else 1.0

    def observe(self, loss: float) -> None:
        """To be told the training loss of every step."""
        if self.trigger is not None:
            self.trigger.observe(loss)

    def maybe_grow(self, loop: Any) -> None:
        """Between two steps: grows if the trigger says so. Checkpoints of the step are of the model before; a run resumed there decides again, and alike."""
        trigger = self.trigger
        if trigger is None:
            return
        if trigger.kappa is not None and trigger.start is None:
            self._begin(loop, loop.check())
        if not agreed(trigger.at_cap(loop.flops) or trigger.due()):
            return
        before_it = copy.deepcopy(trigger)
        before = loop.check() if self.measured else None
        decision = agreed(trigger.decide(loop.flops, before))
        if before is not None:
            loop.log.log("check", loop.step, val_bpb=before, **_facts(decision), reason=decision.reason, **loop.spent())
        if not decision.grow:
            return
        if loop.saved_step != loop.step:  # nothing is lost if the larger model does not fit
            self.trigger = before_it
            loop.save()
        settings, number = self.settings, len(self.history) + 1
        source, target = loop.model.config, self.stages[number]
        with disable_fp8(loop.model):
            model, optimizer = grow(
                loop.model, target.config, loop.optimizer, mode=settings.grow_mode, depth_mode=settings.grow_depth_mode, layers=target.layers,
                optimizer_mode=settings.grow_optimizer, setup=loop.optimizer_setup, freeze=settings.grow_freeze,
                generator=torch.Generator().manual_seed(self.seed + number), **settings.growth_parameters())
        assert optimizer is not None
        loop.use_model(model, optimizer)
        self.ease_in(loop, number, closed=True)
        gc.unfreeze()  # the small model is to be forgotten
        gc.collect()
        self.grown_at = loop.first_step = loop.step
        after = loop.check() if self.measured else None
        self.history.append(growth_record(loop.step, source, model.config, settings.grow_mode, settings.grow_depth_mode, self.seed, tokens=loop.tokens,
                                          flops=loop.flops, loss_before=before, loss_after=after))
        self._tell(loop, source, before, after, decision)
        self.begin_stage(loop, trigger, before)
        if self.trigger is not None and self.trigger.kappa is not None and after is not None:
            self._begin(loop, after)

    def _begin(self, loop: Any, loss: float) -> None:
        """The first validation of a stage whose end kappa decides."""
        assert self.trigger is not None
        self.trigger.begin(loss)
        prediction = self.trigger.predict()
        print0(f"Step {loop.step:05d} | Stage {len(self.history)}: {describe(loop.model.config)} begins at {loss:.4f} bpb and would end the budget at {prediction}")

    def _tell(self, loop: Any, source: GPTConfig, before: float | None, after: float | None, decision: Decision) -> None:
        """The line and the records of a growth."""
        model, settings = loop.model, self.settings
        share = loop.flops / self.budget
        kappa = "" if settings.kappa is None else f" | kappa: {settings.kappa:g} left: {_or_unknown(decision.left)} p: {decision.predicted or 'unknown'} target: {_or_unknown(decision.target)}"
        print0(f"Step {loop.step:05d} | Growth {describe(source)} -> {describe(model.config)} | bpb {_or_unknown(before)} -> {_or_unknown(after)}{kappa} | "
               f"FLOPs spent: {100 * share:.1f}% | {decision.reason}")
        values = dict(loss_before=before, loss_after=after, kappa=settings.kappa, **_facts(decision), share=share)
        loop.log.log("grow", loop.step, label=f"{describe(source)} → {describe(model.config)}", reason=decision.reason, mode=settings.grow_mode,
                     depth_mode=settings.grow_depth_mode, flops_per_token=loop.flops_per_token, counts=model.num_scaling_params(),
                     model_config=asdict(model.config), **values, **loop.spent())
        loop.log_wandb(**{f"grow/{key}": value for key, value in values.items() if isinstance(value, float)}, **{"grow/params": model.num_scaling_params()["total"]})


def _facts(decision: Decision) -> dict[str, Any]:
    """What a decision rests on: the share of the gain that is left, p with its standard deviation and source, the target."""
    p = decision.predicted
    return dict(left=decision.left, predicted=p and p.loss, predicted_error=p and p.error, predicted_by=p and p.source, target=decision.target)


def _or_unknown(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.6f}"
