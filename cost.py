"""What training costs, in three metrics. One account for training, tables, figures and tests.

    tokens       training tokens read
    paper_cost   the unit c of arXiv:2411.18700, section 3: one block, one token, one pass; backward
                 passes cost as much as forward passes, embeddings and head are free
    flops        matrix products of the forward and backward pass that really run, head included;
                 attention over the full square of the context (as in PaLM, appendix B, and in
                 torch.utils.flop_counter)

A schedule has no single cost per token: context, trained blocks and skipped blocks may differ from
step to step, so the cumulative cost is a sum over what `Schedule.at` says of every step.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal

from tabulate import tabulate

import schedule as schedules
from schedule import Phase, Schedule, Step, round_half_up

Metric = Literal["tokens", "paper_cost", "flops"]
COST_METRICS: tuple[Metric, ...] = ("tokens", "paper_cost", "flops")
NAMES = {"tokens": "tokens", "paper_cost": "paper cost", "flops": "FLOPs"}


def flops_per_token(
    model_config,
    context_length: int,
    running_blocks: Iterable[int],
    trained_blocks: Iterable[int],
    train_embeddings: bool = True,
    train_head: bool = True,
) -> int:
    """Return the FLOPs of one forward and backward pass, per token.

    With width d, context c and padded vocabulary V, the forward pass of a block costs 24 d^2 + 4 c
    d and that of the head 2 V d. A matrix product with a weight costs its forward again for each of
    the two gradients, of weight and input. Attention's two products have no weights: they cost
    twice their forward in any backward pass, also in that of a frozen block that only passes the
    gradient down. A frozen block with nothing trained below it has no backward pass. The final norm
    always trains.

    Args:
        model_config: has n_embd (d) and vocab_size (V), such as `model.GPTConfig`.
        running_blocks: blocks that are not skipped.
        trained_blocks: blocks that are not frozen.
    """
    d, V = model_config.n_embd, model_config.vocab_size
    linear, attention, head = 24 * d * d, 4 * context_length * d, 2 * V * d
    flops = head + head + (head if train_head else 0)  # forward, input gradient, weight gradient
    trained, gradient_passes = set(trained_blocks), train_embeddings
    for i in sorted(running_blocks):
        flops += linear + attention
        if i in trained:
            flops += 2 * (linear + attention)
        elif gradient_passes:
            flops += linear + 2 * attention
        gradient_passes |= i in trained
    return flops


def cost_per_token(step: Step, metric: Metric, model_config) -> int:
    """Return what a training token costs in a step."""
    phase, running = step.phase, step.running_blocks
    if metric == "tokens":
        return 1
    if metric == "paper_cost":  # forward through the blocks that run, backward through the trained
        return len(running) + len(set(running) & set(phase.trained_blocks))
    return flops_per_token(
        model_config,
        phase.context_length,
        running,
        phase.trained_blocks,
        phase.train_embeddings,
        phase.train_head,
    )


def _step_cost(step, metric, model_config):
    return step.phase.tokens_per_step * cost_per_token(step, metric, model_config)


@functools.cache
def _skipping_phase_cost(phase: Phase, metric: Metric, model_config) -> list[int]:
    """What the first 0, 1, 2, ... steps of a phase cost whose blocks are skipped by a policy."""
    cost_of: dict = {}  # by running blocks: a policy draws the same ones again and again
    costs = []
    for step in _steps(phase):
        running = step.running_blocks
        if running not in cost_of:
            cost_of[running] = _step_cost(step, metric, model_config)
        costs.append(cost_of[running])
    return list(itertools.accumulate(costs, initial=0))


@functools.cache
def _steps(phase: Phase) -> list[Step]:
    return list(map(Schedule((phase,)).at, range(phase.start, phase.stop)))


def _phase_cost(phase, n_steps, metric, model_config):
    """What the first `n_steps` steps of a phase cost."""
    if phase.skip and metric != "tokens":
        return _skipping_phase_cost(phase, metric, model_config)[n_steps]
    return n_steps * _step_cost(Step(phase, None), metric, model_config)


def cumulative_cost(schedule: Schedule, step: int, metric: Metric, model_config) -> int:
    """Return what the first `step` steps of a schedule cost in all."""
    return sum(
        _phase_cost(p, min(step, p.stop) - p.start, metric, model_config)
        for p in schedule.phases
        if p.start < step
    )


def compute_matched_step(
    schedule: Schedule, baseline: Schedule, metric: Metric, model_config
) -> float:
    """Return the (fractional) step at which `schedule` has cost what the whole of `baseline` costs.

    Past its end a schedule continues with all blocks running and training.
    """
    budget = Fraction(cumulative_cost(baseline, baseline.n_steps, metric, model_config))
    for p in schedule.phases:
        cost = _phase_cost(p, p.n_steps, metric, model_config)
        if budget <= cost:
            # The last step of the phase before which the budget is not exceeded.
            low, high = 0, p.n_steps
            while high - low > 1:
                middle = (low + high) // 2
                if _phase_cost(p, middle, metric, model_config) <= budget:
                    low = middle
                else:
                    high = middle
            before, after = (_phase_cost(p, n, metric, model_config) for n in (low, low + 1))
            return float(p.start + low + (budget - before) / max(1, after - before))
        budget -= cost
    last = schedule.phases[-1]
    full = dataclasses.replace(
        last,
        trained_blocks=tuple(range(last.n_blocks)),
        train_embeddings=True,
        train_head=True,
        skip=None,
    )
    return float(schedule.n_steps + budget / _step_cost(Step(full, None), metric, model_config))


def compute_matched_steps(
    schedule: Schedule, baseline: Schedule, model_config
) -> dict[Metric, int]:
    """Return the compute-matched step in every metric, rounded to whole steps."""
    return {
        metric: round_half_up(compute_matched_step(schedule, baseline, metric, model_config))
        for metric in COST_METRICS
    }


def paper_compute_matched_step(stages: int, steps: int) -> int:
    """Return the compute-matched step by the paper's formula, T + T_cont.

    T_cont = 5/8 (1 - 1/S) T for T steps in S stages, which assumes that S divides L. With 10,000
    steps it is 14,688 (S=4), 15,469 (S=8) and 15,729 (S=12), the solid circles of the paper's
    figures.
    """
    return round_half_up(steps + Fraction(5, 8) * (1 - Fraction(1, stages)) * steps)


def make_schedules(config, model_config) -> tuple[Schedule, Schedule]:
    """Return the schedule of a run, and that of the baseline which it is measured against.

    The baseline has the same model and number of steps, and none of what makes a method.

    Args:
        config: the run's options, a `stagewise.config.Config`.

    Raises:
        UserError: if the options make no schedule.
    """
    baseline = schedules.make_schedule(
        config.n_layer,
        config.steps,
        context_length=config.block_size,
        tokens_per_step=config.tokens_per_step,
    )
    continual_steps = config.continual_steps
    if isinstance(continual_steps, str):
        metric: Metric = "flops" if continual_steps == "match_flops" else "paper_cost"
        before = schedules.schedule_from_config(config, 0)
        matched = compute_matched_steps(before, baseline, model_config)[metric]
        continual_steps = max(0, matched - config.steps)
    return schedules.schedule_from_config(config, continual_steps), baseline


# --------------------------------------------------------------------------------------------------
# summary and table


def summarize(schedule: Schedule, baseline: Schedule, model_config) -> dict:
    """Return what schedule.json and the table of --dry_run hold: phases with costs, and totals.

    "fraction" and "cumulative" are relative to the baseline's total, the latter up to the end of
    the phase.
    """
    totals = {m: cumulative_cost(baseline, baseline.n_steps, m, model_config) for m in COST_METRICS}
    rows = []
    for p in schedule.phases:
        before, after = (
            {m: cumulative_cost(schedule, step, m, model_config) for m in COST_METRICS}
            for step in (p.start, p.stop)
        )
        row: dict = dataclasses.asdict(p)
        row |= {m: after[m] - before[m] for m in COST_METRICS}
        row["fraction"] = {m: (after[m] - before[m]) / totals[m] for m in COST_METRICS}
        row["cumulative"] = {m: after[m] / totals[m] for m in COST_METRICS}
        rows.append(row)
    return {
        "steps": schedule.n_steps,
        "is_baseline": schedule.is_baseline,
        "phases": rows,
        "total": {
            m: cumulative_cost(schedule, schedule.n_steps, m, model_config) for m in COST_METRICS
        },
        "baseline": {"steps": baseline.n_steps} | totals,
        "compute_matched_step": compute_matched_steps(schedule, baseline, model_config),
        "paper_formula_step": _paper_formula_step(schedule, baseline),
    }


def _paper_formula_step(schedule, baseline):
    """By the paper's formula, None where it does not describe the schedule."""
    stages, n_layer = schedule.phases[-1].stage, baseline.phases[0].n_blocks
    before = [p for p in schedule.phases if p.kind != "continual"]
    if stages > 1 and n_layer >= stages:
        tokens_per_step = baseline.phases[0].tokens_per_step
        paper = schedules.make_schedule(
            n_layer, baseline.n_steps, stages, tokens_per_step=tokens_per_step
        )
        cost = ("start", "stop", "n_blocks", "trained_blocks", "tokens_per_step", "skip")
        same = all(
            getattr(p, f) == getattr(q, f) for p, q in zip(before, paper.phases) for f in cost
        )
        if same and len(before) == len(paper.phases):
            return paper_compute_matched_step(stages, baseline.n_steps)
    return None


def summary_table(summary: dict) -> str:
    """Return `summarize`, with "trained_parameters" added to its phases, as a table to print."""
    rows = []
    context = len({p["context_length"] for p in summary["phases"]}) > 1
    batch = len({p["tokens_per_step"] for p in summary["phases"]}) > 1
    header = ["phase", "blocks", "params"]
    header += ["context"] * context + ["tokens/step"] * batch
    header += ["steps", "tokens", "cost", "FLOPs", "sum cost", "FLOPs"]
    for p in summary["phases"]:
        row = [p["name"], f"{len(p['trained_blocks'])} of {p['n_blocks']}"]
        row.append(short_number(p["trained_parameters"]))
        row += [f"{p['context_length']:,}"] * context + [f"{p['tokens_per_step']:,}"] * batch
        row += [f"{p['stop'] - p['start']:,}", short_number(p["tokens"])]
        for kind in ("fraction", "cumulative"):
            row += [f"{100 * p[kind][m]:.1f}%" for m in ("paper_cost", "flops")]
        rows.append(row)
    align = ("left", *("right",) * (len(header) - 1))
    table = tabulate(rows, header, "simple", colalign=align, disable_numparse=True)
    base, matched = summary["baseline"], summary["compute_matched_step"]
    lines = [
        table,
        "blocks, params: those that train. cost: the paper's unit c, one block x token x pass.",
        f"100% is the baseline of {base['steps']:,} steps: {short_number(base['tokens'])} tokens, "
        f"{base['paper_cost']:.4g} c, {base['flops']:.4g} FLOPs.",
        "Compute-matched with it at step "
        + ", ".join(f"{matched[m]:,} in {NAMES[m]}" for m in COST_METRICS)
        + ".",
    ]
    if any(p["skip"] for p in summary["phases"]):
        lines.append(
            "Skipped blocks cost nothing; the table counts the ones that run in each step."
        )
    if summary["paper_formula_step"] is not None:
        lines.append(
            f"By the paper's formula, which assumes that stages divide blocks: step "
            f"{summary['paper_formula_step']:,} in paper cost."
        )
    return "\n".join(lines)


def short_number(n: float) -> str:
    """Return three digits and a unit, such as 21.3M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
