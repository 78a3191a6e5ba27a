"""Changes to the model that benchmarks compare with the baseline.

They are kept apart from model.py until a measurement on a GPU shows that one of them is worth
adding.
"""

import importlib.util
import types
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT, CausalSelfAttention
from stagewise.config import Config
from stagewise.device import matmul_dtype
from stagewise.errors import UserError, did_you_mean
from stagewise.loss import LOGITS_BYTES, SoftmaxLoss, chunk_size
from train import check_compiler

COMPILE = ("none", "blocks", "model")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CUDA_ONLY = ("cudnn", "efficient", "liger_loss")
FP8_ROWS = 16  # of which all sizes of an fp8 matrix product must be multiples
E4M3_MAX, E5M2_MAX = (torch.finfo(d).max for d in (torch.float8_e4m3fn, torch.float8_e5m2))
VARIANTS = (*COMPILE, "erf", "bf16_residual", "fp8_head", "liger_loss", *BACKENDS)


def check_variants(names: Sequence[str], config: Config, device: torch.device) -> None:
    """Raise UserError if there is no such variant, or the baseline or a variant cannot run."""
    for name in names:
        _check_variant(name, config, device)
    compiled = {config.compile, *names} & {"blocks", "model"}
    if compiled and device.type == "cpu":
        check_compiler(min(compiled))


def _check_variant(name, config, device):
    if name not in VARIANTS:
        raise UserError(f"--variant={name} is unknown{did_you_mean(name, VARIANTS)}")
    if name in CUDA_ONLY and device.type != "cuda":
        raise UserError(f"--variant={name} needs a CUDA GPU: use another variant")
    # On a GPU, torch must be asked, which needs one.
    on_cpu = device.type == "cpu"
    products = matmul_dtype(device, config.dtype, config.n_embd) if on_cpu else config.dtype
    if name == "bf16_residual" and products == "float32":
        raise UserError(f"--variant={name} needs bf16 matrix products: use --dtype=bfloat16")
    rows = config.batch_size * config.block_size
    if name == "fp8_head" and (config.n_embd % FP8_ROWS or rows % FP8_ROWS):
        raise UserError(
            f"--variant={name} needs n_embd={config.n_embd} and batch_size x block_size={rows} to "
            f"be multiples of {FP8_ROWS}"
        )
    if (
        name == "fp8_head"
        and device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) < (8, 9)
    ):
        raise UserError(
            f"--variant={name} needs a GPU with fp8 matrix products (compute capability 8.9 or "
            "higher): use another variant"
        )
    if name == "liger_loss" and not importlib.util.find_spec("liger_kernel"):
        raise UserError(f"--variant={name} needs the package liger-kernel: install it")


def apply_variant(model: GPT, name: str) -> None:
    """Change a model in place. The variants in COMPILE are left to the caller."""
    for block in model.transformer.h:
        if name == "erf":
            block.mlp.forward = types.MethodType(erf_mlp, block.mlp)
        elif name in BACKENDS:
            block.attn.forward = types.MethodType(attention_with(BACKENDS[name]), block.attn)
    if name == "bf16_residual":
        model.transformer.drop = BF16Residual()
    if name == "fp8_head":
        model.forward = types.MethodType(forward_with(fp8_loss(model)), model)
    if name == "liger_loss":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

        def loss(x, weight, targets):
            # Otherwise, autocast would round the weight again for every chunk.
            dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
            return liger(weight.to(dtype), x.to(dtype), targets)

        model.forward = types.MethodType(forward_with(loss), model)


def erf_mlp(self, x):
    """The MLP of a block with the exact GELU, as in nanoGPT."""
    return self.dropout(self.c_proj(F.gelu(self.c_fc(x))))


def attention_with(backend: SDPBackend) -> Callable:
    """Return the attention of a block, forced to a backend.

    The backend is part of the compiled code. If it were set around a step, the variant would run
    the graph of the baseline: dynamo has no guard on it, and AOTAutograd's cache has no key for it,
    so even after torch._dynamo.reset() the same graph comes back.
    """

    def forward(self, x, mask=None):
        with sdpa_kernel(backend):
            return CausalSelfAttention.forward(self, x, mask)

    return forward


class BF16Residual(torch.nn.Module):
    """Takes the place of the dropout of the embeddings: the blocks then add to a bf16 tensor."""

    def forward(self, x):
        return x.to(torch.bfloat16)


def forward_with(loss: Callable) -> Callable:
    """Return a forward pass of GPT in training with another loss of (x, weight, targets).

    The shapes are x (N, C), weight (V, C) and targets (N,).
    """

    def forward(self, idx, targets, residual_scales=None):
        x = self.hidden(idx, residual_scales=residual_scales).flatten(0, 1)
        return loss(x, self._head_weight(), targets.flatten())

    return forward


def _autocast(x):
    return torch.is_autocast_enabled(x.device.type)


# --- loss with matrix products in 8-bit floating point


def fp8_loss(model: GPT) -> Callable:
    """Return a loss of (x, weight, targets), in chunks like `ChunkedCrossEntropy`."""
    to_fp8, softmax_loss = _to_fp8, _softmax_loss_fp8
    if model.lm_head.weight.is_cuda:  # on a CPU only the numerics matter
        to_fp8, softmax_loss = (torch.compile(f, dynamic=False) for f in (to_fp8, softmax_loss))

    def loss(x, weight, targets):
        return FP8CrossEntropy.apply(x, weight, targets, to_fp8, softmax_loss)

    return loss


def _to_fp8(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `t` in e4m3, scaled to its full range, and the factor (a scalar) to undo that."""
    scale = t.abs().amax().float().clamp(min=1e-12) / E4M3_MAX
    return (t.float() / scale).to(torch.float8_e4m3fn), scale


def _softmax_loss_fp8(logits, targets):
    """Return the summed loss, and the gradient of the logits, times E5M2_MAX, in e5m2."""
    loss, gradient = SoftmaxLoss.forward(None, logits, targets)  # type: ignore[arg-type]
    return loss, (gradient * E5M2_MAX).to(torch.float8_e5m2)  # its elements are in [-1, 1]


class FP8CrossEntropy(torch.autograd.Function):
    """`ChunkedCrossEntropy` with all three matrix products in fp8.

    Activations and weights are in e4m3, gradients in e5m2, as in arXiv:2209.05433, Section 3. The
    scales are constant for gradients, and determined per chunk of activations and for the weight.
    Sums over chunks use fp32.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, to_fp8, softmax_loss):
        kind = x.device.type
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device)
        g_scale = torch.full((), 1 / E5M2_MAX, device=x.device)
        with torch.autocast(kind, enabled=False):
            w8, w_scale = to_fp8(weight)
            w8_by_columns = w8.t().contiguous().t()  # as the kernels read the second factor
            size = chunk_size(len(x), len(weight), LOGITS_BYTES[kind], kind)
            size = -(-size // FP8_ROWS) * FP8_ROWS
            for start in range(0, len(x), size):
                rows = slice(start, start + size)
                x8, x_scale = to_fp8(x[rows])
                logits = torch._scaled_mm(
                    x8, w8.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16
                )
                chunk_loss, g8 = softmax_loss(logits, targets[rows])
                del logits
                loss += chunk_loss
                dx[rows] = torch._scaled_mm(
                    g8, w8_by_columns, scale_a=g_scale, scale_b=w_scale, out_dtype=torch.bfloat16
                )
                dw += torch._scaled_mm(
                    g8.t().contiguous(),
                    x8.t().contiguous().t(),
                    scale_a=g_scale,
                    scale_b=x_scale,
                    out_dtype=torch.float32,
                )
                del g8
        ctx.save_for_backward(dx, dw)
        ctx.N = len(x)
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = (d.mul_(grad / ctx.N) for d in ctx.saved_tensors)
        return dx, dw, None, None, None
