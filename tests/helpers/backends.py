"""The implementations of the ops, and how one test is given to each of them.

    REFERENCE = reference()
    SIMT, GPU = kernels(HALF, has_kernel=lambda case: case.head_dim % 8 == 0)

    @on(REFERENCE, SIMT, GPU, case=CASES)
    def test_cases(backend: Backend, case: Case, dtype: torch.dtype) -> None:
        check_my_op(backend.library, case, dtype, backend.device)

Such a test runs once for each backend, each case that the backend has a kernel for, and each of its dtypes.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import itertools
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from warpform.ops import _register

from .cases import FLOATS
from .compare import poisoned
from .drawn import drawn

HALF = (torch.float16, torch.bfloat16)
# With one multiprocessor a block walks over much of the work, with many it does one piece.
FEW_SMS, MANY_SMS = 1, 1024
# Bytes of shared memory that a block may take: on an H200, and on sm_86 and sm_89.
H200_SHARED, AD102_SHARED = 232_448, 101_376

# An emulated GPU: the order of threads (0 is the plain one), multiprocessors, bytes of shared memory a block.
Machine = tuple[int, ...]
ORDERS: tuple[Machine, ...] = ((1, 3), (2, 3), (3, 3))


class Simt:
    """torch.ops.warpform_simt: the ops of torch.ops.warpform with their CUDA kernels, run on CPU tensors.

    And the emulator's control, with the functions of its module `_simt`: configure, claim, launches.
    """

    def __init__(self, path: Path, control: Any) -> None:
        self.path = path
        self.configure, self.claim, self.launches = control.configure, control.claim, control.launches

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.warpform_simt, name)


@functools.cache
def simt_library() -> Simt:
    """The emulator. Skips the test where it was not built."""
    given = os.environ.get("WARPFORM_SIMT_LIBRARY")
    path = Path(given) if given else Path(__file__).parents[2] / "build" / "libwarpform_simt.so"
    if not path.exists():
        pytest.skip(
            f"the emulator was not built: {path.name} is missing (an editable install builds it where CUDA's headers "
            "are found; WARPFORM_SIMT=1 insists; WARPFORM_SIMT_LIBRARY names another place)"
        )
    torch.ops.load_library(str(path))
    control = path.with_name("_simt" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not control.exists():
        pytest.skip(f"the emulator's control was not built: {control.name} is missing; building it needs pybind11")
    spec = importlib.util.spec_from_file_location("_simt", control)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load(str(path))
    return Simt(path, module)


def need_cpu_kernels() -> None:
    """Skips the test where warpform has no kernels for this CPU."""
    missing = torch.ops.warpform._cpu_kernels_missing()
    if missing:
        pytest.skip(missing)


def _refuse(name: str, reason: str, args: Sequence[Any]) -> None:
    raise AssertionError(f"{name}: the reference runs instead of a CPU kernel: {reason}")


def order_of(name: str) -> int:
    """The order of threads in which the emulator runs the test of this name: its own, and the same in every run."""
    return 1 + zlib.crc32(name.encode()) % 1000


def _any_case(case: Any) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops, and what it takes of one family of them."""

    name: str  # "reference", "cpu", "simt" or "gpu"
    dtypes: tuple[torch.dtype, ...]
    has_kernel: Callable[[Any], bool] = _any_case  # says of a case whether it runs
    examples: int = 40  # of a drawn test

    @property
    def device(self) -> str:
        """Where its tensors are."""
        return "cuda" if self.name == "gpu" else "cpu"

    @property
    def library(self) -> Any:
        """The namespace of its ops."""
        return simt_library() if self.name == "simt" else torch.ops.warpform

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """The marks of its tests."""
        return {"simt": [pytest.mark.simt], "gpu": [pytest.mark.gpu]}.get(self.name, [])

    @contextlib.contextmanager
    def ready(self, test: str) -> Iterator[None]:
        """What is set while a test of this name runs."""
        with pytest.MonkeyPatch.context() as patch:
            if self.name == "reference":
                patch.setenv("WARPFORM_BACKEND", "reference")  # where kernels would serve, too
                with poisoned():
                    yield
                return
            if self.name == "simt":
                self.configure(order_of(test))
            elif self.name == "cpu":
                need_cpu_kernels()
                # A fallback to the reference is an error. WARPFORM_STRICT does not make it one on a CPU.
                patch.setattr(_register, "_report", _refuse)
            else:
                patch.setenv("WARPFORM_STRICT", "1")
            yield

    # ---- the emulator ----

    def configure(self, *machine: int) -> None:
        """Makes the emulator this machine from here on; does nothing on other backends."""
        if self.name == "simt":
            self.library.configure(*machine)

    def machines(self, *machines: Machine) -> Iterator[None]:
        """The body of the loop runs on each of these emulated machines, on other backends once."""
        for machine in machines if self.name == "simt" else machines[:1]:
            self.configure(*machine)
            yield

    @contextlib.contextmanager
    def hopper(self, taken: bool) -> Iterator[None]:
        """Inside, GPUs of compute capability 9.0 take the kernels for them, or those for every GPU."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WARPFORM_HOPPER", "1" if taken else "0")
            yield

    def kernel_sets(self) -> Iterator[None]:
        """The body of the loop runs with the kernels for compute capability 9.0 and without them, where it had any."""
        for taken in (True, False):
            before = len(self.library.launches()) if self.name == "simt" else 0
            with self.hopper(taken):
                yield
            if self.name in ("reference", "cpu"):
                return
            if self.name == "simt" and not any("hopper" in each["kernel"] for each in self.library.launches()[before:]):
                return

    # ---- properties ----

    def assert_repeats(
        self, call: Callable[[], Sequence[Tensor]], machines: Sequence[Machine] = ORDERS
    ) -> Sequence[Tensor]:
        """The results of the call, the same bits each time, in the emulator in any order of blocks and threads."""
        expected: Sequence[Tensor] | None = None
        for machine in machines if self.name == "simt" else range(5 if self.name == "gpu" else 2):
            if isinstance(machine, tuple):
                self.configure(*machine)
            found = call()
            expected = found if expected is None else expected
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(one, other), f"result {i} differs, on machine or in run {machine}"
        assert expected is not None
        return expected


def reference(dtypes: tuple[torch.dtype, ...] = FLOATS, *, examples: int = 40) -> Backend:
    """The definitions in PyTorch, torch.ops.warpform on CPU tensors. They take every case."""
    return Backend("reference", dtypes, examples=examples)


def cpu(
    dtypes: tuple[torch.dtype, ...], has_kernel: Callable[[Any], bool] = _any_case, *, examples: int = 60
) -> Backend:
    """The kernels for CPUs, torch.ops.warpform on CPU tensors, of the instruction set that WARPFORM_CPU_ISA names."""
    return Backend("cpu", dtypes, has_kernel, examples)


def kernels(
    dtypes: tuple[torch.dtype, ...],
    has_kernel: Callable[[Any], bool] = _any_case,
    *,
    examples: tuple[int, int] = (60, 100),
) -> tuple[Backend, Backend]:
    """The CUDA kernels: in the emulator, and torch.ops.warpform on a GPU; examples of drawn tests of each."""
    return Backend("simt", dtypes, has_kernel, examples[0]), Backend("gpu", dtypes, has_kernel, examples[1])


Values = Sequence[Any] | Callable[[Backend], Sequence[Any]]


def on(*backends: Backend, **values: Values) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a test to each backend, with every combination of the values of other parameters.

    Values are a sequence, or a function that makes one for a backend. Of a parameter `case` those remain that the
    backend has kernels for. A parameter `dtype` of which nothing is said takes the backend's dtypes; on a CPU every
    second dtype of a case, in turn from case to case, is slow: a quick run has all cases and all dtypes, not all pairs.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        names = list(values)
        if "dtype" in inspect.signature(test).parameters and not {"dtype"} & {*values, *_given(test)}:
            names.append("dtype")
        rows = []
        for backend in backends:
            lists = []
            for name in names:
                of_name = values.get(name, backend.dtypes)
                of_backend = of_name(backend) if callable(of_name) else of_name
                lists.append([v for v in of_backend if name != "case" or backend.has_kernel(v)])
            for combination in itertools.product(*lists):
                identifier = "-".join([backend.name, *map(_name, combination)])
                marks = [*backend.marks, *([pytest.mark.slow] if _repeats(backend, names, lists, combination) else [])]
                rows.append(pytest.param(backend, *combination, marks=marks, id=identifier))
        return pytest.mark.parametrize(["backend", *names], rows)(test)

    return decorate


def _repeats(
    backend: Backend, names: Sequence[str], lists: Sequence[Sequence[Any]], combination: Sequence[Any]
) -> bool:
    """Whether a quick run on a CPU leaves out this pair of case and dtype."""
    if backend.name == "gpu" or not {"case", "dtype"} <= set(names):
        return False
    case, dtype = names.index("case"), names.index("dtype")
    return (lists[case].index(combination[case]) + lists[dtype].index(combination[dtype])) % 2 == 1


def _given(test: Callable[..., None]) -> list[str]:
    """The parameters whose values come from marks of pytest below `on`."""
    names = [mark.args[0] for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return [name for some in names for name in ([some] if isinstance(some, str) else some)]


def one_dtype(backend: Backend) -> tuple[torch.dtype]:
    """For tests of one dtype: that of most training on a GPU, and that of most work on a CPU."""
    return (torch.bfloat16 if backend.name in ("simt", "gpu") else torch.float32,)


def _name(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    # Of a function its name: an address would differ from run to run, and the test's seed with it.
    return str(getattr(value, "__name__", value))


Strategy = Any  # a strategy of hypothesis, or a function that makes one for a backend


def drawn_on(*backends: Backend, **strategies: Strategy) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `on`, with values that hypothesis draws: `backend.examples` of them, each with a seed of torch.

    Strategies may be functions that make one for a backend. A parameter `dtype` of which nothing is said draws of the
    backend's dtypes; a parameter `seed` is told the seed.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        parameters = [p for name, p in signature.parameters.items() if name != "backend"]

        @functools.wraps(test)
        def run(backend: Backend) -> None:
            @functools.wraps(test)
            def example(**values: Any) -> None:
                test(backend=backend, **values)

            example.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
            given = {name: s if isinstance(s, st.SearchStrategy) else s(backend) for name, s in strategies.items()}
            if "dtype" in signature.parameters:
                given.setdefault("dtype", st.sampled_from(backend.dtypes))
            drawn(backend.examples, **given)(example)()

        run.__signature__ = signature.replace(parameters=[signature.parameters["backend"]])  # type: ignore[attr-defined]
        return on(*backends)(run)

    return decorate


class Deterministic:
    """A library with deterministic=True in every call."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(self._library, name)
        return lambda *args, **options: op(*args, deterministic=True, **options)


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all tensors are equal bit by bit."""
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))
