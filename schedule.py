"""The schedule of a run as data: the model, and what runs and trains in every step.

A schedule is a sequence of phases, computed before training starts. A phase specifies everything
that can change during training. The training loop, the cost accounting (cost.py), the data order,
checkpoints and figures all read the same phases. The baseline is a schedule with one phase.

`make_schedule` builds the phases of arXiv:2411.18700 and those of growth without freezing. The
functions `with_...` transform a schedule into another one, so methods can be combined. What changes
within a phase, from step to step, is in policies.py.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, Literal

import growth
from policies import MIN_T_0, SKIP_POLICIES, FreezeOut, SkipPolicy
from stagewise.errors import UserError, did_you_mean

NUMBER = r"\d+(?:_\d+)*(?:\.\d+)?"
Kind = Literal["new_blocks", "all_blocks", "continual"]
StateRule = Literal["carry", "copy", "zero", "reset"]
Freezing = Literal["all_but_new", "preceding", "none"]


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
    # without state, also without step count. "copy": new parameters get the state of the blocks
    # they are copied from. "zero": new parameters get moments of zero, with the step count of the
    # others. "reset": all parameters start without state.
    optimizer_state: StateRule
    rewarmup_steps: int  # steps of linear learning-rate warm-up on entry
    skip: SkipPolicy | None  # None: all blocks run in every step
    milestone: bool  # the checkpoint at the end of the phase is never removed
    new_blocks: tuple[int, ...] = ()  # positions of the blocks added on entry
    rewarmup: Literal["all", "new_blocks"] = "all"  # what `rewarmup_steps` applies to
    lr_setback: float = 0.0  # the learning-rate schedule is set back by this part of its position
    fade_in_steps: int = 0  # steps over which the residual branches of new blocks rise from 0 to 1
    # Before blocks are added on entry, weights become shrink * weight + perturb * initial weight.
    shrink: float = 1.0
    perturb: float = 0.0
    freezeout: FreezeOut | None = None  # learning rates of the blocks; None: all are equal

    @property
    def n_steps(self) -> int:
        return self.stop - self.start

    def work(self) -> tuple:
        """Return what determines how long the steps take; equal for phases with the same work."""
        same = ("n_blocks", "trained_blocks", "train_embeddings", "train_head", "context_length")
        skipped = (self.skip, self.start, self.stop) if self.skip else None
        return *(getattr(self, name) for name in same), self.tokens_per_step, skipped

    def without_entry(self) -> "Phase":
        """Return the same phase, but nothing happens on entry."""
        entry: dict[str, Any] = dict(growth=None, optimizer_state="carry", new_blocks=())
        entry |= dict(rewarmup_steps=0, rewarmup="all", lr_setback=0.0, fade_in_steps=0)
        return replace(self, **entry, shrink=1.0, perturb=0.0)


@dataclass(frozen=True)
class Step:
    """What runs and what trains in one optimizer step."""

    phase: Phase
    residual_scales: tuple[float, ...] | None  # one per block; None: all blocks run unscaled
    # On the learning rate of each block and, last, of the other parameters; None: all 1.
    rate_scales: tuple[float, ...] | None = None

    def rate_scale(self, block: int | None) -> float:
        """Return the factor on the learning rate of a block, or of the other parameters (None)."""
        if self.rate_scales is None:
            return 1.0
        return self.rate_scales[-1 if block is None else block]

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
        residual = phase.skip.residual_scales(phase.n_blocks, step) if phase.skip else None
        rates = phase.freezeout.rate_scales(phase.n_blocks, step) if phase.freezeout else None
        grown = next((p for p in reversed(self.phases) if p.start <= step and p.new_blocks), None)
        if grown:
            since = step - grown.start
            residual = _rise(residual, grown, since, grown.fade_in_steps)
            if grown.rewarmup == "new_blocks":
                rates = _rise(rates, grown, since, grown.rewarmup_steps, extra=1)
        return Step(phase, residual, rates)

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
            and p.freezeout is None
            and all(getattr(p, name) == getattr(first, name) for name in same)
            for p in self.phases
        )


def _rise(scales, grown, step, n_steps, extra=0):
    """Return `scales`, with those of blocks added by `grown` increasing over `n_steps` steps."""
    if step >= n_steps:
        return scales
    factor = (step + 1) / (n_steps + 1)
    scales = scales or (1.0,) * (grown.n_blocks + extra)
    return tuple(s * factor if i in grown.new_blocks else s for i, s in enumerate(scales))


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
    stage_blocks: Sequence[int | str] | None = None,
    phase_fractions: Sequence[float] | None = None,
    stage_alpha: float = 0.0,
    freezing: Freezing = "all_but_new",
    phase1: str = "paper",
    growth_operator: str = "random",
    optimizer_state: StateRule = "carry",
    continual_optimizer_state: StateRule = "carry",
    rewarmup_steps: int = 0,
    context_length: int = 1024,
    tokens_per_step: int = 524_288,
    pretrained: bool = False,
) -> Schedule:
    """Return a schedule of `stages` stages, followed by continual training of all blocks.

    Phase i of n ends at step round(i * steps / n), so the stages have exactly `steps` steps. In
    stage 1 there are no existing blocks to freeze, so its phase 1 trains everything.

    Args:
        steps: number of steps of all stages together.
        stages: number of stages S. 1 is the baseline, one phase that trains everything.
        continual_steps: number of steps after the stages that train all blocks.
        stage_blocks: number of blocks at the end of each stage, for example (2, 4, 12) or, as a
            percentage of n_layer, ("25%", "100%"), rounded down but at least 1. Replaces
            `blocks_per_stage` and determines S.
        phase_fractions: relative lengths of the phases. With freezing: 2 numbers (phases 1 and 2 of
            every stage) or 2S numbers. Without: S numbers. Default: equal lengths.
        stage_alpha: the length of stage s is proportional to s**stage_alpha (PROP-alpha of MIDAS,
            Saunshi et al. 2024, arXiv:2409.19044).
        freezing: which blocks phase 1 freezes: all but the new ones, or those below the lowest new
            one. With "none", there is no phase 1, and every stage trains all its blocks.
        phase1: what phase 1 trains besides the new blocks and the final norm. "paper": nothing
            else. "released_code": the embeddings and the head.
        growth_operator: name of the operator in growth.py that creates new blocks.
        optimizer_state, rewarmup_steps: see `Phase`. Used for every phase except the first.
        continual_optimizer_state: the optimizer state of the continual phase.
        context_length, tokens_per_step: used for every phase. `with_ramp` changes them.
        pretrained: whether training starts from trained weights. If the first stages have no steps,
            these weights have the blocks of the last of them, and phase 1 freezes them.

    Raises:
        UserError: if the arguments do not describe a valid schedule.
    """
    blocks = [_block_count(b, n_layer) for b in stage_blocks or blocks_per_stage(n_layer, stages)]
    S = len(blocks)
    if stages not in (1, S):
        raise UserError(
            f"stage_blocks={tuple(blocks)} gives {S} stages, but stages={stages}: set "
            "only one of the two (--stages=1 or --stage_blocks=None)"
        )
    if blocks[0] < 0 or blocks[-1] != n_layer or blocks != sorted(blocks):
        raise UserError(
            f"stage_blocks={tuple(blocks)} must start at 0 or more, not decrease, and end at "
            f"n_layer={n_layer}"
        )
    grows = [a < b for a, b in zip(blocks, blocks[1:])]
    if freezing != "none" and not all(grows):
        raise UserError(
            f"stage_blocks={tuple(blocks)}: phase 1 of a stage that adds no blocks would train "
            "nothing: use --freezing=none"
        )
    if steps < 1 or continual_steps < 0:
        raise UserError(
            f"steps={steps} must be at least 1, continual_steps={continual_steps} at least 0"
        )
    two_phases = freezing != "none" and S > 1
    kinds: list[Kind] = ["new_blocks", "all_blocks"] if two_phases else ["all_blocks"]
    boundaries = _boundaries(steps, S, len(kinds), phase_fractions, stage_alpha)

    phases: list[Phase] = []
    for i, (start, stop) in enumerate(zip(boundaries, boundaries[1:])):
        if start == stop:
            continue
        stage, kind = 1 + i // len(kinds), kinds[i % len(kinds)]
        n_blocks = blocks[stage - 1]
        existing = phases[-1].n_blocks if phases else n_blocks
        if pretrained and not phases and stage > 1:
            existing = blocks[stage - 2]  # of a stage without steps: the initial weights
        trains, new = tuple(range(n_blocks)), tuple[int, ...]()
        if n_blocks > existing:
            # Report an operator that cannot grow the model before training starts.
            new = growth.new_blocks(growth.source_map(growth_operator, existing, n_blocks))
            if kind == "new_blocks":
                trains = new if freezing == "all_but_new" else tuple(range(min(new), n_blocks))
        fixed = kind == "new_blocks" and bool(new) and phase1 == "paper"
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
                new_blocks=new,
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
    growth.source_map(growth_operator, n_layer, n_layer)  # raises if it does not exist
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
            new_blocks=(),
            optimizer_state=continual_optimizer_state,
            rewarmup_steps=rewarmup_steps,
            milestone=True,
        )
        phases.append(end)
    return Schedule(tuple(phases))


def _check_rises(schedule):
    """Check that new blocks have risen to full scale or rate when the model grows again or ends."""
    grown = [p for p in schedule.phases if p.new_blocks]
    stops = [*(p.start for p in grown[1:]), schedule.n_steps]
    for p, stop in zip(grown, stops):
        for name in ("fade_in_steps", "rewarmup_steps" if p.rewarmup == "new_blocks" else ""):
            if name and getattr(p, name) > stop - p.start:
                raise UserError(
                    f"{name}={getattr(p, name)} exceeds the {stop - p.start} steps from the growth "
                    f"in step {p.start} to the next growth or the end: use fewer"
                )


def _block_count(count, n_layer):
    """Return a number of blocks given as a number or as a percentage of n_layer."""
    match = re.fullmatch(rf"({NUMBER})(%?)", str(count))
    if not match or (not match[2] and "." in match[1]):
        raise UserError(f"stage_blocks: {count!r} must be a number of blocks, or for example 25%")
    if not match[2]:
        return int(match[1])
    part = Fraction(match[1]) * n_layer / 100
    return max(1, math.floor(part)) if part else 0


def _phase_name(stages, stage, kind, per_stage):
    if stages == 1:
        return "all blocks"
    if per_stage == 1:
        return f"stage {stage}"
    return f"stage {stage} phase {1 if kind == 'new_blocks' else 2}"


def _boundaries(steps, stages, per_stage, fractions, alpha):
    """Return the steps at which the phases begin and end, from 0 to `steps`."""
    n = stages * per_stage
    if fractions is None:
        fractions = [(1 + i // per_stage) ** alpha for i in range(n)]
    elif alpha:
        raise UserError(
            f"phase_fractions={tuple(fractions)} and stage_alpha={alpha} both set the lengths of "
            "phases: use --phase_fractions=None or --stage_alpha=0"
        )
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
        stage_alpha=config.stage_alpha,
        freezing=config.freezing,
        phase1=config.phase1,
        growth_operator=config.growth,
        optimizer_state=config.optimizer_state,
        continual_optimizer_state=config.continual_optimizer_state,
        rewarmup_steps=config.rewarmup_steps,
        context_length=config.block_size,
        tokens_per_step=config.tokens_per_step,
        pretrained=bool(config.init_weights),
    )
    block_size = config.block_size
    at_growth: dict[str, Any] = dict(
        rewarmup=config.rewarmup,
        lr_setback=config.lr_setback,
        fade_in_steps=config.fade_in_steps,
        shrink=config.shrink,
        perturb=config.perturb,
    )
    grows = [p for p in schedule.phases if p.new_blocks]
    defaults = {f.name: f.default for f in fields(Phase)}
    for name, value in at_growth.items():
        if value != defaults[name] and not grows:
            raise UserError(
                f"{name}={value} has no effect, because the model does not grow during training: "
                "use stages or stage_blocks, enough steps for the first stage, or remove the option"
            )
    schedule = Schedule(
        tuple(replace(p, **at_growth) if p.new_blocks else p for p in schedule.phases)
    )
    _check_rises(schedule)
    if config.freezeout:
        schedule = with_freezeout(schedule, config.freezeout)
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
        ramp: START:VALUE pairs such as "0:512 50%:1024" or "0:50% 50%:100%". A start is a number of
            tokens (with K, M or B for thousands, millions, billions) or a percentage of the steps
            before continual training. A value is a number or a percentage of the value at the end
            of `schedule`. An empty ramp changes nothing.

    Raises:
        UserError: if `ramp` does not have this format.
    """
    option = "context_ramp" if field == "context_length" else f"{field}_ramp"
    former, final = -1, getattr(schedule.phases[-1], field)
    for pair in ramp.split():
        match = re.fullmatch(rf"({NUMBER})([KMB%]?):({NUMBER})(%?)", pair)
        value = Fraction(match[3]) * (Fraction(final, 100) if match[4] else 1) if match else 0
        if not match or value < 1 or value.denominator > 1:
            raise UserError(
                f"{option}={ramp!r}: {pair!r} must be START:VALUE, for example 0:512, 100M:512 or "
                "50%:1024"
            )
        number, unit = Fraction(match[1]), match[2]
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
            tuple(replace(p, **{field: int(value)}) if p.start >= step else p for p in phases)
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
    """Return the same phases with an additional boundary at `step`."""
    result = []
    for p in phases:
        if not p.start < step < p.stop:
            result.append(p)
            continue
        result.append(replace(p, stop=step, milestone=False))
        result.append(replace(p.without_entry(), start=step))
    parts: Counter = Counter()
    for i, p in enumerate(result):
        name = p.name.partition(", part ")[0]
        parts[name] += 1
        result[i] = replace(p, name=name if parts[name] == 1 else f"{name}, part {parts[name]}")
    return result


def with_skip_policy(
    schedule: Schedule, name: str, rate: float | Sequence[float], seed: int
) -> Schedule:
    """Return `schedule` with blocks skipped by the policy `name`.

    Args:
        rate: parameter of the policy in [0, 1), for all stages or for each of them.

    Raises:
        UserError: if the policy does not exist, or `rate` is not in [0, 1).
    """
    if name not in SKIP_POLICIES:
        raise UserError(
            f"skip_policy={name!r} is unknown{did_you_mean(name, ['none', *SKIP_POLICIES])}"
        )
    stages = schedule.phases[-1].stage
    rates = [rate] * stages if isinstance(rate, (int, float)) else list(rate)
    if len(rates) != stages:
        raise UserError(f"skip_rate={tuple(rates)} must be one number, or one per stage ({stages})")
    if not all(0 <= r < 1 for r in rates):
        raise UserError(f"skip_rate={rate} must be at least 0 and less than 1")
    policies = [SkipPolicy(name, r, schedule.stage_steps, seed) for r in rates]
    return Schedule(tuple(replace(p, skip=policies[p.stage - 1]) for p in schedule.phases))


def with_freezeout(schedule: Schedule, t_0: float) -> Schedule:
    """Return `schedule` with blocks annealed and frozen from bottom to top (`FreezeOut`).

    The input embeddings are frozen together with the first block.

    Raises:
        UserError: if the schedule is not a single phase before continual training.
    """
    first = schedule.phases[0]
    if not MIN_T_0 <= t_0 <= 1:
        raise UserError(f"freezeout={t_0} must be between {MIN_T_0} and 1, or 0 to disable it")
    if len(schedule.phases) > 1:
        raise UserError(
            f"freezeout={t_0} cannot be used with several stages or with continual_steps: use "
            "--stages=1 --stage_blocks=None --continual_steps=0, or --freezeout=0"
        )
    freezeout = FreezeOut(t_0, first.n_steps)
    phases = [replace(first, freezeout=freezeout)]
    # Rounded, so that 512.0000000001 steps are 512.
    ends = [math.ceil(round(freezeout.end(i, first.n_blocks), 6)) for i in range(first.n_blocks)]
    for i, end in enumerate(ends):
        phases = _cut(phases, end)
        kept: dict[str, Any] = dict(
            trained_blocks=tuple(range(i + 1, first.n_blocks)), train_embeddings=False
        )
        phases = [replace(p, **kept) if p.freezeout and p.start >= end else p for p in phases]
    return Schedule(tuple(phases))


def begun(phases: Sequence[Phase], step: int) -> list[Phase]:
    """Return the phases up to `step`, for checking that one schedule can continue another."""
    # Clear the fields that do not affect training, and how the model of step 0 was created.
    ignored: dict[str, Any] = dict(name="", stage=0, milestone=False, new_blocks=())
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

    The position in this curve is the step, minus what the phases up to it set it back by (staged
    training, Shen et al. 2022; with `lr_setback` 1, the curve starts again as in G_stack). The
    curve ends with the run. Before that, a part of training between two setbacks follows the same
    curve, or, if that part is longer, a curve that ends with it.

    Args:
        config: an object with learning_rate (the peak), min_lr, lr_schedule, warmup_steps and
            decay_fraction.
    """
    position, end = _lr_position(schedule, step)
    peak, floor, warmup = config.learning_rate, config.min_lr, config.warmup_steps
    if config.lr_schedule == "cosine":
        progress = min(1, max(0, position - warmup) / max(1, end - warmup))
        rate = floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)
    elif config.lr_schedule == "wsd":
        decay = max(1, config.decay_fraction * end)
        rate = floor + min(1, max(0, end - position) / decay) * (peak - floor)
    else:
        rate = peak
    ramp = (position + 1) / (warmup + 1)
    for p in schedule.phases:
        if p.start <= step and p.rewarmup_steps and p.rewarmup == "all":
            ramp = min(ramp, (step - p.start + 1) / (p.rewarmup_steps + 1))
    return rate * min(1, ramp)


def _lr_position(schedule, step):
    """Return the position in the learning-rate curve, and the length of the curve."""
    back, position, ends = 0, step, []
    for p in schedule.phases:
        if p.lr_setback:
            ends.append(p.start - back)
            back += round_half_up(p.lr_setback * (p.start - back))
        if p.start <= step:
            position, cycle = step - back, len(ends)
    ends.append(schedule.n_steps - back)
    return position, max(ends[cycle], ends[-1])


def decay_start(schedule: Schedule, config) -> int | None:
    """Return the step before which the final decay of "wsd" has no effect; None for other curves.

    From there, training can be continued with more steps as if it had been longer from the start.
    """
    if config.lr_schedule != "wsd":
        return None
    _, length = _lr_position(schedule, schedule.n_steps - 1)
    # Rounded, so that 28.000000000000004 steps are 28.
    return schedule.n_steps - math.ceil(round(max(1, config.decay_fraction * length), 6))


def round_half_up(x) -> int:
    """Round to the nearest integer, with halves rounded up (`round` rounds them to even)."""
    return math.floor(x + Fraction(1, 2))
