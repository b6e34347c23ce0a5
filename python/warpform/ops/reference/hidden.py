"""Definition of hidden-dimension routing in PyTorch: the plan, and products that touch a token's groups alone.

Hidden dimensions come in `num_groups` groups of equal width, and a token uses some of them, as bits of an int64. On a
CPU the products go group by group over the tokens that use the group, so that what is not used costs nothing. Elsewhere
the unused parts are zeros of one dense product, which needs no count on the host.

16-bit tensors are multiplied as float32: neither x times its gate nor the product of a group is ever rounded, and none
can be too large for 16 bits where their sum is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype

# More of all (tile, group) pairs in use than this, and sorting gains nothing: every tile then uses every group.
DENSE_ABOVE = (17, 20)


def unpack_bits(mask: Tensor, num_groups: int) -> Tensor:
    """int64 [...] -> bool [..., num_groups], the lowest bit first."""
    return (mask.unsqueeze(-1) >> torch.arange(num_groups, device=mask.device)).bitwise_and(1).bool()


def pack_bits(selected: Tensor) -> Tensor:
    """The inverse of unpack_bits: bool [..., num_groups] -> int64 [...]."""
    shifts = torch.arange(selected.size(-1), device=selected.device)
    return (selected.long() << shifts).sum(-1)


def routing_mask(idx: Tensor, num_groups: int, num_shared: int) -> Tensor:
    selected = torch.zeros(idx.size(0), num_groups + 1, dtype=torch.bool, device=idx.device)
    inside = (idx >= 0) & (idx < num_groups)
    selected.scatter_(1, torch.where(inside, idx, num_groups).long(), True)
    selected[:, :num_shared] = True
    return pack_bits(selected[:, :num_groups])


def plan_tiles(tokens: int, num_classes: int, tile: int) -> int:
    """Tiles enough for any split of the tokens into classes, as no tile mixes classes.

    One is always left over, which works on nothing: a size that is never 1 is one that tracing leaves symbolic.
    """
    return (tokens + tile - 1) // tile + num_classes


def routing_plan(
    group_mask: Tensor, token_class: Tensor | None, num_groups: int, num_classes: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, device = group_mask.size(0), group_mask.device
    tiles = plan_tiles(tokens, num_classes, tile)
    # Masks sort as unsigned numbers, so that the 64th group sorts like the others.
    order = torch.argsort(group_mask ^ torch.iinfo(torch.int64).min, stable=True)
    if token_class is None:
        place = torch.arange(tokens, device=device)
        tile_class = torch.zeros(tiles, dtype=torch.int32, device=device)
    else:
        token_class = token_class.long().clamp(0, num_classes - 1)
        order = order[torch.argsort(token_class[order], stable=True)]
        classes = torch.arange(num_classes, device=device)
        counts = (token_class.unsqueeze(1) == classes).sum(0)
        ends = ((counts + tile - 1) // tile).cumsum(0)
        shift = (ends - (counts + tile - 1) // tile) * tile - (counts.cumsum(0) - counts)
        place = torch.arange(tokens, device=device) + shift[token_class[order]]
        after = torch.searchsorted(ends, torch.arange(tiles, device=device), right=True)
        tile_class = torch.where(after < num_classes, after, 0).int()
    perm = torch.full((tiles * tile,), -1, dtype=torch.int32, device=device)
    perm[place] = order.int()
    inverse = torch.empty(tokens, dtype=torch.int32, device=device)
    inverse[order] = place.int()

    selected = unpack_bits(group_mask, num_groups)
    filled = (perm >= 0).view(tiles, tile)
    if tokens:
        union = (selected[perm.clamp(min=0).long()].view(tiles, tile, num_groups) & filled.unsqueeze(-1)).any(1)
    else:
        union = torch.zeros(tiles, num_groups, dtype=torch.bool, device=device)
    used = filled.any(1)
    dense = DENSE_ABOVE[1] * union.sum() > DENSE_ABOVE[0] * num_groups * used.sum()
    return perm, inverse, pack_bits(union | (dense & used).unsqueeze(1)), tile_class


@dataclass(frozen=True)
class Part:
    """One dense product: of `rows` (None: all tokens) with the weight of a class, over `groups` and `outs`.

    `masked`: not all of the rows use all of the groups.
    """

    rows: Tensor | None
    token_class: int
    groups: slice
    outs: slice
    masked: bool


@dataclass(frozen=True)
class Routing:
    """The part of a plan that the ops take, in the order of their arguments."""

    group_mask: Tensor
    perm: Tensor
    inverse: Tensor
    tile_mask: Tensor
    tile_class: Tensor
    out_mask: Tensor | None
    num_groups: int
    num_classes: int

    @property
    def selected(self) -> Tensor:
        """bool [tokens, num_groups]."""
        return unpack_bits(self.group_mask, self.num_groups)

    @property
    def token_class(self) -> Tensor:
        """int64 [tokens]."""
        tile = self.perm.size(0) // max(self.tile_mask.size(0), 1)
        return self.tile_class[self.inverse.long() // max(tile, 1)].long()

    def parts(self, by_group: bool) -> Iterator[Part]:
        """The products that make up the whole; by_group reads the masks, which on a GPU would be a synchronisation."""
        outs = self._outs()
        if not by_group:
            for c in range(self.num_classes):
                for columns, inputs in outs:
                    for groups in _runs(inputs):
                        yield Part(None, c, groups, columns, True)
            return
        selected = self.selected
        token_class = self.token_class if self.num_classes > 1 else None
        for c in range(self.num_classes):
            members = None if token_class is None else (token_class == c).nonzero().flatten()
            mine = selected if members is None else selected[members]
            counts: list[int] = mine.sum(0).tolist()
            tokens = mine.size(0)
            if sum(counts) * DENSE_ABOVE[1] > tokens * self.num_groups * DENSE_ABOVE[0]:
                counts = [tokens] * self.num_groups
                masked = not bool(mine.all())
            else:
                masked = False
            always = [count == tokens and tokens > 0 for count in counts]
            some = {g: mine[:, g].nonzero().flatten() for g, count in enumerate(counts) if count and not always[g]}
            for columns, inputs in outs:
                for groups in _runs([a and b for a, b in zip(always, inputs, strict=True)]):
                    yield Part(members, c, groups, columns, masked)
                for g, rows in some.items():
                    if inputs[g]:
                        yield Part(rows if members is None else members[rows], c, slice(g, g + 1), columns, False)

    def _outs(self) -> list[tuple[slice, list[bool]]]:
        """Output groups with equal inputs together: their slice, and which groups they see."""
        if self.out_mask is None:
            return [(slice(0, 1), [True] * self.num_groups)]
        rows = unpack_bits(self.out_mask.cpu(), self.num_groups).tolist()
        runs: list[tuple[slice, list[bool]]] = []
        for o, inputs in enumerate(rows):
            if runs and runs[-1][1] == inputs:
                runs[-1] = (slice(runs[-1][0].start, o + 1), inputs)
            else:
                runs.append((slice(o, o + 1), inputs))
        return runs

    @property
    def num_out(self) -> int:
        """Groups of the dimension that is not routed: 1 without an out_mask."""
        return 1 if self.out_mask is None else self.out_mask.size(0)


def _runs(on: list[bool]) -> Iterator[slice]:
    """Slices of neighbours that are on."""
    begin = None
    for i, value in enumerate([*on, False]):
        if value and begin is None:
            begin = i
        elif not value and begin is not None:
            yield slice(begin, i)
            begin = None


def _span(groups: slice, width: int) -> slice:
    return slice(groups.start * width, groups.stop * width)


def _by_group(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _wide(t: Tensor) -> Tensor:
    """t in the dtype that products are made in: float32, or float64 for float64."""
    return t.to(accumulation_dtype(t.dtype))


def _routed(x: Tensor, gates: Tensor | None, selected: Tensor, part: Part) -> Tensor:
    """The part's rows and groups of a routed tensor [T, N * m], times the gates; 0 where a token does not use them."""
    width = x.size(1) // selected.size(1)
    piece = x[:, _span(part.groups, width)]
    piece = piece if part.rows is None else piece[part.rows]
    if gates is not None or part.masked:
        grouped = piece.unflatten(1, (-1, width))
        if gates is not None:
            gate = gates[:, part.groups] if part.rows is None else gates[part.rows, part.groups]
            grouped = grouped * gate.unsqueeze(2)
        if part.masked:
            mine = selected[:, part.groups] if part.rows is None else selected[part.rows, part.groups]
            grouped = torch.where(mine.unsqueeze(2), grouped, 0)
        piece = grouped.flatten(1)
    return piece


def _plain(x: Tensor, part: Part, width: int) -> Tensor:
    """The part's rows and output groups of a tensor that is not routed."""
    piece = x[:, _span(part.outs, width)]
    return piece if part.rows is None else piece[part.rows]


def _add_product(out: Tensor, part: Part, columns: slice, a: Tensor, b: Tensor) -> None:
    """out[rows, columns] += a b."""
    place = out[:, columns]
    if part.rows is None:
        place.addmm_(a, b)
    else:
        place.index_add_(0, part.rows, a @ b)


def _of_class(value: Tensor, part: Part, routing: Routing) -> Tensor:
    """0 for the tokens of other classes, where the part's rows are all tokens."""
    if routing.num_classes == 1 or part.rows is not None:
        return value
    return torch.where((routing.token_class == part.token_class).unsqueeze(1), value, 0)


def hidden_gather_linear(
    x: Tensor, w: Tensor, gates: Tensor | None, bias: Tensor | None, *plan: Tensor | int | None
) -> Tensor:
    routing = Routing(*plan)  # type: ignore[arg-type]
    selected = routing.selected
    dtype, x, w = x.dtype, _wide(x), _wide(w if w.dim() == 3 else w.unsqueeze(0))
    width, out_width = x.size(1) // routing.num_groups, w.size(1) // routing.num_out
    out = x.new_zeros(x.size(0), w.size(1))
    for part in routing.parts(_by_group(x)):
        columns = _span(part.outs, out_width)
        weight = w[part.token_class, columns, _span(part.groups, width)]
        mine = _of_class(_routed(x, gates, selected, part), part, routing)
        _add_product(out, part, columns, mine, weight.t())
    if bias is not None:
        out += bias if bias.dim() == 1 else bias[routing.token_class]
    return out.to(dtype)


def hidden_gather_linear_backward(
    dout: Tensor, x: Tensor, w: Tensor, gates: Tensor | None, *plan: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    routing = Routing(*plan)  # type: ignore[arg-type]
    selected = routing.selected
    grouped = _scattered(dout, w.transpose(-1, -2), None, routing, selected)
    if gates is None:
        return grouped.flatten(1).to(x.dtype), grouped.new_empty(0)
    dgates = (grouped * torch.where(selected.unsqueeze(2), x.unflatten(1, grouped.shape[1:]), 0)).sum(2)
    grouped.mul_(torch.where(selected, gates, 0).unsqueeze(2))
    return grouped.flatten(1).to(x.dtype), dgates


def hidden_scatter_linear(
    x: Tensor, w: Tensor, gates: Tensor | None, bias: Tensor | None, keep_ungated: bool, *plan: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    routing = Routing(*plan)  # type: ignore[arg-type]
    selected = routing.selected
    grouped = _scattered(x, w, bias, routing, selected)
    ungated = grouped.flatten(1).to(x.dtype, copy=True) if keep_ungated else x.new_empty(0)
    if gates is not None:
        grouped.mul_(torch.where(selected, gates, 0).unsqueeze(2))
    return grouped.flatten(1).to(x.dtype), ungated


def hidden_scatter_linear_backward(
    dout: Tensor, ungated: Tensor | None, w: Tensor, gates: Tensor | None, *plan: Tensor | int | None
) -> tuple[Tensor, Tensor]:
    dx = hidden_gather_linear(dout, w.transpose(-1, -2), gates, None, *plan)
    wide = accumulation_dtype(dout.dtype)
    if ungated is None:
        return dx, dout.new_empty(0, dtype=wide)
    selected = Routing(*plan).selected  # type: ignore[arg-type]
    shape = (selected.size(1), -1)
    mine = torch.where(selected.unsqueeze(2), dout.unflatten(1, shape), 0).to(wide)
    return dx, (mine * ungated.unflatten(1, shape)).sum(2)


def _scattered(x: Tensor, w: Tensor, bias: Tensor | None, routing: Routing, selected: Tensor) -> Tensor:
    """W_g x + bias_g for the groups of each token and 0 for others, float32 (float64 for float64) [T, N, m]."""
    x, w = _wide(x), _wide(w if w.dim() == 3 else w.unsqueeze(0))
    width, in_width = w.size(1) // routing.num_groups, x.size(1) // routing.num_out
    sums = x.new_zeros(x.size(0), w.size(1))
    selected_alone = bias is None
    for part in routing.parts(_by_group(x)):
        columns = _span(part.groups, width)
        weight = w[part.token_class, columns, _span(part.outs, in_width)]
        _add_product(sums, part, columns, _of_class(_plain(x, part, in_width), part, routing), weight.t())
        selected_alone = selected_alone and not part.masked
    if bias is not None:
        sums += bias if bias.dim() == 1 else bias[routing.token_class]
    grouped = sums.unflatten(1, (-1, width))
    return grouped if selected_alone else torch.where(selected.unsqueeze(2), grouped, 0)


def hidden_weight_grad(
    x: Tensor, dy: Tensor, gates: Tensor | None, routed_out: bool, *plan: Tensor | int | None
) -> Tensor:
    routing = Routing(*plan)  # type: ignore[arg-type]
    selected = routing.selected
    x, dy = _wide(x), _wide(dy)
    routed, other = (dy, x) if routed_out else (x, dy)
    width, other_width = routed.size(1) // routing.num_groups, other.size(1) // routing.num_out
    dw = x.new_zeros(routing.num_classes, dy.size(1), x.size(1))
    for part in routing.parts(_by_group(x)):
        mine = _of_class(_routed(routed, gates, selected, part), part, routing)
        theirs = _plain(other, part, other_width)
        columns, other_columns = _span(part.groups, width), _span(part.outs, other_width)
        if routed_out:
            dw[part.token_class, columns, other_columns] += mine.t() @ theirs
        else:
            dw[part.token_class, other_columns, columns] += theirs.t() @ mine
    return dw
