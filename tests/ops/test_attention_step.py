"""attention_step through its public functions: chains of steps, meaning, errors, compilation and export; and the
reference's other ways."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import cases, oracle, ring
from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.ring import StepCase, step_inputs
from warpform import ops
from warpform.ops.reference import attention as attention_reference

OPS = torch.ops.warpform


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- the reference's other ways ----


@pytest.mark.parametrize("case", ring.STEP_CASES, ids=str)
def test_cases_without_fused_attention(case: StepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices other than a CPU."""
    monkeypatch.setenv("WARPFORM_BACKEND", "reference")
    monkeypatch.setattr(attention_reference, "_flash", None)
    ring.check_attention_step(OPS, case, torch.float64)
    ring.check_attention_step(OPS, case, torch.float32)


@pytest.mark.parametrize("rows_at_a_time", (1, 7, 64))
def test_scores_come_in_parts(rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_reference, "_rows_at_a_time", lambda *_: rows_at_a_time)
    for case in ring.STEP_CASES:
        ring.check_attention_step(OPS, case, torch.float64)


# ---- chains ----

N, C = 4, 12  # blocks, and rows of one: even, so that the zigzag layout halves it


def _blocks(layout: str) -> list[list[tuple[int, int]]]:
    """Of every rank, the parts of its rows: (offset, stride). Zigzag has two, one from either end."""
    if layout == "striped":
        return [[(r, N)] for r in range(N)]
    if layout == "zigzag":
        half = C // 2
        return [[(r * half, 1), ((2 * N - 1 - r) * half, 1)] for r in range(N)]
    return [[(r * C, 1)] for r in range(N)]


def _chain(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: str, order: int, **masks: Any) -> tuple[Tensor, ...]:
    """Attention [L, H, D] in steps, and its gradients: every part of rows meets every other, each query rank beginning
    with its own keys and going `order` ranks on."""
    ranks = _blocks(layout)
    parts = [(offset, stride, offset + stride * torch.arange(N * C // sum(map(len, ranks)))) for rank in ranks
             for offset, stride in rank]  # fmt: skip
    state = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = torch.empty(q.shape, dtype=state), torch.empty(q.shape[1], q.shape[0], dtype=state)
    meetings: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    for i, (q_offset, q_stride, rows) in enumerate(parts):
        carried: tuple[Tensor | None, Tensor | None] = (None, None)
        for hop in range(len(parts)):
            k_offset, k_stride, keys = parts[(i + order * hop) % len(parts)]
            where = {
                "q_offset": q_offset, "q_stride": q_stride, "k_offset": k_offset, "k_stride": k_stride, **masks,
            }  # fmt: skip
            meetings.append((rows, keys, where))
            carried = ops.attention_step(q[rows][None], k[keys][None], v[keys][None], *carried, **where)
        assert carried[0] is not None and carried[1] is not None
        out[rows], lse[:, rows] = carried[0][0], carried[1][0]
    delta = (dout.to(state) * out).sum(-1).T
    dq, dk, dv = (torch.zeros(t.shape, dtype=state) for t in (q, k, v))
    for rows, keys, where in meetings:
        parts_of = ops.attention_step_backward(
            dout[rows][None], delta[:, rows][None], q[rows][None], k[keys][None], v[keys][None], lse[:, rows][None],
            dq[rows][None], dk[keys][None], dv[keys][None], **where,
        )  # fmt: skip
        dq[rows], dk[keys], dv[keys] = (t[0] for t in parts_of)
    return out, lse, dq, dk, dv


@pytest.mark.parametrize("order", (1, 3), ids=("up", "down"))
@pytest.mark.parametrize(
    "masks",
    ({}, {"causal": True}, {"window_size": (9, 5)}, {"causal": True, "window_size": (20, -1)}),
    ids=("full", "causal", "window", "causal_window"),
)
@pytest.mark.parametrize("layout", ("contiguous", "striped", "zigzag"))
@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16), ids=("float64", "float32", "bfloat16")
)
def test_a_chain_of_steps_is_one_attention(dtype: torch.dtype, layout: str, masks: dict[str, Any], order: int) -> None:
    total, heads, heads_k, d = N * C, 4, 2, 8
    q, dout = (cases.random(total, heads, d, dtype=dtype) for _ in range(2))
    k, v = (cases.random(total, heads_k, d, dtype=dtype) for _ in range(2))
    how: dict[str, Any] = {"causal": masks.get("causal", False), "window": masks.get("window_size", (-1, -1))}
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    truth = oracle.varlen_attention(*exact, [total], [total], **how)
    truths = (*truth, *torch.autograd.grad(truth[0], exact, dout.double()))
    eager = oracle.varlen_attention(q, k, v, [total], [total], **how)
    yardsticks = (*eager, *oracle.varlen_attention_gradients(dout, None, q, k, v, [total], [total], **how))
    found = _chain(q, k, v, dout, layout, order, **masks)
    # Each part of a row has the weight exp(lse of a step - lse), with a relative error of eps(lse) * |lse|.
    growth = 1 + 2 * truth[1].abs().max().item() * torch.finfo(found[1].dtype).eps / torch.finfo(dtype).eps
    for name, t, expected, yardstick in zip(("out", "lse", "dq", "dk", "dv"), found, truths, yardsticks, strict=True):
        size = expected.abs().max().item() * (1.0 if name == "lse" else growth)
        assert_close(name, t, expected, yardstick, gradient=name.startswith("d"), scale=size)


@pytest.mark.parametrize("steps", (1, 4, 64))
def test_the_state_is_float32_however_many_steps(steps: int) -> None:
    """bfloat16 keys in 1 to 64 blocks. Every step rounds lse once, to float32, and nothing else remains."""
    q, k, v = (torch.randn(1, 128, 2, 16).bfloat16() for _ in range(3))
    carried: tuple[Tensor | None, Tensor | None] = (None, None)
    for keys, values in zip(k.chunk(steps, 1), v.chunk(steps, 1), strict=True):
        carried = ops.attention_step(q, keys, values, *carried)
    truth, eager = (
        oracle.varlen_attention(*(t[0].to(dtype) for t in (q, k, v)), [128], [128])
        for dtype in (torch.float64, torch.float32)
    )
    assert carried[0] is not None and carried[1] is not None
    largest = truth[1].abs().max().item()
    assert_close("out", carried[0][0], truth[0], eager[0], scale=steps * largest)
    assert_close("lse", carried[1][0], truth[1], eager[1], scale=steps * largest)


# ---- meaning ----


def test_rows_that_see_nothing_are_carried() -> None:
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 4, 2, 8)
    before = torch.randn(1, 6, 2, 8), torch.randn(1, 2, 6)
    after = ops.attention_step(q, k, k, *before, causal=True, k_offset=3)
    assert torch.equal(after[0][:, :3], before[0][:, :3]) and torch.equal(after[1][..., :3], before[1][..., :3])
    nothing = ops.attention_step(q, k, k, *before, causal=True, k_offset=6)
    assert all(torch.equal(a, b) for a, b in zip(nothing, before, strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(nothing, before, strict=True))


def test_large_scores_stay_finite() -> None:
    """One block whose scores lie far above those before, and one far below."""
    q, v = torch.full((1, 1, 1, 8), 100.0), torch.randn(1, 1, 1, 8)
    far = ops.attention_step(q, q, v, *ops.attention_step(q, -q, -v), softmax_scale=1.0)
    near = ops.attention_step(q, -q, -v, *ops.attention_step(q, q, v, softmax_scale=1.0), softmax_scale=1.0)
    assert torch.equal(far[0], v) and torch.equal(near[0], v) and torch.equal(far[1], near[1])


def test_windows_are_inclusive_and_by_position() -> None:
    q = torch.zeros(1, 5, 1, 8)
    v = torch.eye(6, 8)[None, :, None]
    out, _ = ops.attention_step(q, v, v, window_size=(2, 4), q_offset=1, k_offset=0, q_stride=3, k_stride=2)
    seen = out[0, :, 0, :6] > 0
    assert seen.tolist() == [[1 + 3 * i - 2 <= 2 * j <= 1 + 3 * i + 4 for j in range(6)] for i in range(5)]


def test_what_has_no_derivative_raises() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    out, lse = ops.attention_step(q, q.detach(), q.detach())
    with pytest.raises(RuntimeError, match="attention_step has no gradient"):
        out.sum().backward()
    dq, _, _ = ops.attention_step_backward(q, lse.detach(), *[q.detach()] * 3, lse.detach())
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dq.sum().backward()


def test_dout_is_rounded_to_the_dtype_of_q() -> None:
    x = step_inputs(StepCase("", (9,), (8,)), torch.bfloat16)
    dout, delta, lse = torch.randn(x.q.shape), torch.randn(1, 2, 9), torch.randn(1, 2, 9) + 5
    wide = ops.attention_step_backward(dout, delta, x.q, x.k, x.v, lse)
    narrow = ops.attention_step_backward(dout.bfloat16(), delta, x.q, x.k, x.v, lse)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


class Seen(TorchDispatchMode):
    """The keyword arguments of the calls of one op."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is self.op:
            self.calls.append(kwargs)
        return func(*args, **(kwargs or {}))


def test_deterministic_algorithms_are_asked_for() -> None:
    q, rows = torch.randn(1, 3, 1, 8), torch.randn(1, 1, 3)
    for wanted in (False, True):
        torch.use_deterministic_algorithms(wanted)
        try:
            with Seen(OPS.attention_step_backward.default) as seen:
                ops.attention_step_backward(q, rows, q, q, q, rows)
        finally:
            torch.use_deterministic_algorithms(False)
        assert [call.get("deterministic", False) for call in seen.calls] == [wanted]


# ---- errors ----


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


CU = cases.offsets([4, 5])
VARLEN = {
    "q": _zeros(9, 2, 8), "k": _zeros(9, 2, 8), "v": _zeros(9, 2, 8), "out": None, "lse": None, "cu_seqlens_q": CU,
    "cu_seqlens_k": CU,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor, got"),
        ({"q": _zeros(9, 2, 8)}, ValueError, r"\[batch, length, heads, head_dim\] without cu_seqlens"),
        (VARLEN | {"k": _zeros(1, 9, 2, 8)}, ValueError, r"k must be of .* head_dim\] with cu_seqlens"),
        ({"q": _zeros(1, 9, 2, 8, dtype=torch.int64)}, TypeError, "q must be float16, bfloat16, float32 or float64"),
        ({"q": _zeros(1, 9, 2, 16)[..., ::2]}, ValueError, "the last dimension of q must be contiguous, got stride 2"),
        ({"q": _zeros(1, 9, 2, 0)}, ValueError, "head_dim must be at least 1"),
        ({"k": _zeros(1, 7, 2, 16)}, ValueError, "k and v must be of one shape"),
        ({"k": _zeros(2, 8, 2, 8), "v": _zeros(2, 8, 2, 8)}, ValueError, "batch and head_dim as q's"),
        ({"v": _zeros(1, 7, 2, 8)}, ValueError, "k and v must be of one shape"),
        ({"k": _zeros(1, 8, 3, 8), "v": _zeros(1, 8, 3, 8)}, ValueError, "the 2 heads of q must be a multiple"),
        ({"v": _zeros(1, 8, 2, 8, dtype=torch.float64)}, TypeError, "v must be float32 as q is, got float64"),
        ({"k": _zeros(1, 8, 2, 8).to("meta")}, ValueError, "k must be on cpu as q is, got meta"),
        ({"q_offset": 1.5}, TypeError, "q_offset must be an int"),
        ({"k_stride": True}, TypeError, "k_stride must be an int"),
        ({"k_stride": 0}, ValueError, "q_stride and k_stride must be at least 1, got 1 and 0"),
        ({"window_size": (-2, 1)}, ValueError, r"window_size must be at least -1, which is unbounded, got \(-2, 1\)"),
        ({"window_size": 3}, TypeError, r"window_size must be \(left, right\)"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
        ({"lse": None}, ValueError, "out and lse must both be given, or neither"),
        ({"out": _zeros(1, 9, 2, 8, dtype=torch.bfloat16)}, TypeError, "out must be float32 for q in float32"),
        ({"out": _zeros(1, 9, 8, 2)}, ValueError, r"out must be of shape \[1, 9, 2, 8\]"),
        ({"lse": _zeros(1, 9, 2)}, ValueError, r"lse must be of shape \[1, 2, 9\], got float32 of shape \[1, 9, 2\]"),
        ({"lse": _zeros(1, 2, 9, dtype=torch.float64)}, TypeError, "lse must be float32 for q in float32, got float64"),
        ({"out": 1.0}, TypeError, r"out must be a tensor, got 1.0 \(float\)"),
        ({"cu_seqlens_q": CU}, ValueError, "cu_seqlens_q and cu_seqlens_k must both be given, or neither"),
        (VARLEN | {"cu_seqlens_q": [0, 9]}, TypeError, "cu_seqlens_q must be a tensor"),
        (VARLEN | {"cu_seqlens_q": CU.to("meta")}, ValueError, "cu_seqlens_q must be on cpu as q is, got meta"),
        (VARLEN | {"cu_seqlens_k": CU.long()}, TypeError, r"cu_seqlens_k must be int32 of shape \[batch \+ 1\]"),
        (VARLEN | {"cu_seqlens_k": CU[:2].clone()}, ValueError, r"cu_seqlens_k must be of shape \[3\]"),
        (VARLEN | {"cu_seqlens_k": CU + 1}, ValueError, "cu_seqlens_k must begin with 0, got 1"),
        (VARLEN | {"cu_seqlens_q": CU * 2, "cu_seqlens_k": CU}, ValueError, "cu_seqlens_q must not pass the end"),
    ],
)  # fmt: skip
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "q": _zeros(1, 9, 2, 8), "k": _zeros(1, 8, 2, 8), "v": _zeros(1, 8, 2, 8), "out": _zeros(1, 9, 2, 8),
        "lse": _zeros(1, 2, 9),
    } | change  # fmt: skip
    with pytest.raises(error, match=f"attention_step: .*{message}"):
        ops.attention_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dout": _zeros(1, 9, 2, 4)}, ValueError, r"dout must be of shape \[1, 9, 2, 8\] as q is"),
        ({"dout": _zeros(1, 9, 2, 8, dtype=torch.int32)}, TypeError, "dout must be float16, bfloat16"),
        ({"dout": [1.0]}, TypeError, "dout must be a tensor"),
        ({"dout": _zeros(1, 9, 2, 4, dtype=torch.float64)}, ValueError, r"dout must be of shape \[1, 9, 2, 8\]"),
        ({"dout": _zeros(1, 9, 2, 8).to("meta")}, ValueError, "must be on .* as .* is, got"),
        ({"delta": _zeros(1, 2, 9, dtype=torch.float64)}, TypeError, "delta must be float32"),
        ({"lse": _zeros(1, 9, 2)}, ValueError, r"lse must be of shape \[1, 2, 9\]"),
        ({"dq": _zeros(1, 8, 2, 8)}, ValueError, r"dq must be of shape \[1, 9, 2, 8\]"),
        ({"dk": _zeros(1, 9, 2, 8)}, ValueError, r"dk must be of shape \[1, 8, 2, 8\]"),
        ({"dv": _zeros(1, 8, 2, 8, dtype=torch.float16)}, TypeError, "dv must be float32"),
        ({"q_stride": -1}, ValueError, "q_stride and k_stride must be at least 1"),
    ],
)
def test_bad_input_of_the_backward(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "dout": _zeros(1, 9, 2, 8), "delta": _zeros(1, 2, 9), "q": _zeros(1, 9, 2, 8), "k": _zeros(1, 8, 2, 8),
        "v": _zeros(1, 8, 2, 8), "lse": _zeros(1, 2, 9),
    } | change  # fmt: skip
    with pytest.raises(error, match=f"attention_step_backward: .*{message}"):
        ops.attention_step_backward(**arguments)


def test_the_op_itself_refuses_what_would_be_unsafe() -> None:
    q = _zeros(1, 9, 2, 8)
    with pytest.raises(RuntimeError, match="attention_step: q_stride and k_stride must be at least 1"):
        OPS.attention_step(q, q, q, q_stride=0)
    with pytest.raises(RuntimeError, match="attention_step: out and lse must both be given"):
        OPS.attention_step(q, q, q, q)
    rows = _zeros(1, 2, 9)
    with pytest.raises(RuntimeError, match="attention_step_backward: dout must be float32 as q is, got float16"):
        OPS.attention_step_backward(q.half(), rows, q, q, q, rows)


# ---- compile, export ----


def _two_steps(q: Tensor, k: Tensor, v: Tensor, offset: int) -> tuple[Tensor, ...]:
    out, lse = ops.attention_step(q, k, v, causal=True, q_offset=offset)
    out, lse = ops.attention_step(q, k, v, out, lse, causal=True, q_offset=offset, k_offset=1)
    return out, lse, *ops.attention_step_backward(out, (out * out).sum(-1).transpose(1, 2), q, k, v, lse)


def test_compiles_without_recompiling_for_new_lengths() -> None:
    compilations = Compilations()
    compiled = torch.compile(_two_steps, backend=compilations, fullgraph=True, dynamic=True)
    for length, offset in ((6, 2), (9, 3), (11, 7)):
        q, k, v = (torch.randn(2, length, 2, 8) for _ in range(3))
        for a, b in zip(compiled(q, k, v, offset), _two_steps(q, k, v, offset), strict=True):
            torch.testing.assert_close(a, b)
    assert compilations.count == 1


def test_exports_with_dynamic_lengths() -> None:
    class Steps(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return _two_steps(q, k, v, 2)

    length = torch.export.Dim("length", min=2, max=1000)
    arguments = tuple(torch.randn(2, 6, 2, 8) for _ in range(3))
    program = torch.export.export(Steps(), arguments, dynamic_shapes=({1: length},) * 3)
    other = tuple(torch.randn(2, 13, 2, 8) for _ in range(3))
    for a, b in zip(program.module()(*other), Steps()(*other), strict=True):
        torch.testing.assert_close(a, b)
