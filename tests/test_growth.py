"""Growth operators as source maps, and their application to parameters and optimizer state."""

import dataclasses
import math

import pytest
import torch
from conftest import TINY

import growth
import train
from growth import FRESH, Source, copy, keep, source_map
from model import GPT, GPTConfig
from schedule import make_schedule
from stagewise.config import Config
from stagewise.device import autocast
from stagewise.errors import UserError

MODEL = GPTConfig(**TINY | {"n_layer": 8})
CPU = torch.device("cpu")
BUILT_IN = tuple(growth.OPERATORS)
COPYING = tuple(sorted({*BUILT_IN} - {"random", "interpolate"}))


def sources(name, old, new):
    """Abbreviate a source map: k2 is old block 2 itself, 2 a copy of it, + a new block."""

    def word(s):
        text = "+" if s == FRESH else f"{'k' * s.keep}{s.mix[0][0]}"
        return text + "z" * s.zero_output

    return " ".join(map(word, source_map(name, old, new)))


# --- maps


@pytest.mark.parametrize(
    "name, old, new, expected",
    [
        ("random", 2, 5, "k0 k1 + + +"),
        ("random", 0, 2, "+ +"),
        ("copy_last", 3, 6, "k0 k1 k2 0 1 2"),
        ("copy_last", 6, 9, "k0 k1 k2 k3 k4 k5 3 4 5"),
        ("copy_last", 2, 7, "k0 k1 0 1 0 1 0"),
        ("stack", 3, 6, "k0 k1 k2 0 1 2"),
        ("stack", 2, 8, "k0 k1 0 1 0 1 0 1"),
        ("stack", 3, 7, "k0 k1 k2 0 1 2 0"),
        ("zero_output", 2, 4, "k0 0z k1 1z"),
        ("zero_output", 4, 6, "k0 k1 1z k2 k3 3z"),
        ("zero_output", 1, 3, "k0 0z 0z"),
        ("interleave", 3, 6, "k0 0 k1 1 k2 2"),
        ("interleave", 3, 5, "k0 k1 1 k2 2"),
        ("copy_middle", 5, 7, "k0 k1 0 1 k2 k3 k4"),
        ("copy_middle", 1, 3, "k0 0 0"),
        ("lidas", 6, 7, "k0 k1 k2 2 k3 k4 k5"),
        ("lidas", 9, 12, "k0 k1 k2 k3 k4 k5 4 5 6 k6 k7 k8"),
        ("solar", 8, 12, "k0 k1 k2 k3 k4 k5 2 3 4 5 k6 k7"),
    ],
)
def test_source_maps(name, old, new, expected):
    assert sources(name, old, new) == expected


def origins(name, *depths):
    """Grow through several depths; return the block of the first model that each block is from."""
    blocks = list(range(depths[0]))
    for old, new in zip(depths, depths[1:]):
        blocks = [blocks[s.mix[0][0]] for s in source_map(name, old, new)]
    return blocks


@pytest.mark.parametrize(
    "name, depths, expected",
    [
        # tongxuluo/prts bf6f774, prts_configs/stacking_6L_24L.json
        ("stack", (6, 24), [*range(6)] * 4),
        # gonglinyuan/StackingBERT 922574b, double.py: block l + L is a copy of block l
        ("stack", (3, 6, 12), [0, 1, 2] * 4),
        # tongxuluo/prts bf6f774, prts_lit/scaling/gradual_stack.py: layers[2 * now - trg + i]
        ("copy_last", (6, 12), [*range(6)] * 2),
        ("copy_last", (6, 8), [0, 1, 2, 3, 4, 5, 4, 5]),
        ("copy_last", (6, 9, 12), [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]),
        # cordschmidt/stacking-knowledge c51fe5a, src/gradual_stacking/stacking_callback.py: the
        # group ceil(n / 2) - 1 is inserted after itself
        ("copy_middle", (6, 8, 10, 12), [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5]),
        ("copy_middle", (3, 6), [0, 1, 2] * 2),
        ("copy_middle", (6, 9), [0, 1, 2, 0, 1, 2, 3, 4, 5]),
        ("copy_middle", (9, 12), [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]),
        # allenai/staged-training 6c0cf4e, gpt_pretrain.py, alternate_copy; tongxuluo/prts,
        # bert2bert.py, inner_stacking: i // (trg_depth // src_depth)
        ("interleave", (6, 12), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]),
        ("interleave", (6, 24), [i // 4 for i in range(24)]),
        # TencentARC/LLaMA-Pro bead657, scripts/block_expansion.py: a copy of the last block of each
        # group
        ("zero_output", (6, 9), [0, 1, 1, 2, 3, 3, 4, 5, 5]),
        ("zero_output", (32, 40), [j for i in range(32) for j in ([i, i] if i % 4 == 3 else [i])]),
        # tongxuluo/prts bf6f774, prts_lit/scaling/solar.py; SOLAR itself, 32 to 48
        ("solar", (6, 8), [0, 1, 2, 3, 2, 3, 4, 5]),
        ("solar", (9, 12), [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]),
        ("solar", (32, 48), [*range(24), *range(8, 32)]),
        # LIDAS, as described in its reviews: the last half of the lower group and the first half of
        # the upper one
        ("lidas", (6, 8), [0, 1, 2, 3, 3, 4, 4, 5]),
        ("lidas", (4, 8, 12), [0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3]),
    ],
)
def test_source_maps_are_those_of_the_published_code(name, depths, expected):
    assert origins(name, *depths) == expected


def test_interpolation_is_that_of_the_published_code():
    """Salva4/multilevel_transformer 16ee2e5, src/continuous_model/continuous_block.py, "linear":
    W[c i + ii] = (1 - ii/c) W[c i] + (ii/c) W[c (i + 1)], and copies after the last one."""
    for old, c in ((6, 2), (3, 4)):
        for n, source in enumerate(source_map("interpolate", old, c * old)):
            i, ii = divmod(n, c)
            if ii and i + 1 < old:
                assert source.mix == ((i, 1 - ii / c), (i + 1, ii / c)) and not source.keep
            else:
                assert source == (copy(i) if ii else keep(i))


def test_solar_needs_overlapping_parts():
    with pytest.raises(UserError, match="growth=solar from 3 to 7 blocks: not defined .* longer"):
        source_map("solar", 3, 7)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("old", range(1, 7))
@pytest.mark.parametrize("added", range(1, 8))
def test_built_in_operators_keep_every_old_block_in_order(name, old, added):
    if name == "solar" and added > old:
        pytest.skip("the two parts of the model would not overlap")
    m = source_map(name, old, old + added)
    assert [s.mix[0][0] for s in m if s.keep] == list(range(old))
    assert len(growth.new_blocks(m)) == added
    assert source_map(name, old, old) == tuple(map(keep, range(old)))


def test_invalid_operators_raise_errors_that_name_them():
    with pytest.raises(UserError, match="growth='stak' is unknown: did you mean stack?"):
        source_map("stak", 2, 4)
    with pytest.raises(
        UserError, match="growth=stack copies existing blocks, but the model has none"
    ):
        source_map("stack", 0, 4)


def test_only_operators_that_copy_require_existing_blocks(monkeypatch):
    monkeypatch.setitem(growth.OPERATORS, "fresh_bottom", lambda old, new: (FRESH,) * new)
    assert source_map("fresh_bottom", 0, 2) == (FRESH, FRESH)
    for name in set(growth.OPERATORS) - {"random", "fresh_bottom"}:
        with pytest.raises(UserError, match="copies existing blocks"):
            source_map(name, 0, 2)


@pytest.mark.parametrize(
    "bad, said",
    [
        ((keep(0),), "the operator returned 1 sources"),
        ((keep(0), keep(0), FRESH), "source 1 of the operator must keep one block, only once"),
        ((keep(0), copy(2), FRESH), "source 1 of the operator uses a block that does not exist"),
        ((keep(0), keep(1), Source(keep=True)), "source 2 .* must keep one block"),
        ((keep(0), Source(mix=((1, 0.5),), keep=True), FRESH), "source 1 .* must keep"),
        ((keep(0), Source(mix=((1, 1.0),), fresh=0.1, keep=True), FRESH), "source 1 .* must keep"),
        (
            (keep(0), Source(mix=((1, 1.0),), zero_output=True, keep=True), FRESH),
            "source 1 .* must keep",
        ),
        ((keep(0), FRESH, FRESH), r"does not use old blocks \[1\]"),
    ],
)
def test_invalid_source_maps_raise_an_error(monkeypatch, bad, said):
    monkeypatch.setitem(growth.OPERATORS, "bad", lambda old, new: bad)
    with pytest.raises(UserError, match=f"growth=bad from 2 to 3 blocks: .*{said}"):
        source_map("bad", 2, 3)


# --- parameters


def random_model(n_blocks, seed=0, dtype=torch.float32):
    """Return a model with all parameters random, so that a wrong block or scale is detected."""
    model = GPT(MODEL, n_blocks=n_blocks).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model


def tensors(block):
    return {name: p.detach().clone() for name, p in block.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ("random", *COPYING))
@pytest.mark.parametrize("old, new", [(2, 4), (4, 7), (4, 5)])
def test_blocks_match_the_source_map(name, old, new):
    model = random_model(old)
    before, values = list(model.transformer.h), [tensors(b) for b in model.transformer.h]
    fresh = [tensors(b) for b in GPT(MODEL).transformer.h]  # as in a model with all blocks
    model.grow(source_map(name, old, new), seed=1337)
    assert model.n_blocks == new
    for i, (block, source) in enumerate(zip(model.transformer.h, source_map(name, old, new))):
        if source.keep:
            assert block is before[source.mix[0][0]]
        expected = fresh[i] if source == FRESH else values[source.mix[0][0]]
        for key, value in tensors(block).items():
            zero = source.zero_output and "c_proj" in key
            assert torch.equal(value, torch.zeros_like(value) if zero else expected[key])
        assert all(p.requires_grad for p in block.parameters())
    copies = {id(p) for b in model.transformer.h for p in b.parameters()}
    assert len(copies) == new * len(values[0])  # no two blocks share a parameter


def test_a_mix_is_a_weighted_sum():
    """Interpolate two blocks; scale a block down and add newly initialized weights."""
    model = random_model(2)
    a, b = (tensors(block) for block in model.transformer.h)
    fresh = tensors(GPT(MODEL).transformer.h[2])
    between = Source(mix=((0, 0.25), (1, 0.75)))
    model.grow((keep(0), keep(1), Source(mix=((1, 0.5),), fresh=0.1), between), seed=1337)
    for name, p in model.transformer.h[3].named_parameters():
        torch.testing.assert_close(p, 0.25 * a[name] + 0.75 * b[name])
    for name, p in model.transformer.h[2].named_parameters():
        torch.testing.assert_close(p, 0.5 * b[name] + 0.1 * fresh[name])


def test_zero_output_preserves_the_function():
    model = random_model(3, dtype=torch.float64)
    idx = torch.randint(320, (2, 32))
    before = model(idx)
    model.grow(source_map("zero_output", 3, 8), seed=0)
    assert torch.equal(model(idx), before) and before.abs().max() > 0.1
    stacked = random_model(3, dtype=torch.float64)
    stacked.grow(source_map("stack", 3, 8), seed=0)
    assert not torch.allclose(stacked(idx), before)


def test_a_new_block_in_the_middle_does_not_repeat_earlier_weights():
    model = GPT(MODEL, n_blocks=3)
    first = tensors(model.transformer.h[1])
    model.grow((keep(0), FRESH, keep(1), keep(2)), seed=1337)
    inserted = tensors(model.transformer.h[1])
    two = GPT(MODEL, n_blocks=2)
    two.grow((FRESH, keep(0), FRESH, keep(1)), seed=1337)
    assert not torch.equal(
        two.transformer.h[0].mlp.c_fc.weight, two.transformer.h[2].mlp.c_fc.weight
    )
    assert not torch.equal(inserted["mlp.c_fc.weight"], first["mlp.c_fc.weight"])
    other = GPT(MODEL, n_blocks=3)
    other.grow((keep(0), FRESH, keep(1), keep(2)), seed=1337)
    assert equal(tensors(other.transformer.h[1]), inserted)


# --- optimizer state


def trained(n_blocks, steps=3, config=None):
    """Return a model and its AdamW optimizer after `steps` steps."""
    config = config or Config(learning_rate=1e-2)
    model = GPT(MODEL, n_blocks=n_blocks)
    optimizer = train.make_optimizer(model, config)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, n=1):
    tokens = torch.randint(320, (n, 2, 33), generator=torch.Generator().manual_seed(7))
    batches = iter([(t[:, :-1], t[:, 1:]) for t in tokens])
    for _ in range(n):
        train.train_step(model, optimizer, batches, 1, autocast(CPU, "float32", 1))


def grow(model, optimizer, n_blocks, name, state):
    """Enter a phase with more blocks, as in the training loop."""
    (phase,) = make_schedule(n_blocks, 1).phases
    phase = dataclasses.replace(phase, growth=name, optimizer_state=state)
    return train.enter_phase(model, optimizer.state, phase, Config(learning_rate=1e-2))


@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("state", ["carry", "copy", "zero", "reset"])
def test_optimizer_state_is_carried_copied_or_reset(name, state):
    model, optimizer = trained(2)
    old = [dict(b.named_parameters()) for b in model.transformer.h]
    before = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
    optimizer = grow(model, optimizer, 4, name, state)
    for block, source in zip(model.transformer.h, source_map(name, 2, 4)):
        for key, p in block.named_parameters():
            now, origin = optimizer.state.get(p), before[old[source.mix[0][0]][key]]
            if source.keep:
                assert (now is None) if state == "reset" else equal(now, origin)
            elif state == "copy" and not (source.zero_output and ".c_proj." in key):
                assert equal(now, origin) and origin["step"] == 3
            elif state == "zero":
                assert now["step"] == 3 and not now["exp_avg"].any() and not now["exp_avg_sq"].any()
            else:
                assert now is None
    wte = optimizer.state.get(model.lm_head.weight)
    assert wte is None if state == "reset" else equal(wte, before[model.lm_head.weight])


def test_copied_state_is_a_copy():
    """The next step must not modify the source's state through shared memory."""
    model, optimizer = trained(2)
    optimizer = grow(model, optimizer, 4, "stack", "copy")
    a, b = (dict(model.transformer.h[i].named_parameters())["mlp.c_fc.weight"] for i in (0, 2))
    pointers = {optimizer.state[p][k].data_ptr() for p in (a, b) for k in ("exp_avg", "step")}
    assert len(pointers) == 4


def test_a_mix_of_blocks_mixes_their_state():
    model, optimizer = trained(2)
    a, b = (dict(block.named_parameters()) for block in model.transformer.h)
    model.grow((keep(0), Source(mix=((0, 0.5), (1, 0.5))), keep(1)), 0, optimizer.state)
    for name, p in model.transformer.h[1].named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            mean = (optimizer.state[a[name]][key] + optimizer.state[b[name]][key]) / 2
            torch.testing.assert_close(optimizer.state[p][key], mean)


def test_a_source_without_state_gives_no_state():
    model, optimizer = trained(2)
    for p in model.transformer.h[1].parameters():
        del optimizer.state[p]
    between = Source(mix=((0, 0.5), (1, 0.5)))
    model.grow((keep(0), copy(0), between, copy(1), keep(1)), 0, optimizer.state)
    has_state = [all(p in optimizer.state for p in b.parameters()) for b in model.transformer.h]
    assert has_state == [True, True, False, False, False]


def test_mixed_state_stays_valid():
    """Second moments stay nonnegative and step counts stay valid for any weights."""
    model, optimizer = trained(2)
    difference = Source(mix=((1, 2.0), (0, -1.0)))
    shrunk = Source(mix=((1, 0.1),), fresh=1.0)
    model.grow((keep(0), keep(1), difference, shrunk), 0, optimizer.state)
    for block in model.transformer.h[2:]:
        for p in block.parameters():
            assert (optimizer.state[p]["exp_avg_sq"] >= 0).all()
            assert optimizer.state[p]["step"] == 3
    optimizer = train.make_optimizer(model, Config(learning_rate=1e-2), optimizer.state)
    step(model, optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("state", ["carry", "copy", "zero", "reset"])
def test_new_parameters_train_and_their_first_update_is_not_inflated(name, state):
    """Some public implementations do not add new parameters to the optimizer, or reset Adam's step
    count but not exp_avg and exp_avg_sq, so that bias correction inflates the first updates."""
    model, optimizer = trained(2)
    optimizer = grow(model, optimizer, 4, name, state)
    before = [tensors(b) for b in model.transformer.h]
    step(model, optimizer)
    for block, old in zip(model.transformer.h, before):
        for key, p in block.named_parameters():
            change = (p - old[key]).abs().max().item()
            decay = 1e-2 * 0.1 * old[key].abs().max().item()
            # zero projections block the gradient to the earlier layers of their branch
            if key.split(".")[-2] == "c_proj" or name != "zero_output":
                assert change > 0, key
            assert change <= 1e-2 * 1.5 + decay, key  # lr, plus a margin for momentum


def test_the_first_update_of_new_parameters_has_the_size_of_the_learning_rate():
    """Without state, Adam's first update is the rate times the sign of the gradient. With moments
    of zero and the step count of the others, it is smaller, since bias correction has ended."""
    sizes = {}
    for state in ("carry", "zero", "reset"):
        model, optimizer = trained(2, steps=30, config=Config(learning_rate=1e-2, weight_decay=0))
        optimizer = grow(model, optimizer, 4, "stack", state)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        weight = model.transformer.h[3].mlp.c_fc.weight
        before = weight.detach().clone()
        step(model, optimizer)
        sizes[state] = (weight - before).abs().median().item()
    assert sizes["carry"] == pytest.approx(1e-2, rel=0.01)
    assert sizes["reset"] == pytest.approx(1e-2, rel=0.01)
    beta1, beta2, n = 0.9, 0.95, 31
    zero = (1 - beta1) / (1 - beta1**n) / math.sqrt((1 - beta2) / (1 - beta2**n))
    assert sizes["zero"] == pytest.approx(1e-2 * zero, rel=0.01) and zero < 0.5


# --- shrink and perturb


def test_shrink_and_perturb_is_the_published_formula():
    model = random_model(3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.shrink_and_perturb(0.4, 0.5, seed=1)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert torch.equal(p, before[name])
            continue
        noise = (p.detach() - 0.4 * before[name]) / 0.5
        std = 0.02 / math.sqrt(2 * MODEL.n_layer) if "c_proj" in name else 0.02
        assert noise.mean().abs() < 4 * std / math.sqrt(noise.numel())
        assert noise.std() == pytest.approx(std, rel=0.1)
    again = random_model(3)
    again.shrink_and_perturb(0.4, 0.5, seed=1)
    assert equal(tensors(again), tensors(model))
    other = random_model(3)
    other.shrink_and_perturb(0.4, 0.5, seed=2)
    assert not equal(tensors(other), tensors(model))


def test_shrink_and_perturb_happens_before_growth():
    """So that copies are copies of the shrunk and perturbed blocks."""
    model, optimizer = trained(2)
    weight = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    (phase,) = make_schedule(4, 1).phases
    phase = dataclasses.replace(phase, growth="stack", shrink=0.5, optimizer_state="reset")
    train.enter_phase(model, optimizer.state, phase, Config())
    for i in (1, 3):
        assert torch.equal(model.transformer.h[i].mlp.c_fc.weight, 0.5 * weight)
    train.enter_phase(model, {}, phase, Config(), begins=False)  # not again on resuming
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, 0.5 * weight)
