"""Products with the bias where it is cheapest, and on a CPU in the way that is fastest there."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import _env, _hardware, _library, _torch_private
from ..ops import RoutingPlan, hidden_gather_linear

# Rows of a feed-forward block that a CPU takes at once: 512 x 3072 float32 is 6 MB, which stays in its cache and in the
# allocator's heap. All rows at once would be written to fresh pages and read back from memory, which on 2 cores of an
# AMD EPYC halves the speed of the two products at 16,000 rows (82 against 192 GFLOP/s at hidden 384).
CPU_ROWS = 512

# The least rows that oneDNN, or the way through float32, multiplies faster than torch's own product.
LEAST_ROWS = 16
# Up to so many rows a product is bound by reading the weight. On AMD processors the library that torch takes reads it
# far below the speed of memory: 4 rows and 5632 x 1024 float32 take it 5.5 ms on two threads of an AMD EPYC with AVX2,
# and this package's kernel 1.2; one row takes 1.6 and 0.95. One thread multiplies one row as fast with torch.
FEW_ROWS = 8
# The least elements of such a weight, and its least rows and columns. With fewer elements the call takes the time, and
# with shorter rows or columns the kernel is slower than torch's product.
LEAST_WEIGHT, LEAST_WIDTH = 1 << 19, 128
# The features of an x86 CPU that multiplies such numbers itself. Without one of them torch's product of float16 runs at
# a tenth of the speed of float32, that of bfloat16 at a quarter.
OWN_PRODUCTS = {
    torch.float16: frozenset({"avx512_fp16", "amx_fp16"}),
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16"}),
}
PLAIN_TENSORS = (Tensor, nn.Parameter)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Tells whether a call of the module does what `kind` does with its weights, and nothing else.

    Only then may a fused operation read the weights instead of calling the module. Adapters (LoRA), quantisation and
    parametrisations have classes of their own; pruning, offloading and what users watch are hooks, or a `forward` set
    on the instance.
    """
    return (
        type(module) is kind
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
        and not torch_module._has_any_global_hook()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by what computes it fastest on a CPU.

    The rule is fixed, and nothing is timed, so that a machine gives the same bits in every run. On a CPU:

    * Up to `FEW_ROWS` rows, of which torch records no gradient, are multiplied with a large weight by this package's
      kernel (`ops.hidden_gather_linear`), as in decoding, where each text has one token: float32 on AMD processors,
      float16 and bfloat16 where the CPU has no instruction for their products. One thread leaves one row to torch.
    * From `LEAST_ROWS` rows on, float32 is multiplied by oneDNN on AMD processors with AVX-512, where the library that
      torch takes for float32 runs at half the speed.
    * From `LEAST_ROWS` rows on, float16 and bfloat16 go through float32 where the CPU has no instruction for their
      products: the sums are float32, and the result is rounded once.

    `WARPFORM_ONEDNN` chooses otherwise. Everything else is torch's: other devices and dtypes, tensors of subclasses,
    and calls that torch.compile, export, tracing, autocast, torch.func, forward-mode differentiation or a mode of torch
    sees. Gradients of any order are computed by the same rule.

    Args:
        x: [..., in].
        weight: [out, in], of the dtype of x.
        bias: [out], of the dtype of x, or None.

    Returns:
        [..., out].
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    recorded = records(x, weight, bias)
    way = _way(x, weight, bias, recorded)
    if way is None:
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], weight.shape[0])
    if recorded:
        out: Tensor = _Linear.apply(rows, weight, bias)
        return out if x.dim() == 2 else out.view(shape)
    # Not a view, as in-place operations on views made without gradients are refused later.
    if way == "few":
        return _multiply_few(rows, weight, bias).resize_(shape)
    return _multiply(rows, weight, bias, round_up=True).resize_(shape)


def records(*tensors: Tensor | None) -> bool:
    """Tells whether torch records what is computed from the tensors, for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _way(x: Tensor, weight: Tensor, bias: Tensor | None, recorded: bool) -> str | None:
    """How `linear` multiplies these tensors on a CPU: "few" or "many" rows at once, or None: it leaves them to torch.

    What F.linear refuses is left to it.
    """
    if (
        _torch_private.sees_calls()
        or not (x.dtype in OWN_PRODUCTS or x.dtype == torch.float32)
        or not all(type(t) in PLAIN_TENSORS for t in (x, weight))
        or not (bias is None or (type(bias) in PLAIN_TENSORS and bias.dtype == x.dtype and bias.device == x.device))
        or not (weight.dtype == x.dtype and weight.device == x.device)
        or not x.layout == weight.layout == torch.strided
        or not (weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1])
        or not (bias is None or bias.shape == weight.shape[:1])
        or weight.numel() == 0
    ):
        return None
    size, (outputs, width) = x.numel(), weight.shape
    if size >= LEAST_ROWS * width:
        ours = takes_onednn() if x.dtype == torch.float32 else _through_float32(x.dtype)
        return "many" if ours else None
    few = (
        not recorded
        and 0 < size <= FEW_ROWS * width
        and weight.numel() >= LEAST_WEIGHT
        and min(outputs, width) >= LEAST_WIDTH
        and weight.stride(1) == 1
        and (size > width or torch.get_num_threads() > 1)
        and takes_few_rows(x.dtype)
    )
    return "few" if few else None


def takes_few_rows(dtype: torch.dtype = torch.float32) -> bool:
    """Tells whether products of few rows go to this package's kernel on this machine and under these settings."""
    return (
        _env.onednn() != "0"
        and _env.backend() == "auto"
        and _has_kernels()
        and (_is_amd() if dtype == torch.float32 else _lacks_products(dtype))
    )


@functools.cache
def _has_kernels() -> bool:
    return _library.loaded() and bool(_library.cpu_isa())


def takes_onednn() -> bool:
    """Tells whether float32 products go to oneDNN on this machine and under these settings."""
    setting = _env.onednn()
    return (
        (setting == "1" or (setting == "auto" and _has_faster_onednn()))
        and bool(torch.backends.mkldnn.enabled)
        and _torch_private.onednn_linear() is not None
    )


def _is_amd() -> bool:
    return _hardware.cpu_features()[0] == "AuthenticAMD"


@functools.cache
def _has_faster_onednn() -> bool:
    return _is_amd() and "avx512f" in _hardware.cpu_features()[1]


def _through_float32(dtype: torch.dtype) -> bool:
    """Tells whether products of a 16-bit dtype are computed in float32 on this machine and under these settings."""
    return _env.onednn() != "0" and _lacks_products(dtype)


@functools.cache
def _lacks_products(dtype: torch.dtype) -> bool:
    _, features = _hardware.cpu_features()
    return "avx2" in features and not features & OWN_PRODUCTS[dtype]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, *, round_up: bool = False) -> Tensor:
    """F.linear of x [rows, in] without a gradient, for tensors that `linear` takes; the result is no view.

    oneDNN prepares code for each number of rows, which takes a millisecond or more, and packed batches differ in it.
    round_up: so up to `CPU_ROWS` rows are rounded up to one of few numbers. Rounding copies x, which for more rows
    takes longer over the layers of a model than that code does.
    """
    dtype, rows = x.dtype, x.shape[0]
    if dtype != torch.float32:
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    onednn = _torch_private.onednn_linear() if takes_onednn() else None
    if onednn is None:
        return F.linear(x, weight, bias).to(dtype)
    # oneDNN's op takes a bias as if it were contiguous. With columns of a wider weight it computes a thousand times
    # slower on a CPU with AVX2: 3.5 s against 1.3 ms for 256 rows and 512 x 256.
    bias = None if bias is None else bias.contiguous()
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    extra = -rows % (16 if rows <= CPU_ROWS // 2 else 64) if round_up and rows <= CPU_ROWS else 0
    if 8 * extra > rows:  # the result would keep that much memory for nothing
        extra = 0
    if extra == 0:
        return onednn(x, weight, bias).to(dtype)
    return onednn(F.pad(x, (0, 0, 0, extra)), weight, bias).resize_(rows, weight.shape[0]).to(dtype)


def _multiply_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of x [rows, in] without a gradient, for few rows that `linear` takes; the result is no view."""
    return hidden_gather_linear(x, weight, _one_group(x.shape[0]), bias=bias)


@functools.cache
def _one_group(rows: int) -> RoutingPlan:
    """The plan of rows that use the whole of their input."""
    with torch.inference_mode(False):
        return RoutingPlan.by_class(torch.zeros(rows, dtype=torch.int64, device="cpu"), 1)


class _Linear(torch.autograd.Function):
    """x [rows, in] @ weight.T + bias; its gradient is made of `linear`, so that it has gradients in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dout,) = gradients
        x, weight = ctx.saved_tensors
        # Transposed operands cost oneDNN nothing.
        return (
            linear(dout, weight.t()) if ctx.needs_input_grad[0] else None,
            linear(dout.t(), x.t()) if ctx.needs_input_grad[1] else None,
            dout.sum(0) if ctx.needs_input_grad[2] else None,
        )


def add_linear_(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out += linear(x, weight), in place: out [rows, out], which may be strided, x [rows, in], weight [out, in]."""
    if x.device.type == "cpu" and _way(x, weight, None, records(x, weight)) is not None:
        out += linear(x, weight)
    else:
        out.addmm_(x, weight.t())


def is_pointwise(module: nn.Module) -> bool:
    """Tells whether a module is a convolution over images that looks at one position at a time."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid")
    )


def apply_pointwise(x: Tensor, module: nn.Module) -> Tensor:
    """module(x), channels last, for a 1x1 convolution, whose weight [out, in, 1, 1] is that of a product.

    Args:
        x: [..., in].
        module: `nn.Conv2d`. A module that takes its place, such as an adapter, is called as a convolution is.

    Returns:
        [..., out].
    """
    if is_plain(module, nn.Conv2d) and is_pointwise(module):
        return linear(x, module.weight.flatten(1), module.bias)  # type: ignore[arg-type,operator]
    grid = x if x.dim() == 4 else x.reshape(1, -1, 1, x.shape[-1])
    out: Tensor = module(grid.movedim(-1, 1)).movedim(1, -1)
    return out if x.dim() == 4 else out.reshape(*x.shape[:-1], -1)


def apply_linear(x: Tensor, module: nn.Module) -> Tensor:
    """module(x), which on a CPU is the product that is fastest there."""
    if x.device.type == "cpu" and is_plain(module, nn.Linear):
        return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    out: Tensor = module(x)
    return out


def product(x: Tensor, module: nn.Module, *, pointwise: bool = False) -> tuple[Tensor, Tensor | None]:
    """module(x), or x @ weight.T and the bias that is still to be added by the fused operation that follows.

    On a CPU the matrix product adds a bias for nothing, while an elementwise pass costs; so there None is left to add.
    pointwise: whether the module stands for a 1x1 convolution (`apply_pointwise`).
    """
    if pointwise:
        if x.device.type == "cpu" or not (is_plain(module, nn.Conv2d) and is_pointwise(module)):
            return apply_pointwise(x, module), None
        return F.linear(x, module.weight.flatten(1)), module.bias  # type: ignore[operator,return-value]
    if x.device.type == "cpu" or not is_plain(module, nn.Linear):
        return apply_linear(x, module), None
    return F.linear(x, module.weight), module.bias  # type: ignore[arg-type,return-value]


def product_with_bias(x: Tensor, module: nn.Module, bias: Tensor | None) -> Tensor:
    """module(x) + bias, for a linear module that has no bias of its own."""
    if is_plain(module, nn.Linear):
        return linear(x, module.weight, bias)  # type: ignore[arg-type]
    out: Tensor = module(x)
    return out if bias is None else out + bias.to(out.dtype)


def row(embedding: nn.Module, index: int, device: torch.device) -> Tensor:
    """Row `index` of an embedding, [width]."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight[index]  # type: ignore[index]
    out: Tensor = embedding(torch.full((1,), index, device=device))
    return out[0]


def table(embedding: nn.Module, rows: int, device: torch.device) -> Tensor:
    """All rows of an embedding, [rows, width]."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight  # type: ignore[return-value]
    out: Tensor = embedding(torch.arange(rows, device=device))
    return out


def decoder_table(embedding: nn.Module, rows: int, device: torch.device) -> Tensor:
    """The weight [rows, width] that an embedding shares with a decoder.

    As with transformers' tied decoders, an adapter on the embedding leaves the decoder alone where it has a `weight`.
    """
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) else table(embedding, rows, device)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the first parameter that is floating point; the default where there is none, as in quantised ones.

    For inputs that a model makes itself.
    """
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())


def even_blocks(x: Tensor, most: int) -> tuple[Tensor, ...]:
    """The rows of x in as few parts of at most `most` as can be, all of about one size: few rows multiply slowly."""
    parts = -(-x.shape[0] // most)
    return x.split(-(-x.shape[0] // parts)) if parts > 1 else (x,)


def in_blocks(x: Tensor) -> bool:
    """Tells whether to take rows in blocks: on a CPU, in inference. Gradients need all; compilers choose blocks."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.shape[0] > CPU_ROWS
    )
