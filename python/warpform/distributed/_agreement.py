"""Ranks that call different things are told so before the first hop, all of them, where they would else hang.

Every rank tells all others what it was called with, in one small message. The same exchange, empty, ends a call: no
rank returns before all of them have gone through the whole ring, so a rank that died late in it is noticed by those too
that had everything they need.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

from ..ops import _check
from . import _collectives
from ._errors import RingMismatchError
from ._group import Ring
from ._transport import Steps

CHECKS = ("always", "first")
# A message is as long whatever is in it: ranks that disagree have to understand each other.
_BYTES = 768
# The facts that ranks agreed on before, for check="first".
_agreed: set[tuple[str, str]] = set()


def choose(op: str, check: Any, device: torch.device) -> str:
    """`check` as given, or where it is None what costs no synchronisation."""
    if check is None:
        return "always" if device.type == "cpu" else "first"
    if check not in CHECKS:
        raise ValueError(f"{op}: check must be one of {', '.join(CHECKS)}, or None, got {check!r}")
    return str(check)


def digest(t: Tensor) -> str:
    """The values of a small tensor as a fact; its shape where reading them would wait for a device."""
    values = f", checksum {zlib.crc32(t.numpy().tobytes()):08x}" if t.device.type == "cpu" else ""
    return _check.describe(t) + values


def agree(ring: Ring, op: str, facts: dict[str, Any], *, group: str, check: str, device: torch.device) -> Steps[None]:
    """Raises RingMismatchError on all ranks unless all came with the same op and facts.

    check: "always", or "first": only when these facts are new to this rank.
    """
    text = json.dumps({"op": op, **facts}, default=str)
    if ring.size == 1 or (check == "first" and (group, text) in _agreed):
        return
    heard = yield from _collectives.tell(ring, _encoded(text, device), "the agreement before the first step")
    if not torch.equal(heard, heard[:1].expand_as(heard)):
        raise RingMismatchError(_difference(op, [_decoded(row) for row in heard.cpu()]))
    if check == "first":
        _agreed.add((group, text))


def refuse(ring: Ring, op: str, error: Exception, *, device: torch.device) -> Steps[None]:
    """Takes the place of `agree` on a rank whose own checks failed, so that the others need not wait for it."""
    message = str(error).removeprefix(f"{op}: ")
    yield from _collectives.tell(
        ring, _encoded(json.dumps({"op": op, "refused": message[:500]}), device), "the agreement before the first step"
    )


def finish(ring: Ring, *, check: str, device: torch.device) -> Steps[None]:
    """Returns when all ranks have come to it. On devices that the host does not wait for there is nothing to do."""
    if check == "always" and device.type == "cpu":
        yield from _collectives.tell(ring, torch.zeros(1, dtype=torch.uint8), "the end of the last step")


def _encoded(text: str, device: torch.device) -> Tensor:
    data = text.encode()
    if len(data) > _BYTES:
        data = f'{{"checksum": {zlib.crc32(data)}}}'.encode()
    return torch.frombuffer(bytearray(data.ljust(_BYTES)), dtype=torch.uint8).to(device)


def _decoded(row: Tensor) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(bytes(row.tolist()).decode())
    return facts


def _difference(op: str, facts: list[dict[str, Any]]) -> str:
    for rank, one in enumerate(facts):
        if "refused" in one:
            return f"{op}: rank {rank} of the ring refused its arguments: {one['refused']}"
    differences = []
    for name in facts[0]:
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            by_value.setdefault(json.dumps(one.get(name)), []).append(rank)
        if len(by_value) > 1:
            shown = ", ".join(
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in by_value.items()
            )
            differences.append(f"{name} is {shown}")
    return f"{op}: the ranks of the ring were called differently: {'; '.join(differences)}"
