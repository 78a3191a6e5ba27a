"""Tests of the model: against transformers' GPT-2, growth, and freezing."""

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from conftest import TINY, needs_gpu, set_trainable
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import train
from growth import FRESH, keep, source_map
from model import GPT, GPTConfig
from schedule import make_schedule
from stagewise import loss as losses
from stagewise.config import Config
from stagewise.device import autocast
from stagewise.errors import UserError
from stagewise.hf import from_hf
from stagewise.seeding import derived_seed, derived_uniform

SHAPE = GPTConfig(**TINY)
CPU = torch.device("cpu")


def weights(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


# --- against transformers


@pytest.fixture(scope="module")
def hf():
    """Return a small transformers GPT-2 with random weights and biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=301,
        n_positions=64,
        n_embd=48,
        n_layer=3,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        # Large weights, so that a wrong activation or scale is detected.
        torch.nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_logits_and_loss_match_transformers(hf, dtype, tolerance):
    ours = GPT(GPTConfig(block_size=64, vocab_size=301, n_layer=3, n_head=4, n_embd=48)).to(dtype)
    ours.load_state_dict(from_hf(hf.state_dict()))
    theirs = hf.to(dtype)
    idx = torch.randint(301, (2, 64), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx, labels=idx)
    assert expected.logits.abs().max() > 1
    torch.testing.assert_close(ours(idx), expected.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        ours(idx[:, :-1], idx[:, 1:]).float(), expected.loss.float()
    )  # theirs is float32


def test_gradients_match_transformers(hf):
    ours = GPT(GPTConfig(block_size=64, vocab_size=301, n_layer=3, n_head=4, n_embd=48)).double()
    ours.load_state_dict(from_hf(hf.state_dict()))
    theirs = hf.double()
    theirs.zero_grad()
    idx = torch.randint(301, (2, 64), generator=torch.Generator().manual_seed(1))
    ours(idx[:, :-1], idx[:, 1:]).backward()
    logits = theirs(idx[:, :-1]).logits  # their own loss would be computed in float32
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        name = "transformer.wte.weight" if name == "lm_head.weight" else name
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chunks", [1, 3, 50])
def test_the_chunked_loss_matches_the_full_loss(monkeypatch, frozen, chunks):
    """Compare value and scaled gradients with those of unchunked logits in fp64."""
    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 320 * -(-50 // chunks))
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(n, 32, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (50, 320)
    )
    targets = torch.randint(320, (50,), generator=generator)
    head = weight.detach() if frozen else weight

    def loss_and_gradients(loss):
        x.grad = weight.grad = None
        (3 * loss).backward()
        return loss.detach(), x.grad, weight.grad

    shapes = []
    softmax_loss = losses.SoftmaxLoss()
    softmax_loss.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[0]))
    ours = loss_and_gradients(losses.ChunkedCrossEntropy.apply(x, head, targets, softmax_loss))
    plain = loss_and_gradients(F.cross_entropy(x @ head.T, targets))
    assert sum(shapes) == 50 and max(shapes) == -(-50 // chunks)
    for a, b in zip(ours, plain):
        assert a is b is None or torch.allclose(a, b, rtol=1e-12, atol=1e-15)
    assert (ours[2] is None) == frozen
    with torch.autocast("cpu", dtype=torch.bfloat16):  # products in bf16, the loss not
        rounded = losses.ChunkedCrossEntropy.apply(x.float(), head.float(), targets, softmax_loss)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(
        plain[0].item(), rel=2e-3
    )


def test_a_step_never_materializes_all_logits(monkeypatch):
    """Memory for vocabulary-sized tensors does not grow with the number of rows."""

    def peak(T):
        model = GPT(GPTConfig(block_size=T, vocab_size=16384, n_layer=1, n_head=1, n_embd=8))
        model.freeze(
            embeddings=True, head=True
        )  # the gradient of the weights would be the larger part
        return peak_bytes(model, torch.zeros(1, T, dtype=torch.long))

    monkeypatch.setitem(losses.LOGITS_BYTES, "cpu", 4 * 16384 * 16)
    assert peak(256) - peak(16) < 0.05 * (256 - 16) * 16384 * 4  # peak(16) is that of one chunk


@pytest.mark.parametrize(
    "kind, n_rows, n_chunks",
    [
        ("cpu", 49_000, 5),
        ("cuda", 16 * 1024, 1),
        ("cuda", 12 * 1024, 1),
        ("cuda", 64 * 1024, 4),
        ("cuda", 96 * 1024, 8),  # not 6, with smaller last chunks for other micro-batches
        ("cuda", 100 * 1024, 8),
    ],
)
def test_chunks_of_the_loss_are_equal_and_fit_into_the_limit(kind, n_rows, n_chunks):
    limit = losses.LOGITS_BYTES["cuda"] if kind == "cuda" else 4 * 50304 * 9_800
    size = losses.chunk_size(n_rows, 50304, limit, kind)
    assert size * n_chunks == n_rows and 4 * 50304 * size <= limit


def test_parameter_names_and_counts_match_gpt2():
    model = GPT(GPTConfig(vocab_size=50257), device="meta")
    assert model.num_params() == 124_439_808
    assert (
        GPT(
            GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600), device="meta"
        ).num_params()
        == 1_557_611_200
    )
    names = {n.replace(".11.", ".N.") for n in model.state_dict() if ".h." not in n or ".11." in n}
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    expected = {
        f"transformer.h.N.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")
    }
    assert names == expected | {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "lm_head.weight",
    } | {f"transformer.ln_f.{kind}" for kind in ("weight", "bias")}


def test_attention_is_causal():
    model = GPT(SHAPE)
    idx = torch.randint(320, (1, 64))
    changed = idx.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 320
    a, b = model(idx), model(changed)
    torch.testing.assert_close(a[:, :20], b[:, :20])
    assert not torch.allclose(a[:, 20:], b[:, 20:])


# --- initial weights and growth


def test_initial_weights_match_gpt2_with_residual_projections_scaled_for_the_final_depth():
    model = GPT(
        GPTConfig(block_size=64, vocab_size=320, n_layer=8, n_head=4, n_embd=128), n_blocks=2
    )
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(
                p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)
            ), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < expected / 30, name


def test_a_grown_model_has_the_weights_of_one_created_at_full_depth():
    whole, grown = GPT(SHAPE, seed=5), GPT(SHAPE, n_blocks=1, seed=5)
    torch.manual_seed(99)  # growth does not read the global random state, nor change it
    state = torch.get_rng_state()
    grown.grow(source_map("random", grown.n_blocks, 3), seed=5)
    grown.grow(source_map("random", grown.n_blocks, 4), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, weights(grown)[name]) for name, w in weights(whole).items())
    other = weights(GPT(SHAPE, seed=6))
    assert not torch.equal(
        other["transformer.h.3.mlp.c_fc.weight"], weights(whole)["transformer.h.3.mlp.c_fc.weight"]
    )


def test_blocks_and_embeddings_differ_from_each_other():
    w = weights(GPT(SHAPE))
    matrices = [w[f"transformer.h.{i}.attn.c_attn.weight"].flatten()[:1000] for i in range(4)] + [
        w["lm_head.weight"].flatten()[:1000]
    ]
    correlations = torch.corrcoef(torch.stack(matrices)) - torch.eye(5)
    assert correlations.abs().max() < 0.2


def test_seeds_of_different_streams_differ():
    """numpy's SeedSequence drops trailing zeros: (7, 3) and (7, 3, 0) would be one stream."""
    seeds = [
        derived_seed("weights", 7, 3),
        derived_seed("weights", 7, 3, 0),
        derived_seed("dropout", 7, 3),
    ]
    seeds += [derived_seed("dropout", 7, step, rank) for step in range(4) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    uniform = derived_uniform(1000, "skip", 7, 3)
    assert all(0 <= u < 1 for u in uniform) and abs(sum(uniform) / 1000 - 0.5) < 0.05


def test_growth_keeps_existing_parameters_and_rejects_too_many_blocks():
    model = GPT(SHAPE, n_blocks=2)
    before, values = list(model.parameters()), weights(model)
    model.eval()
    model.grow(source_map("random", 2, 4), seed=0)
    assert all(any(p is q for q in model.parameters()) for p in before)
    assert all(torch.equal(values[name], weights(model)[name]) for name in values)
    assert not any(m.training for m in model.modules())
    with pytest.raises(ValueError, match="cannot grow to 5 of 4 blocks"):
        model.grow((keep(0), keep(1), keep(2), keep(3), FRESH), seed=0)


def test_from_weights_infers_the_number_of_blocks():
    for n_blocks in (0, 3):
        model = GPT(SHAPE, n_blocks=n_blocks, seed=9)
        again = GPT.from_weights(dataclasses.asdict(SHAPE), weights(model))
        assert again.n_blocks == n_blocks and again.config == SHAPE
        assert all(torch.equal(w, weights(again)[name]) for name, w in weights(model).items())
        assert again.transformer.wte.weight is again.lm_head.weight
    with pytest.raises(UserError, match="do not fit the model's sizes: .*ln_f.bias"):
        GPT.from_weights(SHAPE, {n: w for n, w in weights(model).items() if "ln_f.bias" not in n})
    with pytest.raises(UserError, match="do not fit the model's sizes: n_embd: expected `int`"):
        GPT.from_weights(dataclasses.asdict(SHAPE) | {"n_embd": "x"}, weights(model))
    with pytest.raises(UserError, match="has no models with rope"):
        GPT.from_weights(dataclasses.asdict(SHAPE) | {"rope": True}, weights(model))


# --- skipping


def test_skipped_and_scaled_blocks():
    """A block with factor 0 is skipped and gets no gradient; other factors scale both branches."""
    model = GPT(SHAPE).double()
    idx = torch.randint(320, (2, 32))
    assert torch.equal(model(idx, residual_scales=(1, 1, 1, 1)), model(idx))
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:32]
    for block, scale in zip(model.transformer.h, (1, 0, 2, 0)):
        x = x + scale * block.attn(block.ln_1(x))
        x = x + scale * block.mlp(block.ln_2(x))
    expected = model.lm_head(model.transformer.ln_f(x))
    torch.testing.assert_close(model(idx, residual_scales=(1, 0, 2.0, 0)), expected)
    model(idx, idx, (1, 0, 2.0, 0)).backward()
    has_gradient = [all(p.grad is not None for p in b.parameters()) for b in model.transformer.h]
    assert has_gradient == [True, False, True, False]
    assert all(p.grad is None for p in model.transformer.h[1].parameters())
    with pytest.raises(ValueError):
        model(idx, residual_scales=(1, 1))


# --- freezing


def last_phase_1(n_layer, phase1="paper"):
    """Return the phase in which only the last block trains."""
    phases = make_schedule(n_layer, 64, n_layer, phase1=phase1).phases
    return next(p for p in phases if p.stage == n_layer and p.kind == "new_blocks")


def phase_1_model(phase1="paper"):
    """Return a model with four blocks, of which only the last trains."""
    model = GPT(SHAPE)
    set_trainable(model, last_phase_1(4, phase1))
    return model


def test_trainable_parameters_match_the_phase():
    model = phase_1_model()
    assert model.trainable() == {
        "blocks": [False, False, False, True],
        "embeddings": False,
        "ln_f": True,
        "head": False,
    }
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".h.3." in n or "ln_f" in n}
    assert model.num_params(trainable_only=True) == sum(
        p.numel() for n, p in model.named_parameters() if n in trained
    )
    set_trainable(model, make_schedule(4, 64).phases[0])
    assert model.num_params(trainable_only=True) == model.num_params()


def test_embeddings_and_head_freeze_separately():
    """They share a tensor; if one is frozen, the tensor gets only the gradient of the other."""
    idx = torch.randint(320, (2, 32))

    def gradient(**frozen):
        model = GPT(SHAPE).double()
        model.freeze(**frozen)
        model(idx, idx).backward()
        return model.lm_head.weight.grad, model.transformer.wpe.weight.grad

    both, _ = gradient()
    head_only, wpe = gradient(embeddings=True)
    embeddings_only, _ = gradient(head=True)
    assert wpe is None and gradient(embeddings=True, head=True) == (None, None)
    assert head_only.norm() > 0 and embeddings_only.norm() > 0
    torch.testing.assert_close(head_only + embeddings_only, both)


def test_freezing_does_not_change_the_remaining_gradients():
    idx = torch.randint(320, (2, 32))
    frozen, whole = phase_1_model(), GPT(SHAPE)
    frozen(idx, idx).backward()
    whole(idx, idx).backward()
    for p, q in zip(frozen.parameters(), whole.parameters()):
        assert torch.equal(p.grad, q.grad) if p.requires_grad else p.grad is None


def graph_leaves(loss):
    """Return the parameters reachable in the autograd graph of a loss, and its number of nodes."""
    seen, queue, leaves = set(), [loss.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        queue.extend(n for n, _ in node.next_functions)
    return leaves, len(seen)


def test_frozen_lower_blocks_build_no_graph():
    idx = torch.randint(320, (2, 32))
    model = phase_1_model()
    assert not model.transformer.h[2](model.transformer.h[1](torch.randn(2, 32, 32))).requires_grad
    leaves, nodes = graph_leaves(model(idx, idx))
    assert leaves == {id(p) for p in model.parameters() if p.requires_grad}
    one_block = GPT(
        GPTConfig(**TINY | {"n_layer": 1})
    )  # the graph is that of a model of one block, less the embedding
    one_block.freeze(embeddings=True, head=True)
    assert nodes == graph_leaves(one_block(idx, idx))[1]
    assert (
        graph_leaves(phase_1_model("released_code")(idx, idx))[1] > 2 * nodes
    )  # the released code's reading goes through all blocks


class LiveBytes(TorchDispatchMode):
    """Tracks the peak bytes of tensors created in this mode, not counting parameters."""

    def __init__(self, model):
        super().__init__()
        self.live = self.peak = 0
        self.storages = weakref.WeakSet(p.untyped_storage() for p in model.parameters())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.storages and storage.nbytes():
                    self.storages.add(storage)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, nbytes):
        self.live -= nbytes


def peak_bytes(model, idx=None):
    gc.collect()
    idx = torch.randint(320, (8, 32)) if idx is None else idx
    with LiveBytes(model) as bytes_:
        model(idx, idx).backward()
    return bytes_.peak


def test_frozen_lower_blocks_store_no_activations():
    """Peak memory of a step does not grow with the number of frozen blocks, unless embeddings
    train."""

    def peak(n_layer, phase1):
        shape = GPTConfig(**TINY | {"n_layer": n_layer})
        model = GPT(shape)
        set_trainable(model, last_phase_1(n_layer, phase1))
        return peak_bytes(model)

    per_block = peak_bytes(GPT(GPTConfig(**TINY | {"n_layer": 3}))) - peak_bytes(
        GPT(GPTConfig(**TINY | {"n_layer": 2}))
    )
    assert peak(8, "paper") - peak(2, "paper") < 0.1 * per_block
    assert peak(8, "released_code") - peak(2, "released_code") > 3 * per_block


@pytest.mark.gpu
@needs_gpu
def test_frozen_lower_blocks_store_no_activations_on_the_gpu():
    def peak(frozen):
        model = GPT(GPTConfig(vocab_size=1024, n_layer=12, block_size=512), device="cuda")
        if frozen:
            model.freeze(range(11), embeddings=True, head=True)
        idx = torch.randint(1024, (8, 512), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(idx, idx).backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(frozen=True) < 0.3 * peak(frozen=False)


# --- sampling and invalid input


def test_generate_is_greedy_at_temperature_0_and_never_samples_padding():
    model = GPT(SHAPE).eval()
    idx = torch.randint(300, (2, 5))
    out = model.generate(
        idx, 70, temperature=0, n_vocab=300
    )  # beyond block_size: the window slides
    assert out.shape == (2, 75) and torch.equal(out[:, :5], idx)
    for t in range(5, 75):
        logits = model(out[:, max(0, t - 64) : t])[:, -1, :300]
        assert torch.equal(logits.argmax(-1), out[:, t])
    torch.nn.init.constant_(model.lm_head.weight[300:], 10.0)
    drawn = model.generate(
        idx, 30, top_k=50, n_vocab=300, generator=torch.Generator().manual_seed(0)
    )
    assert drawn.max() < 300


def test_too_long_sequences_and_invalid_head_counts_raise_errors():
    with pytest.raises(ValueError, match="block_size=64"):
        GPT(SHAPE)(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="n_head=5"):
        GPT(GPTConfig(n_head=5, n_embd=32))


# --- CompleteP


def changes(base_depth, depths, steps=10):
    """Return how much training changes the output of the last block (RMS), by depth."""
    result = []
    data = torch.randint(257, (steps + 1, 8, 65), generator=torch.Generator().manual_seed(0))
    for depth in depths:
        config = GPTConfig(64, 320, depth, 2, 64, base_depth=base_depth)
        model, outputs = GPT(config, seed=1), list[torch.Tensor]()
        options = Config(learning_rate=1e-2, base_depth=base_depth, weight_decay=0.0)
        optimizer = train.make_optimizer(model, options)
        keep_output = functools.partial(lambda to, block, x, y: to.append(y.detach()), outputs)
        model.transformer.h[-1].register_forward_hook(keep_output)
        model(data[-1][:, :-1])
        batches = iter([(tokens[:, :-1], tokens[:, 1:]) for tokens in data])
        for _ in range(steps):
            train.train_step(model, optimizer, batches, 1, autocast(CPU, "float32", 64))
        model(data[-1][:, :-1])
        result.append((outputs[-1] - outputs[0]).square().mean().sqrt().item())
    return result


def test_completep_makes_updates_of_the_same_size_at_all_depths():
    """A coordinate check at one learning rate for all depths (arXiv:2505.01618, figure 2)."""
    depths = (2, 6, 12, 24)
    completep, plain = changes(2, depths), changes(0, depths)
    assert max(completep) / min(completep) < 2
    assert plain[-1] / plain[0] > 3


def test_completep_is_that_of_the_published_code():
    """EleutherAI/nanoGPT-mup 6f8bc3b, branch completep, with depth_alpha_exp = 1: residual branches
    scaled by base_depth / n_layer, initial weights not scaled by depth, eps scaled likewise."""
    config = GPTConfig(64, 320, 6, 2, 64, base_depth=2)
    model, plain = GPT(config), GPT(dataclasses.replace(config, base_depth=0))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(model.state_dict()[name])
    idx = torch.randint(320, (2, 64))
    torch.testing.assert_close(model(idx), plain(idx, residual_scales=[1 / 3] * 6))
    scales = [1.0, 0.0, 1.0, 2.0, 1.0, 1.0]
    expected = plain(idx, residual_scales=[s / 3 for s in scales])
    torch.testing.assert_close(model(idx, residual_scales=scales), expected)
    assert model.transformer.h[3].mlp.c_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    optimizer = train.make_optimizer(model, Config(base_depth=2))
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8 / 3}


def test_completep_without_blocks():
    model = GPT(GPTConfig(64, 320, 6, 2, 64, base_depth=2), n_blocks=0)
    assert model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 320)


def test_parameter_groups_of_blocks_contain_all_parameters():
    model = GPT(GPTConfig(64, 320, 3, 2, 64))
    groups = model.param_groups(0.1, per_block=True)
    params = [p for group in groups for p in group["params"]]
    assert len(params) == len(set(params)) and set(params) == set(model.parameters())
    for group in groups:
        block = group["block"]
        inside = set() if block is None else set(model.transformer.h[block].parameters())
        assert all((p in inside) == (block is not None) for p in group["params"])
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
