"""Ring attention over N ranks, forward and with backward: how much of one device's throughput is left.

On a CPU ranks are processes of one thread joined by gloo; on a GPU they take turns on it (LocalGroup), which times
everything that a ring adds but the hops between devices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Missing, Session
from torch import Tensor

import warpform
from helpers import oracle
from helpers.compare import assert_close
from suites import ring_ranks
from warpform.distributed import LocalGroup, ring_attention, shard_sequence, unshard_sequence

RANKS = (2, 4, 8)
PROVIDERS = (
    "warpform",  # zigzag
    "warpform_striped",
    "warpform_contiguous",
    "warpform_local",
    "one_device",
    "torch_context_parallel",
)
STEP_PROVIDERS = ("warpform", "warpform_without_state", "warpform_varlen_attention", "sdpa")
STEP_BACKWARD_PROVIDERS = ("warpform", "warpform_varlen_attention", "sdpa")
LAYOUTS = {"warpform": "zigzag", "warpform_striped": "striped", "warpform_contiguous": "contiguous"}

# The table of sizes: tokens of all ranks together, heads, key heads, head_dim.
SIZES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "tiny": ((96, 2, 1, 16),),
    "cpu": ((4096, 4, 2, 64),),
    "cuda": ((65536, 16, 4, 128), (16384, 32, 32, 64)),
}
MAIN = (16384, 2)  # tokens and ranks of whole rings; steps are main all of them
TRUTH_ROWS = 512  # rows of scores that the oracle holds at a time


@dataclass(frozen=True)
class Spec(harness.Spec):
    ranks: int = 2

    family = "ring"

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.sizes)
        return f"{self.kernel}-{self.direction}-{sizes}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Counts the two products of a step, five backward; a causal ring has half of them, on all ranks together."""
        length, heads, kv_heads, head_dim = _sizes_of(self)
        one = length * head_dim * itemsize
        forward, both = float(one * (2 * heads + 2 * kv_heads)), self.direction == "forward+backward"
        if self.kernel == "attention_step":
            # Every step reads q, k, v and writes the output. The state adds 2 * 4 * heads * (head_dim + 1) a row.
            return 4.0 * head_dim * heads * length**2, forward
        if self.kernel == "attention_step_backward":
            # q, k, v, dout, lse and delta in; three gradients out, float32.
            gradients = 4 * length * head_dim * (heads + 2 * kv_heads)
            return 10.0 * head_dim * heads * length**2, forward + gradients + 8 * length * heads
        # q, k, v in and the output out; backward: these and the output's gradient in, three gradients out.
        flops = (14 if both else 4) * head_dim * heads * length * (length + 1) / 2
        return flops, forward + both * one * (4 * heads + 4 * kv_heads)

    def build(self, session: Session) -> Case:
        kinds = {"attention_step": StepCase, "attention_step_backward": StepBackwardCase}
        return kinds.get(self.kernel, RingCase)(self, session)


def _sizes_of(spec: harness.Spec) -> tuple[int, int, int, int]:
    """Positions, heads, key heads, head_dim."""
    size = dict(spec.sizes)
    return size["seqlen"], size["heads"], size["kv_heads"], size["head_dim"]


def specs(session: Session) -> list[Spec]:
    found = []
    for seqlen, heads, kv_heads, head_dim in SIZES["tiny" if session.tiny else session.device]:
        for ranks in RANKS[:1] if session.tiny else RANKS:
            for direction in ("forward", "forward+backward"):
                columns = {
                    "batch": 1, "seqlen": seqlen, "tokens": seqlen, "heads": heads, "kv_heads": kv_heads,
                    "head_dim": head_dim, "causal": 1,
                }  # fmt: skip
                kernel = f"ring_attention_{ranks}_ranks"
                main = harness.is_main(session, (seqlen, ranks) == MAIN)
                found.append(Spec(kernel, direction, tuple(columns.items()), PROVIDERS, ranks, main=main))
        chunk = seqlen // RANKS[-1]
        columns = {
            "batch": 1, "seqlen": chunk, "tokens": chunk, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        }  # fmt: skip
        for kernel, direction, providers in (
            ("attention_step", "forward", STEP_PROVIDERS),
            ("attention_step_backward", "backward", STEP_BACKWARD_PROVIDERS),
        ):
            found.append(Spec(kernel, direction, tuple(columns.items()), providers, 1, main=True))
    return found


def dense(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """Causal attention and its gradients from the formula, some rows of scores at a time. [1, L, H, D] each."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, 2) for t in (k, v))
    q, k, v, dout = (t[0].transpose(0, 1) for t in (q, k, v, dout))  # [H, L, D]
    scale, length = q.shape[-1] ** -0.5, q.shape[1]
    out, dq, dk, dv = (torch.zeros_like(t) for t in (q, q, k, v))
    for begin in range(0, length, TRUTH_ROWS):
        end = min(begin + TRUTH_ROWS, length)
        rows = slice(begin, end)
        keys, values = k[:, :end], v[:, :end]
        later = torch.ones(end - begin, end, dtype=torch.bool, device=q.device).triu(begin + 1)
        p = ((q[:, rows] @ keys.mT) * scale).masked_fill(later, float("-inf")).softmax(-1)
        out[:, rows] = p @ values
        dp = dout[:, rows] @ values.mT
        ds = p * (dp - (dout[:, rows] * out[:, rows]).sum(-1, keepdim=True)) * scale
        dq[:, rows] = ds @ keys
        dk[:, :end] += ds.mT @ q[:, rows]
        dv[:, :end] += p.mT @ dout[:, rows]
    dk, dv = (t.unflatten(0, (-1, repeats)).sum(1) for t in (dk, dv))
    return tuple(t.transpose(0, 1)[None] for t in (out, dq, dk, dv))


@functools.cache
def truth(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[tuple[Tensor, ...], ...]:
    """(out, dq, dk, dv) in float64, and the same computation in dtype."""
    inputs = ring_ranks.draw(*sizes, dtype, device)
    return dense(*(t.double() for t in inputs)), dense(*inputs)


class RingCase(Case):
    """q [1, L, H, D] and k, v [1, L, Hkv, D], causal, spread over ranks before the clock starts."""

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction != "forward"
        self.sizes = _sizes_of(spec)
        self.flops, self.bytes = spec.work(session.dtype.itemsize)

    def over_processes(self, provider: str, layout: str, purpose: str = "") -> list[Callable[[], Any]]:
        """A call runs it on all processes; the first one brings the outputs back, whole."""
        ranks = self.spec.ranks
        self.where = f", {ranks} processes of 1 thread on {len(os.sched_getaffinity(0))} cores"
        self.elsewhere = ("attention_step", "attention_step_backward")[: 1 + self.backward]
        ring_ranks.run(ranks, purpose, ring_ranks.prepare, provider, layout, self.sizes, self.backward)
        fetched = False

        def call() -> tuple[Tensor, ...] | None:
            nonlocal fetched
            results = ring_ranks.run(ranks, purpose, ring_ranks.call, not fetched)
            if fetched:
                return None
            fetched = True
            parts = [torch.stack([torch.from_numpy(t) for t in ranks]) for ranks in zip(*results, strict=True)]
            group = LocalGroup(ranks)
            return tuple(unshard_sequence(t, group=group, dim=1, layout=layout) for t in parts)

        return [call]

    def locally(self, layout: str) -> list[Callable[[], Any]]:
        group = LocalGroup(self.spec.ranks)
        where = "one GPU" if self.device == "cuda" else "1 core, in one process"
        self.where = f", {self.spec.ranks} ranks that take turns on {where}"
        self.elsewhere = ()
        inputs = ring_ranks.draw(*self.sizes, self.session.dtype, self.device)
        *inputs, dout = (shard_sequence(t, group=group, dim=1, layout=layout) for t in inputs)
        inputs = [t.requires_grad_(self.backward) for t in inputs]

        def attention(*tensors: Tensor) -> Tensor:
            return ring_attention(*tensors, group=group, causal=True, layout=layout)

        def call() -> tuple[Tensor, ...]:
            return ring_ranks.step(attention, inputs, dout, self.backward)

        return [call]

    def ring(self, provider: str) -> list[Callable[[], Any]]:
        layout = LAYOUTS[provider]
        return self.over_processes(provider, layout) if self.device == "cpu" else self.locally(layout)

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.ring("warpform")

    def with_warpform_striped(self) -> list[Callable[[], Any]]:
        return self.ring("warpform_striped")

    def with_warpform_contiguous(self) -> list[Callable[[], Any]]:
        return self.ring("warpform_contiguous")

    def with_warpform_local(self) -> list[Callable[[], Any]]:
        if self.device != "cpu":
            raise Missing("is what warpform is on a GPU")
        return self.on_one_thread(self.locally("zigzag"))

    def with_one_device(self) -> list[Callable[[], Any]]:
        """Fused attention to the whole sequence; on a CPU one process of one thread, as each rank is."""
        *inputs, dout = ring_ranks.draw(*self.sizes, self.session.dtype, self.device)
        inputs = [t.requires_grad_(self.backward) for t in inputs]

        def attention(*tensors: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        calls = [lambda: ring_ranks.step(attention, inputs, dout, self.backward)]
        return self.on_one_thread(calls) if self.device == "cpu" else calls

    def with_torch_context_parallel(self) -> list[Callable[[], Any]]:
        if self.device != "cpu":
            raise Missing("needs as many GPUs as ranks")
        # In processes of its own, for it patches torch.
        return self.over_processes("torch_context_parallel", "zigzag", "torch")

    def on_one_thread(self, calls: list[Callable[[], Any]]) -> list[Callable[[], Any]]:
        def limited(call: Callable[[], Any]) -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return call()
            finally:
                torch.set_num_threads(before)

        return [functools.partial(limited, call) for call in calls]

    def check(self, provider: str, output: Any) -> None:
        """The rule of tests/helpers/compare.py for warpform, the bound of the harness for others."""
        exact, eager = truth(self.sizes, self.session.dtype, self.device)
        for i, (name, actual) in enumerate(zip(("out", "dq", "dk", "dv"), output, strict=False)):
            if actual.dim() == 5:  # of ranks in one process
                layout = LAYOUTS.get(provider, "zigzag")
                actual = unshard_sequence(actual, group=LocalGroup(self.spec.ranks), dim=1, layout=layout)
            if provider.startswith("warpform"):
                assert_close(name, actual, exact[i], eager[i], gradient=i > 0)
            else:
                harness.assert_near(name, actual, exact[i], eager[i])


class StepCase(Case):
    """One step, all rows with all keys, a state that holds nothing carried in: what the state costs over the plain op.

    The output is float32 for steps, of the inputs' dtype for the others.
    """

    def __init__(self, spec: Spec, session: Session) -> None:
        self.device = session.device
        length, heads, kv_heads, head_dim = _sizes_of(spec)
        self.flops, self.bytes = spec.work(session.dtype.itemsize)
        number = harness.copies(self.device, self.bytes)
        made = [ring_ranks.draw(length, heads, kv_heads, head_dim, session.dtype, self.device) for _ in range(number)]
        self.inputs = [tensors[:3] for tensors in made]
        self.offsets = torch.tensor([0, length], dtype=torch.int32, device=self.device)
        self.length = length

    def each(self, call: Callable[..., Tensor]) -> list[Callable[[], Tensor]]:
        return [torch.no_grad()(functools.partial(call, *tensors)) for tensors in self.inputs]

    def with_warpform(self) -> list[Callable[[], Tensor]]:
        q = self.inputs[0][0]
        out = torch.zeros(q.shape, device=self.device)
        lse = torch.full((1, q.shape[2], self.length), -torch.inf, device=self.device)
        return self.each(lambda q, k, v: warpform.ops.attention_step(q, k, v, out, lse)[0])

    def with_warpform_without_state(self) -> list[Callable[[], Tensor]]:
        return self.each(lambda q, k, v: warpform.ops.attention_step(q, k, v)[0])

    def with_warpform_varlen_attention(self) -> list[Callable[[], Tensor]]:
        sizes = self.offsets, self.offsets, self.length, self.length
        return self.each(lambda q, k, v: warpform.ops.varlen_attention(q[0], k[0], v[0], *sizes)[None])

    def with_sdpa(self) -> list[Callable[[], Tensor]]:
        def call(*tensors: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return self.each(call)

    @functools.cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """In float64 and in the inputs' dtype, from the formula; of the first copy some rows."""
        found = []
        for wide in (True, False):
            q, k, v = (t.double() if wide else t for t in self.inputs[0])
            k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
            scores = torch.einsum("bihd,bjhd->bhij", q[:, :TRUTH_ROWS], k) * q.shape[-1] ** -0.5
            found.append(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v))
        return found[0], found[1]

    def check(self, provider: str, output: Tensor) -> None:
        exact, eager = self.truth
        assert torch.isfinite(output).all(), "values that are not finite"
        rows = output[:, :TRUTH_ROWS]
        if provider.startswith("warpform"):
            assert_close("out", rows, exact, eager)
        else:
            harness.assert_near("out", rows, exact, eager)


class StepBackwardCase(Case):
    """The gradients of one step, all rows with all keys, timed alone over a forward that was done before.

    They are float32 for steps, of the inputs' dtype for the others.
    """

    def __init__(self, spec: Spec, session: Session) -> None:
        self.device, self.session = session.device, session
        length, heads, self.kv_heads, head_dim = _sizes_of(spec)
        self.group, self.length = heads // self.kv_heads, length
        self.flops, self.bytes = spec.work(session.dtype.itemsize)
        draw = functools.partial(ring_ranks.draw, length, heads, self.kv_heads, head_dim, session.dtype, self.device)
        self.inputs = [draw() for _ in range(harness.copies(self.device, self.bytes))]
        self.offsets = torch.tensor([0, length], dtype=torch.int32, device=self.device)

    def with_warpform(self) -> list[Callable[[], Any]]:
        calls = []
        for q, k, v, dout in self.inputs:
            out, lse = warpform.ops.attention_step(q, k, v)
            delta = (dout.float() * out).sum(-1).transpose(1, 2).contiguous()
            calls.append(functools.partial(warpform.ops.attention_step_backward, dout, delta, q, k, v, lse))
        return calls

    def by_autograd(self, attention: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        calls = []
        for *inputs, dout in self.inputs:
            leaves = [t.detach().requires_grad_() for t in inputs]
            out = attention(*leaves)
            calls.append(functools.partial(torch.autograd.grad, out, leaves, dout, retain_graph=True))
        return calls

    def with_warpform_varlen_attention(self) -> list[Callable[[], Any]]:
        sizes = self.offsets, self.offsets, self.length, self.length
        return self.by_autograd(lambda q, k, v: warpform.ops.varlen_attention(q[0], k[0], v[0], *sizes)[None])

    def with_sdpa(self) -> list[Callable[[], Any]]:
        def call(*tensors: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in tensors)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

        return self.by_autograd(call)

    @functools.cached_property
    def truth(self) -> list[tuple[slice, slice, list[Tensor], list[Tensor]]]:
        """The results of the first and the last key head, which depend on no others: heads, key heads, the gradients in
        float64 and in the inputs' dtype."""
        found = []
        for head in sorted({0, self.kv_heads - 1}):
            heads, keys = slice(head * self.group, (head + 1) * self.group), slice(head, head + 1)
            parts = [t[0][:, h] for t, h in zip(self.inputs[0], (heads, keys, keys, heads), strict=True)]
            results = []
            for dtype in (torch.float64, self.session.dtype):
                q, k, v, dout = (t.to(dtype) for t in parts)
                lengths = [self.length]
                results.append(list(oracle.varlen_attention_gradients(dout, None, q, k, v, lengths, lengths)))
            found.append((heads, keys, *results))
        return found

    def check(self, provider: str, output: Sequence[Tensor]) -> None:
        names = ("dq", "dk", "dv")
        for name, tensor in zip(names, output, strict=True):
            assert torch.isfinite(tensor).all(), f"{name}: not finite"
        for heads, keys, exact, eager in self.truth:
            for name, tensor, wanted, plain in zip(names, output, exact, eager, strict=True):
                actual = tensor[0][:, heads if name == "dq" else keys]
                if provider.startswith("warpform"):
                    assert_close(name, actual, wanted, plain, gradient=True)
                else:
                    harness.assert_near(name, actual, wanted, plain)


def test_ring(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
