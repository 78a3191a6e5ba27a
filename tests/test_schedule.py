"""Tests of the schedule: boundaries, trained blocks, ramps, skipped blocks, learning rates."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

import schedule as schedules
from cost import make_schedules
from growth import source_map
from model import GPTConfig
from schedule import (
    Phase,
    begun,
    blocks_per_stage,
    learning_rate,
    make_schedule,
    with_ramp,
    with_skip_policy,
)
from stagewise.config import Config, load_config
from stagewise.errors import UserError
from stagewise.fileio import convert


def values(schedule, *names):
    rows = [tuple(getattr(p, name) for name in names) for p in schedule.phases]
    return [row[0] for row in rows] if len(names) == 1 else rows


# --- phases


def test_uneven_stages_end_with_all_blocks():
    assert blocks_per_stage(12, 8) == [1, 3, 4, 6, 7, 9, 10, 12]


@pytest.mark.parametrize(
    "S, T", [(1, 7), (4, 10_000), (8, 10_000), (12, 10_000), (5, 997), (12, 24), (7, 15)]
)
@pytest.mark.parametrize("freezing", ["preceding", "none"])
def test_phases_have_exactly_the_requested_steps(S, T, freezing):
    phases = make_schedule(12, T, S, 13, freezing=freezing).phases
    assert phases[0].start == 0 and phases[-1].stop == T + 13
    assert all(a.stop == b.start for a, b in zip(phases, phases[1:]))
    n = 2 * S if freezing != "none" and S > 1 else S
    if n <= T:
        expected = [math.floor(i * T / n + 0.5) for i in range(1, n + 1)]
        assert [p.stop for p in phases[:-1]] == expected
    blocks = [p.n_blocks for p in phases]
    assert blocks == sorted(blocks) and blocks[-1] == 12


def test_the_baseline_is_a_schedule_with_one_phase():
    schedule = make_schedule(12, 10)
    (phase,) = schedule.phases
    assert (phase.n_blocks, phase.trained_blocks) == (12, tuple(range(12)))
    assert phase.train_embeddings and phase.train_head and schedule.is_baseline


@pytest.mark.parametrize(
    "other",
    [
        make_schedule(12, 100, 4),
        make_schedule(12, 100, 2, freezing="none"),
        with_ramp(make_schedule(12, 100), "context_length", "0:512 50%:1024"),
        with_ramp(make_schedule(12, 100), "tokens_per_step", "0:512 50%:1024"),
        with_skip_policy(make_schedule(12, 100), "layer_dropout", 0.1, seed=0),
    ],
)
def test_methods_are_not_the_baseline(other):
    assert not other.is_baseline
    assert make_schedule(12, 100, continual_steps=50).is_baseline


def test_phase_1_freezes_existing_parts_as_in_the_paper_or_the_released_code():
    paper = make_schedule(12, 100, 4)
    assert values(paper, "stage", "kind", "n_blocks", "trained_blocks")[:4] == [
        (1, "new_blocks", 3, (0, 1, 2)),  # no existing blocks
        (1, "all_blocks", 3, (0, 1, 2)),
        (2, "new_blocks", 6, (3, 4, 5)),
        (2, "all_blocks", 6, (0, 1, 2, 3, 4, 5)),
    ]
    expected = [True, True, False, True, False, True, False, True]
    assert values(paper, "train_embeddings") == values(paper, "train_head") == expected
    released = make_schedule(12, 100, 4, phase1="released_code")
    assert all(p.train_embeddings and p.train_head for p in released.phases)
    assert values(released, "trained_blocks") == values(paper, "trained_blocks")


def test_phase_1_trains_the_new_blocks_at_any_position():
    schedule = make_schedule(6, 100, stage_blocks=(3, 6), growth_operator="zero_output")
    assert [s.keep for s in source_map("zero_output", 3, 6)] == [True, False] * 3
    assert schedule.phases[2].trained_blocks == (1, 3, 5)


def test_growing_without_freezing_has_no_phase_1():
    schedule = make_schedule(12, 100, 4, freezing="none")
    assert values(schedule, "name", "start") == [
        ("stage 1", 0),
        ("stage 2", 25),
        ("stage 3", 50),
        ("stage 4", 75),
    ]
    assert all(len(p.trained_blocks) == p.n_blocks for p in schedule.phases)


def test_explicit_blocks_and_unequal_fractions():
    schedule = make_schedule(12, 100, stage_blocks=(2, 12), phase_fractions=(1, 3))
    assert values(schedule, "n_blocks", "start", "stop") == [
        (2, 0, 13),
        (2, 13, 50),
        (12, 50, 63),
        (12, 63, 100),
    ]
    schedule = make_schedule(12, 100, stage_blocks=(2, 12), phase_fractions=(0, 1, 1, 2))
    assert values(schedule, "name", "stop") == [
        ("stage 1 phase 2", 25),
        ("stage 2 phase 1", 50),
        ("stage 2 phase 2", 100),
    ]


def test_the_lengths_of_stages_follow_prop_alpha():
    """cordschmidt/stacking-knowledge, scheduler.py: T_i = i^alpha / sum_j j^alpha T."""
    for alpha, stops in ((0, [25, 50, 75, 100]), (1, [10, 30, 60, 100]), (2, [3, 17, 47, 100])):
        schedule = make_schedule(12, 100, 4, freezing="none", stage_alpha=alpha)
        assert values(schedule, "stop") == stops
    two = make_schedule(12, 60, 2, stage_alpha=1)
    assert values(two, "stop") == [10, 20, 40, 60]
    with pytest.raises(UserError, match="--stage_alpha=0"):
        make_schedule(12, 100, 4, freezing="none", stage_alpha=1, phase_fractions=(1, 1, 1, 1))


def test_stage_blocks_may_be_percentages():
    def blocks(n_layer, *stage_blocks):
        schedule = make_schedule(n_layer, 100, stage_blocks=stage_blocks, freezing="none")
        return [p.n_blocks for p in schedule.phases]

    assert blocks(12, "25%", "50%", "100%") == [3, 6, 12]
    assert blocks(12, 0, "33.3%", 12) == [0, 3, 12] and blocks(32, "67%", "100%") == [21, 32]
    assert blocks(4, "100%", "100%") == [4, 4]
    assert blocks(3, "25%", "100%") == [1, 3] and blocks(3, "0%", "100%") == [0, 3]
    for bad in (("a", 12), ("1.5", 12), ("50%", "120%"), ("-1", 12), ("50%", 3, 12)):
        with pytest.raises(UserError, match="stage_blocks"):
            make_schedule(12, 100, stage_blocks=bad, freezing="none")
    with pytest.raises(UserError, match="adds no blocks .* --freezing=none"):
        make_schedule(12, 100, stage_blocks=("100%", "100%"))


def test_preceding_blocks_are_those_below_the_lowest_new_block():
    for operator, expected in (("interleave", (1, 2, 3)), ("random", (2, 3))):
        for freezing in ("preceding", "all_but_new"):
            schedule = make_schedule(4, 100, 2, growth_operator=operator, freezing=freezing)
            new = (1, 3) if operator == "interleave" else (2, 3)
            trained = expected if freezing == "preceding" else new
            assert schedule.phases[2].trained_blocks == trained
            assert schedule.phases[2].new_blocks == new


def test_without_freezing_fractions_are_per_stage():
    """Without freezing, a stage is not split into two phases."""
    schedule = make_schedule(4, 100, 2, freezing="none", phase_fractions=(0.3, 0.7))
    assert values(schedule, "stop", "n_blocks") == [(30, 2), (100, 4)]


def test_every_stage_ends_with_a_milestone_even_without_phase_2():
    schedule = make_schedule(12, 100, stage_blocks=(2, 12), phase_fractions=(1, 1, 2, 0))
    assert values(schedule, "stop", "milestone") == [(25, False), (50, True), (100, True)]


def test_after_a_stage_without_steps_there_is_nothing_to_freeze():
    schedule = make_schedule(12, 100, stage_blocks=(2, 12), phase_fractions=(0, 0, 1, 1))
    first = schedule.phases[0]
    assert (first.name, first.start, first.n_blocks) == ("stage 2 phase 1", 0, 12)
    assert len(first.trained_blocks) == 12 and first.train_head


def test_phase_1_freezes_embeddings_and_head_even_if_all_blocks_are_new():
    schedule = make_schedule(12, 100, stage_blocks=(0, 12))
    assert values(schedule, "train_embeddings") == [True, True, False, True]
    assert schedule.phases[2].trained_blocks == tuple(range(12))


def test_a_run_may_start_without_blocks():
    schedule = make_schedule(12, 100, stage_blocks=(0, 12), freezing="none")
    assert values(schedule, "n_blocks") == [0, 12]


def test_optimizer_state_and_rewarmup_on_phase_entry():
    schedule = make_schedule(
        12,
        100,
        2,
        10,
        growth_operator="stack",
        optimizer_state="copy",
        continual_optimizer_state="reset",
        rewarmup_steps=3,
    )
    assert values(schedule, "growth") == ["stack", None, "stack", None, None]
    assert values(schedule, "optimizer_state") == ["carry", "copy", "copy", "copy", "reset"]
    assert values(schedule, "rewarmup_steps") == [0, 3, 3, 3, 3]
    assert values(schedule, "milestone") == [False, True, False, True, True]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (dict(stages=13), "n_layer=12"),
        (dict(stages=0), "stages=0"),
        (dict(stage_blocks=(3, 3, 12)), "stage_blocks"),
        (dict(stage_blocks=(-1, 12)), "stage_blocks"),
        (dict(stage_blocks=(3, 6)), "n_layer=12"),
        (dict(stage_blocks=(6, 12), stages=3), "stages=3"),
        (dict(stages=4, phase_fractions=(1, 2, 3)), "must be 2 numbers .* or 8"),
        (dict(stages=4, phase_fractions=(0, 0)), "phase_fractions"),
        (dict(stages=4, phase_fractions=(1, float("nan"))), "phase_fractions"),
        (dict(stages=4, freezing="none", phase_fractions=(1, 2)), "must be 4"),
        (dict(phase_fractions=(1, 2)), "must be 1"),
        (dict(steps=0), "steps=0"),
        (dict(continual_steps=-1), "continual_steps=-1"),
        (dict(stages=12, steps=2, phase_fractions=(1,) * 22 + (0, 0)), "last of 12 stages"),
        (dict(stages=4, growth_operator="stak"), "did you mean stack"),
        (dict(stage_blocks=(0, 12), growth_operator="stack"), "the model has none"),
    ],
)
def test_invalid_schedules_raise_errors_that_name_the_argument(arguments, named):
    with pytest.raises(UserError, match=named):
        make_schedule(12, **({"steps": 100} | arguments))


def test_phases_round_trip_through_json():
    schedule = with_skip_policy(make_schedule(12, 100, 4), "layer_dropout", 0.2, seed=1)
    rows = [dataclasses.asdict(p) for p in schedule.phases]
    assert tuple(convert(rows, list[Phase])) == schedule.phases


# --- ramps


def test_a_ramp_splits_phases_at_value_changes():
    base = make_schedule(12, 100, 2, 20, rewarmup_steps=4, optimizer_state="reset")
    schedule = with_ramp(base, "context_length", "0:256 60%:512 90%:1024")
    assert values(schedule, "name", "start", "stop", "context_length") == [
        ("stage 1 phase 1", 0, 25, 256),
        ("stage 1 phase 2", 25, 50, 256),
        ("stage 2 phase 1", 50, 60, 256),
        ("stage 2 phase 1, part 2", 60, 75, 512),
        ("stage 2 phase 2", 75, 90, 512),
        ("stage 2 phase 2, part 2", 90, 100, 1024),
        ("continual", 100, 120, 1024),
    ]
    before, after = schedule.phases[2:4]
    assert (before.growth, before.optimizer_state, before.rewarmup_steps) == ("random", "reset", 4)
    assert (after.growth, after.optimizer_state, after.rewarmup_steps) == (None, "carry", 0)
    assert not before.milestone and not after.milestone
    assert [p.stop for p in schedule.phases if p.milestone] == [50, 100, 120]
    assert before.trained_blocks == after.trained_blocks == tuple(range(6, 12))


def test_ramps_can_be_combined():
    base = make_schedule(12, 80, tokens_per_step=1000)
    schedule = with_ramp(base, "tokens_per_step", "0:500 20K:1000")
    assert values(schedule, "stop", "tokens_per_step") == [(40, 500), (80, 1000)]
    schedule = with_ramp(schedule, "context_length", "0:128 10_000:256 0.03M:512")
    assert values(schedule, "name", "start", "tokens_per_step", "context_length") == [
        ("all blocks", 0, 500, 128),
        ("all blocks, part 2", 20, 500, 256),
        ("all blocks, part 3", 40, 1000, 256),
        ("all blocks, part 4", 50, 1000, 512),
    ]
    assert [schedule.tokens(s) for s in (0, 1, 40, 41, 80)] == [0, 500, 20_000, 21_000, 60_000]


@pytest.mark.parametrize(
    "ramp, said",
    [
        ("512", "'512' must be START:VALUE"),
        ("0:512 half:1024", "'half:1024' must be"),
        ("0:0", "'0:0' must be"),
        ("0:-1", "'0:-1' must be"),
        ("10:512", "must increase from 0"),
        ("0:512 0%:1024", "must increase from 0"),
        ("0:512 50%:1024 40%:512", "must increase from 0"),
        ("0:512 1T:1024", "'1T:1024' must be"),
        ("0:64_", "'0:64_' must be"),
        ("=_:512", "must be START:VALUE"),
        ("0:512 1__0:1024", "'1__0:1024' must be"),
    ],
)
def test_invalid_ramps_raise_errors(ramp, said):
    with pytest.raises(UserError, match=said):
        with_ramp(make_schedule(12, 100), "context_length", ramp)


def test_a_start_beyond_the_end_changes_nothing():
    schedule = with_ramp(make_schedule(12, 10), "context_length", "0:512 100B:1024 200B:256")
    assert values(schedule, "stop", "context_length") == [(10, 512)]


# --- comparison on resuming


@pytest.mark.parametrize(
    "change",
    [
        lambda s: with_ramp(s, "context_length", "0:512 50%:1024"),
        lambda s: with_skip_policy(s, "layer_dropout", 0.5, seed=0),
    ],
)
def test_continual_steps_may_increase_with_any_method(change):
    short, long = (change(make_schedule(12, 100, 4, n)) for n in (0, 30))
    assert begun(short.phases, 100) == begun(long.phases, 100)
    assert [short.at(s).residual_scales for s in range(100)] == [
        long.at(s).residual_scales for s in range(100)
    ]
    assert long.at(120).residual_scales in (None, (1.0,) * 12)


def test_fields_that_do_not_affect_training_are_not_compared():
    plain, stack = make_schedule(12, 100), make_schedule(12, 100, growth_operator="stack")
    assert begun(plain.phases, 50) == begun(stack.phases, 50)
    ramp = with_ramp(make_schedule(12, 200, tokens_per_step=8), "tokens_per_step", "0:8 50%:16")
    assert begun(ramp.phases, 100) == begun(make_schedule(12, 100, tokens_per_step=8).phases, 100)


def test_a_longer_run_starts_like_a_shorter_one():
    short, long = make_schedule(12, 100, 4, 10), make_schedule(12, 100, 4, 30)
    assert begun(short.phases, 105) == begun(long.phases, 105) != begun(long.phases, 111)
    other = with_ramp(short, "context_length", "0:1024 50%:512")
    assert begun(other.phases, 50) == begun(short.phases, 50)
    assert begun(other.phases, 60) != begun(short.phases, 60)


# --- learning rate


def rates(schedule, **config):
    defaults = dict(lr_schedule="constant", learning_rate=1.0, min_lr=0.1, warmup_steps=0)
    c = SimpleNamespace(**(defaults | {"decay_fraction": 0.2} | config))
    return [learning_rate(s, schedule, c) for s in range(schedule.n_steps)]


def test_a_constant_rate_is_constant():
    assert set(rates(make_schedule(12, 50, 4))) == {1.0}


def test_cosine_decays_from_peak_to_min_lr():
    r = rates(make_schedule(12, 100), lr_schedule="cosine", warmup_steps=9)
    assert r[:9] == pytest.approx([i / 10 for i in range(1, 10)]) and r[9] == 1.0
    assert all(a > b for a, b in zip(r[9:], r[10:])) and r[-1] == pytest.approx(0.1, abs=1e-3)
    assert r[9 + 45] == pytest.approx(0.55, abs=0.02)


def test_wsd_is_constant_then_decays_linearly():
    r = rates(make_schedule(12, 100), lr_schedule="wsd", min_lr=0.0)
    assert set(r[:81]) == {1.0} and r[90] == pytest.approx(0.5) and r[99] == pytest.approx(0.05)


def test_every_later_phase_warms_up_again_but_a_split_does_not():
    schedule = make_schedule(12, 40, 2, rewarmup_steps=3)
    r = rates(schedule)
    for phase in schedule.phases[1:]:
        assert r[phase.start : phase.start + 4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert r[:10] == [1.0] * 10
    # cut between phases, and in the middle of a warm-up
    cut = with_ramp(schedule, "context_length", "0:512 12.5%:256 30%:512")
    cut = schedules.Schedule(schedules._cut(schedules._cut(cut.phases, 15), 21))
    assert rates(cut) == r


@pytest.mark.parametrize("lr_schedule", ["cosine", "wsd"])
def test_the_learning_rate_schedule_starts_again_with_a_setback_of_1(lr_schedule):
    """As in G_stack: both cycles have the length of the second one, so the first does not decay."""
    schedule = make_schedule(4, 100, 2, freezing="none", phase_fractions=(1, 4))
    first, second = schedule.phases
    restarted = schedules.Schedule((first, dataclasses.replace(second, lr_setback=1.0)))
    config = dict(lr_schedule=lr_schedule, warmup_steps=4)
    r, alone = rates(restarted, **config), rates(make_schedule(4, 80), **config)
    assert r[20:] == alone and r[:20] == alone[:20]


def test_a_long_part_before_a_setback_decays_at_its_own_end():
    schedule = make_schedule(4, 100, 2, freezing="none", phase_fractions=(4, 1))
    first, second = schedule.phases
    restarted = schedules.Schedule((first, dataclasses.replace(second, lr_setback=1.0)))
    r = rates(restarted, lr_schedule="cosine")
    assert r[:80] == rates(make_schedule(4, 80), lr_schedule="cosine")
    assert r[80:] == rates(make_schedule(4, 20), lr_schedule="cosine")


def test_a_setback_repeats_part_of_the_learning_rate_schedule():
    """As in staged training, whose schedule goes back from step 6,499 to 4,449."""
    schedule = make_schedule(4, 100, 2, freezing="none")
    first, second = schedule.phases
    back = schedules.Schedule((first, dataclasses.replace(second, lr_setback=0.3)))
    r, base = rates(back, lr_schedule="cosine"), rates(make_schedule(4, 85), lr_schedule="cosine")
    assert r == base[:50] + base[35:]


def test_parts_of_a_phase_have_different_names_with_two_ramps():
    schedule = make_schedule(4, 100, stages=2, context_length=32, tokens_per_step=64)
    for ramp in ("0:16 10%:32", "0:8 5%:16 15%:32"):
        schedule = with_ramp(schedule, "context_length", ramp)
    names = [p.name for p in schedule.phases]
    assert len(set(names)) == len(names) and "stage 1 phase 1, part 4" in names


# --- options


def from_options(*options):
    return make_schedules(load_config([*options], Config()), GPTConfig())[0]


def test_options_for_growth_reach_the_phases_that_grow():
    schedule = from_options(
        "--stages=4", "--steps=1000", "--freezing=none", "--stage_alpha=1", "--shrink=0.5",
        "--perturb=0.1", "--fade_in_steps=7", "--rewarmup=new_blocks", "--lr_setback=0.25",
    )  # fmt: skip
    assert values(schedule, "stop") == [100, 300, 600, 1000]
    expected = (0.5, 0.1, 7, "new_blocks", 0.25)
    names = ("shrink", "perturb", "fade_in_steps", "rewarmup", "lr_setback")
    first, *others = values(schedule, *names)
    assert first == (1.0, 0.0, 0, "all", 0.0) and others == [expected] * 3
    (phase, *_) = from_options("--freezeout=0.8").phases
    assert phase.freezeout.t_0 == 0.8


@pytest.mark.parametrize(
    "options, said",
    [
        (["--shrink=0.5"], "shrink=0.5 has no effect, because the model does not grow"),
        (["--rewarmup=new_blocks"], "rewarmup=new_blocks has no effect"),
        (["--stages=2", "--stage_alpha=101"], "stage_alpha=101.0 must be"),
        (
            ["--stages=4", "--steps=100", "--freezing=none", "--fade_in_steps=26"],
            "fade_in_steps=26 exceeds the 25 steps from the growth in step 25 to the next growth",
        ),
        (
            ["--stages=2", "--steps=100", "--rewarmup=new_blocks", "--rewarmup_steps=51"],
            "rewarmup_steps=51 exceeds the 50 steps",
        ),
        (
            ["--init_weights=gpt2", "--continual_steps=match_flops"],
            "cannot be used with init_weights",
        ),
    ],
)
def test_options_without_effect_or_end_are_errors(options, said):
    with pytest.raises(UserError, match=said):
        from_options(*options)
