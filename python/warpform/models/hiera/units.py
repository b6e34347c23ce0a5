"""The order of tokens in Hiera: mask units, inside of which tokens that are pooled together are adjacent.

A token grid of H x W is cut into units. One unit is R cells, where a cell is what k poolings of sy x sx tokens make one
token of, so it has R * (sy * sx)^k tokens. Inside of a unit the order is [R, a_k, .., a_2, a_1]: a_1 is the place among
the sy x sx tokens that the first pooling joins, a_2 among those of the second, each row by row. So each pooling joins
adjacent rows, a window is a run of rows, and what is left of the order needs no permutation.

The published code and transformers have the reverse, [a_1, a_2, .., a_k, cells]. `Units.reversed` goes there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

Pair = tuple[int, int]


@dataclass(frozen=True)
class Units:
    """The order of tokens for one grid.

    Attributes:
        grid: tokens of the grid, rows and columns.
        unit: tokens of a unit, rows and columns; it divides grid.
        stride: sy and sx, tokens that a pooling joins.
        poolings: k. stride to this power divides unit.
        scattered: the R cells of a unit lie a whole number of times grid / R apart in the row-major order of cells, as
            in the published code, rather than beside each other. It is the same where R is 1.
    """

    grid: Pair
    unit: Pair
    stride: Pair
    poolings: int
    scattered: bool = False

    @property
    def count(self) -> int:
        """Units of an image."""
        return math.prod(self.grid) // math.prod(self.unit)

    @property
    def cells(self) -> Pair:
        """Cells of an image, rows and columns: its tokens after all poolings."""
        rows, columns = (size // s**self.poolings for size, s in zip(self.grid, self.stride, strict=True))
        return rows, columns

    @property
    def cells_of_unit(self) -> Pair:
        """Cells of a unit, rows and columns."""
        rows, columns = (size // s**self.poolings for size, s in zip(self.unit, self.stride, strict=True))
        return rows, columns

    def after(self, pooled: int) -> Units:
        """The order of the grid that `pooled` poolings leave."""
        (rows, columns), (height, width) = self.grid, self.unit
        sy, sx = (s**pooled for s in self.stride)
        return replace(
            self, grid=(rows // sy, columns // sx), unit=(height // sy, width // sx), poolings=self.poolings - pooled
        )

    def _steps(self, pooled: int) -> int:
        """Poolings that are left after `pooled` of them."""
        return self.poolings - min(pooled, self.poolings)

    def split(self, tokens: Tensor) -> Tensor:
        """tokens [batch, rows, columns, C] of the grid -> [batch, units, tokens of a unit, C]."""
        batch, channels = tokens.shape[0], tokens.shape[-1]
        (sy, sx), steps = self.stride, self.poolings
        (rows, columns), (ry, rx) = self.cells, self.cells_of_unit
        x = tokens.reshape(batch, rows, *[sy] * steps, columns, *[sx] * steps, channels)
        pairs = [axis for step in range(steps) for axis in (2 + step, 3 + steps + step)]  # from a_k to a_1
        x = x.permute(0, 1, 2 + steps, *pairs, -1)  # cells, and the tokens of each
        inside = (sy * sx) ** steps
        if self.scattered:
            x = x.reshape(batch, ry * rx, self.count, inside, channels).transpose(1, 2)
        else:
            x = x.reshape(batch, rows // ry, ry, columns // rx, rx, inside, channels).transpose(2, 3)
        return x.reshape(batch, self.count, math.prod(self.unit), channels)

    def join(self, hidden: Tensor, pooled: int) -> Tensor:
        """The opposite of `split`, after `pooled` poolings: [batch, units, n, C] -> [batch, height, width, C]."""
        batch, _, tokens, channels = hidden.shape
        (sy, sx), steps = self.stride, self._steps(pooled)
        (rows, columns), (ry, rx) = self.cells, self.cells_of_unit
        inside = tokens // (ry * rx)
        if self.scattered:
            x = hidden.reshape(batch, self.count, ry * rx, inside, channels).transpose(1, 2)
        else:
            x = hidden.reshape(batch, rows // ry, columns // rx, ry, rx, inside, channels).transpose(2, 3)
        x = x.reshape(batch, rows, columns, *[sy, sx] * steps, channels)
        down = [3 + 2 * step for step in range(steps)]
        x = x.permute(0, 1, *down, 2, *[axis + 1 for axis in down], -1)
        return x.reshape(batch, rows * sy**steps, columns * sx**steps, channels)

    def join_units(self, hidden: Tensor, pooled: int) -> Tensor:
        """hidden [batch, units, n, C] after `pooled` poolings -> each cell's tokens as a grid.

        Returns:
            [batch, R * units, height, width, C], first the first cell of all units.
        """
        batch, units, _, channels = hidden.shape
        (sy, sx), steps = self.stride, self._steps(pooled)
        cells = math.prod(self.cells_of_unit)
        x = hidden.reshape(batch, units, cells, *[sy, sx] * steps, channels)
        down = [3 + 2 * step for step in range(steps)]
        x = x.permute(0, 2, 1, *down, *[axis + 1 for axis in down], -1)
        return x.reshape(batch, cells * units, sy**steps, sx**steps, channels)

    def reversed(self, hidden: Tensor, pooled: int) -> Tensor:
        """hidden [batch, units, n, C] after `pooled` poolings -> [batch, tokens, C] in the order of transformers."""
        batch, units, tokens, channels = hidden.shape
        (sy, sx), steps = self.stride, self._steps(pooled)
        x = hidden.reshape(batch, units, math.prod(self.cells_of_unit), *[sy * sx] * steps, channels)
        return x.permute(0, *range(x.dim() - 2, 0, -1), -1).reshape(batch, units * tokens, channels)

    def from_reversed(self, tokens: Tensor) -> Tensor:
        """The opposite of `reversed` before any pooling: [batch, tokens, C] -> [batch, units, n, C]."""
        batch, _, channels = tokens.shape
        (sy, sx), steps = self.stride, self.poolings
        x = tokens.reshape(batch, *[sy * sx] * steps, math.prod(self.cells_of_unit), self.count, channels)
        inside = math.prod(self.unit)
        return x.permute(0, *range(x.dim() - 2, 0, -1), -1).reshape(batch, self.count, inside, channels)
