"""GPT-2 in one file, with methods to add blocks and to freeze any part of the model.

The structure and the parameter names follow nanoGPT (https://github.com/karpathy/nanoGPT), so
weights are interchangeable. These methods of `GPT` support stagewise training:

    grow(source_map, seed)              add blocks
    set_trainable(blocks, ...)          train exactly these parts (see also freeze and unfreeze)
    forward(..., residual_scales=...)   skip blocks, or scale their residual branches
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from growth import FRESH, Source
from stagewise.distributed import allocate, mesh_of, shard, shard_like
from stagewise.errors import UserError
from stagewise.fileio import convert
from stagewise.loss import ChunkedCrossEntropy, SoftmaxLoss, token_losses
from stagewise.seeding import derived_seed

# Backends of attention for inputs of many shapes. cuDNN's, the default on recent GPUs, builds an
# execution plan for each new shape, which takes far longer than the attention itself.
ATTENTION_OF_ANY_SHAPE = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class GPTConfig:
    """Configuration of the final model. In stagewise training, earlier stages have fewer blocks."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in GPT-2
    # Base depth of CompleteP (Dey et al. 2025, arXiv:2505.01618). If it is not 0, all residual
    # branches of a model with n blocks are scaled by base_depth / n, and their initial weights are
    # not scaled by depth.
    base_depth: int = 0


class LayerNorm(nn.Module):
    """Layer norm with an optional bias."""

    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, mask=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        # (B, nh, T, hs)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def gelu(x):
    """GELU with the tanh approximation, as in GPT-2."""
    if torch.compiler.is_compiling():  # the same function; exp compiles to faster code than tanh
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, residual_scale=None):
        """Scale both residual branches by `residual_scale`, a 0-dimensional tensor; None is 1."""
        attn = self.attn(self.ln_1(x), mask)
        x = x + (attn if residual_scale is None else residual_scale * attn)
        mlp = self.mlp(self.ln_2(x))
        x = x + (mlp if residual_scale is None else residual_scale * mlp)
        return x

    @torch.no_grad()
    def init_weights(self, config: GPTConfig, seed: int) -> None:
        """Initialize as GPT-2: N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            scaled = name.endswith("c_proj.weight") and not config.base_depth
            std = 0.02 / math.sqrt(2 * config.n_layer) if scaled else 0.02
            _init(p, name, std, generator)


def _compile(block):
    # Static shapes: a ramp has few context lengths, and specialized kernels are faster.
    block.compile(dynamic=False)


def _mix_state(states):
    """Return Adam's state for a weighted sum of parameters, given (state, weight) pairs.

    Second moments are summed with absolute weights, so that they stay nonnegative. The step count
    is the largest one.
    """
    mixed = {}
    for key in states[0][0]:
        if key == "step":
            mixed[key] = torch.stack([s[key] for s, _ in states]).amax(0)
        elif key == "exp_avg":
            mixed[key] = sum(w * s[key] for s, w in states)
        else:
            mixed[key] = sum(abs(w) * s[key] for s, w in states)
    return mixed


def _init(p, name, std, generator):
    if p.is_meta:
        return
    if p.dim() >= 2:  # sampled on the CPU, so that the weights do not depend on the device
        p.copy_(shard_like(torch.empty(p.shape).normal_(0.0, std, generator=generator), p))
    else:
        p.fill_(0.0 if name.endswith("bias") else 1.0)


class GPT(nn.Module):
    """GPT-2 with `n_blocks` of `config.n_layer` blocks (default: all), all parameters trainable.

    The initial weights depend only on `seed`, not on the device or on when a block is added. On
    device "meta" the model has shapes but no weights. With a `mesh`, every parameter is sharded
    over it; to run such a model, see `stagewise.distributed.fully_shard`.

    Raises:
        ValueError: if n_head does not divide n_embd.
    """

    def __init__(
        self,
        config: GPTConfig,
        n_blocks: int | None = None,
        seed: int = 1337,
        device="cpu",
        mesh=None,
    ):
        super().__init__()
        self.transformer: Any  # the entries of a ModuleDict have no static types
        self.lm_head: nn.Linear
        if config.n_embd % config.n_head:
            raise ValueError(f"n_head={config.n_head} does not divide n_embd={config.n_embd}")
        self.config = config
        with torch.device("meta"):
            self.transformer = nn.ModuleDict(
                dict(
                    wte=nn.Embedding(config.vocab_size, config.n_embd),
                    wpe=nn.Embedding(config.block_size, config.n_embd),
                    drop=nn.Dropout(config.dropout),
                    h=nn.ModuleList(),
                    ln_f=LayerNorm(config.n_embd, config.bias),
                )
            )
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        allocate(self, device, mesh)
        self.transformer.wte.weight = self.lm_head.weight
        self.softmax_loss = SoftmaxLoss()
        self._embeddings_train = self._head_trains = True
        self.blocks_compiled = False
        generator = torch.Generator().manual_seed(derived_seed("weights", seed, 0))
        with torch.no_grad():
            for name in ("wte", "wpe", "ln_f"):
                for kind, p in self.transformer[name].named_parameters():
                    _init(p, kind, 0.02, generator)
        self.grow((FRESH,) * (config.n_layer if n_blocks is None else n_blocks), seed)

    @classmethod
    def from_weights(
        cls,
        config: GPTConfig | dict[str, Any],
        weights: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
        mesh=None,
    ) -> "GPT":
        """Return a model with the state dict `weights`, which determines the number of blocks.

        With a `mesh`, the weights are full tensors, of which each rank keeps its shard.

        Raises:
            UserError: if the weights do not match `config`.
        """
        known = {f.name for f in fields(GPTConfig)}
        if isinstance(config, dict) and (unknown := sorted(config.keys() - known)):
            raise UserError(f"this version of the code has no models with {', '.join(unknown)}")
        try:
            n_blocks = len({name.split(".")[2] for name in weights if ".h." in name})
            model = cls(convert(config, GPTConfig), n_blocks=n_blocks, device="meta")
            allocate(model, device, mesh)
            model.transformer.wte.weight = model.lm_head.weight  # allocate unties them
            model.load_state_dict({name: shard(w, mesh) for name, w in weights.items()})
        except (ValueError, RuntimeError, ArithmeticError) as error:
            last_line = str(error).splitlines()[-1].strip()
            raise UserError(f"the weights do not fit the model's sizes: {last_line}") from None
        return model

    # --- forward

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        residual_scales: Sequence[float] | None = None,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        predict_at: torch.Tensor | None = None,
        n_vocab: int | None = None,
    ) -> torch.Tensor:
        """Return the logits (B, T, V) for token ids `idx` (B, T), or the loss given `targets`.

        The loss is the mean cross-entropy in nats against `targets` (B, T). See `hidden` for the
        other arguments.

        Args:
            predict_at: (M,), positions in the flattened batch. If given, `targets` is (M, K), and
                the result is (M, K): the cross-entropies of K targets at each position, without
                gradients.
            n_vocab: with `predict_at`, the size of the vocabulary without padding. If given, the
                padding has no probability.

        Raises:
            ValueError: if T > block_size.
        """
        x = self.hidden(idx, positions, mask, residual_scales)
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)
        if predict_at is not None:
            return token_losses(x[predict_at], self.lm_head.weight[:n_vocab], targets)
        targets = targets.flatten()
        if not torch.is_grad_enabled():
            return token_losses(x, self.lm_head.weight, targets[:, None]).mean()
        return ChunkedCrossEntropy.apply(x, self._head_weight(), targets, self.softmax_loss)

    def hidden(
        self,
        idx: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        residual_scales: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Return the hidden states (B, T, C) after the final layer norm, the input of `head`.

        Autograd records nothing below the lowest trainable part. With frozen embeddings, the frozen
        blocks at the bottom therefore store no activations.

        Args:
            positions: (B, T), position of each token in its text; default 0..T-1.
            mask: (B, 1, T, T), True where a token (row) attends to another (column); default
                causal.
            residual_scales: factor on both residual branches of each block. A block with factor 0
                is skipped. None runs all blocks unscaled.
        """
        T = idx.shape[1]
        if positions is None and self.config.block_size < T:
            raise ValueError(
                f"a sequence of {T} tokens is longer than block_size={self.config.block_size}"
            )
        wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
        if not self._embeddings_train:  # tied to the head, which may still be trainable
            wte = wte.detach()
        pos_emb = wpe[:T] if positions is None else F.embedding(positions, wpe)
        x = self.transformer.drop(F.embedding(idx, wte) + pos_emb)
        scales = [1.0] * self.n_blocks if residual_scales is None else residual_scales
        depth_scale = self.config.base_depth / max(1, self.n_blocks) or 1
        for block, scale in zip(self.transformer.h, scales, strict=True):
            if scale * depth_scale == 1:
                x = block(x, mask)
            elif scale != 0:  # a tensor: a compiled block would specialize on a Python float
                factor = torch.full((), scale * depth_scale, dtype=x.dtype, device=x.device)
                x = block(x, mask, factor)
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) for hidden states (..., C)."""
        return F.linear(x, self._head_weight())

    def _head_weight(self):
        return self.lm_head.weight if self._head_trains else self.lm_head.weight.detach()

    def compile_regions(self, whole: bool = False) -> None:
        """Compile each block, current and future, and the loss as separate regions.

        All blocks share a graph, so growing, freezing and skipping blocks do not recompile the
        model. whole=True instead compiles everything before the head as one region, which is faster
        for narrow models but needs a new graph in every phase.
        """
        # By default, Dynamo silently falls back to eager execution after 8 recompilations.
        torch._dynamo.config.recompile_limit = 1000
        self.softmax_loss.compile()
        if whole:
            self.hidden = torch.compile(self.hidden, dynamic=False)  # type: ignore[method-assign]
            return
        # By default, Dynamo cuts graphs at the bounds of DistributedDataParallel's buckets, so that
        # their reduction overlaps with the backward pass. With compiled blocks, it overlaps anyway.
        torch._dynamo.config.optimize_ddp = False
        self.blocks_compiled = True
        for block in self.transformer.h:
            _compile(block)

    # --- growing

    @property
    def n_blocks(self) -> int:
        """The current number of blocks."""
        return len(self.transformer.h)

    @torch.no_grad()
    def grow(
        self,
        source_map: Sequence[Source],
        seed: int,
        optimizer_state: dict[torch.Tensor, Any] | None = None,
    ) -> None:
        """Replace the blocks with those that `source_map` describes. New blocks are trainable.

        Kept blocks keep their parameter objects, so their optimizer state stays valid. New weights
        are sampled from a generator seeded with (seed, position): a block added on top gets the
        weights that it would have in a model created with all its blocks.

        Args:
            source_map: the source of each block of the grown model, bottom first; see
                `growth.Source`.
            optimizer_state: an optimizer's ``state``. If given, each new parameter gets the same
                mix of its sources' state, including Adam's step count. Otherwise, new parameters
                have no state, and the optimizer initializes it to zero.

        Raises:
            ValueError: if there are more than config.n_layer sources.
        """
        if len(source_map) > self.config.n_layer:
            raise ValueError(f"cannot grow to {len(source_map)} of {self.config.n_layer} blocks")
        old = list(self.transformer.h)
        blocks = []
        for i, source in enumerate(source_map):
            if source.keep:
                blocks.append(old[source.mix[0][0]])
                continue
            # A block inserted in the middle must not get the initial weights of an earlier block at
            # the same position.
            parts = (1 + i,) if i >= len(old) else (1 + i, len(source_map))
            blocks.append(self._new_block())
            if source.fresh:
                blocks[i].init_weights(self.config, derived_seed("weights", seed, *parts))
            self._fill(blocks[i], old, source, optimizer_state)
        self.transformer.h = nn.ModuleList(blocks).train(self.training)

    def _new_block(self):
        weight = self.lm_head.weight
        with torch.device("meta"):
            block = Block(self.config).to(weight.dtype)
        allocate(block, weight.device, mesh_of(weight))
        if self.blocks_compiled:
            _compile(block)
        return block

    def _fill(self, block, old, source, optimizer_state):
        """Set the tensors of a block as `source` describes.

        If `source.fresh` is nonzero, the block must hold newly initialized tensors.
        """
        olds = [(dict(old[i].named_parameters()), weight) for i, weight in source.mix]
        for name, p in block.named_parameters():
            if source.zero_output and ".c_proj." in name:
                p.zero_()
                continue
            p.mul_(source.fresh) if source.fresh else p.zero_()
            for params, weight in olds:
                p.add_(params[name], alpha=weight)
            if optimizer_state is not None and olds:
                states = [(optimizer_state.get(params[name]), weight) for params, weight in olds]
                if all(state for state, _ in states):
                    optimizer_state[p] = _mix_state(states)

    @torch.no_grad()
    def shrink_and_perturb(self, shrink: float, perturb: float, seed: int) -> None:
        """Replace each weight by ``shrink * weight + perturb * initial weight``.

        The initial weights are those of a new model with another seed, which is derived from `seed`
        and the number of blocks. Biases and norms stay as they are (Ash & Adams 2020,
        arXiv:1910.08475; for growth, Mallik et al. 2024, arXiv:2411.07340).
        """
        new_seed = derived_seed("perturb", seed, self.n_blocks)
        initial = GPT(self.config, self.n_blocks, new_seed, mesh=mesh_of(self.lm_head.weight))
        for p, other in zip(self.parameters(), initial.parameters(), strict=True):
            if p.dim() >= 2:
                p.mul_(shrink).add_(other.to(p.device, p.dtype), alpha=perturb)

    # --- freezing

    def freeze(
        self, blocks: Iterable[int] = (), embeddings: bool = False, ln_f=False, head: bool = False
    ) -> None:
        """Freeze the given parts.

        The embeddings are wte and wpe as inputs; the head is wte as the output projection. The two
        share the tensor wte, which is frozen only if both are.
        """
        self._set_requires_grad(False, blocks, embeddings, ln_f, head)

    def unfreeze(
        self, blocks: Iterable[int] = (), embeddings: bool = False, ln_f=False, head: bool = False
    ) -> None:
        """Unfreeze the given parts."""
        self._set_requires_grad(True, blocks, embeddings, ln_f, head)

    def _set_requires_grad(self, flag, blocks, embeddings, ln_f, head):
        for i in blocks:
            self.transformer.h[i].requires_grad_(flag)
        if embeddings:
            self._embeddings_train = flag
        if head:
            self._head_trains = flag
        if ln_f:
            self.transformer.ln_f.requires_grad_(flag)
        self.transformer.wpe.weight.requires_grad_(self._embeddings_train)
        self.lm_head.weight.requires_grad_(self._embeddings_train or self._head_trains)

    def set_trainable(
        self, blocks: Iterable[int], embeddings: bool = True, head: bool = True
    ) -> None:
        """Make the given blocks and parts and the final layer norm trainable, and nothing else."""
        self.freeze(range(self.n_blocks), embeddings=True, head=True)
        self.unfreeze(blocks, embeddings=embeddings, ln_f=True, head=head)

    def trainable(self) -> dict:
        """Return what is trainable: {"blocks": [bool, ...], "embeddings", "ln_f", "head": bool}."""
        return {
            "blocks": [block.ln_1.weight.requires_grad for block in self.transformer.h],
            "embeddings": self._embeddings_train,
            "ln_f": self.transformer.ln_f.weight.requires_grad,
            "head": self._head_trains,
        }

    def num_params(self, trainable_only: bool = False) -> int:
        """Return the current number of parameters, counting the tied weights once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def param_groups(self, weight_decay: float, per_block: bool = False) -> list[dict]:
        """Return parameter groups for AdamW. Only tensors with 2 or more dimensions are decayed.

        Args:
            per_block: give each block groups of its own, so that learning rates may differ. Their
                key "block" is its position, or None for the parameters outside of the blocks.
        """
        parts: list[tuple[int | None, list]] = [(None, list(self.parameters()))]
        if per_block:
            blocks = list(self.transformer.h)
            inside = {p for block in blocks for p in block.parameters()}
            parts = [(None, [p for p in self.parameters() if p not in inside])]
            parts += [(i, list(block.parameters())) for i, block in enumerate(blocks)]
        groups = []
        for block, params in parts:
            for decayed in (True, False):
                chosen = [p for p in params if (p.dim() >= 2) == decayed]
                decay = weight_decay if decayed else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "block": block})
        return groups

    # --- sampling

    @torch.no_grad()
    @sdpa_kernel(ATTENTION_OF_ANY_SHAPE)
    def generate(
        self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, generator=None
    ) -> torch.Tensor:
        """Append `max_new_tokens` sampled tokens to `idx` (B, T); return (B, T + max_new_tokens).

        Args:
            temperature: divides the logits; 0 selects the most likely token.
            top_k: sample only from the k most likely tokens.
            n_vocab: size of the tokenizer's vocabulary, so that padding ids are never sampled.
        """
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size :])[:, -1]
            logits = self.head(x)[:, :n_vocab].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                probs = F.softmax(logits / temperature, -1)
                token = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx
