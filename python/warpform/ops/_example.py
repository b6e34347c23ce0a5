"""Small inputs of an op, of which doctor, the GPU check and tests make calls; the same values on every device."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._dtypes import accumulation_dtype


def nudged(t: Tensor, generator: torch.Generator) -> Tensor:
    """t in float64, each value changed by up to one unit of float32.

    What that changes in an exact result is an error that any computation in float32 may have. It stands beside the
    error of a reference, which may be nothing by luck where few sums cancel.
    """
    change = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
    return t.double() * (1 + torch.finfo(torch.float32).eps * change.to(t.device))


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op, as its schema has them.

    label: what the call has that others have not; no two calls of an example share one.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str | torch.device) -> Call:
        """The same values on another device."""
        return self._map(lambda t: t.to(device))

    def double(self) -> Call:
        """The same values with every floating-point tensor in float64."""
        return self._map(lambda t: t.double() if t.is_floating_point() else t)

    def nudged(self) -> Call:
        """`double` with every floating-point tensor `nudged`."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.label.encode()))
        return self._map(lambda t: nudged(t, generator) if t.is_floating_point() else t)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Call:
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Call(self.label, args, kwargs)


class Draw:
    """Draws the tensors of an example on the CPU, by a generator of its own.

    dtype: of the tensors under test. wide: float32, or float64 for float64; of statistics, spectra and gates.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = accumulation_dtype(dtype)
        self._generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, rounded to `dtype` from the same float64 values whatever it is."""
        values = torch.randn(*shape, generator=self._generator, dtype=torch.float64)
        return values.to(dtype or self.dtype)

    def like(self, t: Tensor) -> Tensor:
        """Normal values of the shape and dtype of t."""
        return self(*t.shape, dtype=t.dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        """int64, uniform on [0, end)."""
        return torch.randint(end, shape, generator=self._generator)


Example = Callable[[Draw], Iterator[Call]]


def offsets(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens, int32 [B + 1], of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
