"""The schedule of a run as data: the model, and what runs and trains in every step.

A schedule is a sequence of phases, computed before training starts. A phase specifies everything
that can change during training. The training loop, the cost accounting (cost.py), the data order,
checkpoints and figures all read the same phases. The baseline is a schedule with one phase.

`make_schedule` builds the phases of arXiv:2411.18700 and those of growth without freezing.
`with_ramp` and `with_skip_policy` transform a schedule into another one, so methods can be
combined. To add a policy for skipping blocks, write a function at the end of this file.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import growth
from stagewise.errors import UserError, did_you_mean
from stagewise.seeding import derived_uniform

Kind = Literal["new_blocks", "all_blocks", "continual"]
StateRule = Literal["carry", "copy", "reset"]


@dataclass(frozen=True)
class SkipPolicy:
    """Selects the blocks to skip in each step, as a pure function of the seed and the step."""

    name: str  # one of SKIP_POLICIES
    rate: float
    n_steps: int  # T; the policy changes over the first T steps and then stays as in the last one
    seed: int

    def residual_scales(self, n_blocks: int, step: int) -> tuple[float, ...]:
        """Return the scale of every block's residual branches. A block with scale 0 is skipped."""
        uniform = derived_uniform(n_blocks, "skip", self.seed, step)
        progress = min(1, step / max(1, self.n_steps - 1))
        return SKIP_POLICIES[self.name](uniform, progress, self.rate)


@dataclass(frozen=True)
class Phase:
    """Consecutive steps in which the same parameters exist and the same parameters train.

    There is no field for the final layer norm, because it trains in every phase.
    """

    name: str
    stage: int  # 1..S
    kind: Kind  # the paper's phase 1, its phase 2, and continual training
    start: int  # first optimizer step, counted from 0
    stop: int  # one past the last step
    n_blocks: int  # number of blocks in the model, L_s in the paper
    trained_blocks: tuple[int, ...]  # any subset of the blocks; the others are frozen
    train_embeddings: bool  # token and position embeddings
    train_head: bool  # output projection, tied to the token embeddings
    context_length: int  # tokens per sequence; divides block_size
    tokens_per_step: int  # over all processes and micro-batches
    growth: str | None  # operator that creates the blocks added on entry; None if none are added
    # Optimizer state on entry. "carry": existing parameters keep their state, new ones start
    # without state. "copy": new parameters get the state of the blocks they are copied from.
    # "reset": all parameters start without state.
    optimizer_state: StateRule
    rewarmup_steps: int  # steps of linear learning-rate warm-up on entry
    skip: SkipPolicy | None  # None: all blocks run in every step
    milestone: bool  # the checkpoint at the end of the phase is never removed

    @property
    def n_steps(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Step:
    """What runs and what trains in one optimizer step."""

    phase: Phase
    residual_scales: tuple[float, ...] | None  # one per block; None: all blocks run unscaled

    @property
    def running_blocks(self) -> tuple[int, ...]:
        """The blocks that are not skipped."""
        scales = self.residual_scales
        return tuple(i for i in range(self.phase.n_blocks) if scales is None or scales[i])


@dataclass(frozen=True)
class Schedule:
    """Consecutive phases from step 0 to `n_steps`."""

    phases: tuple[Phase, ...]

    @property
    def n_steps(self) -> int:
        return self.phases[-1].stop

    @property
    def stage_steps(self) -> int:
        """Steps before continual training, which may be extended later."""
        return max((p.stop for p in self.phases if p.kind != "continual"), default=0)

    def phase_at(self, step: int) -> Phase:
        """Return the phase of step `step` (from 0), or the last phase after the end."""
        return next((p for p in self.phases if step < p.stop), self.phases[-1])

    def at(self, step: int) -> Step:
        """Return what runs and trains in step `step` (from 0)."""
        phase = self.phase_at(step)
        if phase.skip is None:
            return Step(phase, None)
        return Step(phase, phase.skip.residual_scales(phase.n_blocks, step))

    def tokens(self, step: int) -> int:
        """Return the number of tokens read in the first `step` steps."""
        begun = [p for p in self.phases if p.start < step]
        return sum((min(step, p.stop) - p.start) * p.tokens_per_step for p in begun)

    @property
    def is_baseline(self) -> bool:
        """Whether all parameters exist, run and train in every step, without ramps."""
        first = self.phases[0]
        same = ("n_blocks", "context_length", "tokens_per_step")
        return all(
            len(p.trained_blocks) == p.n_blocks
            and p.train_embeddings
            and p.train_head
            and p.skip is None
            and all(getattr(p, name) == getattr(first, name) for name in same)
            for p in self.phases
        )


# --------------------------------------------------------------------------------------------------
# building a schedule


def blocks_per_stage(n_layer: int, stages: int) -> list[int]:
    """Return the cumulative block counts L_1..L_S = floor(s L / S); S need not divide L.

    Raises:
        UserError: if S is not in 1..L.
    """
    if not 1 <= stages <= n_layer:
        raise UserError(
            f"stages={stages} must be between 1 and n_layer={n_layer}: every stage adds blocks"
        )
    return [s * n_layer // stages for s in range(1, stages + 1)]


def make_schedule(
    n_layer: int,
    steps: int,
    stages: int = 1,
    continual_steps: int = 0,
    *,
    stage_blocks: Sequence[int] | None = None,
    phase_fractions: Sequence[float] | None = None,
    freezing: bool = True,
    phase1: str = "paper",
    growth_operator: str = "random",
    optimizer_state: StateRule = "carry",
    continual_optimizer_state: StateRule = "carry",
    rewarmup_steps: int = 0,
    context_length: int = 1024,
    tokens_per_step: int = 524_288,
) -> Schedule:
    """Return a schedule of `stages` stages, followed by continual training of all blocks.

    Phase i of n ends at step round(i * steps / n), so the stages have exactly `steps` steps. In
    stage 1 there are no existing blocks to freeze, so its phase 1 trains everything.

    Args:
        steps: number of steps of all stages together.
        stages: number of stages S. 1 is the baseline, one phase that trains everything.
        continual_steps: number of steps after the stages that train all blocks.
        stage_blocks: number of blocks at the end of each stage, for example (2, 4, 12). Replaces
            `blocks_per_stage` and determines S.
        phase_fractions: relative lengths of the phases. With freezing: 2 numbers (phases 1 and 2 of
            every stage) or 2S numbers. Without: S numbers. Default: equal lengths.
        freezing: if False, there is no phase 1, and every stage trains all its blocks.
        phase1: what phase 1 trains besides the new blocks and the final norm. "paper": nothing
            else. "released_code": the embeddings and the head.
        growth_operator: name of the operator in growth.py that creates new blocks.
        optimizer_state, rewarmup_steps: see `Phase`. Used for every phase except the first.
        continual_optimizer_state: the optimizer state of the continual phase.
        context_length, tokens_per_step: used for every phase. `with_ramp` changes them.

    Raises:
        UserError: if the arguments do not describe a valid schedule.
    """
    blocks = list(stage_blocks) if stage_blocks else blocks_per_stage(n_layer, stages)
    S = len(blocks)
    if stages not in (1, S):
        raise UserError(
            f"stage_blocks={tuple(blocks)} gives {S} stages, but stages={stages}: set only one"
        )
    if blocks[0] < 0 or blocks[-1] != n_layer or any(a >= b for a, b in zip(blocks, blocks[1:])):
        raise UserError(
            f"stage_blocks={tuple(blocks)} must rise strictly from 0 or more to n_layer={n_layer}"
        )
    if steps < 1 or continual_steps < 0:
        raise UserError(
            f"steps={steps} must be at least 1, continual_steps={continual_steps} at least 0"
        )
    kinds: list[Kind] = ["new_blocks", "all_blocks"] if freezing and S > 1 else ["all_blocks"]
    boundaries = _boundaries(steps, S, len(kinds), phase_fractions)

    phases: list[Phase] = []
    for i, (start, stop) in enumerate(zip(boundaries, boundaries[1:])):
        if start == stop:
            continue
        stage, kind = 1 + i // len(kinds), kinds[i % len(kinds)]
        n_blocks = blocks[stage - 1]
        trains = tuple(range(n_blocks))
        if kind == "new_blocks" and phases:  # phases[-1] belongs to the stage before
            sources = growth.source_map(growth_operator, phases[-1].n_blocks, n_blocks)
            trains = growth.new_blocks(sources)
        fixed = kind == "new_blocks" and bool(phases) and phase1 == "paper"
        phases.append(
            Phase(
                name=_phase_name(S, stage, kind, len(kinds)),
                stage=stage,
                kind=kind,
                start=start,
                stop=stop,
                n_blocks=n_blocks,
                trained_blocks=trains,
                train_embeddings=not fixed,
                train_head=not fixed,
                context_length=context_length,
                tokens_per_step=tokens_per_step,
                growth=growth_operator if not phases or n_blocks > phases[-1].n_blocks else None,
                optimizer_state=optimizer_state if phases else "carry",
                rewarmup_steps=rewarmup_steps if phases else 0,
                skip=None,
                milestone=False,
            )
        )
    for i, p in enumerate(phases):  # at the end of each stage, even if it has no phase 2
        if i + 1 == len(phases) or phases[i + 1].stage > p.stage:
            phases[i] = replace(p, milestone=True)
    if phases[-1].n_blocks != n_layer:
        raise UserError(
            f"steps={steps} leaves no step for the last of {S} stages: use more steps or fewer "
            "stages"
        )
    # Report an operator that does not exist or cannot grow the model before training starts.
    for old, new in zip([phases[0], *phases], phases):
        growth.source_map(growth_operator, old.n_blocks, new.n_blocks)
    if continual_steps:
        end = replace(
            phases[-1],
            name="continual",
            kind="continual",
            start=steps,
            stop=steps + continual_steps,
            trained_blocks=tuple(range(n_layer)),
            train_embeddings=True,
            train_head=True,
            growth=None,
            optimizer_state=continual_optimizer_state,
            rewarmup_steps=rewarmup_steps,
            milestone=True,
        )
        phases.append(end)
    return Schedule(tuple(phases))


def _phase_name(stages, stage, kind, per_stage):
    if stages == 1:
        return "all blocks"
    if per_stage == 1:
        return f"stage {stage}"
    return f"stage {stage} phase {1 if kind == 'new_blocks' else 2}"


def _boundaries(steps, stages, per_stage, fractions):
    """Return the steps at which the phases begin and end, from 0 to `steps`."""
    n = stages * per_stage
    if fractions is None:
        fractions = [1.0] * n
    elif len(fractions) == per_stage == 2:
        fractions = list(fractions) * stages
    if (
        len(fractions) != n
        or any(not 0 <= f < math.inf for f in fractions)
        or sum(map(Fraction, fractions)) == 0
    ):
        needed = f"{n} numbers"
        if per_stage == 2:
            needed = f"2 numbers (phase 1 and 2 of every stage) or {n}"
        raise UserError(
            f"phase_fractions={tuple(fractions)} must be {needed}, none of them negative and not "
            "all zero"
        )
    # Exact fractions, so that a boundary does not depend on floating-point rounding.
    total, cumulative, boundaries = sum(map(Fraction, fractions)), Fraction(0), [0]
    for fraction in fractions:
        cumulative += Fraction(fraction)
        boundaries.append(round_half_up(cumulative * steps / total))
    return boundaries


def schedule_from_config(config, continual_steps: int) -> Schedule:
    """Return the schedule described by the options of a run (`stagewise.config.Config`).

    Raises:
        UserError: if the options do not describe a valid schedule.
    """
    schedule = make_schedule(
        config.n_layer,
        config.steps,
        config.stages,
        continual_steps,
        stage_blocks=config.stage_blocks,
        phase_fractions=config.phase_fractions,
        freezing=config.freezing,
        phase1=config.phase1,
        growth_operator=config.growth,
        optimizer_state=config.optimizer_state,
        continual_optimizer_state=config.continual_optimizer_state,
        rewarmup_steps=config.rewarmup_steps,
        context_length=config.block_size,
        tokens_per_step=config.tokens_per_step,
    )
    block_size = config.block_size
    schedule = with_ramp(schedule, "tokens_per_step", config.tokens_per_step_ramp)
    schedule = with_ramp(schedule, "context_length", config.context_ramp)
    for phase in schedule.phases:
        if block_size % phase.context_length:
            raise UserError(
                f"context_ramp={config.context_ramp!r}: {phase.context_length} must divide "
                f"block_size={block_size}"
            )
    if schedule.phases[-1].context_length != block_size:
        raise UserError(
            f"context_ramp={config.context_ramp!r} must end at block_size={block_size}, because "
            "evaluations use the full context"
        )
    if config.skip_policy == "none":
        return schedule
    return with_skip_policy(schedule, config.skip_policy, config.skip_rate, config.seed)


# --------------------------------------------------------------------------------------------------
# transforming a schedule


def with_ramp(schedule: Schedule, field: str, ramp: str) -> Schedule:
    """Return `schedule` with one field of its phases changed during training.

    Phases are split at the steps at which the value changes. A split alone does not grow the model,
    reset the optimizer state, warm up the learning rate again, or keep a checkpoint.

    Args:
        field: "context_length" or "tokens_per_step".
        ramp: START:VALUE pairs such as "0:512 50%:1024". A start is a number of tokens (with K, M
            or B for thousands, millions, billions) or a percentage of the steps before continual
            training. An empty ramp changes nothing.

    Raises:
        UserError: if `ramp` does not have this format.
    """
    option = "context_ramp" if field == "context_length" else f"{field}_ramp"
    former = -1
    for pair in ramp.split():
        match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)([KMB%]?):(\d+(?:_\d+)*)", pair)
        if not match or not int(match[3]):
            raise UserError(
                f"{option}={ramp!r}: {pair!r} must be START:VALUE, for example 0:512, 100M:512 or "
                "50%:1024"
            )
        number, unit, value = Fraction(match[1]), match[2], int(match[3])
        if unit == "%":
            step = round_half_up(min(number / 100, Fraction(1)) * schedule.stage_steps)
        else:
            step = _first_step(schedule, number * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[unit])
        at_end = step == schedule.n_steps  # at or after the end: nothing changes
        if (step > 0) if former < 0 else (step <= former and not at_end):
            raise UserError(f"{option}={ramp!r}: starts must increase from 0 by at least one step")
        former = step
        phases = _cut(schedule.phases, step)
        schedule = Schedule(
            tuple(replace(p, **{field: value}) if p.start >= step else p for p in phases)
        )
    return schedule


def _first_step(schedule, tokens):
    """Return the first step that starts after at least `tokens` tokens, at most `n_steps`."""
    for p in schedule.phases:
        before = schedule.tokens(p.start)
        if before + p.n_steps * p.tokens_per_step >= tokens:
            return p.start + max(0, math.ceil((tokens - before) / p.tokens_per_step))
    return schedule.n_steps


def _cut(phases, step):
    """Return the same phases, with an additional boundary at `step`."""
    result = []
    for p in phases:
        if not p.start < step < p.stop:
            result.append(p)
            continue
        after = dict(start=step, growth=None, optimizer_state="carry", rewarmup_steps=0)
        result.append(replace(p, stop=step, milestone=False))
        result.append(replace(p, **after))
    parts: Counter = Counter()
    for i, p in enumerate(result):
        name = p.name.partition(", part ")[0]
        parts[name] += 1
        result[i] = replace(p, name=name if parts[name] == 1 else f"{name}, part {parts[name]}")
    return result


def with_skip_policy(schedule: Schedule, name: str, rate: float, seed: int) -> Schedule:
    """Return `schedule` with blocks skipped by the policy `name`.

    Raises:
        UserError: if the policy does not exist, or `rate` is not in [0, 1).
    """
    if name not in SKIP_POLICIES:
        raise UserError(
            f"skip_policy={name!r} is unknown{did_you_mean(name, ['none', *SKIP_POLICIES])}"
        )
    if not 0 <= rate < 1:
        raise UserError(f"skip_rate={rate} must be at least 0 and less than 1")
    skip = SkipPolicy(name, rate, schedule.stage_steps, seed)
    return Schedule(tuple(replace(p, skip=skip) for p in schedule.phases))


def begun(phases: Sequence[Phase], step: int) -> list[Phase]:
    """Return the phases up to `step`, for checking that one schedule can continue another."""
    # Clear the fields that do not affect training, and how the model of step 0 was created.
    ignored: dict[str, Any] = dict(name="", stage=0, milestone=False)
    return [
        replace(p, stop=min(p.stop, step), growth=p.growth if p.start else None, **ignored)
        for p in phases
        if p.start < step
    ]


# --------------------------------------------------------------------------------------------------
# learning rate


def learning_rate(step: int, schedule: Schedule, config) -> float:
    """Return the learning rate of optimizer step `step` (from 0).

    "constant" is used in the paper's released code, and "cosine" in nanoGPT. "wsd" (warm-up,
    stable, decay) decays linearly over the last `decay_fraction` of all steps (Hu et al. 2024,
    arXiv:2404.06395). All of them warm up linearly over `warmup_steps`, and again over the
    `rewarmup_steps` of a phase.

    Args:
        config: an object with learning_rate (the peak), min_lr, lr_schedule, warmup_steps and
            decay_fraction.
    """
    peak, floor, end = config.learning_rate, config.min_lr, schedule.n_steps
    warmup = config.warmup_steps
    if config.lr_schedule == "cosine":
        progress = max(0, step - warmup) / max(1, end - warmup)
        rate = floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)
    elif config.lr_schedule == "wsd":
        decay = max(1, config.decay_fraction * end)
        rate = floor + min(1, (end - step) / decay) * (peak - floor)
    else:
        rate = peak
    ramp = (step + 1) / (warmup + 1)
    for p in schedule.phases:
        if p.start <= step and p.rewarmup_steps:
            ramp = min(ramp, (step - p.start + 1) / (p.rewarmup_steps + 1))
    return rate * min(1, ramp)


def round_half_up(x) -> int:
    """Round to the nearest integer, and halves up (the built-in `round` rounds halves to even)."""
    return math.floor(x + Fraction(1, 2))


# --------------------------------------------------------------------------------------------------
# policies for skipping blocks: functions (uniform, progress, rate) -> residual scales. `uniform`
# contains a random number in [0, 1) for every block. `progress` increases from 0 to 1 over the
# stages.


SKIP_POLICIES: dict[str, Callable[[list[float], float, float], tuple[float, ...]]] = {}


def skip_policy(function):
    """Register a policy under its function name."""
    SKIP_POLICIES[function.__name__] = function
    return function


@skip_policy
def layer_dropout(uniform, progress, rate):
    """Skip deep blocks more often than shallow ones, and more in early steps (arXiv:2609.05275).

    Block l of L is skipped in step t of T with probability p = rate * l/(L-1) * (1 - t/(T-1)). The
    residual branches of a block that runs are scaled by 1/(1-p).
    """
    last = max(1, len(uniform) - 1)
    p = [rate * i / last * (1 - progress) for i in range(len(uniform))]
    return tuple(0.0 if u < q else 1 / (1 - q) for u, q in zip(uniform, p))
