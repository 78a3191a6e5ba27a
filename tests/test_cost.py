"""Tests of the cost of a schedule: against the paper, by hand, and against torch's FLOP counter."""

import dataclasses
import math

import pytest
import torch
from conftest import ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cost
from cost import (
    COST_METRICS,
    compute_matched_step,
    compute_matched_steps,
    cost_per_token,
    cumulative_cost,
    make_schedules,
    paper_compute_matched_step,
    summarize,
    summary_table,
)
from model import GPT, GPTConfig
from schedule import make_schedule, with_ramp, with_skip_policy
from stagewise.config import Config, load_config

GPT2 = GPTConfig()
ONE = dict(tokens_per_step=1)
SMALL = GPTConfig(block_size=48, vocab_size=192, n_layer=4, n_head=2, n_embd=32)


# --- the paper


def test_the_papers_formula_matches_its_figures():
    assert [paper_compute_matched_step(S, 10_000) for S in (4, 8, 12)] == [14_688, 15_469, 15_729]


@pytest.mark.parametrize("S", [1, 2, 3, 4, 6, 12])
def test_cost_matches_the_papers_formula_if_stages_divide_blocks(S):
    T = 48_000  # divisible by 2S
    schedule, baseline = make_schedule(12, T, S, **ONE), make_schedule(12, T, **ONE)
    stages = cumulative_cost(schedule, T, "paper_cost", GPT2)
    assert stages == T * 12 * (3 * S + 5) / (4 * S)  # C_incremental
    assert cumulative_cost(baseline, T, "paper_cost", GPT2) == 2 * T * 12
    matched = compute_matched_steps(schedule, baseline, GPT2)["paper_cost"]
    assert matched == paper_compute_matched_step(S, T)


def test_twelve_blocks_in_eight_stages_cost_more_than_the_formula():
    schedule, baseline = make_schedule(12, 10_000, 8, **ONE), make_schedule(12, 10_000, **ONE)
    by_hand, former = 0, 0
    for n in (1, 3, 4, 6, 7, 9, 10, 12):
        by_hand += 625 * (n + (n - former)) + 625 * 2 * n
        former = n
    assert cumulative_cost(schedule, 10_000, "paper_cost", GPT2) == by_hand == 105_000
    matched = compute_matched_steps(schedule, baseline, GPT2)["paper_cost"]
    assert matched == 10_000 + (240_000 - 105_000) / 24 == 15_625


# --- cumulative cost


def test_cost_accumulates_over_phases_with_different_batch_and_context():
    base = make_schedule(4, 10, tokens_per_step=480, context_length=48)
    schedule = with_ramp(base, "tokens_per_step", "0:96 50%:480")
    schedule = with_ramp(schedule, "context_length", "0:12 70%:48")
    d, V, L = 32, 192, 4

    def per_token(context):
        return 3 * (L * (24 * d * d + 4 * context * d) + 2 * V * d)

    tokens = [96] * 5 + [480] * 5
    flops = [n * per_token(12 if s < 7 else 48) for s, n in enumerate(tokens)]
    for step in range(11):
        assert cumulative_cost(schedule, step, "tokens", SMALL) == sum(tokens[:step])
        assert cumulative_cost(schedule, step, "flops", SMALL) == sum(flops[:step])
        assert cumulative_cost(schedule, step, "paper_cost", SMALL) == 8 * sum(tokens[:step])


def test_skipped_blocks_cost_nothing():
    base = make_schedule(4, 64, 2, 16, tokens_per_step=96, context_length=48)
    schedule = with_skip_policy(base, "layer_dropout", 0.6, seed=3)
    total = dict.fromkeys(COST_METRICS, 0)
    for step in range(80):
        for metric in COST_METRICS:
            assert cumulative_cost(schedule, step, metric, SMALL) == total[metric]
            total[metric] += 96 * cost_per_token(schedule.at(step), metric, SMALL)
    whole = cumulative_cost(base, 80, "flops", SMALL)
    assert cumulative_cost(schedule, 80, "flops", SMALL) == total["flops"] < 0.95 * whole
    assert total["tokens"] == 80 * 96
    at = schedule.at(0)
    trained = set(at.running_blocks) & set(at.phase.trained_blocks)
    assert cost_per_token(at, "paper_cost", SMALL) == len(at.running_blocks) + len(trained)


SCHEDULES = {
    "paper": make_schedule(12, 100, 4, 500),
    "long": make_schedule(12, 100, 4),
    "skipping": with_skip_policy(make_schedule(12, 200), "layer_dropout", 0.5, seed=0),
    "short context": with_ramp(make_schedule(12, 200), "context_length", "0:128 50%:1024"),
}


@pytest.mark.parametrize("metric", ["flops", "paper_cost"])
@pytest.mark.parametrize(
    "options",
    [
        dict(tokens_per_step_ramp="0:8192 800K:16384"),  # the second part is continual training
        dict(skip_policy="subnetwork", skip_rate=0.3),
        dict(skip_policy="layer_dropout", skip_rate=0.5),
        dict(skip_policy="progressive_layer_dropping", skip_rate=0.5),
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_continual_training_stops_when_compute_matched(metric, options):
    """Also if ramps and skipped blocks change the cost of the continual steps."""
    config = Config(
        stages=4, steps=100, tokens_per_step=8192, batch_size=1, continual_steps=f"match_{metric}",
        **options,
    )  # fmt: skip
    schedule, baseline = make_schedules(config, GPT2)
    total, budget = (cumulative_cost(s, s.n_steps, metric, GPT2) for s in (schedule, baseline))
    per_step = cumulative_cost(baseline, 1, metric, GPT2)
    assert schedule.n_steps > 105 and abs(total - budget) <= 2 * per_step


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("metric", COST_METRICS)
def test_cumulative_cost_at_the_compute_matched_step_equals_the_baselines(name, metric):
    """Within a schedule that costs more than its baseline, and past the end of one that costs
    less."""
    schedule, baseline = SCHEDULES[name], make_schedule(12, 100)
    step = compute_matched_step(schedule, baseline, metric, GPT2)
    budget = cumulative_cost(baseline, 100, metric, GPT2)
    if step <= schedule.n_steps:
        low, high = (
            cumulative_cost(schedule, s, metric, GPT2) for s in (math.floor(step), math.ceil(step))
        )
        assert low <= budget <= high
    else:
        assert name == "long"
        rest = budget - cumulative_cost(schedule, 100, metric, GPT2)
        per_step = cumulative_cost(baseline, 1, metric, GPT2)
        assert step == pytest.approx(100 + rest / per_step)


# --- FLOPs


def test_flops_of_the_124m_model_by_hand():
    d, T, V, L = 768, 1024, 50304, 12
    expected = 3 * (L * (24 * d * d + 4 * T * d) + 2 * V * d)
    assert cost_per_token(make_schedule(L, 1).at(0), "flops", GPT2) == expected


def counted_flops(model, T, scales=None):
    """Return torch's FLOP count of a forward and backward pass, with attention as matmuls."""
    idx = torch.randint(192, (3, T))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(idx, idx, scales).backward()
    return counter.get_total_flops()


def stem(path):
    return path.stem


SMALL_CONTEXT = dict(context_length=48)
KINDS = {
    "baseline": (make_schedule(4, 8, **SMALL_CONTEXT), 0),
    "paper, first phase 1": (make_schedule(4, 8, 2, **SMALL_CONTEXT), 0),
    "paper, later phase 1": (make_schedule(4, 8, 2, **SMALL_CONTEXT), 4),
    "paper, first phase 2": (make_schedule(4, 8, 2, **SMALL_CONTEXT), 2),
    "released code, later phase 1": (
        make_schedule(4, 8, 2, phase1="released_code", **SMALL_CONTEXT),
        4,
    ),
    "new blocks between frozen ones": (
        make_schedule(4, 8, 2, growth_operator="zero_output", **SMALL_CONTEXT),
        4,
    ),
    "continual": (make_schedule(4, 8, 2, 4, **SMALL_CONTEXT), 9),
    "short context": (make_schedule(4, 8, context_length=16), 0),
    **{
        f"skipping, step {step}": (
            with_skip_policy(make_schedule(4, 8, 2, **SMALL_CONTEXT), "layer_dropout", 0.9, seed=4),
            step,
        )
        for step in range(8)
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_computed_flops_match_torchs_counter(kind):
    schedule, number = KINDS[kind]
    step = schedule.at(number)
    phase = step.phase
    model = GPT(SMALL, n_blocks=phase.n_blocks)
    model.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)
    counted = counted_flops(model, phase.context_length, step.residual_scales)
    assert counted == 3 * phase.context_length * cost_per_token(step, "flops", SMALL)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "methods").glob("*.py")), ids=stem)
def test_computed_flops_match_torchs_counter_for_every_method(path):
    """In the first and the last step of every phase."""
    options = ["--n_layer=4", "--n_embd=32", "--n_head=2", "--block_size=64", "--steps=60"]
    options += ["--fade_in_steps=5"] if path.stem == "msg" else []
    config = load_config([str(path), *options, "--tokens_per_step=64"], Config())
    schedule, _ = make_schedules(config, SMALL)
    for phase in schedule.phases:
        model = GPT(dataclasses.replace(SMALL, block_size=64), n_blocks=phase.n_blocks)
        model.set_trainable(phase.trained_blocks, phase.train_embeddings, phase.train_head)
        for number in {phase.start, phase.stop - 1}:
            step = schedule.at(number)
            counted = counted_flops(model, phase.context_length, step.residual_scales)
            assert counted == 3 * phase.context_length * cost_per_token(step, "flops", SMALL)


def test_the_skipping_kinds_skip_something():
    running = [s.at(i).running_blocks for k, (s, i) in KINDS.items() if "skipping" in k]
    assert len(set(running)) > 3 and any(len(r) < 2 for r in running)


def test_flops_with_frozen_middle_blocks_match_torchs_counter():
    model = GPT(SMALL)
    model.freeze(blocks=[0, 2], embeddings=True)
    flops = cost.flops_per_token(SMALL, 48, range(4), [1, 3], train_embeddings=False)
    assert counted_flops(model, 48) == 3 * 48 * flops


# --- the baseline of a run


def test_continual_steps_until_compute_matched():
    for goal, total in (("match_paper_cost", 14_688), ("match_flops", 13_983)):
        config = load_config(["--stages=4", f"--continual_steps={goal}"], Config())
        schedule, baseline = make_schedules(config, GPT2)
        assert schedule.n_steps == total and baseline.n_steps == 10_000


@pytest.mark.parametrize("metric", ["paper_cost", "flops"])
@pytest.mark.parametrize(
    "method",
    [
        ["--context_ramp=0:128 90%:1024"],
        ["--context_ramp=0:128 100M:1024"],
        ["--tokens_per_step_ramp=0:131072 50%:524288"],
        ["--skip_policy=layer_dropout", "--skip_rate=0.8"],
        ["--freezing=none", "--growth=stack"],
    ],
)
def test_continual_steps_match_the_baseline_with_any_method(metric, method):
    """Percentages and policies refer only to the steps before continual training."""
    options = ["--stages=4", "--steps=1000", f"--continual_steps=match_{metric}", *method]
    schedule, baseline = make_schedules(load_config(options, Config()), GPT2)
    n = schedule.n_steps
    budget = cumulative_cost(baseline, 1000, metric, GPT2)
    assert n > 1000
    before, at, after = (cumulative_cost(schedule, n + i, metric, GPT2) for i in (-1, 0, 1))
    one_step = at - before
    assert abs(at - budget) <= one_step / 2
    assert compute_matched_steps(schedule, baseline, GPT2)[metric] == n and after == at


def test_the_baseline_is_independent_of_the_method():
    options = ["--stages=4", "--context_ramp=0:512 50%:1024", "--skip_policy=layer_dropout"]
    options += ["--tokens_per_step_ramp=0:262144 50%:524288", "--growth=stack"]
    schedule, baseline = make_schedules(load_config(options, Config()), GPT2)
    assert baseline == make_schedule(12, 10_000) and baseline.is_baseline
    assert not schedule.is_baseline


# --- summary


def summary(*options):
    config = load_config([*options], Config())
    schedule, baseline = make_schedules(config, GPT2)
    return summarize(schedule, baseline, GPT2)


def test_the_summary_adds_up():
    s = summary("--stages=4", "--continual_steps=4688", "--context_ramp=0:512 50%:1024")
    for metric in COST_METRICS:
        assert sum(p[metric] for p in s["phases"]) == s["total"][metric]
        last = s["phases"][-1]["cumulative"][metric]
        assert last == pytest.approx(s["total"][metric] / s["baseline"][metric])
        assert sum(p["fraction"][metric] for p in s["phases"]) == pytest.approx(last)
    first = make_schedule(12, 10_000, 4, context_length=512).phases[0]
    assert s["phases"][0] == s["phases"][0] | dataclasses.asdict(first)


@pytest.mark.parametrize(
    "options, step",
    [
        (["--stages=4"], 14_688),
        (["--stages=8"], 15_469),  # the paper prints it, though 8 does not divide 12
        (["--stages=4", "--phase1=released_code"], 14_688),
        ([], None),
        (["--stages=4", "--freezing=none"], None),
        (["--stages=4", "--phase_fractions", "1", "3"], None),
        (["--stage_blocks", "1", "12"], None),
        (["--stages=4", "--skip_policy=layer_dropout"], None),
        (["--stages=4", "--context_ramp=0:512 30%:1024"], None),
        (["--stages=4", "--tokens_per_step_ramp=0:262144"], None),
        (["--stages=4", "--tokens_per_step_ramp=0:262144 50%:524288"], None),
    ],
)
def test_the_papers_formula_is_printed_only_if_it_applies(options, step):
    s = summary(*options)
    assert s["paper_formula_step"] == step
    assert ("The paper's formula" in summary_table(s)) == (step is not None)


def test_the_table_shows_context_and_batch_only_if_they_vary():
    plain, varied = (
        summary_table(summary("--stages=4", *more))
        for more in ([], ["--context_ramp=0:512 50%:1024", "--skip_policy=layer_dropout"])
    )
    assert "context" not in plain.split("---")[0] and "tokens/step" not in plain
    assert "context" in varied.split("---")[0] and "Skipped blocks" in varied
    assert max(map(len, plain.splitlines())) <= 100
