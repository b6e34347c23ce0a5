"""Calls of ops past torch's dispatcher, by `warpform._C`: when they are taken, what they return; life without it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import warpform
from helpers.backends import Simt, simt_library
from helpers.cases import offsets
from warpform import _direct, _library
from warpform.cli import self_test
from warpform.ops._register import ops

pytestmark = pytest.mark.skipif(_direct.why_not() is not None, reason=f"there are no direct calls: {_direct.why_not()}")

HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def simt() -> Simt:
    return simt_library()


class Closed(Exception):
    """The direct way was not taken."""


def closed(*args: Any, **kwargs: Any) -> Any:
    raise Closed


def emulated(name: str, fallback: Callable[..., Any] = closed) -> Callable[..., Any]:
    """The direct call of an op's kernels in the emulator."""
    import warpform._C as module

    call: Callable[..., Any] = module.Library(str(simt_library().path)).direct(name, fallback)
    return call


# ---- results ----


@pytest.mark.simt
@pytest.mark.parametrize("name", ops())
def test_same_results_as_through_torch(simt: Simt, name: str) -> None:
    op = ops()[name]
    direct = emulated(name)
    dtypes = {row.get("dtype") for row in _library.kernel_table() if row["op"] == name}
    for dtype in HALF if {"float16", "any"} & dtypes else (torch.float32,):
        for call in op.calls(dtype):
            simt.configure(0)
            expected = getattr(simt, name)(*call.args, **call.kwargs)
            simt.configure(0)
            with torch.inference_mode():
                found = direct(*call.args, **call.kwargs)
            assert isinstance(found, tuple) == isinstance(expected, tuple)
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            for a, b in pairs:
                assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b), call.label


@pytest.mark.simt
def test_results_are_ordinary_tensors(simt: Simt) -> None:
    """Of torch's allocator, freed with the last reference, and good for anything that follows."""
    direct = emulated("bias_gelu")
    x = torch.randn(64, 128).half()
    out = direct(x, None)
    assert type(out) is Tensor and not out.requires_grad and out._version == 0 and out.untyped_storage().resizable()
    out.requires_grad_().sum().backward()
    assert out.grad is not None
    dead = weakref.ref(out.untyped_storage())
    del out
    gc.collect()
    assert dead() is None
    with torch.inference_mode():
        assert direct(x, None).is_inference()


@pytest.mark.simt
def test_nothing_leaks(simt: Simt) -> None:
    direct = emulated("varlen_attention")
    q, cu = torch.randn(7, 2, 64).half(), offsets([3, 4])
    arguments = (q, q, q, cu, cu, 4, 4)

    def counts() -> list[int]:
        return [sys.getrefcount(x) for x in (q, cu, None, True, direct)]

    direct(*arguments, causal=True)
    seen = []
    # What other tests left may be freed meanwhile, in any thread; a leak would show every time.
    for _ in range(3):
        gc.collect()
        before, objects = counts(), len(gc.get_objects())
        for _ in range(100):
            direct(*arguments, causal=True)
            with pytest.raises(ValueError, match="softcap"):
                direct(*arguments, softcap=-1.0)
        gc.collect()
        changes = [after - one for one, after in zip(before, counts(), strict=True)]
        seen.append((changes, len(gc.get_objects()) - objects))
        if all(abs(change) <= 2 for change in changes) and seen[-1][1] < 50:
            return
    pytest.fail(f"references and objects: {seen}")


# ---- when the way is open ----


class Subclass(Tensor):
    pass


class SeesFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class SeesOps(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    with torch.autograd.forward_ad.dual_level():
        yield


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "torch_function": SeesFunctions,
    "torch_dispatch": SeesOps,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "forward_ad": forward_mode,
    "default_device": lambda: torch.device("cpu"),
}


@pytest.mark.simt
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_sees_the_call(simt: Simt, mode: str) -> None:
    direct = emulated("bias_gelu")
    x = torch.randn(4, 16).half()
    direct(x, None)
    with MODES[mode](), pytest.raises(Closed):
        direct(x, None)
    direct(x, None)


@pytest.mark.simt
def test_transforms_and_tracers_see_the_call(simt: Simt) -> None:
    direct = emulated("bias_gelu", lambda x, bias: x + 1)
    x = torch.randn(4, 16).half()
    assert not torch.equal(direct(x, None), x + 1)
    assert torch.equal(torch.func.vmap(lambda row: direct(row, None))(x), x + 1)
    traced = torch.jit.trace(lambda t: direct(t, None), (x,), check_trace=False)
    assert torch.equal(traced(x), x + 1)


@pytest.mark.simt
@pytest.mark.parametrize("variable", ["WARPFORM_LOG", "WARPFORM_VALIDATE"])
def test_settings_close_it(simt: Simt, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "debug" if variable == "WARPFORM_LOG" else "1")
    with pytest.raises(Closed):
        emulated("bias_gelu")(torch.randn(4, 16).half(), None)


@pytest.mark.simt
def test_gradients_close_it(simt: Simt) -> None:
    direct = emulated("bias_gelu")
    x, bias = torch.randn(4, 16).half(), torch.randn(16).half().requires_grad_()
    with pytest.raises(Closed):
        direct(x, bias)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            direct(x, bias)
    direct(x, bias.detach())
    parameter = torch.nn.Parameter(bias.detach(), requires_grad=False)
    direct(x, parameter)


@pytest.mark.simt
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(4, 16).half().as_subclass(Subclass), None),
        (torch.randn(4, 16, dtype=torch.complex64).conj().imag, None),  # negated where it is read
        (torch.randn(4, 16, dtype=torch.complex64).conj(), None),
        (torch._efficientzerotensor((4, 16), dtype=torch.half), None),
        (torch.randn(4, 16).half(), None, "\ud800"),
        (torch.randn(4, 16).half(), None, "tanh\0"),
        (torch.randn(4, 16).to_sparse(), None),
        (torch.randn(4, 16, device="meta"), None),
        ([1.0], None),
        (torch.randn(4, 16).half(),),
        (torch.randn(4, 16).half(), None, "none", 1),
        (torch.randn(4, 16).half(), None, 3),
    ],
    ids=[
        "subclass",
        "negative",
        "conjugate",
        "zeros",
        "surrogate",
        "null_byte",
        "sparse",
        "meta",
        "list",
        "too_few",
        "too_many",
        "not_text",
    ],
)
def test_what_torch_has_to_look_at(simt: Simt, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(Closed):
        emulated("bias_gelu")(*arguments)


@pytest.mark.simt
def test_arguments_by_name(simt: Simt) -> None:
    direct = emulated("bias_gelu")
    x = torch.randn(4, 16).half()
    expected = direct(x, None, "tanh")
    assert torch.equal(direct(bias=None, approximate="tanh", x=x), expected)
    assert torch.equal(direct(x, bias=None, **{"".join(("approx", "imate")): "tanh"}), expected)
    for wrong in ({"x": x, "bias": None, "nonsense": 1}, {"bias": None}):
        with pytest.raises(Closed):
            direct(**wrong)
    with pytest.raises(Closed):
        direct(x, None, x=x)


@pytest.mark.simt
def test_it_can_be_closed(simt: Simt) -> None:
    direct, x = emulated("bias_gelu"), torch.randn(4, 16).half()
    direct(x, None)
    with _direct.closed(), pytest.raises(Closed):
        direct(x, None)
    direct(x, None)


def test_a_setting_closes_it() -> None:
    code = "import warpform; print(warpform._direct.why_not())"
    assert "WARPFORM_DIRECT=0" in run_python(code, WARPFORM_DIRECT="0")


def test_on_a_cpu_torch_is_called_for_what_has_no_kernel() -> None:
    calls = []

    def fallback(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "through torch"

    call = _direct.direct("bias_gelu", fallback)
    x = torch.randn(4, 16, dtype=torch.float64)
    assert call(x, None, approximate="tanh") == "through torch"
    assert calls == [((x, None), {"approximate": "tanh"})]
    if _library.cpu_isa():
        assert isinstance(call(x.float(), None), torch.Tensor) and len(calls) == 1


# ---- errors ----


@pytest.mark.simt
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"q": torch.randn(2, 64).half()}, ValueError),
        ({"k": torch.randn(7, 2, 64)}, TypeError),
        ({"softcap": -1.0}, ValueError),
        ({"cu_seqlens_q": offsets([3, 4]).long()}, TypeError),
    ],
    ids=["shape", "dtype", "value", "offsets"],
)
def test_errors_are_those_of_the_public_function(simt: Simt, change: dict[str, Any], error: type[Exception]) -> None:
    q, cu = torch.randn(7, 2, 64).half(), offsets([3, 4])
    arguments = {"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(error) as direct:
        emulated("varlen_attention")(**arguments | change)
    with pytest.raises(error) as public:
        warpform.ops.varlen_attention(**arguments | change)
    assert str(direct.value) == str(public.value) and type(direct.value) is type(public.value)


# ---- facts and plans ----


@pytest.mark.parametrize("capability", (80, 90, 100, 120))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_large_problems_take_kernels_for_hopper_on_hopper_alone(capability: int, dtype: torch.dtype) -> None:
    """The sizes that benchmarks have in mind, of each op that has such kernels."""
    import warpform._C as module

    needs_kernels()
    if not _library.build_info()["hopper"]:
        pytest.skip("built without kernels for Hopper")

    def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    offsets, mask = meta(9, of=torch.int32), torch.full((16384,), 0xFF)  # 8 of 16 groups
    plan = (mask, *torch.ops.warpform.routing_plan(mask, None, 16, 1, 128), None, 16, 1)
    gates, weight = meta(16384, 16, of=torch.float32), meta(4096, 4096)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("blockdiag_multiply", (meta(8192, 8192), meta(1, 8192, 8192)), {}),
        ("blockdiag_multiply", (meta(16384, 4096), meta(4, 1024, 1024)), {}),
        ("monarch_multiply", (meta(16384, 768), meta(4, 192, 192), meta(4, 768, 192)), {}),
        ("hidden_gather_linear", (meta(16384, 4096), weight, gates, None, *plan), {}),
        ("hidden_scatter_linear", (meta(16384, 4096), weight, gates, None, False, *plan), {}),
    ]
    for head_dim in (64, 128):
        q = meta(16384, 2048 // head_dim, head_dim)
        for causal in (False, True):
            calls.append(("varlen_attention", (q, q, q, offsets, offsets, 2048, 2048), {"causal": causal}))
    for name, arguments, options in calls:
        found = module.launch_plan(name, *arguments, capability=capability, **options)
        kernels = [launch["kernel"] for launch in found["launches"]]
        assert any("hopper" in kernel for kernel in kernels) == (capability == 90), (name, kernels)


def test_facts() -> None:
    import warpform._C as module

    assert module.build_info() == _library.build_info()
    assert module.kernel_table() == _library.kernel_table()
    assert set(module.library.ops()) == set(ops())


def needs_kernels() -> None:
    if not _library.build_info()["cuda"]:
        pytest.skip("built without CUDA kernels")


def test_supported() -> None:
    import warpform._C as module

    needs_kernels()
    assert module.supported("varlen_attention", torch.float16, "cuda", head_dim=64) is None
    assert module.supported("varlen_attention", "bfloat16") is None
    assert "float32" in module.supported("varlen_attention", torch.float32)
    assert module.supported("varlen_attention", torch.float16, head_dim=257) is not None
    assert module.supported("varlen_attention", torch.float16, head_dim=60) is not None
    assert (module.supported("varlen_attention", torch.float16, "cpu") is None) == bool(_library.cpu_isa())
    assert module.supported("spectral_conv", torch.float32, "cpu") is not None
    if _library.cpu_isa():
        assert "float64" in module.supported("varlen_attention", torch.float64, "cpu")
        assert "256" in module.supported("varlen_attention", torch.float32, "cpu", head_dim=257)
    if not torch.cuda.is_available():
        assert module.supported("varlen_attention", torch.float16, "cuda:0") is not None
    with pytest.raises(ValueError, match="no op nonsense"):
        module.supported("nonsense")
    with pytest.raises(ValueError, match="device must be"):
        module.supported("varlen_attention", torch.float16, "tpu")


def dtype_with_kernels(name: str) -> torch.dtype:
    dtypes = {row.get("dtype") for row in _library.kernel_table() if row["op"] == name}
    return torch.bfloat16 if {"bfloat16", "any"} & dtypes else torch.float32


@pytest.mark.parametrize("name", ops())
def test_every_op_has_a_plan(name: str) -> None:
    import warpform._C as module

    needs_kernels()
    op = ops()[name]
    for call in op.calls(dtype_with_kernels(name)):
        plan = module.launch_plan(name, *call.args, **call.kwargs)
        assert {"tile", "stages", "splits", "shared_bytes", "grid", "threads", "waves", "kernel"} <= set(plan)
        assert plan["launches"] and all(launch["op"] for launch in plan["launches"])
        for launch in plan["launches"]:
            assert "(" not in launch["kernel"].split("<")[0] and launch["kernel"], launch
            assert min(launch["grid"]) >= 1 and 32 <= launch["threads"] <= 1024 and launch["waves"] > 0
            assert 0 <= launch["shared_bytes"] <= 227 * 1024


def test_plans_follow_the_sizes_and_the_machine() -> None:
    import warpform._C as module

    needs_kernels()

    def plan(tokens: int, **machine: int) -> dict[str, Any]:
        q = torch.empty(tokens, 16, 128, dtype=torch.bfloat16, device="meta")
        cu = torch.empty(2, dtype=torch.int32, device="meta")
        machine = {"capability": 80} | machine
        found: dict[str, Any] = module.launch_plan("varlen_attention", q, q, q, cu, cu, tokens, tokens, **machine)
        return found

    long, short = plan(16384), plan(64)
    assert long["tile"] == [128, 64, 128] and short["tile"] == [64, 64, 128]
    assert long["grid"] == [131, 16, 1] and long["waves"] > 1 > short["waves"]
    assert plan(16384, sm_count=66)["waves"] == pytest.approx(2 * long["waves"], rel=1e-4)
    with pytest.raises(ValueError, match="the kernels take float16 and bfloat16"):
        q = torch.empty(4, 2, 64, device="meta")
        cu = torch.empty(2, dtype=torch.int32, device="meta")
        module.launch_plan("varlen_attention", q, q, q, cu, cu, 4, 4)
    with pytest.raises(TypeError, match="needs the argument"):
        module.launch_plan("bias_gelu")
    with pytest.raises(TypeError, match="takes 3 positional arguments, got 4"):
        module.launch_plan("bias_gelu", q, None, "none", 1)


ROUTED = ("hidden_gather_linear", "hidden_scatter_linear_backward", "hidden_weight_grad")


@pytest.mark.parametrize("op", ROUTED)
def test_a_plan_says_where_a_gpu_has_no_room(op: str) -> None:
    """Routed products on GPUs of 99, 163 and 227 KiB of shared memory a block."""
    import warpform._C as module

    needs_kernels()

    def plan(tokens: int, with_gates: bool, kib: int) -> Any:
        def empty(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*sizes, dtype=dtype, device="meta")

        tiles = -(-tokens // 128)
        places, int64 = empty(tiles * 128, dtype=torch.int32), torch.int64
        inverse, classes = empty(tokens, dtype=torch.int32), empty(tiles, dtype=torch.int32)
        routes = (empty(tokens, dtype=int64), places, inverse, empty(tiles, dtype=int64), classes, None, 64, 1)
        gates = empty(tokens, 64, dtype=torch.float32) if with_gates else None
        x, w = empty(tokens, 512), empty(512, 512)
        first = {
            "hidden_gather_linear": (x, w, gates, None),
            "hidden_scatter_linear_backward": (x, None, w, gates),
            "hidden_weight_grad": (x, x, gates, False),
        }
        return module.launch_plan(op, *first[op], *routes, shared_memory_limit=kib * 1024)

    for kib in (163, 227):
        for tokens in (1, 1000, 1_000_000):
            assert plan(tokens, True, kib)["launches"] and plan(tokens, False, kib)["launches"]
    no_room = "shared memory a block than this GPU has"
    with pytest.raises(ValueError, match=no_room):
        plan(1000, True, 99)
    if op == "hidden_weight_grad":
        with pytest.raises(ValueError, match=no_room):
            plan(1000, False, 99)
    else:
        assert plan(1000, False, 99)["launches"]
    if op == "hidden_gather_linear":  # a few tokens have a kernel of their own
        assert plan(1, True, 99)["launches"]


@pytest.mark.simt
@pytest.mark.parametrize("name", ops())
def test_plans_are_what_is_launched(simt: Simt, name: str) -> None:
    """On the emulated machine: grid, threads and shared memory of every launch."""
    import warpform._C as module

    needs_kernels()
    for call in ops()[name].calls(dtype_with_kernels(name)):
        simt.configure(0, 132)
        getattr(simt, name)(*call.args, **call.kwargs)
        plan = module.launch_plan(name, *call.args, **call.kwargs)
        keys = ("grid", "threads", "shared_bytes")
        planned = [{key: launch[key] for key in keys} for launch in plan["launches"]]
        assert planned == [{key: launch[key] for key in keys} for launch in simt.launches()], call.label


@pytest.mark.simt
def test_the_emulator_has_no_plans(simt: Simt) -> None:
    import warpform._C as module

    with pytest.raises(ValueError, match="the emulator's library has no plans"):
        module.Library(str(simt.path)).launch_plan("bias_gelu", torch.empty(4, 8, device="meta"), None)


# ---- the module, and life without it ----


def run_python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_registers_the_ops() -> None:
    code = "import warpform._C, torch; print(warpform._C.build_info()['version'], torch.ops.warpform.pack)"
    assert warpform.__version__ in run_python(code)


def test_everything_works_without_it() -> None:
    """The smoke suite: the examples of all ops, forward and backward, where the module is not there."""
    code = """
import sys
sys.modules["warpform._C"] = None
import warpform
from warpform import _direct
from warpform.cli import self_test
assert "cannot be imported" in _direct.why_not()
names = [name for family in self_test.families().values() for name in family]
rows = [row for row in self_test.run(names, device="cpu", kernels=False) if "ok" in row]
assert len(rows) > len(names) and all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
print("ok")
"""
    assert run_python(code).strip() == "ok"


def test_the_smoke_suite_passes_with_it() -> None:
    names = [name for family in self_test.families().values() for name in family]
    rows = [row for row in self_test.run(names, device="cpu", kernels=False) if "ok" in row]
    assert len(rows) > len(names) and all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]


# ---- gradients ----


@pytest.mark.simt
@pytest.mark.parametrize("name", [name for name, op in ops().items() if op.differentiable])
def test_gradients_without_the_dispatcher(simt: Simt, name: str) -> None:
    """The forward is a direct call of the emulator's kernels; the backward is the op's own on a CPU."""
    op = ops()[name]
    function = self_test._recorded_call(op, emulated(name))
    simt.configure(0)
    problem = self_test._backward(op, torch.float16, "cpu", function, set())
    assert problem is None
    wanted = next(iter(op.calls(torch.float16)))
    assert all(g is not None for g in self_test._gradients(function, wanted)[:1])
