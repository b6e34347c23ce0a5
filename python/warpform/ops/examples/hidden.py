"""Examples of routing, and of the layers that it routes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._example import Call, Draw
from ..reference import hidden as reference

_GROUPS, _WIDTH, _OTHER, _TILE = 6, 16, 48, 128


@dataclass(frozen=True)
class _Routed:
    label: str
    tokens: int
    plan: tuple[Any, ...]
    gates: Tensor | None
    classes: int

    def weight(self, draw: Draw, rows: int, cols: int) -> Tensor:
        return draw(self.classes, rows, cols) if self.classes > 1 else draw(rows, cols)

    def bias(self, draw: Draw, cols: int) -> Tensor:
        return draw(self.classes, cols) if self.classes > 1 else draw(cols)


def _mask(draw: Draw, tokens: int) -> Tensor:
    return reference.routing_mask(draw.integers(_GROUPS, tokens, 2), _GROUPS, 1)


def _routed(draw: Draw) -> Iterator[_Routed]:
    """More tokens than a tile holds, as few as decoding has, weights by class, and a triangle of weights."""
    for label, tokens, gated in (("300 tokens", 300, True), ("5 tokens", 5, False)):
        mask = _mask(draw, tokens)
        plan: tuple[Any, ...] = (mask, *reference.routing_plan(mask, None, _GROUPS, 1, _TILE), None, _GROUPS, 1)
        yield _Routed(label, tokens, plan, draw(tokens, _GROUPS, dtype=draw.wide) if gated else None, 1)
    mask = _mask(draw, 150)
    plan = (mask, *reference.routing_plan(mask, draw.integers(2, 150), _GROUPS, 2, _TILE), None, _GROUPS, 2)
    yield _Routed("2 classes", 150, plan, draw(150, _GROUPS, dtype=draw.wide), 2)
    mask = torch.full((140,), 2**_GROUPS - 1)
    triangle = reference.pack_bits(torch.ones(_GROUPS // 2, _GROUPS).tril(1).bool())
    plan = (mask, *reference.routing_plan(mask, None, _GROUPS, 1, _TILE), triangle, _GROUPS, 1)
    yield _Routed("triangle", 140, plan, None, 1)


def routing_mask(draw: Draw) -> Iterator[Call]:
    """Indices that repeat."""
    yield Call("int64", (draw.integers(_GROUPS, 300, 3), _GROUPS, 2))
    yield Call("64 groups", (draw.integers(64, 40, 5).to(torch.int32), 64, 0))


def routing_plan(draw: Draw) -> Iterator[Call]:
    """With and without classes."""
    yield Call("one class", (_mask(draw, 300), None, _GROUPS, 1, _TILE))
    yield Call("3 classes", (_mask(draw, 300), draw.integers(3, 300), _GROUPS, 3, _TILE))


def hidden_gather_linear(draw: Draw) -> Iterator[Call]:
    """Every kind of plan."""
    for r in _routed(draw):
        x, w = draw(r.tokens, _GROUPS * _WIDTH), r.weight(draw, _OTHER, _GROUPS * _WIDTH)
        bias = None if r.label == "triangle" else r.bias(draw, _OTHER)
        yield Call(r.label, (x, w, r.gates, bias, *r.plan))


def hidden_gather_linear_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in hidden_gather_linear(draw):
        x, w, gates, _, *plan = call.args
        yield Call(call.label, (draw(x.size(0), _OTHER), x, w, gates, *plan))


def hidden_scatter_linear(draw: Draw) -> Iterator[Call]:
    """Every kind of plan; without gates there is nothing to keep."""
    for r in _routed(draw):
        x, w = draw(r.tokens, _OTHER), r.weight(draw, _GROUPS * _WIDTH, _OTHER)
        bias = None if r.label == "triangle" else r.bias(draw, _GROUPS * _WIDTH)
        yield Call(r.label, (x, w, r.gates, bias, r.gates is not None, *r.plan))


def hidden_scatter_linear_backward(draw: Draw) -> Iterator[Call]:
    """Every forward's."""
    for call in hidden_scatter_linear(draw):
        _, w, gates, _, keep, *plan = call.args
        out, ungated = reference.hidden_scatter_linear(*call.args)
        yield Call(call.label, (draw.like(out), ungated if keep else None, w, gates, *plan))


def hidden_weight_grad(draw: Draw) -> Iterator[Call]:
    """Yields the weight gradients of both layers (routed in, routed out) for every kind of plan."""
    for r in _routed(draw):
        routed, other = draw(r.tokens, _GROUPS * _WIDTH), draw(r.tokens, _OTHER)
        yield Call(f"{r.label}, in", (routed, other, r.gates, False, *r.plan))
        yield Call(f"{r.label}, out", (other, routed, r.gates, True, *r.plan))
