"""Shared by all benchmarks: cases and their providers, clocks, ceilings, and the rows that are appended to results.

A `Spec` names a workload and its providers; `Spec.build` makes a `Case`, whose `with_NAME` methods each prepare one
provider. `Session.measure` runs a provider once, lets the case check the outputs, and only then times it. It knows
nothing of pytest: conftest.py calls it under pytest-benchmark, rows.py without both.

Timing. On a CPU the host's clock: pytest-benchmark's where it is there. On a GPU CUDA events around several launches
that walk through copies of the inputs larger together than the L2 cache; a short sleep is put on the stream first, so
that the host enqueues ahead and the gaps it would leave do not count (except where `Case.end_to_end`: there they do).
The host's clock then times the host.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import functools
import gc
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kinds
import plans
import suites
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

SIZE_COLUMNS = (
    "dtype", "batch", "seqlen", "tokens", "heads", "kv_heads", "head_dim", "hidden", "causal", "grid", "window",
    "shift",
)  # fmt: skip
COLUMNS = (
    "date", "commit", "device", "kind", "family", "kernel", "direction", "workload", "provider", "status", "backend",
    *SIZE_COLUMNS,
    "p20_us", "p50_us", "p80_us", "host_us", "images_s", "tflops", "gbs", "roofline", "ceiling_tflops", "ceiling_gbs",
    "waves", "ratios", "threads", "warpform", "torch", "cuda", "transformers", "python",
)  # fmt: skip

# Seconds that one run may take, by default; suites.DEADLINES divides them among the families. Past COMPILE_SHARE of its
# time a family leaves out compiled peers, past all of it everything else; each is listed as such.
BUDGET = 660.0
COMPILE_SHARE = 0.7
# Inputs together exceed the largest L2 cache there is about three times over.
ROTATE_BYTES = 160e6
MOST_COPIES = 64


# Read at each call: "0" leaves out the kernels for GPUs of compute capability 9.0.
HOPPER = "WARPFORM_HOPPER"

# The seconds that a compilation may take. A run with less time left begins none.
COMPILE_SECONDS = 20.0


class Missing(Exception):
    """A provider that this machine, or this run, cannot have; the text says why."""


# A clock for calls: (call, rounds, iterations, device) -> microseconds of a call, round by round.
Clock = Callable[[Callable[[], Any], int, int, str], list[float]]


@dataclass(frozen=True)
class Spec:
    """One workload, not yet built. Subclasses add what they need and `build`."""

    kernel: str
    direction: str  # forward, backward, forward+backward or training step
    sizes: tuple[tuple[str, Any], ...]  # of SIZE_COLUMNS
    providers: tuple[str, ...]
    # A main workload is one that a short run measures and docs/hardware.md lists.
    main: bool = field(default=False, kw_only=True)

    family = ""

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.sizes if name != "dtype")
        return f"{self.kernel}-{self.direction.replace(' ', '_')}-{sizes}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """(FLOPs, bytes): the least that any implementation has to do and to move, in a dtype of `itemsize` bytes.

        (0, 0) where only the built case can count them.
        """
        return 0.0, 0.0

    def build(self, session: Session) -> Case:
        raise NotImplementedError


class Case:
    """A workload with its inputs. `flops` and `bytes` are what `Spec.work` counts."""

    flops = 0.0
    bytes = 0.0
    images = 0  # that one call takes, for models of images
    end_to_end = False  # whether the host's gaps between launches are part of the time
    where = ""  # what a row's backend says beside: processes and cores
    elsewhere: tuple[str, ...] = ()  # ops that calls run in other processes

    def prepare(self, provider: str) -> list[Callable[[], Any]]:
        """One call for each copy of the inputs. Raises Missing."""
        calls: list[Callable[[], Any]] = getattr(self, f"with_{provider}")()
        return calls

    def check(self, provider: str, output: Any) -> None:
        """Raises AssertionError where the output of a provider's first call is wrong."""
        raise NotImplementedError


def is_main(session: Session, condition: bool) -> bool:
    """`Spec.main` of a workload that a file lists among its main ones on a GPU; elsewhere all of them are."""
    return condition or session.tiny or session.device != "cuda"


def inference_or_step(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    douts: Sequence[Tensor],
    backward: bool,
    *,
    allow_unused: bool = False,
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of function(*tensors): in inference mode, or with the gradients of all tensors from `douts`.

    The call returns the outputs, followed by the gradients. allow_unused: a tensor may have None for its gradient.
    """
    leaves = [t.detach().requires_grad_(backward) for t in tensors]

    def outputs() -> tuple[Tensor, ...]:
        found = function(*leaves)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def infer() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return outputs()

    def step() -> tuple[Tensor, ...]:
        found = outputs()
        return (*found, *torch.autograd.grad(found, leaves, douts, allow_unused=allow_unused))

    return step if backward else infer


def draw_lengths(batch: int, seqlen: int) -> tuple[int, ...]:
    """Uniform on [0.2 S, S], the same in every run."""
    draw = random.Random(batch * 10_000 + seqlen)
    return tuple(draw.randint(max(1, round(0.2 * seqlen)), seqlen) for _ in range(batch))


def copies(device: str, bytes_of_one: float) -> int:
    """Returns the number of copies of the inputs to rotate through."""
    return 1 if device == "cpu" else max(1, min(MOST_COPIES, round(ROTATE_BYTES / max(bytes_of_one, 1.0) + 0.5)))


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth||, infinite where actual is not finite."""
    actual, truth = actual.detach().double(), truth.detach().double()
    norm, error = truth.norm().item(), (actual - truth).norm().item()
    return error / norm if norm > 0 and error == error else (0.0 if error == 0 else float("inf"))


def assert_near(name: str, actual: Tensor, oracle: Tensor, eager: Tensor, scale: float = 0.0) -> None:
    """The bound for peers: 4 times the relative error of the eager computation in the same dtype, plus 4 eps.

    scale: the size of what was added up, as in tests/helpers/compare.py; if larger than the result, eps is of it.

    They are not ours to judge by the rule of tests/helpers/compare.py, which warpform has to pass; but one that
    computed something else would be off by far more.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {list(actual.shape)}, expected {list(oracle.shape)}"
    error, allowed = (
        relative_error(actual, oracle),
        4 * relative_error(eager, oracle) + 4 * torch.finfo(eager.dtype).eps * _growth(oracle, scale),
    )
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def _growth(oracle: Tensor, scale: float) -> float:
    """Returns the size of the oracle's terms in units of the oracle's size, at least 1."""
    size = oracle.double().square().mean().sqrt().item() if oracle.numel() else 0.0
    return max(1.0, scale / size) if size else 1.0


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool | None = True) -> Callable[..., Any]:
    """torch.compile of a function, once a run, so that several sizes share its code."""
    torch._dynamo.config.cache_size_limit = 64
    torch._functorch.config.donated_buffer = False  # backward is timed many times over one forward
    return torch.compile(function, dynamic=dynamic)


def needs_compiling(provider: str) -> bool:
    """Tells by its name whether a provider is compiled by torch.compile."""
    return "compiled" in provider


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """An environment variable has this value inside, and afterwards the one that it had, or none."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


def under(name: str, value: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with an environment variable set while it runs: also while a CUDA graph captures it."""

    def wrapped() -> Any:
        with setting(name, value):
            return call()

    return wrapped


def on_mma_sync(session: Session, prepare: Callable[[], list[Callable[[], Any]]]) -> list[Callable[[], Any]]:
    """What `prepare` returns, on the kernels for every GPU where plain calls take kernels for Hopper.

    Raises Missing where that is the same: on a CPU, where kernels for Hopper do not run, where none serves the call.
    """
    session.need_gpu()
    from warpform import _library

    reason = _library.hopper_kernels_missing(torch.cuda.current_device())
    if reason:
        raise Missing(reason)
    calls = prepare()
    if _same_kernels(calls[0]):
        raise Missing("no kernel for Hopper serves this call")
    return [under(HOPPER, "0", call) for call in calls]


def _same_kernels(call: Callable[[], Any]) -> bool:
    """Tells whether a call has the same plan without kernels for Hopper; False where it has none that can be read."""
    from warpform import _direct

    try:
        ops, machine = plans.ops_of(call), _direct.launch_limits(torch.cuda.current_device())
        plain = plans.kernels(ops, **machine)
        with setting(HOPPER, "0"):
            return bool(plain) and plain == plans.kernels(ops, **machine)
    except Exception as error:
        print(f"no plans to compare: {_line(error)}", file=sys.stderr)
        return False


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def device_samples(calls: list[Callable[[], Any]], seconds: float, *, hide_host: bool) -> list[float]:
    """Microseconds of one call on the GPU, in samples of several calls each, by CUDA events."""

    def sample(count: int, first: int, sleep_us: float) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if sleep_us:
            torch.cuda._sleep(int(sleep_us * 2000))  # cycles; some 2 GHz, so at least as long as asked
        start.record()
        for i in range(count):
            calls[(first + i) % len(calls)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / count

    for call in calls:
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    rough = sample(3, 0, 0)
    host_us = (time.perf_counter() - begin) * 1e6 / 3
    count = max(1, min(32, int(1000 / max(rough, 1.0))))
    sleep_us = min(20_000.0, 1.5 * count * host_us) if hide_host else 0.0
    each = max(host_us, rough) * count * 1e-6 + sleep_us * 1e-6
    rounds = max(5, min(100, int(seconds / each)))
    return [sample(count, i * count, sleep_us) for i in range(rounds)]


def ceilings(device: str, dtype: torch.dtype, tiny: bool) -> tuple[float, float]:
    """(TFLOP/s of a large matrix product, GB/s of a large copy, reads and writes counted), both by this machine now.

    On a CPU torch has two libraries for products in float32, and the faster is the ceiling.
    """
    from warpform import _torch_private

    width = 128 if tiny else 8192 if device == "cuda" else 1536
    length = 1 << (16 if tiny else 30 if device == "cuda" else 28)  # bytes
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    source = torch.randint(0, 256, (length,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest(call: Callable[[], Any]) -> float:
        call()
        if device == "cuda":
            return statistics.median(device_samples([call], 0.2, hide_host=True))
        times = []
        for _ in range(1 if tiny else 7):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)

    products: list[Callable[[], Any]] = [lambda: a @ b]
    onednn = _torch_private.onednn_linear() if device == "cpu" and dtype == torch.float32 else None
    if onednn is not None:
        products.append(lambda: onednn(a, b, None))
    least = min(map(fastest, products))
    return 2 * width**3 / least / 1e6, 2 * length / fastest(lambda: target.copy_(source)) / 1e3


def stopwatch(call: Callable[[], Any], rounds: int, iterations: int, device: str) -> list[float]:
    """The clock where no other is given; on a GPU each round starts with it idle and ends when the call returns."""
    found = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(iterations):
            call()
        found.append((time.perf_counter() - start) * 1e6 / iterations)
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Names the commit that is measured, and whether the tree differs from it. Records of earlier runs do not count."""
    named = os.environ.get("WARPFORM_COMMIT")
    if named:
        return named
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    records = ("docs/hardware.md", "bench/results/")
    dirty = [
        line for line in _output("git", "status", "--porcelain").splitlines() if not any(r in line for r in records)
    ]
    return (head + (" (changed)" if dirty else "")) if head else "unknown"


def machine(device: str) -> dict[str, Any]:
    """The columns that are the same in every row of a run."""
    import warpform
    from warpform._hardware import cpu_name

    try:
        import transformers

        transformers_version = transformers.__version__
    except ImportError:
        transformers_version = ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "device": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "warpform": warpform.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "transformers": transformers_version,
        "python": platform.python_version(),
    }


def backend(device: str, call: Callable[[], Any], elsewhere: Sequence[str] = ()) -> str:
    """Names what ran warpform's ops in a call that was made before.

    On a GPU that can be told without making it again: the reference warns once per op. On a CPU kernels take some calls
    and references the others without a warning, so the call is made once more and its ops are watched, which those of a
    compiled call cannot be. Ops that it runs in other processes (`elsewhere`) are judged by their first example.
    """
    if os.environ.get("WARPFORM_BACKEND") == "reference":
        return "reference"
    from warpform import _library
    from warpform.ops import _register

    kernels = "kernels"
    if device == "cpu":
        if not _library.cpu_isa():
            return "reference"
        with _register.fallbacks() as found:
            ops = {name for name, _, _ in plans.ops_of(call)} | set(elsewhere)
            for name in elsewhere:
                example = _register.ops()[name].calls(torch.float32)[0]
                getattr(torch.ops.warpform, name)(*example.args, **example.kwargs)
        names = sorted({name for name, _ in found})
        if ops <= set(names):
            return "reference"
        kernels = f"kernels ({_library.cpu_isa()})"
    else:
        names = sorted({name for name, _ in _register._warned})
    return f"{kernels}, reference for {' '.join(names)}" if names else kernels


@dataclass
class Session:
    """One run of the suite."""

    device: str  # "cpu" or "cuda"
    tiny: bool = False  # every benchmark once, at sizes that say nothing
    everything: bool = False  # all sizes, not only those that fit the budget
    results: Path | None = None  # the folder that rows are appended to
    budget: float = BUDGET  # seconds; 0 is no limit
    seconds: float | None = None  # that a row is timed for; None: 0.1 on a GPU and 0.4 on a CPU
    stop_at: float | None = None  # of time.monotonic(); takes the place of the budget and its deadlines
    date: str = ""  # of the rows; "": now
    dtype_name: str = ""  # of the inputs; "": the device's own. The rows say another one in `kind`
    busy: int = 0  # processes beside this one that keep a core busy each; the rows say so in `kind`
    rows: list[dict[str, Any]] = field(default_factory=list)
    _group: list[dict[str, Any]] = field(default_factory=list)
    _spec: Spec | None = None
    _case: Case | None = None
    _started: dict[str, float] = field(default_factory=dict)
    _ceilings: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype_name or kinds.OWN_DTYPES[self.device])
        return found

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        facts = {**machine(self.device), "kind": kinds.kind(self.device, dtype, self.busy)}
        return {**facts, **({"date": self.date} if self.date else {})}

    def need_gpu(self) -> None:
        if self.device != "cuda":
            raise Missing("needs a GPU")

    def allow_compile(self) -> None:
        """Called by a provider that is about to compile something."""
        if self.tiny and not self.everything:
            raise Missing("nothing is compiled in a tiny run")
        if self._spec is not None and self._late(self._spec.family, COMPILE_SHARE):
            raise Missing(f"no time left to compile in this run ({self._limit} 0 lifts the limit)")

    @property
    def _limit(self) -> str:
        """The option that sets it."""
        return "--budget" if self.stop_at is None else "--seconds"

    @property
    def over(self) -> bool:
        """Tells whether `stop_at` has passed."""
        return self.stop_at is not None and time.monotonic() > self.stop_at

    def _late(self, family: str, share: float = 1.0) -> bool:
        now = time.monotonic()
        if self.stop_at is not None:
            return now > self.stop_at - (COMPILE_SECONDS if share < 1 else 0)
        begin = self._started.setdefault("", now)
        start = self._started.setdefault(family, now)
        deadline = begin + self.budget * suites.DEADLINES.get(family, 1.0)
        return bool(self.budget) and now > start + share * (deadline - start)

    def measure(self, spec: Spec, provider: str, clock: Clock = stopwatch) -> tuple[dict[str, Any], Exception | None]:
        """Checks one provider and times it. Returns its row, which says in `status` what came of it, and the error.

        status: "ok", "missing: " and why there is no such provider here, "disagrees: " and what is wrong with what it
        computes, or "failed: " and the error.
        """
        if self._spec is not spec:
            self.flush()
            self._spec = spec
        row: dict[str, Any] = {
            **self.facts,
            "family": spec.family,
            "kernel": spec.kernel,
            "direction": spec.direction,
            "workload": str(spec),
            "provider": provider,
            "dtype": str(self.dtype).removeprefix("torch."),
            **dict(spec.sizes),
        }
        self._group.append(row)
        try:
            if self._late(spec.family):
                raise Missing(f"no time left in this run ({self._limit} 0 lifts the limit)")
            if self._case is None:
                torch.manual_seed(0)
                self._case = spec.build(self)
            case = self._case
            calls = case.prepare(provider)
            output = calls[0]()
            synchronize(self.device)
            try:
                case.check(provider, output)
            except AssertionError as wrong:
                row["status"] = f"disagrees: {_line(wrong)}"
                raise
            del output
            self._time(case, calls, row, clock)
            row["status"] = "ok"
            if provider.startswith("warpform"):
                plain = case.prepare("warpform") if self.device == "cpu" and needs_compiling(provider) else calls
                ran = backend(self.device, plain[0], case.elsewhere)
                row["backend"] = ran + case.where
                if provider == "warpform" and ran == "kernels" and not case.end_to_end:
                    row["waves"] = self._waves(calls[0])
        except Missing as missing:
            row["status"] = f"missing: {missing}"
            return row, missing
        except Exception as error:
            row.setdefault("status", f"failed: {_line(error)}")
            return row, error
        return row, None

    def _time(self, case: Case, calls: list[Callable[[], Any]], row: dict[str, Any], clock: Clock) -> None:
        seconds = self.seconds or (0.1 if self.device == "cuda" else 0.4)
        samples: list[float] = []
        if self.tiny:
            host = clock(calls[0], 1, 1, self.device)
            samples = host
        elif self.device == "cuda":
            samples = device_samples(calls, seconds, hide_host=not case.end_to_end)
            host = clock(calls[0], 10, 1, self.device)
            row["host_us"] = f"{statistics.median(host):.3f}" if host else ""
        else:
            start = time.perf_counter()
            calls[0]()
            once = time.perf_counter() - start
            rounds = max(3 if once > 0.5 else 5, min(400, int(seconds / once)))
            samples = clock(calls[0], rounds, max(1, int(1e-4 / once)), self.device)
        if not samples:
            return
        p20, p50, p80 = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
        if self.dtype not in self._ceilings:
            self._ceilings[self.dtype] = ceilings(self.device, self.dtype, self.tiny)
        tflops, gbs = self._ceilings[self.dtype]
        values = {
            "p20_us": p20,
            "p50_us": p50,
            "p80_us": p80,
            "images_s": case.images / p50 * 1e6,
            "tflops": case.flops / p50 / 1e6,
            "gbs": case.bytes / p50 / 1e3,
            "roofline": max(case.flops / (tflops * 1e6), case.bytes / (gbs * 1e3)) / p50,
            "ceiling_tflops": tflops,
            "ceiling_gbs": gbs,
        }
        # A workload that counts nothing (a host call) has no rate.
        row.update({name: f"{value:.4g}" for name, value in values.items() if value})

    def _waves(self, call: Callable[[], Any]) -> str:
        """`plans.waves` of a call on this GPU. Empty where they cannot be had: the row has been timed all the same."""
        from warpform import _direct

        try:
            return plans.text(plans.waves(plans.ops_of(call), **_direct.launch_limits(torch.cuda.current_device())))
        except Exception as error:
            print(f"no plans of {self._spec}: {_line(error)}", file=sys.stderr)
            return ""

    def flush(self) -> None:
        """Ends a group: fills in the ratios, keeps its rows, appends them to the results."""
        group, self._group, self._spec, self._case = self._group, [], None, None
        if not group:
            return
        if self.device == "cuda":
            gc.collect()  # cases and their calls refer to each other
            torch.cuda.empty_cache()
        for row in group:
            row.update(_ratios(row, group))
        self.rows += group
        if self.results is not None:
            append(self.results / f"{group[0]['family']}.csv", group)

    def compared(self, row: dict[str, Any]) -> dict[str, Any]:
        """The last row of `measure` with its ratios to what was timed before it in the group."""
        return {**row, **_ratios(row, self._group)}


def _ratios(row: dict[str, Any], group: list[dict[str, Any]]) -> dict[str, str]:
    """The column `ratios` of one of warpform's rows, where it was timed; else nothing."""
    if not row["provider"].startswith("warpform") or "p50_us" not in row:
        return {}
    own = float(row["p50_us"])
    peers = (other for other in group if other is not row and "p50_us" in other)
    return {"ratios": " ".join(f"{peer['provider']}={float(peer['p50_us']) / own:.3g}" for peer in peers)}


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200].removeprefix("AssertionError: ")


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a results file, which is only ever appended to.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; move it away to start another")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A short table: of each kernel and direction, how often warpform is ahead of the best peer, and by how much."""
    groups: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["family"] != "host" and "p50_us" in row:
            found = groups.setdefault((row["kernel"], row["direction"]), {})
            found.setdefault(row["workload"], {})[row["provider"]] = float(row["p50_us"])
    lines = [
        f"{'kernel':30} {'direction':14} {'workloads':>9} {'ahead':>6} {'best peer / warpform: least, median, most'}"
    ]
    for (kernel, direction), workloads in groups.items():
        ratios = []
        for times in workloads.values():
            ours = [t for p, t in times.items() if kinds.is_mode(p)]
            peers = [t for p, t in times.items() if not p.startswith("warpform")]
            if ours and peers:
                ratios.append(min(peers) / min(ours))
        if ratios:
            spread = f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}"
            lines.append(f"{kernel:30} {direction:14} {len(ratios):9} {sum(r > 1 for r in ratios):6} {spread}")
    counts: dict[str, int] = {}
    for row in rows:
        status = row.get("status", "failed").partition(":")[0]
        counts[status] = counts.get(status, 0) + 1
    lines.append("rows: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return lines
