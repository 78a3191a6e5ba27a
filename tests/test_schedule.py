"""The plan as data: boundaries, trained sets, and the account of what a plan costs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import schedule
from errors import UserError
from model import GPT, GPTConfig
from schedule import blocks_per_stage, equal_steps, make_plan, paper_equal_cost_step, price, spent

GPT2 = GPTConfig()


def test_paper_formula_gives_the_circles_of_the_papers_figures():
    assert [paper_equal_cost_step(S, 10_000) for S in (4, 8, 12)] == [14_688, 15_469, 15_729]


@pytest.mark.parametrize("S", [1, 2, 3, 4, 6, 12])
def test_plan_costs_what_the_formula_says_where_stages_divide_blocks(S):
    T = 48_000  # divisible by 2S
    plan, baseline = make_plan(12, T, S), make_plan(12, T)
    assert spent(plan, T, "cost", GPT2, 1) == T * 12 * (3 * S + 5) / (4 * S)  # C_incremental
    assert spent(baseline, T, "cost", GPT2, 1) == 2 * T * 12
    assert equal_steps(plan, baseline, GPT2)["cost"] == paper_equal_cost_step(S, T)


def test_twelve_blocks_in_eight_stages_end_with_twelve_and_cost_more_than_the_formula():
    assert blocks_per_stage(12, 8) == [1, 3, 4, 6, 7, 9, 10, 12]
    plan, baseline = make_plan(12, 10_000, 8), make_plan(12, 10_000)
    by_hand, former = 0, 0
    for n in (1, 3, 4, 6, 7, 9, 10, 12):
        by_hand += 625 * (n + (n - former)) + 625 * 2 * n
        former = n
    assert spent(plan, 10_000, "cost", GPT2, 1) == by_hand == 105_000
    assert equal_steps(plan, baseline, GPT2)["cost"] == 10_000 + (240_000 - 105_000) / 24 == 15_625


@pytest.mark.parametrize("S, T", [(1, 7), (4, 10_000), (8, 10_000), (12, 10_000), (5, 997), (12, 24), (7, 15)])
def test_phases_have_exactly_the_steps_asked_for(S, T):
    phases = make_plan(12, T, S, continual_steps=13).phases
    assert phases[0].start == 0 and phases[-1].stop == T + 13
    assert all(a.stop == b.start for a, b in zip(phases, phases[1:]))
    if S > 1 and T >= 2 * S:
        assert [p.stop for p in phases[:-1]] == [math.floor(i * T / (2 * S) + 0.5) for i in range(1, 2 * S + 1)]
    assert [p.n_blocks for p in phases] == sorted(p.n_blocks for p in phases) and phases[-1].n_blocks == 12


def test_baseline_is_the_plan_with_one_phase():
    (phase,) = make_plan(12, 10).phases
    assert (phase.n_blocks, phase.n_frozen, phase.train_embeddings, phase.train_head) == (12, 0, True, True)


def test_phase_1_freezes_what_precedes_by_the_papers_or_the_scripts_reading():
    paper = make_plan(12, 100, 4).phases
    assert [(p.stage, p.phase, p.n_blocks, p.n_frozen) for p in paper][:4] == [(1, 1, 3, 0), (1, 2, 3, 0), (2, 1, 6, 3), (2, 2, 6, 0)]
    assert [p.train_embeddings for p in paper] == [p.train_head for p in paper] == [True, True, False, True, False, True, False, True]
    assert all(p.train_embeddings and p.train_head for p in make_plan(12, 100, 4, phase1="script").phases)


def test_growing_without_freezing_has_no_phase_1():
    phases = make_plan(12, 100, 4, freezing=False).phases
    assert [(p.stage, p.phase, p.start, p.n_frozen) for p in phases] == [(1, 2, 0, 0), (2, 2, 25, 0), (3, 2, 50, 0), (4, 2, 75, 0)]


def test_explicit_blocks_and_unequal_shares():
    phases = make_plan(12, 100, stage_blocks=(2, 12), phase_shares=(1, 3)).phases
    assert [(p.n_blocks, p.n_frozen, p.start, p.stop) for p in phases] == [(2, 0, 0, 13), (2, 0, 13, 50), (12, 2, 50, 63), (12, 0, 63, 100)]
    phases = make_plan(12, 100, stage_blocks=(2, 12), phase_shares=(0, 1, 1, 2)).phases
    assert [(p.name, p.stop) for p in phases] == [("stage 1 phase 2", 25), ("stage 2 phase 1", 50), ("stage 2 phase 2", 100)]


def test_a_stage_without_steps_leaves_nothing_behind_to_freeze():
    (first, second) = make_plan(12, 100, stage_blocks=(2, 12), phase_shares=(0, 0, 1, 1)).phases
    assert (first.name, first.start, first.n_blocks, first.n_frozen, first.train_head) == ("stage 2 phase 1", 0, 12, 0, True)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(stages=13), "n_layer=12"),
        (dict(stages=0), "stages=0"),
        (dict(stage_blocks=(3, 3, 12)), "stage_blocks"),
        (dict(stage_blocks=(3, 6)), "n_layer=12"),
        (dict(stage_blocks=(6, 12), stages=3), "stages=3"),
        (dict(stages=4, phase_shares=(1, 2, 3)), "phase_shares"),
        (dict(stages=4, phase_shares=(0, 0)), "phase_shares"),
        (dict(stages=4, phase_shares=(1, float("nan"))), "phase_shares"),
        (dict(steps=0), "steps=0"),
        (dict(continual_steps=-1), "continual_steps=-1"),
        (dict(stages=12, steps=2, phase_shares=(1,) * 22 + (0, 0)), "last of 12 stages"),
    ],
)
def test_plans_that_cannot_be_are_refused_by_name(arguments, named):
    with pytest.raises(UserError, match=named):
        make_plan(12, **({"steps": 100} | arguments))


def test_equal_step_within_the_plan():
    """A plan dearer than its baseline reaches the budget before its end, at the step where the cumulative cost says."""
    baseline, plan = make_plan(12, 100), make_plan(12, 100, 4, continual_steps=500)
    step = schedule.equal_step(plan, baseline, "cost", GPT2)
    below, above = (spent(plan, s, "cost", GPT2, 1) for s in (math.floor(step), math.ceil(step)))
    assert below <= spent(baseline, 100, "cost", GPT2, 1) <= above and step < plan.n_steps


def test_flops_of_the_124m_model_by_hand():
    d, T, V, L = 768, 1024, 50304, 12
    (phase,) = make_plan(L, 1).phases
    assert price(phase, "flops", GPT2) == 3 * (L * (24 * d * d + 4 * T * d) + 2 * V * d)


KINDS = {
    "baseline": make_plan(4, 8).phases[0],
    "paper, early phase 1": make_plan(4, 8, 2).phases[0],
    "paper, late phase 1": make_plan(4, 8, 2).phases[2],
    "paper, early phase 2": make_plan(4, 8, 2).phases[1],
    "script, late phase 1": make_plan(4, 8, 2, phase1="script").phases[2],
    "continual": make_plan(4, 8, 2, 4).phases[-1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_planned_flops_are_the_counted_flops(kind):
    """torch's counter sees a real forward and backward pass; attention runs as plain matrix products there."""
    phase = KINDS[kind]
    shape = GPTConfig(block_size=48, vocab_size=192, n_layer=4, n_head=2, n_embd=32)
    model = GPT(shape, n_blocks=phase.n_blocks)
    model.set_phase(phase)
    idx = torch.randint(192, (3, 48))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 48 * price(phase, "flops", shape) == 3 * 48 * model.flops_per_token()


def test_flops_of_a_frozen_middle_are_the_counted_flops():
    """No published schedule of this project needs it yet, but the hooks allow any range to be frozen."""
    shape = GPTConfig(block_size=48, vocab_size=192, n_layer=4, n_head=2, n_embd=32)
    model = GPT(shape)
    model.freeze(blocks=[0, 2], embeddings=True)
    idx = torch.randint(192, (3, 48))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx).backward()
    assert counter.get_total_flops() == 3 * 48 * model.flops_per_token()


# --- learning rate


def rates(plan, **config):
    defaults = dict(learning_rate=1.0, min_lr=0.1, lr_schedule="constant", warmup_iters=0, rewarm_iters=0, decay_share=0.2)
    c = SimpleNamespace(**(defaults | config))
    return [schedule.learning_rate(s, plan, c) for s in range(plan.n_steps)]


def test_constant_rate_is_constant():
    assert set(rates(make_plan(12, 50, 4))) == {1.0}


def test_cosine_falls_from_peak_to_floor():
    r = rates(make_plan(12, 100), lr_schedule="cosine", warmup_iters=9)
    assert r[:9] == pytest.approx([i / 10 for i in range(1, 10)]) and r[9] == 1.0
    assert all(a > b for a, b in zip(r[9:], r[10:])) and r[-1] == pytest.approx(0.1, abs=1e-3)
    assert r[9 + 45] == pytest.approx(0.55, abs=0.02)


def test_wsd_is_stable_then_falls_linearly():
    r = rates(make_plan(12, 100), lr_schedule="wsd", min_lr=0.0)
    assert set(r[:81]) == {1.0} and r[90] == pytest.approx(0.5) and r[99] == pytest.approx(0.05)


def test_every_later_phase_warms_up_again():
    plan = make_plan(12, 40, 2)
    r = rates(plan, rewarm_iters=3)
    for phase in plan.phases[1:]:
        assert r[phase.start : phase.start + 4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert r[:10] == [1.0] * 10
