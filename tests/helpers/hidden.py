"""Hidden routing: cases, inputs, the float64 oracle, and checks of a plan and of the three products.

The oracle knows no tiles: it multiplies by a matrix with zeros where a token does not use a group, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import misaligned, random, strided
from .compare import assert_close


@dataclass(frozen=True)
class HiddenCase:
    """Sizes of one routed product and how its tokens choose groups.

    routing: "topk" (two of the groups that are not shared), "random", "same" (all tokens alike), "distinct" (no two
    neighbours alike), "all", "none", "unused" (one group that no token uses).
    """

    name: str
    tokens: int
    num_groups: int
    width: int  # of a group
    other: int  # the dimension that is not routed
    routing: str = "topk"
    num_shared: int = 0
    num_classes: int = 1
    num_out: int = 0  # parts of the other dimension: block lower-triangular weights
    gates: bool = True
    bias: bool = True
    tile: int = 128
    layout: str = "plain"  # of x and w: "strided", "misaligned", "transposed" (w alone)

    def __str__(self) -> str:
        return self.name


HIDDEN_CASES = (
    HiddenCase("topk", 300, 16, 8, 40, num_shared=6),
    HiddenCase("topk_64", 130, 16, 64, 72, num_shared=6),
    HiddenCase("no_gates", 200, 8, 16, 24, gates=False),
    HiddenCase("no_bias", 129, 8, 16, 24, bias=False),
    HiddenCase("same", 140, 8, 16, 33, "same"),
    HiddenCase("distinct", 260, 12, 8, 24, "distinct"),
    HiddenCase("random", 150, 5, 24, 17, "random"),
    HiddenCase("all", 130, 4, 16, 24, "all"),
    HiddenCase("none", 70, 4, 16, 24, "none"),
    HiddenCase("unused_group", 150, 6, 16, 24, "unused"),
    HiddenCase("one_group", 90, 1, 32, 16, "random"),
    HiddenCase("64_groups", 140, 64, 8, 40, "random"),
    HiddenCase("odd_width", 75, 7, 5, 13, "random"),
    HiddenCase("one_token", 1, 16, 16, 40, num_shared=6),
    HiddenCase("two_tokens", 2, 16, 16, 40, num_shared=6),
    HiddenCase("four_tokens", 4, 16, 16, 129, num_shared=6),
    HiddenCase("no_tokens", 0, 4, 16, 24),
    HiddenCase("classes", 300, 4, 16, 24, "random", num_classes=3),
    HiddenCase("an_empty_class", 140, 4, 16, 24, "random", num_classes=5),
    HiddenCase("many_classes", 9, 2, 16, 24, "all", num_classes=6),
    HiddenCase("triangular", 140, 8, 16, 96, "all", num_out=8),
    HiddenCase("triangular_uneven", 70, 6, 16, 64, "all", num_out=4),
    HiddenCase("strided", 135, 8, 16, 24, layout="strided"),
    HiddenCase("misaligned", 135, 8, 16, 24, layout="misaligned"),
    HiddenCase("transposed", 135, 8, 16, 24, layout="transposed"),
)


def with_kernel(case: HiddenCase) -> HiddenCase:
    """The case nearest to this one that has CUDA kernels: groups and parts have widths that are multiples of 8."""
    parts = max(case.num_out, 1)
    return replace(case, width=-(-case.width // 8) * 8, other=-(-case.other // (8 * parts)) * 8 * parts)


@st.composite
def hidden_cases(draw: st.DrawFn) -> HiddenCase:
    """Any sizes, any choice of groups."""
    num_groups = draw(st.integers(1, 20))
    num_out = draw(st.sampled_from((0, 0, 1, 3)))
    return HiddenCase(
        "drawn",
        draw(st.one_of(st.integers(0, 6), st.integers(0, 300))),
        num_groups,
        draw(st.one_of(st.integers(1, 20), st.integers(1, 5).map(lambda n: 8 * n))),
        draw(st.integers(1, 40)) * max(num_out, 1),
        "all" if num_out else draw(st.sampled_from(("topk", "random", "same", "distinct", "all", "none", "unused"))),
        num_shared=draw(st.integers(0, num_groups)),
        num_classes=1 if num_out else draw(st.sampled_from((1, 1, 2, 4))),
        num_out=num_out,
        gates=draw(st.booleans()),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(("plain", "plain", "strided", "misaligned", "transposed"))),
    )


@dataclass
class HiddenInputs:
    """Tensors of one case; `routed_out`: of hidden_scatter_linear, else of hidden_gather_linear."""

    case: HiddenCase
    selected: Tensor  # bool [tokens, num_groups]
    token_class: Tensor | None  # int64 [tokens]
    group_mask: Tensor
    out_mask: Tensor | None
    x: Tensor
    w: Tensor
    gates: Tensor | None
    bias: Tensor | None
    dout: Tensor

    def plan(self, library: Any) -> tuple[Any, ...]:
        """The op's plan, in the order of arguments of the products."""
        case = self.case
        tensors = library.routing_plan(self.group_mask, self.token_class, case.num_groups, case.num_classes, case.tile)
        return (self.group_mask, *tensors, self.out_mask, case.num_groups, case.num_classes)


def wrong_plans(plan: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The plan of 140 tokens with numbers in its tensors that lie outside of everything."""
    group_mask, perm, inverse, tile_mask, tile_class, *rest = plan
    for wrong in (2**31 - 1, -(2**31), 141):
        yield (
            torch.full_like(group_mask, wrong),
            torch.where(perm % 3 == 0, torch.full_like(perm, wrong), perm),
            torch.full_like(inverse, wrong),
            torch.full_like(tile_mask, -1),
            torch.full_like(tile_class, wrong),
            *rest,
        )


def choose(case: HiddenCase) -> Tensor:
    """bool [tokens, num_groups]."""
    tokens, groups = case.tokens, case.num_groups
    if case.routing == "topk":
        specialised = torch.rand(tokens, groups).argsort(1)[:, : min(2, groups)]
        selected = torch.zeros(tokens, groups, dtype=torch.bool).scatter_(1, specialised, True)
        selected[:, : case.num_shared] = True
        return selected
    if case.routing == "distinct":
        numbers = (torch.arange(tokens) * 5 + 3) % 2 ** min(groups, 30)
        return (numbers.unsqueeze(1) >> torch.arange(groups)) % 2 == 1
    if case.routing == "same":
        return (torch.rand(groups) < 0.5).expand(tokens, groups).clone()
    share = {"all": 1.1, "none": 0.0}.get(case.routing, 0.3)
    selected = torch.rand(tokens, groups) < share
    if case.routing == "unused":
        selected[:, groups // 2] = False
    return selected


def bits(selected: Tensor) -> Tensor:
    """int64 [...], bit by bit."""
    mask = torch.zeros(selected.shape[:-1], dtype=torch.int64, device=selected.device)
    for g in range(selected.size(-1)):
        mask |= selected[..., g].long() << g
    return mask


def hidden_inputs(case: HiddenCase, dtype: torch.dtype, device: str = "cpu", *, routed_out: bool) -> HiddenInputs:
    """Fresh random tensors; what a token does not use holds NaN where it comes in."""
    routed = case.num_groups * case.width
    size_in, size_out = (case.other, routed) if routed_out else (routed, case.other)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    classes = [case.num_classes] if case.num_classes > 1 else []
    selected = choose(case).to(device)
    token_class = None
    if classes:
        # The second class stays empty.
        token_class = torch.randint(case.num_classes, (case.tokens,))
        token_class[token_class == 1] = 0
    out_mask = None
    if case.num_out:
        o, g = torch.arange(case.num_out).unsqueeze(1), torch.arange(case.num_groups)
        out_mask = bits(g / case.num_groups < (o + 1) / case.num_out).to(device)

    x = random(case.tokens, size_in, dtype=dtype, device=device)
    dout = random(case.tokens, size_out, dtype=dtype, device=device)
    hidden = ~selected.repeat_interleave(case.width, 1)
    (dout if routed_out else x)[hidden] = float("nan")
    w = random(*classes, size_out, size_in, dtype=dtype, device=device)
    if case.layout == "transposed":
        w = w.transpose(-1, -2).contiguous().transpose(-1, -2)
    if case.layout == "strided":
        x, dout = strided(x), strided(dout)
    if case.layout == "misaligned":
        x, w, dout = misaligned(x), misaligned(w), misaligned(dout)
    gates = None
    if case.gates:
        gates = random(case.tokens, case.num_groups, dtype=wide, device=device)
        gates[~selected] = float("nan")
        if case.tokens:
            gates[0] = 0.0
    bias = random(*classes, size_out, dtype=dtype, device=device) if case.bias else None
    return HiddenInputs(
        case,
        selected,
        None if token_class is None else token_class.to(device),
        bits(selected),
        out_mask,
        x,
        w,
        gates,
        bias,
        dout,
    )


# ---- plan ----


def check_routing_plan(library: Any, case: HiddenCase, device: str = "cpu") -> None:
    """The order of tokens, token by token."""
    x = hidden_inputs(case, torch.float32, device, routed_out=False)
    perm, inverse, tile_mask, tile_class = library.routing_plan(
        x.group_mask, x.token_class, case.num_groups, case.num_classes, case.tile
    )
    masks = [m % 2**64 for m in x.group_mask.tolist()]
    classes = [0] * case.tokens if x.token_class is None else x.token_class.tolist()
    places: list[int] = []
    owners: list[int] = []
    for c in range(case.num_classes):
        members = sorted((t for t in range(case.tokens) if classes[t] == c), key=lambda t: masks[t])
        padded = members + [-1] * (-len(members) % case.tile)
        places += padded
        owners += [c] * (len(padded) // case.tile)
    tiles = -(-case.tokens // case.tile) + case.num_classes
    unused = tiles - len(owners)
    places += [-1] * (unused * case.tile)
    union = [0] * tiles
    for place, t in enumerate(places):
        if t >= 0:
            union[place // case.tile] |= masks[t]
    if 20 * sum(u.bit_count() for u in union) > 17 * case.num_groups * len(owners):
        union = [2**case.num_groups - 1] * len(owners) + [0] * unused
    assert perm.dtype == inverse.dtype == tile_class.dtype == torch.int32 and tile_mask.dtype == torch.int64
    assert perm.tolist() == places
    assert inverse.tolist() == [places.index(t) for t in range(case.tokens)]
    assert [m % 2**64 for m in tile_mask.tolist()] == union
    assert tile_class.tolist() == owners + [0] * unused


# ---- products ----


def oracle(x: HiddenInputs, dtype: torch.dtype, *, routed_out: bool) -> dict[str, Tensor]:
    """out and the gradients dx, dw, dgates, dbias in dtype, from dense products with zeros for what is not used."""
    case = x.case
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = x.selected.repeat_interleave(case.width, 1)
    token_class = torch.zeros(case.tokens, dtype=torch.int64, device=x.x.device)
    token_class = token_class if x.token_class is None else x.token_class

    def leaf(t: Tensor | None, kind: torch.dtype) -> Tensor | None:
        return None if t is None else t.detach().nan_to_num(0.0).to(kind, copy=True).requires_grad_()

    data, w, bias = (leaf(t, dtype) for t in (x.x, x.w, x.bias))
    gates = leaf(x.gates, wide)
    assert data is not None and w is not None
    weight = w if w.dim() == 3 else w.unsqueeze(0)
    if x.out_mask is not None:
        sees = torch.tensor([[m >> g & 1 for g in range(case.num_groups)] for m in x.out_mask.tolist()])
        sees = sees.to(weight.device, weight.dtype).repeat_interleave(case.other // case.num_out, 0)
        sees = sees.repeat_interleave(case.width, 1)
        weight = weight * (sees.t() if routed_out else sees)
    factor = mine.to(wide) if gates is None else mine * gates.repeat_interleave(case.width, 1)
    out = data.new_zeros(case.tokens, weight.size(1))
    for c in range(case.num_classes):
        here = (token_class == c).unsqueeze(1)
        given = data if routed_out else (data * factor).to(dtype)
        one = given @ weight[c].t()
        if bias is not None:
            one = one + (bias[c] if bias.dim() == 2 else bias)
        out = out + torch.where(here, one, 0)
    if routed_out:
        out = (out * factor).to(dtype)
    leaves = {"dx": data, "dw": w, "dgates": gates, "dbias": bias}
    leaves = {name: t for name, t in leaves.items() if t is not None}
    dout = x.dout.nan_to_num(0.0).to(dtype)
    found = torch.autograd.grad((out * dout).sum(), tuple(leaves.values()))  # type: ignore[arg-type]
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def check_hidden(library: Any, case: HiddenCase, dtype: torch.dtype, device: str = "cpu", *, routed_out: bool) -> None:
    """One of the two products, its gradients by the ops that the autograd formula calls, and the weight's."""
    x = hidden_inputs(case, dtype, device, routed_out=routed_out)
    plan = x.plan(library)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truth, eager = (oracle(x, kind, routed_out=routed_out) for kind in (torch.float64, dtype))
    found: dict[str, Tensor] = {}
    if routed_out:
        out, ungated = library.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, True, *plan)
        again, empty = library.hidden_scatter_linear(x.x, x.w, x.gates, x.bias, False, *plan)
        assert torch.equal(again, out) and empty.shape == (0,) and ungated.dtype == dtype
        hidden = ~x.selected.repeat_interleave(case.width, 1)
        assert not out[hidden].any() and not ungated[hidden].any()
        kept = None if x.gates is None else ungated
        found["dx"], dgates = library.hidden_scatter_linear_backward(x.dout, kept, x.w, x.gates, *plan)
    else:
        out = library.hidden_gather_linear(x.x, x.w, x.gates, x.bias, *plan)
        found["dx"], dgates = library.hidden_gather_linear_backward(x.dout, x.x, x.w, x.gates, *plan)
    assert dgates.dtype == wide
    if x.gates is None:
        assert dgates.shape == (0,)
    else:
        found["dgates"] = dgates
    dw = library.hidden_weight_grad(x.x, x.dout, x.gates, routed_out, *plan)
    assert dw.dtype == wide and dw.shape == (case.num_classes, *x.w.shape[-2:])
    found["dw"] = dw.view(x.w.shape)
    assert out.dtype == found["dx"].dtype == dtype and out.is_contiguous()
    assert_close("out", out, truth["out"], eager["out"])
    for name, value in found.items():
        # Gates are float32, but what their gradient adds up was rounded to the dtype of the tensors.
        assert_close(name, value, truth[name], eager[name].to(dtype), gradient=True)
