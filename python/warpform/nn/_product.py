"""Products with the bias where it is cheapest, and the size of blocks of rows on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# Rows of a feed-forward block that a CPU takes at once: 512 x 3072 float32 is 6 MB, which stays in its cache and in the
# allocator's heap. All rows at once would be written to fresh pages and read back from memory, which on 2 cores of an
# AMD EPYC halves the speed of the two products at 16,000 rows (82 against 192 GFLOP/s at hidden 384).
CPU_ROWS = 512


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


def product(x: Tensor, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """linear(x), or x @ weight.T and the bias that is still to be added by the fused operation that follows.

    On a CPU the matrix product adds a bias for nothing, while an elementwise pass costs; so there None is left to add.
    """
    if x.device.type == "cpu" or not is_plain(linear, nn.Linear):
        return linear(x), None
    return F.linear(x, linear.weight), linear.bias  # type: ignore[arg-type,return-value]


def product_with_bias(x: Tensor, linear: nn.Module, bias: Tensor | None) -> Tensor:
    """linear(x) + bias, for a linear that has no bias of its own."""
    if is_plain(linear, nn.Linear):
        return F.linear(x, linear.weight, bias)  # type: ignore[arg-type]
    out: Tensor = linear(x)
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


def in_blocks(x: Tensor) -> bool:
    """Tells whether to take rows in blocks: on a CPU, in inference. Gradients need all; compilers choose blocks."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.shape[0] > CPU_ROWS
    )
