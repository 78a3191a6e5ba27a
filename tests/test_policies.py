"""Policies: skipped blocks, and learning rates and residual scales of single blocks."""

import dataclasses
import math

import pytest

from policies import SKIP_POLICIES
from schedule import Schedule, make_schedule, with_freezeout, with_ramp, with_skip_policy
from stagewise.errors import UserError

# --- skipped blocks


def dropped(rate=0.5, n_steps=2000, seed=0, n_layer=5):
    return with_skip_policy(make_schedule(n_layer, n_steps), "layer_dropout", rate, seed)


def test_layer_dropout_skips_with_the_published_probability():
    """p = rate * l/(L-1) * (1 - t/(T-1)): checked over the first and the last quarter of the
    steps."""
    schedule, n = dropped(), 500
    for start in (0, 1500):
        steps = range(start, start + n)
        scales = [schedule.at(s).residual_scales for s in steps]
        for i in range(5):
            p = [0.5 * i / 4 * (1 - s / 1999) for s in steps]
            skipped = [scale[i] == 0 for scale in scales]
            spread = math.sqrt(sum(q * (1 - q) for q in p))
            assert abs(sum(skipped) - sum(p)) <= 4 * spread
            for scale, q in zip(scales, p):  # the expected contribution is that of the full block
                assert scale[i] == 0 or scale[i] == pytest.approx(1 / (1 - q))
    assert schedule.at(1999).residual_scales == (1.0,) * 5


def test_skipped_blocks_are_a_pure_function_of_seed_and_step():
    a, b, other = dropped(), dropped(), dropped(seed=1)
    steps = [7, 3, 1000, 7]
    assert [a.at(s) for s in steps] == [b.at(s) for s in steps]
    assert a.at(7).residual_scales != a.at(8).residual_scales
    assert [a.at(s).residual_scales for s in range(50)] != [
        other.at(s).residual_scales for s in range(50)
    ]


def test_running_blocks_are_the_ones_not_skipped():
    step = dropped(rate=0.9).at(0)
    assert step.running_blocks == tuple(i for i in range(5) if step.residual_scales[i])
    assert make_schedule(5, 10).at(3).residual_scales is None
    assert make_schedule(5, 10).at(3).running_blocks == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    "name, rate, said",
    [
        ("layer_drop", 0.2, "did you mean layer_dropout"),
        ("layer_dropout", 1.0, "skip_rate=1.0"),
        ("layer_dropout", -0.1, "skip_rate=-0.1"),
        ("layer_dropout", float("nan"), "skip_rate=nan"),
    ],
)
def test_invalid_policies_raise_errors(name, rate, said):
    with pytest.raises(UserError, match=said):
        with_skip_policy(make_schedule(5, 10), name, rate, seed=0)


def test_every_policy_is_tested_here():
    assert SKIP_POLICIES.keys() == {"layer_dropout", "progressive_layer_dropping", "subnetwork"}


def counts(name, rate, at, n=2000, n_layer=6, n_steps=100_000):
    """Return how often each block is skipped in n steps from step `at`, and the last scales."""
    schedule = with_skip_policy(make_schedule(n_layer, n_steps), name, rate, seed=0)
    scales = [schedule.at(s).residual_scales for s in range(at, at + n)]
    return [sum(scale[i] == 0 for scale in scales) for i in range(n_layer)], scales[-1]


def test_progressive_layer_dropping_is_that_of_the_published_code():
    """DeepSpeed's theta(t) = (1 - theta) exp(-gamma t) + theta; block l is kept with probability 1
    - l (1 - theta(t)) / L (DeepSpeedExamples 26e3321, modelingpreln_layerdrop.py)."""
    assert counts("progressive_layer_dropping", 0.5, at=0, n=1)[1] == (1.0,) * 6
    skipped, scales = counts("progressive_layer_dropping", 0.5, at=50_000)
    for i, (n, scale) in enumerate(zip(skipped, scales)):
        p = i * 0.5 / 6
        assert abs(n - 2000 * p) <= 4 * math.sqrt(2000 * p)
        assert scale == 0 or scale == pytest.approx(1 / (1 - p))
    early, _ = counts("progressive_layer_dropping", 0.5, at=0, n=500)  # theta(t) falls fast
    assert 0 < sum(early) < sum(skipped) / 4 / 2


def test_a_subnetwork_always_has_the_first_and_the_last_block():
    skipped, scales = counts("subnetwork", 0.5, at=0)
    assert skipped[0] == skipped[-1] == 0 and set(scales) <= {0.0, 1.0}
    assert sum(skipped) / 2000 == pytest.approx(0.5 * 6, abs=0.1)
    for n in skipped[1:-1]:
        assert abs(n - 1500) < 4 * math.sqrt(1500 / 4)
    assert not any(counts("subnetwork", 0.0, at=0, n=100)[0])
    assert counts("subnetwork", 0.9, at=0, n=100)[0] == [0, 100, 100, 100, 100, 0]


def test_the_skip_rate_may_differ_between_stages():
    schedule = make_schedule(6, 40, stage_blocks=("100%",) * 2, freezing="none")
    skipping = with_skip_policy(schedule, "subnetwork", (0.5, 0.0), seed=0)
    assert any(0 in skipping.at(s).residual_scales for s in range(20))
    assert all(skipping.at(s).residual_scales == (1.0,) * 6 for s in range(20, 40))
    with pytest.raises(UserError, match="must be one number, or one per stage"):
        with_skip_policy(schedule, "subnetwork", (0.5, 0.0, 0.1), seed=0)


# --- learning rates and residual scales of blocks


def test_freezeout_is_that_of_the_published_code():
    """ajbrock/FreezeOut 73beea1, utils.py: lr_ratio = (t_0 + (1 - t_0) i / L)^3, and the rate in
    iteration j is 0.5 * lr / lr_ratio * (1 + cos(pi j / max_j))."""
    schedule = with_freezeout(make_schedule(4, 1000), 0.8)
    for step in range(0, 1000, 7):
        at = schedule.at(step)
        for i in range(5):  # the last one: ratio 1, for all parameters outside of the blocks
            ratio = (0.8 + 0.2 * i / 4) ** 3
            expected = 0.5 / ratio * (1 + math.cos(math.pi * step / (1000 * ratio)))
            frozen = step >= 1000 * ratio
            block = i if i < 4 else None
            assert at.rate_scale(block) == pytest.approx(0 if frozen else expected, abs=1e-9)
            assert i == 4 or (i in at.phase.trained_blocks) != frozen
        assert at.phase.train_embeddings == (step < 512) and at.phase.train_head
    assert [(p.start, p.trained_blocks) for p in schedule.phases] == [
        (0, (0, 1, 2, 3)),
        (512, (1, 2, 3)),
        (615, (2, 3)),
        (729, (3,)),
        (858, ()),
    ]
    for several in (make_schedule(4, 1000, 2), make_schedule(4, 1000, continual_steps=10)):
        with pytest.raises(UserError, match="freezeout=0.8 cannot be used with several stages"):
            with_freezeout(several, 0.8)
    with pytest.raises(UserError, match="freezeout=0.01 must be between 0.3 and 1"):
        with_freezeout(make_schedule(4, 1000), 0.01)


def test_only_new_blocks_warm_up_again_and_fade_in():
    phases = make_schedule(4, 40, 2, freezing="none", growth_operator="interleave").phases
    grown = dataclasses.replace(phases[1], rewarmup_steps=3, rewarmup="new_blocks", fade_in_steps=1)
    schedule = Schedule((phases[0], grown))
    assert grown.new_blocks == (1, 3)
    assert [schedule.at(s).rate_scales for s in (19, 23)] == [None, None]
    assert schedule.at(20).rate_scales == (1.0, 0.25, 1.0, 0.25, 1.0)
    assert schedule.at(22).rate_scales == (1.0, 0.75, 1.0, 0.75, 1.0)
    assert schedule.at(20).rate_scale(None) == 1.0 and schedule.at(20).rate_scale(1) == 0.25
    assert schedule.at(20).residual_scales == (1.0, 0.5, 1.0, 0.5)
    assert schedule.at(20).running_blocks == (0, 1, 2, 3)
    assert schedule.at(21).residual_scales is None
    # a cut, and skipped blocks
    cut = with_ramp(schedule, "context_length", "0:512 52.5%:1024")
    for s in range(40):
        assert cut.at(s).rate_scales == schedule.at(s).rate_scales
    skipping = with_skip_policy(schedule, "layer_dropout", 0.9, seed=0).at(20)
    plain = with_skip_policy(Schedule(phases), "layer_dropout", 0.9, seed=0).at(20)
    factors = (1.0, 0.5, 1.0, 0.5)
    assert skipping.residual_scales == tuple(map(math.prod, zip(plain.residual_scales, factors)))
