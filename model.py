"""GPT-2 in one file, with hooks to grow it block by block and to freeze any part of it.

Structure and parameter names are those of nanoGPT (https://github.com/karpathy/nanoGPT), so weights move between the two;
`from_hf` and `to_hf` translate Hugging Face's. The hooks of stagewise training, on GPT:

    grow(n_blocks, seed)            append blocks, initialised by a growth operator
    freeze(...), unfreeze(...)      any range of blocks, the embeddings, the final norm, the head
    trainable()                     what trains now
    num_params(), flops_per_token() its size and its cost
"""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

import schedule


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the finished model; `n_layer` is the final depth L, a growing model has fewer blocks until then."""

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded up to a multiple of 64 for faster matrix products
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as GPT-2 has


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
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def gelu(x):
    """GELU in the tanh approximation, GPT-2's own."""
    if torch.compiler.is_compiling():  # the same function; compilers make more of exp than of tanh
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

    def forward(self, x, mask=None):
        x = x + self.attn(self.ln_1(x), mask)
        x = x + self.mlp(self.ln_2(x))
        return x


# ---------------------------------------------------------------------------------------------------------------------
# the head and its loss, the one place where tensors as wide as the vocabulary exist

# Logits that exist at once, in bytes of fp32. In training every part adds to the whole weight gradient, so that small parts
# cost. Measured on a CPU; the sizes for a GPU are a choice, not a measurement.
LOGITS_BYTES = {"cpu": 192 * 2**20, "cuda": 2 * 2**30}
LOGITS_BYTES_EVAL = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}


def _part_size(n_rows, n_vocab, limit):
    """Rows in each of the fewest equal parts of `n_rows` rows whose logits keep within `limit` bytes."""
    n_parts = max(1, math.ceil(4 * n_rows * n_vocab / limit))
    return math.ceil(n_rows / n_parts)


class SoftmaxLoss(nn.Module):
    """Cross entropy of logits (N, V), summed, in nats; and its gradient (N, V), of the logits' dtype.

    A module, so that it can be compiled by itself, without a tensor of fp32 logits.
    """

    def forward(self, logits, targets):
        log_p = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
        of_target = log_p.gather(1, targets[:, None])
        gradient = log_p.exp_().to(logits.dtype)  # softmax - 1 at the target, softmax elsewhere
        gradient.scatter_(1, targets[:, None], of_target.expm1().to(logits.dtype))
        return -of_target.sum(), gradient


def _product_into(out, a, b, add=False):
    """out = a @ b, or out += a @ b, for an `out` of a and b's dtype or a wider one."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        out.add_(a @ b) if add else out.copy_(a @ b)


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross entropy (a scalar) of the logits x @ weight.T, in parts that never exist together.

    x (N, C), weight (V, C), targets (N,). The gradients are computed in the forward pass, while a part's logits are there;
    the backward pass scales them. Products are made in autocast's dtype where that is on, sums in fp32. Nothing is
    computed that does not require a gradient: a frozen head costs two of the three products.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softmax_loss):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            size = _part_size(len(x), len(weight), LOGITS_BYTES[kind])
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                x_part = x[rows].to(dtype)
                part_loss, gradient = softmax_loss(x_part @ w.T, targets[rows])
                loss += part_loss
                if dx is not None:
                    _product_into(dx[rows], gradient, w)
                if dw is not None:
                    _product_into(dw, gradient.T, x_part, add=True)
        ctx.save_for_backward(dx, dw)
        ctx.N = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        scale = grad / ctx.N
        dx, dw = (None if d is None else d.mul_(scale) for d in ctx.saved_tensors)
        return dx, dw, None, None


@torch.no_grad()
def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy (N, K) in nats of each row of the logits x @ weight.T with each of its targets (N, K), for evaluation.

    Dtypes, and parts that never exist together, as in LinearCrossEntropy.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    size = _part_size(len(x), len(weight), LOGITS_BYTES_EVAL[kind])
    # Reused by all parts: on the CPU, memory that is new each time costs a fifth of the head's time in page faults.
    wide = torch.promote_types(x.dtype, torch.float32)
    logits, log_p = (torch.empty(size, len(weight), dtype=wide, device=x.device) for _ in range(2))
    losses = []
    with torch.autocast(kind, enabled=False):
        w = weight.to(dtype)
        for x_part, targets_part in zip(x.to(dtype).split(size), targets.split(size)):
            n = len(x_part)
            _product_into(logits[:n], x_part, w.T)
            torch.log_softmax(logits[:n], -1, out=log_p[:n])
            losses.append(-log_p[:n].gather(1, targets_part))
    return torch.cat(losses)


# ---------------------------------------------------------------------------------------------------------------------
# growth operators: functions (model, i, seed) that fill block i of a model that has the blocks below it


def random_init(model: "GPT", i: int, seed: int) -> None:
    """The paper's new blocks: GPT-2's N(0, 0.02), the residual projections scaled by 1/sqrt(2L) for the FINAL depth L.

    Block i gets the same weights in a model grown to it as in one built whole, on any device and any number of
    processes: they depend on (seed, i) alone.
    """
    generator = _generator(seed, 1 + i)
    for name, p in model.transformer.h[i].named_parameters():
        std = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj.weight") else 0.02
        _init(p, name, std, generator)


def derived_seed(stream: str, *parts: int) -> int:
    """A 32-bit seed for one of many independent streams of random numbers, such as ("weights", seed, block).

    The name and the number of parts are hashed too: numpy's SeedSequence treats (a, b) and (a, b, 0) alike.
    """
    return int(np.random.SeedSequence([zlib.crc32(stream.encode()), len(parts), *parts]).generate_state(1)[0])


def _generator(seed, part):
    """Random numbers for one part of the model: 0 the embeddings, 1 + i block i."""
    return torch.Generator().manual_seed(derived_seed("weights", seed, part))


@torch.no_grad()
def _init(p, name, std, generator):
    if p.is_meta:
        return
    if p.dim() >= 2:
        p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))  # drawn on the CPU, whatever p's device
    else:
        p.fill_(0.0 if name.endswith("bias") else 1.0)


# ---------------------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """GPT-2 with `n_blocks` of its `config.n_layer` blocks (default: all), everything trainable.

    Weights come from `seed` alone, see `random_init`. On device "meta" the model has shapes but no weights.
    Raises ValueError where n_head does not divide n_embd.
    """

    def __init__(self, config: GPTConfig, n_blocks: int | None = None, seed: int = 1337, device="cpu"):
        super().__init__()
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
        self.to_empty(device=device)
        self.transformer.wte.weight = self.lm_head.weight
        self.softmax_loss = SoftmaxLoss()
        self._embeddings_train = self._head_trains = True
        self._compile_new_blocks = False
        generator = _generator(seed, 0)
        for name in ("wte", "wpe", "ln_f"):
            for kind, p in self.transformer[name].named_parameters():
                _init(p, kind, 0.02, generator)
        self.grow(config.n_layer if n_blocks is None else n_blocks, seed)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, T, V) of token ids `idx` (B, T); with `targets` (B, T), their mean cross entropy in nats instead.

        Raises ValueError where T > block_size.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        if not torch.is_grad_enabled():
            return token_losses(x, self.lm_head.weight, targets[:, None]).mean()
        return LinearCrossEntropy.apply(x, self._head_weight(), targets, self.softmax_loss)

    def hidden(self, idx: torch.Tensor, positions: torch.Tensor | None = None, mask: torch.Tensor | None = None) -> torch.Tensor:
        """States (B, T, C) after the final norm, the input of `head`.

        positions (B, T), mask (B, 1, T, T): the place of every token in its text, and which tokens (True) a row's token sees,
        itself among them, where a row holds several texts; by default 0..T-1 and all tokens up to its own.

        Below the first part that trains nothing requires gradients, so autograd records nothing there: a frozen trunk
        under frozen embeddings keeps no activations.
        """
        B, T = idx.shape
        if positions is None and T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than block_size={self.config.block_size}")
        wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
        if not self._embeddings_train:  # the tensor is the head's too, which may train by itself
            wte = wte.detach()
        x = self.transformer.drop(F.embedding(idx, wte) + (wpe[:T] if positions is None else F.embedding(positions, wpe)))
        for block in self.transformer.h:
            x = block(x, mask)
        return self.transformer.ln_f(x)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (..., V) of states (..., C)."""
        return F.linear(x, self._head_weight())

    def _head_weight(self):
        return self.lm_head.weight if self._head_trains else self.lm_head.weight.detach()

    def compile_regions(self, whole: bool = False) -> None:
        """torch.compile every block, present and future, and the loss, each as a region of its own.

        All blocks share a graph, so that neither growth nor freezing compiles the model anew. whole=True compiles all that
        comes before the head as one region instead: a faster step for narrow models, and a new graph in every phase.
        """
        self.softmax_loss.compile()
        if whole:
            torch._dynamo.config.recompile_limit = 1000  # else a long schedule would silently run on uncompiled
            self.hidden = torch.compile(self.hidden)
            return
        self._compile_new_blocks = True
        for block in self.transformer.h:
            block.compile()

    # --- growing and freezing

    def grow(self, n_blocks: int, seed: int, init: Callable[["GPT", int, int], None] = random_init) -> None:
        """Append blocks until there are `n_blocks`; `init(model, i, seed)` fills each. New blocks train.

        Existing parameters stay the same objects, so optimizer state can be carried over. Raises ValueError where
        `n_blocks` is below the present number or above config.n_layer.
        """
        h = self.transformer.h
        if not len(h) <= n_blocks <= self.config.n_layer:
            raise ValueError(f"cannot grow from {len(h)} to {n_blocks} of {self.config.n_layer} blocks")
        weight = self.lm_head.weight
        for i in range(len(h), n_blocks):
            with torch.device("meta"):
                block = Block(self.config).to(weight.dtype)
            h.append(block.to_empty(device=weight.device).train(self.training))
            init(self, i, seed)
            if self._compile_new_blocks:
                h[i].compile()

    def freeze(self, blocks: Iterable[int] = (), embeddings=False, ln_f=False, head=False) -> None:
        """Stop training the named parts. Embeddings are wte and wpe as inputs, the head is wte as output projection:
        the two share a tensor, which is fixed only when both are frozen."""
        self._set_training_parts(False, blocks, embeddings, ln_f, head)

    def unfreeze(self, blocks: Iterable[int] = (), embeddings=False, ln_f=False, head=False) -> None:
        """Train the named parts again."""
        self._set_training_parts(True, blocks, embeddings, ln_f, head)

    def _set_training_parts(self, flag, blocks, embeddings, ln_f, head):
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

    def set_phase(self, phase: schedule.Phase) -> None:
        """Train exactly what `phase` says. The model must already have the phase's blocks."""
        self.unfreeze(range(phase.n_blocks), embeddings=True, ln_f=True, head=True)
        self.freeze(range(phase.n_frozen), embeddings=not phase.train_embeddings, head=not phase.train_head)

    # --- what it is

    def trainable(self) -> dict:
        """What trains now: {"blocks": [bool, ...], "embeddings": bool, "ln_f": bool, "head": bool}."""
        return {
            "blocks": [block.ln_1.weight.requires_grad for block in self.transformer.h],
            "embeddings": self._embeddings_train,
            "ln_f": self.transformer.ln_f.weight.requires_grad,
            "head": self._head_trains,
        }

    def num_params(self, trainable_only: bool = False) -> int:
        """Parameters of the present blocks, embeddings and norm; the tied head counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def flops_per_token(self) -> int:
        """FLOPs of a forward and backward pass, per token, with what trains now; see schedule.flops_per_token.

        The final norm is taken to train, as it does in every phase."""
        now = self.trainable()
        return schedule.flops_per_token(self.config, now["blocks"], now["embeddings"], now["head"])

    def param_groups(self, weight_decay: float) -> list[dict]:
        """AdamW's groups over all parameters, frozen ones too: decay on tensors of 2 or more dimensions only."""
        params = list(self.parameters())
        return [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]

    # --- what it says

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, n_vocab=None, generator=None):
        """Extend token ids `idx` (B, T) by `max_new_tokens` sampled ones; returns (B, T + max_new_tokens).

        temperature 0 takes the likeliest token. n_vocab: size of the tokenizer's vocabulary, so that padding ids are
        never drawn.
        """
        for _ in range(max_new_tokens):
            logits = self.head(self.hidden(idx[:, -self.config.block_size :])[:, -1])[:, :n_vocab].float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, [-1]]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            idx = torch.cat([idx, token], dim=1)
        return idx


# ---------------------------------------------------------------------------------------------------------------------
# weights from and to Hugging Face's GPT2LMHeadModel, whose Conv1D layers hold their weights transposed

_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")  # buffers that old checkpoints carry


def from_hf(state_dict: dict[str, torch.Tensor], vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """A state dict for GPT from one of transformers' GPT2LMHeadModel; rows of wte padded with zeros to `vocab_size`."""
    ours = {}
    for name, w in state_dict.items():
        if name.endswith(_MASKS):
            continue
        if name in ("transformer.wte.weight", "lm_head.weight") and vocab_size is not None:
            w = F.pad(w, (0, 0, 0, vocab_size - w.size(0)))
        ours[name] = w.t().contiguous() if name.endswith(_CONV1D) else w
    return ours


def to_hf(state_dict: dict[str, torch.Tensor], vocab_size: int | None = None) -> dict[str, torch.Tensor]:
    """A state dict for transformers' GPT2LMHeadModel from one of GPT; wte cut to its first `vocab_size` rows."""
    theirs = {}
    for name, w in state_dict.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            w = w[:vocab_size]
        theirs[name] = w.t().contiguous() if name.endswith(_CONV1D) else w
    return theirs
