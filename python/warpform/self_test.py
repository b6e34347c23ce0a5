"""The self-test: the example of every op, forward and backward, in every dtype that has kernels, against the reference.

doctor runs all of it; the GPU check runs one family a process, and the emulator's ops (`library`) in its dry run.

A result passes by the rule of docs/numerics.md, with the reference in the dtype under test as the yardstick: its error
is at most `FACTOR` times that of the reference plus `UNITS` units, one unit being eps(dtype) times the largest exact
value of that output, where exact is the reference in float64. Tests judge kernels more strictly; this finds those that
do not work on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import _env, _library

FACTOR = 3.0
UNITS = 4.0
# Examples of ops without a kernel for a floating-point dtype (plans, say) need one to be drawn in.
_ANY = ("float32",)
_FLOATING = ("float16", "bfloat16", "float32")

Row = dict[str, Any]


def families() -> dict[str, tuple[str, ...]]:
    """The names of all ops by family, as the files of `ops.reference` are called.

    Raises ImportError where torch cannot be imported.
    """
    found: dict[str, tuple[str, ...]] = {}
    for op in _registry().values():
        found[op.family] = (*found.get(op.family, ()), op.name)
    return found


def run(names: Sequence[str], *, device: str = "cuda", library: Any = None, kernels: bool = True) -> Iterator[Row]:
    """Tests ops one by one, and yields rows as they are done, so that a crash loses nothing but what was running.

    Args:
        names: ops of `families()`.
        device: of the tensors, "cpu" or "cuda".
        library: the ops' namespace, torch.ops.warpform by default; or torch.ops.warpform_simt, which has no autograd.
        kernels: whether kernels are expected on the device: then each dtype that has some is tested, and the reference
            may not stand in for them.

    Yields:
        {"op", "dtype", "starting": True} before an op is tested in a dtype, then for each direction
        {"op", "device", "dtype", "direction", "ok", "problem", "ms"}: "forward" is the op itself, "backward" is
        autograd through a differentiable op. `problem` is None, or what is wrong, with the example's label.

    Raises:
        ImportError: the library is not loaded. KeyError: an unknown op.
    """
    import torch

    _library.require()
    registry = _registry()
    if library is None:
        library = torch.ops.warpform
    on_kernels = kernels and (device != "cpu" or library is not torch.ops.warpform)
    table = json.loads(library._kernel_table()) if on_kernels else []
    for name in names:
        op = registry[name]
        for dtype in _dtypes(name, table):
            yield {"op": name, "dtype": dtype, "starting": True}
            how = (op, getattr(torch, dtype), device, getattr(library, name))
            with _strict(on_kernels and library is torch.ops.warpform and any(row["op"] == name for row in table)):
                yield _timed(name, device, dtype, "forward", lambda how=how: _forward(*how))  # type: ignore[misc]
                if op.differentiable and library is torch.ops.warpform:
                    yield _timed(name, device, dtype, "backward", lambda how=how: _backward(*how))  # type: ignore[misc]


def _registry() -> dict[str, Any]:
    import importlib

    # Also where the library is not loaded, when `warpform.ops` as an attribute would raise.
    importlib.import_module("warpform.ops")
    return dict(importlib.import_module("warpform.ops._register").ops())


def _dtypes(name: str, table: list[Row]) -> tuple[str, ...]:
    """Floating-point dtypes that an op has kernels for, or the one that it is tested in without."""
    found = {str(row["dtype"]) for row in table if row["op"] == name and "dtype" in row}
    if "any" in found:
        return _FLOATING
    return tuple(dtype for dtype in _FLOATING if dtype in found) or _ANY


@contextlib.contextmanager
def _strict(on: bool) -> Iterator[None]:
    """WARPFORM_STRICT=1: a reference in place of a kernel is an error. Not where the user asked for references."""
    before = os.environ.get("WARPFORM_STRICT")
    if on and _env.backend() != "reference":
        os.environ["WARPFORM_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("WARPFORM_STRICT", None)
        else:
            os.environ["WARPFORM_STRICT"] = before


def _timed(name: str, device: str, dtype: str, direction: str, test: Callable[[], str | None]) -> Row:
    start = time.perf_counter()
    try:
        problem = test()
    except Exception as error:
        lines = str(error).strip().splitlines()
        problem = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return {
        "op": name,
        "device": device,
        "dtype": dtype,
        "direction": direction,
        "ok": problem is None,
        "problem": problem,
        "ms": round((time.perf_counter() - start) * 1e3, 1),
    }


def _forward(op: Any, dtype: Any, device: str, function: Callable[..., Any]) -> str | None:
    """The op on every call of its example; the first problem, or None."""
    for call in op.calls(dtype):
        here, exact = call.to(device), call.double()
        outputs = (
            _tuple(function(*here.args, **here.kwargs)),
            _tuple(op.reference(*call.args, **call.kwargs)),
            _tuple(op.reference(*exact.args, **exact.kwargs)),
        )
        problem = _compare(call.label, "output", *outputs)
        if problem:
            return problem
    return None


def _backward(op: Any, dtype: Any, device: str, function: Callable[..., Any]) -> str | None:
    """Autograd through the op on every call of its example; the first problem, or None."""
    for call in op.calls(dtype):
        gradients = [_gradients(function, c) for c in (call.to(device), call, call.double())]
        problem = _compare(call.label, "gradient", *gradients)
        if problem:
            return problem
    return None


def _gradients(function: Callable[..., Any], call: Any) -> tuple[Any, ...]:
    """Of every floating-point argument that has one, for the sum of all outputs with weights from -1 to 1."""
    import torch

    args = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in call.args
    ]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    loss = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for out in _tuple(function(*args, **call.kwargs)):
        if out.requires_grad and out.numel():
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
            # A row that sees no key has lse -inf, and no gradient.
            loss = loss + torch.where(out.isfinite(), out.double() * weights, 0).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _compare(label: str, what: str, ours: Sequence[Any], same: Sequence[Any], exact: Sequence[Any]) -> str | None:
    """`ours` against the reference in the same dtype and in float64, tensor by tensor; what is wrong, or None."""
    for index, (a, b, c) in enumerate(zip(ours, same, exact, strict=True)):
        problem = _difference(a, b, c)
        if problem:
            return f"{label}: {what} {index} {problem}"
    return None


def _difference(ours: Any, same: Any, exact: Any) -> str | None:
    import torch

    if ours is None or same is None:
        return None if ours is None and same is None else f"is {ours}, expected {same}"
    if ours.shape != same.shape or ours.dtype != same.dtype:
        return f"is {ours.dtype} of shape {list(ours.shape)}, expected {same.dtype} of shape {list(same.shape)}"
    ours = ours.detach().cpu()
    if not ours.numel():
        return None
    if not ours.is_floating_point():
        return None if torch.equal(ours, same) else f"differs in {int((ours != same).sum())} of {ours.numel()} elements"
    eps = torch.finfo(same.dtype).eps
    infinite = exact.isinf()
    if not torch.equal(ours[infinite].double(), exact[infinite].double()):
        return "has infinities in other places"
    finite = [t.detach().double()[~infinite] for t in (ours, same, exact)]
    error, allowed = _errors(*finite, eps)
    return None if error <= allowed else f"is off by {error:.3g}, allowed are {allowed:.3g}"


def _errors(ours: Any, same: Any, exact: Any, eps: float) -> tuple[float, float]:
    """The largest error, and what is allowed."""
    if not exact.numel():
        return 0.0, 0.0
    unit = eps * exact.abs().max().item()
    return (ours - exact).abs().max().item(), FACTOR * (same - exact).abs().max().item() + UNITS * unit
