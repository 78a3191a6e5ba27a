"""The cost of training in three metrics, used by training, tables, figures and tests.

    tokens       training tokens read
    paper_cost   the unit c of arXiv:2411.18700, section 3: one block, one token, one pass. Backward
                 passes cost the same as forward passes; embeddings and head are free
    flops        FLOPs of the matrix products that the forward and backward passes execute,
                 including the head. Attention is counted without using causality, as in PaLM
                 (appendix B) and torch.utils.flop_counter

The cost per token may differ between steps, because the context length, the trained blocks and the
skipped blocks may change. The cumulative cost is therefore a sum over steps (`Schedule.at`).
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

    For width d, context length c and padded vocabulary size V, the forward pass of a block costs
    24 d^2 + 4 c d, and that of the head 2 V d. For a product with a weight, the gradient of the
    weight and the gradient of the input each cost as much as the forward pass. The two attention
    products have no weights. Their backward pass always costs twice the forward pass, even in a
    frozen block that only propagates the gradient. A frozen block with no trained part below it has
    no backward pass. The final norm always trains.

    Args:
        model_config: an object with n_embd (d) and vocab_size (V), such as `model.GPTConfig`.
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
    """Return the cost of one training token in a step."""
    phase, running = step.phase, step.running_blocks
    if metric == "tokens":
        return 1
    if metric == "paper_cost":  # forward: blocks that run; backward: blocks that run and train
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
    """Return the cost of the first 0, 1, 2, ... steps of a phase with skipped blocks."""
    steps, indices = _distinct_steps(phase)
    costs = [_step_cost(step, metric, model_config) for step in steps]
    return list(itertools.accumulate((costs[i] for i in indices), initial=0))


@functools.cache
def _distinct_steps(phase: Phase) -> tuple[list[Step], list[int]]:
    """Return steps of a phase in which different blocks run, and for every step its index there."""
    steps: list[Step] = []
    index_of: dict[tuple[int, ...], int] = {}
    indices = []
    for step in map(Schedule((phase,)).at, range(phase.start, phase.stop)):
        i = index_of.setdefault(step.running_blocks, len(steps))
        if i == len(steps):
            steps.append(step)
        indices.append(i)
    return steps, indices


def _phase_cost(phase, n_steps, metric, model_config):
    """Return the cost of the first `n_steps` steps of a phase."""
    if phase.skip and metric != "tokens":
        return _skipping_phase_cost(phase, metric, model_config)[n_steps]
    return n_steps * _step_cost(Step(phase, None), metric, model_config)


def cumulative_cost(schedule: Schedule, step: int, metric: Metric, model_config) -> int:
    """Return the total cost of the first `step` steps of a schedule."""
    return sum(
        _phase_cost(p, min(step, p.stop) - p.start, metric, model_config)
        for p in schedule.phases
        if p.start < step
    )


def compute_matched_step(
    schedule: Schedule, baseline: Schedule, metric: Metric, model_config
) -> float:
    """Return the (fractional) step at which `schedule` has cost as much as all of `baseline`.

    After its end, a schedule is assumed to continue with all blocks running and training.
    """
    budget = Fraction(cumulative_cost(baseline, baseline.n_steps, metric, model_config))
    for p in schedule.phases:
        cost = _phase_cost(p, p.n_steps, metric, model_config)
        if budget <= cost:
            # Find the last step of the phase that starts within the budget.
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
    """Return the compute-matched step in every metric, rounded to an integer."""
    return {
        metric: round_half_up(compute_matched_step(schedule, baseline, metric, model_config))
        for metric in COST_METRICS
    }


def paper_compute_matched_step(stages: int, steps: int) -> int:
    """Return the compute-matched step according to the paper's formula, T + T_cont.

    T_cont = 5/8 (1 - 1/S) T for T steps in S stages. The formula assumes that S divides L. With
    10,000 steps, the result is 14,688 (S=4), 15,469 (S=8) and 15,729 (S=12), which are the solid
    circles in the paper's figures.
    """
    return round_half_up(steps + Fraction(5, 8) * (1 - Fraction(1, stages)) * steps)


def make_schedules(config, model_config) -> tuple[Schedule, Schedule]:
    """Return the schedule of a run and the schedule of its baseline.

    The baseline has the same model and the same number of steps, without stages, ramps or skipped
    blocks.

    Args:
        config: the options of the run, a `stagewise.config.Config`.

    Raises:
        UserError: if the options do not describe a valid schedule.
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
        continual_steps = _matching_steps(config, baseline, metric, model_config)
    return schedules.schedule_from_config(config, continual_steps), baseline


def _matching_steps(config, baseline, metric, model_config):
    """Return the number of continual steps with which a run costs as much as its baseline."""
    n_steps = former = 0
    # Repeated, because ramps and skipped blocks change the cost of the continual steps themselves.
    for _ in range(20):
        schedule = schedules.schedule_from_config(config, n_steps)
        matched = compute_matched_step(schedule, baseline, metric, model_config)
        former, n_steps = n_steps, max(0, round_half_up(matched) - config.steps)
        if n_steps == former:
            break
    return n_steps


# --------------------------------------------------------------------------------------------------
# summary and table


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: token and position embeddings, final norm, and each block.

    The head is tied to the token embeddings.
    """

    wte: int
    wpe: int
    ln_f: int
    block: int

    @classmethod
    def of(cls, model_config) -> "ParameterCounts":
        d, bias = model_config.n_embd, model_config.bias
        norm = 2 * d if bias else d
        block = 12 * d * d + 2 * norm + (9 * d if bias else 0)
        return cls(model_config.vocab_size * d, model_config.block_size * d, norm, block)

    def all(self, n_blocks: int) -> int:
        return self.wte + self.wpe + self.ln_f + n_blocks * self.block

    def trained(self, phase: Phase) -> int:
        """Return how many parameters a phase trains, the final norm among them."""
        tied = self.wte * (phase.train_embeddings or phase.train_head)
        embeddings = self.wpe * phase.train_embeddings
        return tied + embeddings + self.ln_f + len(phase.trained_blocks) * self.block


def summarize(schedule: Schedule, baseline: Schedule, model_config) -> dict:
    """Return the content of schedule.json and of the --dry_run table: phases, costs and totals.

    "fraction" is the cost of the phase, and "cumulative" the cost up to its end, both as a fraction
    of the baseline's total.
    """
    totals = {m: cumulative_cost(baseline, baseline.n_steps, m, model_config) for m in COST_METRICS}
    counts = ParameterCounts.of(model_config)
    rows, after = [], dict.fromkeys(COST_METRICS, 0)
    for p in schedule.phases:
        costs = {m: _phase_cost(p, p.n_steps, m, model_config) for m in COST_METRICS}
        after = {m: after[m] + costs[m] for m in COST_METRICS}
        row: dict = dataclasses.asdict(p) | costs | {"trained_parameters": counts.trained(p)}
        row["fraction"] = {m: costs[m] / totals[m] for m in COST_METRICS}
        row["cumulative"] = {m: after[m] / totals[m] for m in COST_METRICS}
        rows.append(row)
    return {
        "steps": schedule.n_steps,
        "is_baseline": schedule.is_baseline,
        "parameters": counts.all(model_config.n_layer),
        "phases": rows,
        "total": {
            m: cumulative_cost(schedule, schedule.n_steps, m, model_config) for m in COST_METRICS
        },
        "baseline": {"steps": baseline.n_steps} | totals,
        "compute_matched_step": compute_matched_steps(schedule, baseline, model_config),
        "paper_formula_step": _paper_formula_step(schedule, baseline),
    }


def _paper_formula_step(schedule, baseline):
    """Return the step given by the paper's formula, or None if the formula does not apply."""
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
    """Return a table of a summary (`summarize`)."""
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
        "blocks, params: the ones that train. cost: in the paper's unit c (block x token x pass).",
        f"100% is the baseline with {base['steps']:,} steps: {short_number(base['tokens'])} "
        f"tokens, {base['paper_cost']:.4g} c, {base['flops']:.4g} FLOPs.",
        "Compute-matched with the baseline at step "
        + ", ".join(f"{matched[m]:,} in {NAMES[m]}" for m in COST_METRICS)
        + ".",
    ]
    stages = [p["stage"] for p in summary["phases"]]
    if missing := sorted(set(range(1, max(stages))) - set(stages)):
        lines.append(f"Stages without steps are left out: {', '.join(map(str, missing))}.")
    if any(p["skip"] for p in summary["phases"]):
        lines.append(
            "Skipped blocks cost nothing. The costs count only the blocks that run in each step."
        )
    if summary["paper_formula_step"] is not None:
        lines.append(
            f"The paper's formula, which assumes that S divides L, gives step "
            f"{summary['paper_formula_step']:,} in paper cost."
        )
    return "\n".join(lines)


def short_number(n: float) -> str:
    """Format a number with three digits and a unit, for example 21.3M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
