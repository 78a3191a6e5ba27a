"""The plan of a run, as data: which blocks exist and which of them train at every step, and what that costs.

Pure Python, no torch. A plan is a sequence of phases; the baseline is the plan with one phase. Everything that spends or
reports compute (train.py, plot.py, the tests) asks the functions here, so that there is one account of cost:

    tokens  training tokens read
    cost    the paper's unit c: one block, one token, one pass (arXiv:2411.18700, section 3). A backward pass costs as
            much as a forward pass, the embeddings and the head are free
    flops   matrix products of a real forward and backward pass, attention over the full T x T square (PaLM, appendix B,
            and torch.utils.flop_counter), head included
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from errors import UserError

CURRENCIES = ("tokens", "cost", "flops")
NAMES = {"tokens": "tokens", "cost": "paper cost", "flops": "FLOPs"}


@dataclass(frozen=True)
class Phase:
    """A run of steps during which the same parameters exist and the same ones train.

    The final layer norm trains in every phase, so it has no field.
    """

    name: str
    stage: int  # 1..S
    phase: int  # 1: the new blocks train, 2: all blocks train, 3: continual training after the last stage
    start: int  # first step (optimizer update, from 0)
    stop: int  # one past the last step
    n_blocks: int  # blocks that run, the paper's L_s
    n_frozen: int  # of these, the first n_frozen are fixed: L_s - n_s in phase 1, else 0
    train_embeddings: bool  # token and position embeddings
    train_head: bool  # output projection, tied to the token embeddings
    reset_optimizer: bool  # begin the phase with zero moments instead of carrying them over

    @property
    def n_steps(self) -> int:
        return self.stop - self.start

    @property
    def trained_blocks(self) -> list[bool]:
        """For every block that runs, whether it trains."""
        return [i >= self.n_frozen for i in range(self.n_blocks)]


@dataclass(frozen=True)
class Plan:
    """Consecutive phases from step 0 to `n_steps`."""

    phases: tuple[Phase, ...]

    @property
    def n_steps(self) -> int:
        return self.phases[-1].stop

    def phase_of(self, step: int) -> Phase:
        """The phase that makes update number `step` (from 0); past the end, the last phase."""
        return next((p for p in self.phases if step < p.stop), self.phases[-1])


def blocks_per_stage(n_layer: int, stages: int) -> list[int]:
    """Cumulative block counts L_1..L_S = floor(i * L / S): ends with all L blocks, whether or not S divides L.

    Raises UserError where S is not in 1..L.
    """
    if not 1 <= stages <= n_layer:
        raise UserError(f"stages={stages} must lie between 1 and n_layer={n_layer}: a stage adds at least one block")
    return [i * n_layer // stages for i in range(1, stages + 1)]


def make_plan(
    n_layer: int,
    steps: int,
    stages: int = 1,
    continual_steps: int = 0,
    stage_blocks: Sequence[int] | None = None,
    phase_shares: Sequence[float] | None = None,
    freezing: bool = True,
    phase1: str = "paper",
    reset_at_phases: bool = False,
    reset_at_continual: bool = False,
) -> Plan:
    """The phases of `steps` incremental steps in `stages` stages, then `continual_steps` steps of all blocks.

    stages          S; 1 is the baseline, one phase in which everything trains
    stage_blocks    cumulative block counts instead of `blocks_per_stage`, for example (2, 4, 12); sets S
    phase_shares    relative lengths of the phases: 2 numbers (phase 1 and 2 of every stage) or 2S; default equal
    freezing        False grows without phase 1: every stage trains all its blocks all the time
    phase1          what trains in phase 1 besides the new blocks and the final norm: "paper" nothing, embeddings and head
                    are fixed with everything else that precedes; "script" embeddings and head, as in the released code
    reset_at_*      whether phases (the continual phase) begin with fresh optimizer state

    Phase i of 2S ends at round(i * steps / 2S), so the phases have exactly `steps` steps in all. In stage 1 nothing
    precedes, so its phase 1 trains everything. Raises UserError on counts that make no plan.
    """
    blocks = list(stage_blocks) if stage_blocks else blocks_per_stage(n_layer, stages)
    S = len(blocks)
    if stages not in (1, S):
        raise UserError(f"stage_blocks={tuple(blocks)} gives {S} stages, but stages={stages}: set one of the two")
    if blocks[0] < 1 or blocks[-1] != n_layer or any(a >= b for a, b in zip(blocks, blocks[1:])):
        raise UserError(f"stage_blocks={tuple(blocks)} must rise strictly from 1 or more to n_layer={n_layer}")
    if steps < 1 or continual_steps < 0:
        raise UserError(f"steps={steps} must be at least 1, continual_steps={continual_steps} at least 0")

    if phase_shares is None:
        shares = [1.0] * (2 * S)
    elif len(phase_shares) == 2:
        shares = list(phase_shares) * S
    else:
        shares = list(phase_shares)
    if len(shares) != 2 * S or any(not 0 <= s < math.inf for s in shares) or sum(shares) == 0:
        raise UserError(f"phase_shares={tuple(phase_shares)} must be 2 or {2 * S} numbers (two a stage), not negative")
    # Fractions: a boundary must not depend on the rounding of a running float sum.
    total, cumulative, ends = sum(map(Fraction, shares)), Fraction(0), []
    for share in shares:
        cumulative += Fraction(share)
        ends.append(_round(cumulative * steps / total))
    starts = [0, *ends]

    def phase(name, stage, number, start, stop, n_frozen, reset):
        fixed = n_frozen > 0 and phase1 == "paper"
        n_blocks = blocks[stage - 1]
        return Phase(name, stage, number, start, stop, n_blocks, n_frozen, not fixed, not fixed, reset and start > 0)

    phases = []
    if S == 1:
        phases.append(phase("baseline", 1, 2, 0, steps, 0, False))
    preceding = 0  # blocks that have trained: a stage without steps leaves nothing behind to freeze
    for s in range(1, S + 1) if S > 1 else ():
        start, middle, stop = starts[2 * s - 2], ends[2 * s - 2], ends[2 * s - 1]
        if freezing:
            phases.append(phase(f"stage {s} phase 1", s, 1, start, middle, preceding, reset_at_phases))
            start = middle
        phases.append(phase(f"stage {s} phase 2", s, 2, start, stop, 0, reset_at_phases))
        if stop > starts[2 * s - 2]:
            preceding = blocks[s - 1]
    if continual_steps:
        phases.append(phase("continual", S, 3, steps, steps + continual_steps, 0, reset_at_continual))
    phases = [p for p in phases if p.n_steps]
    if phases[-1].n_blocks != n_layer:
        raise UserError(f"steps={steps} leaves the last of {S} stages without a step: use more steps or fewer stages")
    return Plan(tuple(phases))


# ---------------------------------------------------------------------------------------------------------------------
# cost


def flops_per_token(shape, trained_blocks: Sequence[bool], train_embeddings: bool = True, train_head: bool = True) -> int:
    """FLOPs of one forward and backward pass, per token, at the full context length.

    shape: anything with n_embd (d), block_size (T) and vocab_size (V, padded), such as model.GPTConfig.
    trained_blocks: for every block that runs, bottom first, whether it trains. The final norm always trains.

    A matrix product with a weight costs its forward again for each of the two gradients, weight and input. Attention
    has no weights: its two products cost twice their forward in any backward pass, also that of a frozen block which
    only hands the gradient down. A frozen block with nothing trained below it has no backward pass at all.
    """
    d, T, V = shape.n_embd, shape.block_size, shape.vocab_size
    linear, attention, head = 24 * d * d, 4 * T * d, 2 * V * d  # forward, per token
    flops = head + head + (head if train_head else 0)  # forward, input gradient for the final norm, weight gradient
    gradient_passes = train_embeddings
    for trained in trained_blocks:
        flops += linear + attention
        if trained:
            flops += 2 * (linear + attention)
        elif gradient_passes:
            flops += linear + 2 * attention
        gradient_passes |= trained
    return flops


def price(phase: Phase, currency: str, shape) -> int:
    """What one training token costs in `phase`, in one of CURRENCIES."""
    if currency == "tokens":
        return 1
    if currency == "cost":  # forward through L_s blocks, backward through those that train
        return phase.n_blocks + (phase.n_blocks - phase.n_frozen)
    if currency == "flops":
        return flops_per_token(shape, phase.trained_blocks, phase.train_embeddings, phase.train_head)
    raise ValueError(f"currency {currency!r} is none of {CURRENCIES}")


def spent(plan: Plan, step: int, currency: str, shape, tokens_per_step: int) -> int:
    """What the first `step` updates of `plan` cost in all."""
    return sum(
        (min(step, p.stop) - p.start) * tokens_per_step * price(p, currency, shape)
        for p in plan.phases
        if p.start < step
    )


def equal_step(plan: Plan, baseline: Plan, currency: str, shape) -> float:
    """The (fractional) step at which `plan` has spent what the whole of `baseline` spends.

    Past its end a plan goes on as continual training: all blocks train.
    """
    budget = Fraction(spent(baseline, baseline.n_steps, currency, shape, 1))
    for p in plan.phases:
        cost = price(p, currency, shape)
        if budget <= p.n_steps * cost:
            return float(p.start + budget / cost)
        budget -= p.n_steps * cost
    full = make_plan(plan.phases[-1].n_blocks, steps=1).phases[0]
    return float(plan.n_steps + budget / price(full, currency, shape))


def equal_steps(plan: Plan, baseline: Plan, shape) -> dict[str, int]:
    """The equal-cost step in every currency, rounded to whole steps."""
    return {currency: _round(equal_step(plan, baseline, currency, shape)) for currency in CURRENCIES}


def paper_equal_cost_step(stages: int, steps: int) -> int:
    """Total steps at equal cost by the paper's closed formula, T + T_cont with T_cont = 5/8 (1 - 1/S) T.

    It assumes that S divides L. 10,000 steps give 14,688 (S=4), 15,469 (S=8) and 15,729 (S=12): the solid circles of
    the paper's figures.
    """
    return _round(steps + Fraction(5, 8) * (1 - Fraction(1, stages)) * steps)


def plan_summary(plan: Plan, baseline: Plan, shape, tokens_per_step: int) -> dict:
    """Everything that plan.json and the table of --dry_run say: phases with their costs, totals, equal-cost steps.

    `share` is relative to the baseline's total, `cumulative` up to the end of the phase, likewise.
    """
    totals = {c: spent(baseline, baseline.n_steps, c, shape, tokens_per_step) for c in CURRENCIES}
    rows = []
    for p in plan.phases:
        before, after = ({c: spent(plan, s, c, shape, tokens_per_step) for c in CURRENCIES} for s in (p.start, p.stop))
        rows.append(
            vars(p)
            | {c: after[c] - before[c] for c in CURRENCIES}
            | {"share": {c: (after[c] - before[c]) / totals[c] for c in CURRENCIES}}
            | {"cumulative": {c: after[c] / totals[c] for c in CURRENCIES}}
        )
    return {
        "steps": plan.n_steps,
        "tokens_per_step": tokens_per_step,
        "phases": rows,
        "total": {c: spent(plan, plan.n_steps, c, shape, tokens_per_step) for c in CURRENCIES},
        "baseline": {"steps": baseline.n_steps} | totals,
        "equal_step": equal_steps(plan, baseline, shape),
        "paper_formula_step": paper_equal_cost_step(plan.phases[-1].stage, baseline.n_steps),
    }


def plan_table(summary: dict) -> str:
    """`plan_summary`, with `trained_parameters` added to its phases, as a table to print."""
    rows = [("phase", "blocks", "params", "steps", "tokens", "cost", "FLOPs", "sum cost", "FLOPs")]
    for p in summary["phases"]:
        rows.append((
            p["name"],
            f"{p['n_blocks'] - p['n_frozen']} of {p['n_blocks']}",
            _short(p["trained_parameters"]),
            f"{p['stop'] - p['start']:,}",
            _short(p["tokens"]),
            *(f"{100 * p[kind][currency]:.1f}%" for kind in ("share", "cumulative") for currency in ("cost", "flops")),
        ))  # fmt: skip
    lines = [text_table(rows)]
    base, equal = summary["baseline"], summary["equal_step"]
    lines += [
        "blocks and params: those that train. cost: the paper's unit c, one block x token x pass.",
        f"100% is the baseline of {base['steps']:,} steps: "
        f"{_short(base['tokens'])} tokens, {base['cost']:.4g} c, {base['flops']:.4g} FLOPs.",
        f"Equal to it at step {', '.join(f'{equal[c]:,} in {NAMES[c]}' for c in CURRENCIES)};",
        f"{summary['paper_formula_step']:,} by the paper's formula, which assumes that stages divide blocks.",
    ]
    return "\n".join(lines)


def _short(n: int) -> str:
    """Three digits and a unit, 21.3M; plan.json has the exact number."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def text_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of text, the first one the header, as columns of a terminal: the first left, the others right-justified."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# learning rate


def learning_rate(step: int, plan: Plan, config) -> float:
    """The rate of update number `step` (from 0).

    config: learning_rate (peak), min_lr, lr_schedule, warmup_iters, decay_share, rewarm_iters as in train.Config.
    "constant" is the released script's, "cosine" nanoGPT's, "wsd" warm-up, stable, linear decay over the last
    `decay_share` of the plan (Hu et al. 2024). All warm up linearly; `rewarm_iters` repeats that at every phase start.
    """
    peak, floor, warmup, end = config.learning_rate, config.min_lr, config.warmup_iters, plan.n_steps
    if config.lr_schedule == "cosine":
        progress = max(0, step - warmup) / max(1, end - warmup)
        rate = floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)
    elif config.lr_schedule == "wsd":
        decay = max(1, config.decay_share * end)
        rate = floor + min(1, (end - step) / decay) * (peak - floor)
    else:
        rate = peak
    phase = plan.phase_of(step)
    ramp = (step + 1) / (warmup + 1)
    if phase.start > 0:
        ramp = min(ramp, (step - phase.start + 1) / (config.rewarm_iters + 1))
    return rate * min(1, ramp)


def _round(x) -> int:
    """Nearest whole number, halves up (the built-in rounds halves to even)."""
    return math.floor(x + Fraction(1, 2))
