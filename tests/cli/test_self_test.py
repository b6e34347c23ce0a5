"""The self-test and the registry that it, doctor, the GPU check, opcheck and the table in docs/ops.md go through."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import opcheck

from warpform import _direct, _library
from warpform.cli import self_test
from warpform.ops import _register
from warpform.ops._example import Call, Draw

OPS = _register.ops()
ROOT = Path(__file__).resolve().parents[2]
CALLS = [(name, call) for name, op in OPS.items() for call in op.calls(torch.float32)]
FIRST = dict(reversed(CALLS))


def rows_of(*names: str, **how: Any) -> list[dict[str, Any]]:
    return [row for row in self_test.run(names, **{"device": "cpu", **how}) if "starting" not in row]


def test_every_op_of_the_library_is_registered_with_an_example() -> None:
    schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
    defined = {name.removeprefix("warpform::") for name in schemas if name.startswith("warpform::")}
    # Each op of the library has its reference beside it; what is composed of ops in Python has none.
    assert {name for name in defined if f"{name}_reference" in defined} == set(OPS)
    assert {str(row["op"]) for row in _library.kernel_table()} <= set(OPS)
    assert sum(len(names) for names in self_test.families().values()) == len(OPS)


@pytest.mark.parametrize("name", OPS)
def test_an_example_is_the_same_in_every_run(name: str) -> None:
    calls = OPS[name].calls(torch.bfloat16)
    assert calls and len({call.label for call in calls}) == len(calls)
    again = OPS[name].calls(torch.bfloat16)
    assert all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(calls, again, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param(name, call, marks=() if call is FIRST[name] else pytest.mark.slow, id=f"{name}-{call.label}")
        for name, call in CALLS
    ],
)
def test_opcheck(name: str, call: Call) -> None:
    function = getattr(torch.ops.warpform, name).default
    if not OPS[name].differentiable or call is FIRST[name]:
        opcheck(function, call.args, call.kwargs)
    if OPS[name].differentiable:
        args = tuple(
            a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in call.args
        )
        opcheck(function, args, call.kwargs)


def test_rows() -> None:
    rows = list(self_test.run(["bias_gelu", "packing_plan"], device="cpu"))
    has_kernels, has_direct = bool(_library.cpu_isa()), _direct.why_not() is None
    direct = ["direct", "direct backward"] if has_kernels and has_direct else []
    expected = [
        (name, dtype, direction)
        for name, dtypes, directions in (
            ("bias_gelu", ("float16", "bfloat16", "float32"), ["starting", "forward", "backward", *direct]),
            ("packing_plan", ("float32",), ["starting", "forward", *direct[:1]]),
        )
        for dtype in (dtypes if has_kernels else ("float32",))
        for direction in directions
    ]
    assert [(row["op"], row["dtype"], row.get("direction", "starting")) for row in rows] == expected
    assert all(row.get("ok", True) for row in rows)


def test_rows_say_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """bias_gelu has CPU kernels for float32, and the gradient of an op is judged by its reference."""
    expected = "kernel" if _library.cpu_isa() else "reference"
    assert {row["ran"] for row in rows_of("bias_gelu", "bias_gelu_backward")} == {expected}
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    assert {row["ran"] for row in rows_of("bias_gelu", "packing_plan")} == {"reference"}


def test_fallbacks_are_seen() -> None:
    x, bias = torch.randn(3, 8), torch.randn(8)
    with _register.fallbacks() as outer:
        with _register.fallbacks() as inner:
            torch.ops.warpform.bias_gelu(x.double(), bias.double())
        assert [name for name, _ in inner] == ["bias_gelu"] and "float64" in inner[0][1]
        leaf = x.double().requires_grad_()
        torch.ops.warpform.bias_gelu(leaf, bias.double()).sum().backward()
    assert [name for name, _ in outer] == ["bias_gelu", "bias_gelu", "bias_gelu_backward"] and len(inner) == 1
    torch.ops.warpform.bias_gelu(x.double(), bias.double())
    assert len(outer) == 3
    if _library.cpu_isa():
        with _register.fallbacks() as none:
            torch.ops.warpform.bias_gelu(x, bias)
        assert none == []


@pytest.mark.parametrize(("name", "direction"), [("bias_gelu", "forward"), ("window_attention_backward", "forward")])
def test_a_wrong_op_is_found(name: str, direction: str) -> None:
    right = getattr(torch.ops.warpform, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        outputs = right(*args, **kwargs)
        first = (outputs if isinstance(outputs, torch.Tensor) else outputs[0]) * (1 + 2**-18)
        return first if isinstance(outputs, torch.Tensor) else (first, *outputs[1:])

    library = type("Library", (), {name: staticmethod(wrong), "_kernel_table": staticmethod(lambda: "[]")})
    (row,) = rows_of(name, library=library)
    assert not row["ok"] and row["direction"] == direction and "is off by" in row["problem"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plan: (plan[0] + 1, *plan[1:]), "output 0 differs in 6 of 6 elements"),
        (lambda plan: (plan[0].long(), *plan[1:]), "output 0 is torch.int64 of shape"),
        (lambda plan: (plan[0][1:], *plan[1:]), "output 0 is torch.int32 of shape"),
    ],
)
def test_wrong_integers_are_found(change: Any, problem: str) -> None:
    class Library:
        _kernel_table = staticmethod(lambda: "[]")

        @staticmethod
        def packing_plan(mask: torch.Tensor, capacity: int) -> Any:
            return change(torch.ops.warpform.packing_plan(mask, capacity))

    (row,) = rows_of("packing_plan", library=Library)
    assert row["problem"].startswith("bool: ") and problem in row["problem"]


def test_an_op_that_raises_or_gives_nan_is_found() -> None:
    class Library:
        _kernel_table = staticmethod(lambda: "[]")

        @staticmethod
        def pack(*args: Any) -> Any:
            raise RuntimeError("broken on purpose\nand more")

        @staticmethod
        def unpack(*args: Any) -> Any:
            return torch.ops.warpform.unpack(*args) * float("nan")

    pack, unpack = rows_of("pack", "unpack", library=Library)
    assert pack["problem"] == "RuntimeError: broken on purpose"
    assert "is off by nan" in unpack["problem"]


def test_strict_only_while_a_kernel_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setenv("WARPFORM_STRICT", "0")
    with self_test._strict(True):
        seen.append(_register._env.strict())
    seen.append(_register._env.strict())
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    with self_test._strict(True):
        seen.append(_register._env.strict())
    monkeypatch.setenv("WARPFORM_STRICT", "1")
    for on in (None, False):
        with self_test._strict(on):
            seen.append(_register._env.strict())
    assert seen == [True, False, False, True, False] and _register._env.strict()


def test_a_gpu_without_room_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small GPU a refusal for want of shared memory goes to the reference; any other refusal is a failure."""
    no_room = "head_dim needs more shared memory a block than this GPU has"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for reason, kib, ok in ((no_room, 99, True), (no_room, 163, False), ("no kernel of this dtype", 99, False)):
        monkeypatch.setattr(_direct, "launch_limits", lambda device, kib=kib: {"shared_memory_limit": kib * 1024})
        monkeypatch.setattr(_register, "_warned", set())

        def refuses(ran: set[str], reason: str = reason) -> str | None:
            with pytest.warns(UserWarning, match=reason) if not self_test._env.strict() else contextlib.nullcontext():
                _register._report("bias_gelu", reason, ())
            return None

        with self_test._strict(True):
            row = self_test._timed("bias_gelu", "cuda", "float16", "forward", refuses)
        assert row["ok"] == ok, row
        assert ok or "WARPFORM_STRICT=1 forbids" in row["problem"]


def test_draw_rounds_the_same_values() -> None:
    half, double = (Draw("x", dtype)(40, 3) for dtype in (torch.float16, torch.float64))
    assert torch.equal(half, double.half()) and not torch.equal(half, Draw("y", torch.float16)(40, 3))


def test_docs_have_the_table_of_ops() -> None:
    if not (ROOT / "tools").is_dir() or not _library.kernel_table() or not _library.kernel_table("cpu"):
        pytest.skip("needs a checkout, and a library with kernels")
    sys.path.insert(0, str(ROOT / "tools"))
    import ops_table

    assert ops_table.main(["--check"]) == 0
    lines = ops_table.table(OPS.values(), _library.kernel_table(), _library.kernel_table("cpu"))
    forward = [name for name in OPS if not name.endswith("_backward")]
    assert [line.split("`")[1] for line in lines[2:]] == forward
