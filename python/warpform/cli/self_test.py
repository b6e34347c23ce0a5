"""The self-test: the example of every op, forward and backward, in every dtype that has kernels, against the reference.

doctor runs all of it; the GPU check runs one family a process, and the emulator's ops (`library`) in its dry run.

A result passes by the rule of docs/numerics.md for largest errors: at most twice the error of the reference in the same
dtype (three times for gradients) plus one unit, eps(dtype) times the largest exact value of that output; exact is the
reference in float64, on the same inputs. Examples are small, and the reference may round few sums whose terms cancel
without an error: what a unit of float32 in the inputs changes in the exact result stands for its error if it is larger.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import _direct, _env, _library

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


def run(
    names: Sequence[str],
    *,
    device: str = "cuda",
    library: Any = None,
    kernels: bool = True,
    dtypes: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Tests ops one by one, and yields rows as they are done, so that a crash loses nothing but what was running.

    Args:
        names: ops of `families()`.
        device: of the tensors, "cpu" or "cuda".
        library: the ops' namespace, torch.ops.warpform by default; or torch.ops.warpform_simt, which has no autograd.
        kernels: whether kernels are expected on the device: then each dtype that has some is tested, and the reference
            may not replace them.
        dtypes: only these, where an op has one of them.

    Yields:
        {"op", "dtype", "starting": True} before an op is tested in a dtype, then for each direction
        {"op", "device", "dtype", "direction", "ok", "problem", "ms", "ran"}: "forward" is the op itself, "backward" is
        autograd through a differentiable op, and "direct" and "direct backward" are the same two past torch's
        dispatcher (`warpform._C`), where that is open. `problem` is None, or what is wrong, with the example's label.
        `ran` says what computed the example's calls: "kernel", "reference", or "kernel and reference" where some calls
        have no kernel.

    Raises:
        ImportError: the library is not loaded. KeyError: an unknown op.
    """
    import torch

    _library.require()
    registry = _registry()
    if library is None:
        library = torch.ops.warpform
    own = library is torch.ops.warpform
    on_cpu = own and device == "cpu"
    # On a CPU a reference may replace a kernel, as no kernel takes every call.
    on_kernels = kernels and not on_cpu
    if on_cpu:
        table = _library.kernel_table("cpu") if _env.backend() != "reference" else []
    else:
        table = json.loads(library._kernel_table()) if on_kernels else []
    for name in names:
        op = registry[name]
        found = _dtypes(name, table)
        for dtype in [dtype for dtype in found if dtypes is None or dtype in dtypes] or found:
            yield {"op": name, "dtype": dtype, "starting": True}
            how = (op, getattr(torch, dtype), device, getattr(library, name))
            has_kernels = any(row["op"] == name for row in table)
            with _strict(True if on_kernels and own and has_kernels else None):
                yield _timed(name, device, dtype, "forward", functools.partial(_forward, *how))
                if op.differentiable and own:
                    yield _timed(name, device, dtype, "backward", functools.partial(_backward, *how))
                direct = _direct_call(name) if own and (on_kernels or has_kernels) else None
                if direct is not None:
                    how = (*how[:3], direct)
                    yield _timed(name, device, dtype, "direct", functools.partial(_forward, *how))
                    if op.differentiable:
                        how = (*how[:3], _recorded_call(op, direct))
                        yield _timed(name, device, dtype, "direct backward", functools.partial(_backward, *how))


def examples() -> Iterator[tuple[str, str, Any]]:
    """The calls of every op's example, each with the op's name and the first dtype that it has kernels for.

    Raises ImportError where the library is not loaded.
    """
    import torch

    _library.require()
    table = _library.kernel_table()
    for op in _registry().values():
        dtype = _dtypes(op.name, table)[0]
        for call in op.calls(getattr(torch, dtype)):
            yield op.name, dtype, call


def _registry() -> dict[str, Any]:
    import importlib

    # Also where the library is not loaded, when `warpform.ops` as an attribute would raise.
    importlib.import_module("warpform.ops")
    return dict(importlib.import_module("warpform.ops._register").ops())


def _dtypes(name: str, table: list[Row]) -> tuple[str, ...]:
    """Floating-point dtypes that an op has kernels for; without kernels, the dtype of its test."""
    found = {str(row["dtype"]) for row in table if row["op"] == name and "dtype" in row}
    if "any" in found:
        return _FLOATING
    return tuple(dtype for dtype in _FLOATING if dtype in found) or _ANY


@contextlib.contextmanager
def _strict(on: bool | None) -> Iterator[None]:
    """Sets WARPFORM_STRICT: whether a reference in place of a kernel is an error.

    None leaves it as it is, and so does True where the user asked for references.
    """
    before = os.environ.get("WARPFORM_STRICT")
    if on is False:
        os.environ["WARPFORM_STRICT"] = "0"
    elif on and _env.backend() != "reference":
        os.environ["WARPFORM_STRICT"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("WARPFORM_STRICT", None)
        else:
            os.environ["WARPFORM_STRICT"] = before


def _direct_call(name: str) -> Callable[..., Any] | None:
    """The op past torch's dispatcher, which raises where it would need that; None where that way is not open at all."""
    import torch

    if _direct.why_not() is not None or _env.backend() == "reference":
        return None

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name}: the direct way was closed")

    call = _direct.direct(name, refuse)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return run


def _recorded_call(op: Any, direct: Callable[..., Any]) -> Callable[..., Any]:
    """An op whose forward is a direct call, recorded for its backward."""
    import importlib

    import torch

    register = importlib.import_module("warpform.ops._register")
    overload = getattr(torch.ops.warpform, op.name).default
    recorded: Callable[..., Any] = register.autograd_function(overload, direct, op.backward, op.setup_context)
    return recorded


# Refusals end with these words where a GPU has too little shared memory for a kernel.
NO_ROOM = "than this GPU has"
# An A100 has this much shared memory a block. tools/gates.py checks that no example is refused where there is as much.
ROOM_FOR_ALL = 163 * 1024


def is_for_want_of_room(error: RuntimeError) -> bool:
    """Tells whether WARPFORM_STRICT made an error of a reference that runs because this GPU is a small one.

    On a GPU with as much shared memory a block as an A100 it is never that: a refusal is a fault there.
    """
    if NO_ROOM not in str(error) or "WARPFORM_STRICT" not in str(error):
        return False
    import torch

    limits = _direct.launch_limits(torch.cuda.current_device())
    return limits["shared_memory_limit"] < ROOM_FOR_ALL


# Runs the example of an op; puts into the set whether a "kernel" or the "reference" ran, and returns the first problem.
Test = Callable[[set[str]], str | None]


def _with_room(test: Test, ran: set[str]) -> str | None:
    """Runs a test, and again without WARPFORM_STRICT where this GPU is too small for a kernel."""
    try:
        return test(ran)
    except RuntimeError as error:
        if not is_for_want_of_room(error):
            raise
    with _strict(False):
        return test(ran)


def _timed(name: str, device: str, dtype: str, direction: str, test: Test) -> Row:
    start = time.perf_counter()
    ran: set[str] = set()
    try:
        problem = _with_room(test, ran)
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
        "ran": " and ".join(sorted(ran)),
    }


@contextlib.contextmanager
def _watched(ran: set[str]) -> Iterator[None]:
    """Puts into `ran` what computed a call inside."""
    import importlib

    with importlib.import_module("warpform.ops._register").fallbacks() as found:
        yield
    ran.add("reference" if found else "kernel")


@contextlib.contextmanager
def _references() -> Iterator[None]:
    """References alone run inside."""
    before = os.environ.get("WARPFORM_BACKEND")
    os.environ["WARPFORM_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WARPFORM_BACKEND"]
        else:
            os.environ["WARPFORM_BACKEND"] = before


def _forward(op: Any, dtype: Any, device: str, function: Callable[..., Any], ran: set[str]) -> str | None:
    """The op on every call of its example; the first problem, or None."""
    factor = 3 if op.name.endswith(("_backward", "_grad")) else 2
    for call in op.calls(dtype):
        here, exact, moved = call.to(device), call.double(), call.nudged()
        with _watched(ran):
            ours = _tuple(function(*here.args, **here.kwargs))
        outputs = (
            ours,
            _tuple(op.reference(*call.args, **call.kwargs)),
            _tuple(op.reference(*exact.args, **exact.kwargs)),
            _tuple(op.reference(*moved.args, **moved.kwargs)),
        )
        problem = _compare(f"{call.label}: output", outputs, dtype, factor)
        if problem:
            return problem
    return None


def _backward(op: Any, dtype: Any, device: str, function: Callable[..., Any], ran: set[str]) -> str | None:
    """Autograd through `function` on every call of the op's example; the first problem, or None."""
    import torch

    on_cpu = getattr(torch.ops.warpform, op.name)
    for call in op.calls(dtype):
        with _watched(ran):
            here = _gradients(function, call.to(device))
        with _references():
            gradients = (here, *(_gradients(on_cpu, c) for c in (call, call.double(), call.nudged())))
        problem = _compare(f"{call.label}: gradient", gradients, dtype, 3)
        if problem:
            return problem
    return None


def _gradients(function: Callable[..., Any], call: Any) -> tuple[Any, ...]:
    """Computes the gradients of floating-point arguments, of the sum of all outputs with weights from -1 to 1."""
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


def _compare(what: str, results: tuple[tuple[Any, ...], ...], dtype: Any, factor: int) -> str | None:
    """The first difference between the tensors of four results, or None; they and the rest are `_difference`'s."""
    for index, (ours, same, exact, moved) in enumerate(zip(*results, strict=True)):
        problem = _difference(ours, same, exact, moved, dtype, factor)
        if problem:
            return f"{what} {index} {problem}"
    return None


def _difference(ours: Any, same: Any, exact: Any, moved: Any, dtype: Any, factor: int) -> str | None:
    """Returns the fault of `ours`, or None.

    same, exact, moved: from the reference in `dtype`, in float64, and in float64 of inputs that are a unit off.
    """
    import torch

    if ours is None or same is None:
        return None if ours is same else f"is {type(ours).__name__}, expected {type(same).__name__}"
    if ours.shape != same.shape or ours.dtype != same.dtype:
        return f"is {ours.dtype} of shape {list(ours.shape)}, expected {same.dtype} of shape {list(same.shape)}"
    ours = ours.detach().cpu()
    if not ours.is_floating_point():
        return None if torch.equal(ours, same) else f"differs in {int((ours != same).sum())} of {ours.numel()} elements"
    # A float32 result of float16 inputs carries the rounding of what was made of them.
    eps = max(torch.finfo(dtype).eps, torch.finfo(same.dtype).eps)
    ours, same, exact, moved = (t.detach().double() for t in (ours, same, exact, moved))
    infinite = exact.isinf()
    if not torch.equal(ours[infinite], exact[infinite]):
        return "has infinities in other places"
    ours, same, exact, moved = (t[~infinite] for t in (ours, same, exact, moved))
    if not exact.numel():
        return None
    error = (ours - exact).abs().max().item()
    usual = max((t - exact).abs().max().item() for t in (same, moved))
    allowed = factor * usual + eps * exact.abs().max().item()
    return None if error <= allowed else f"is off by {error:.3g}, allowed are {allowed:.3g}"
