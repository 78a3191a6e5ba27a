"""Chunked cross-entropy for a language-model head, which never materializes all logits at once.

`torch.nn.functional.linear_cross_entropy` (torch 2.13) does the same. It took 3 to 6 times as long
on a CPU, and torch 2.11 does not have it.
"""

import math

import torch
from torch import nn

# Maximum size in bytes of the fp32 logits of a chunk. In training, every chunk updates the full
# weight gradient, so small chunks are slow. Tuned on a CPU; the GPU values are not tuned. In
# training on a GPU, chunks have up to 16,384 rows if the vocabulary is GPT-2's and the number of
# rows is a power of two.
LOGITS_BYTES = {"cpu": 192 * 2**20, "cuda": 4 * 2**30}
LOGITS_BYTES_EVAL = {"cpu": 24 * 2**20, "cuda": 256 * 2**20}


def chunk_size(n_rows: int, n_vocab: int, limit: int, kind: str) -> int:
    """Return the rows per chunk, for the fewest equal chunks of at most `limit` bytes of logits.

    On a GPU, the number of chunks is a power of two. Micro-batches have few odd factors, so all
    chunks have the same size and use the same compiled graph.
    """
    n_chunks = max(1, math.ceil(4 * n_rows * n_vocab / limit))
    if kind == "cuda":
        n_chunks = 1 << (n_chunks - 1).bit_length()
    return math.ceil(n_rows / n_chunks)


class SoftmaxLoss(nn.Module):
    """Summed cross-entropy in nats of logits (N, V), and its gradient (N, V) in the logits' dtype.

    This is a separate module so that it can be compiled, which avoids a tensor of fp32 logits.
    """

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_p = torch.nn.functional.log_softmax(logits, -1, dtype=dtype)
        of_target = log_p.gather(1, targets[:, None])
        gradient = log_p.exp_().to(logits.dtype)  # softmax - 1 at the target, softmax elsewhere
        gradient.scatter_(1, targets[:, None], of_target.expm1().to(logits.dtype))
        return -of_target.sum(), gradient


def _matmul_into(out, a, b, add=False):
    """Compute out = a @ b, or out += a @ b. `out` may have a wider dtype than a and b."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.is_cuda and out.dtype == torch.float32:  # CPUs have no kernel with another dtype
        torch.addmm(out, a, b, beta=int(add), out_dtype=out.dtype, out=out)
    else:
        out.add_(a @ b) if add else out.copy_(a @ b)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy (a scalar, in nats) of the logits ``x @ weight.T``.

    The shapes are x (N, C), weight (V, C) and targets (N,). The forward pass also computes the
    gradients, chunk by chunk; the backward pass only scales them. Matrix products use autocast's
    dtype if autocast is enabled; sums use fp32. Gradients that are not required are not computed,
    so a frozen head needs two of the three matrix products.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softmax_loss):
        kind, dtype = x.device.type, _autocast_dtype(x)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(kind, enabled=False):
            w = weight.to(dtype)
            size = chunk_size(len(x), len(weight), LOGITS_BYTES[kind], kind)
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                x_chunk = x[rows].to(dtype)
                chunk_loss, gradient = softmax_loss(x_chunk @ w.T, targets[rows])
                loss += chunk_loss
                if dx is not None:
                    _matmul_into(dx[rows], gradient, w)
                if dw is not None:
                    _matmul_into(dw, gradient.T, x_chunk, add=True)
                del gradient  # before the next logits are allocated
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
    """Return the cross-entropy (N, K) in nats of each row of ``x @ weight.T`` for its K targets.

    For evaluation. The shapes are x (N, C), weight (V, C) and targets (N, K). The dtypes are those
    of `ChunkedCrossEntropy`.
    """
    kind, dtype = x.device.type, _autocast_dtype(x)
    size = chunk_size(len(x), len(weight), LOGITS_BYTES_EVAL[kind], kind)
    # Buffers are reused by all chunks. On a CPU, page faults of new allocations would take a fifth
    # of the time.
    wide = torch.promote_types(x.dtype, torch.float32)
    logits, log_p = (torch.empty(size, len(weight), dtype=wide, device=x.device) for _ in range(2))
    losses = []
    with torch.autocast(kind, enabled=False):
        w = weight.to(dtype)
        for x_chunk, targets_chunk in zip(x.to(dtype).split(size), targets.split(size)):
            n = len(x_chunk)
            _matmul_into(logits[:n], x_chunk, w.T)
            torch.log_softmax(logits[:n], -1, out=log_p[:n])
            losses.append(-log_p[:n].gather(1, targets_chunk))
    return torch.cat(losses)
