"""The host's cost of a call of each op in each mode, at sizes where the device has almost no work.

Without gradients a call goes straight to its kernels; `warpform_through_torch` is the same call in inference mode with
that way closed, through torch's dispatcher.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Session
from torch import Tensor

import warpform
from helpers.fft_conv import eager_spectral_conv, short_conv_gate
from suites import disentangled_attention
from suites.monarch import two_bmm, two_bmm_glu
from warpform import _direct

OPS = (
    "packing_plan",
    "pack",
    "unpack",
    "varlen_attention",
    "disentangled_attention",
    "add_bias_residual_layer_norm",
    "bias_gelu",
    "add_residual_rms_norm",
    "rms_norm_gelu",
    "window_attention",
    "window_mix",
    "blockdiag_multiply",
    "monarch_multiply",
    "blockdiag_glu",
    "fft_conv",
    "short_conv_gate",
    "attention_step",
    "attention_step_backward",
    "RoutingPlan",
    "hidden_gather_linear",
    "hidden_scatter_linear",
    "hidden_weight_grad",
)
MODES = (
    "warpform",
    "warpform_no_grad",
    "warpform_inference_mode",
    "warpform_through_torch",
    "warpform_compiled",
    "torch_inference_mode",
)


@dataclass(frozen=True)
class Spec(harness.Spec):
    family = "host"

    def __str__(self) -> str:
        return f"{self.kernel}-{self.direction}"

    def build(self, session: Session) -> HostCase:
        return HostCase(self.kernel, session)


def specs(session: Session) -> list[Spec]:
    sizes = {"batch": 2, "seqlen": 4, "tokens": 6, "heads": 2, "kv_heads": 2, "head_dim": 64, "hidden": 128}
    return [Spec(op, "host call", tuple(sizes.items()), MODES, main=True) for op in OPS]


def _step(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A step of attention with nothing carried in, [1, L, H, D]."""
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.float()), scores.logsumexp(-1)


def _step_backward(dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    dout, q, k, v = (t.float() for t in (dout, q, k, v))
    scale = q.shape[-1] ** -0.5
    p = (torch.einsum("bihd,bjhd->bhij", q, k) * scale - lse[..., None]).exp()
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, v) - delta[..., None]) * scale
    products = (("bhij,bjhd->bihd", ds, k), ("bhij,bihd->bjhd", ds, q), ("bhij,bihd->bjhd", p, dout))
    return tuple(torch.einsum(how, a, b) for how, a, b in products)


def _torch_plan(mask: Tensor) -> tuple[Tensor, Tensor]:
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return offsets, mask.flatten().nonzero().flatten()


class HostCase(Case):
    """Two sequences, of 4 and 2 tokens, or two windows of 3; hidden size 128.

    Gradients are wanted, which only the first mode heeds.
    """

    end_to_end = True

    def __init__(self, op: str, session: Session) -> None:
        self.session = session
        device, dtype = session.device, session.dtype
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool, device=device)
        packing = warpform.Packing.from_mask(mask)
        indices, ranks, offsets = packing.indices, packing.ranks, packing.cu_seqlens

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape).to(device, dtype).requires_grad_()

        x, rows, residual = draw(2, 4, 128), draw(6, 128), draw(6, 128)
        bias, weight, ln_bias = draw(128), draw(128), draw(128)
        q, k, v = draw(6, 2, 64), draw(6, 2, 64), draw(6, 2, 64)
        pos_key, pos_query = draw(8, 2, 64), draw(8, 2, 64)
        places = torch.arange(4, device=device)
        rows_of_tables = places[:, None] - places + 4  # distances of query less key are within the tables
        seen = mask[:, None, None, :]
        norm = warpform.ops.add_bias_residual_layer_norm
        padded = torch.zeros(8, 128, device=device, dtype=dtype)

        def pad(t: Tensor) -> Tensor:
            """[6, 2, 64] -> [batch, heads, seqlen, head_dim]."""
            return padded.index_put((indices,), t.flatten(1)).view(2, 4, 2, 64).transpose(1, 2)

        def unpad(t: Tensor) -> Tensor:
            return t.transpose(1, 2).reshape(8, 2, 64)[indices]

        def composed(q: Tensor, k: Tensor, v: Tensor, pos_key: Tensor, pos_query: Tensor) -> Tensor:
            tables = pos_key.transpose(0, 1), pos_query.transpose(0, 1)
            return unpad(disentangled_attention.eager_attention(pad(q), pad(k), pad(v), *tables, rows_of_tables, seen))

        line = torch.arange(3, device=device)
        differences = line[:, None] - line + 2  # rows of the table of a window of 3 tokens in a line
        step = tuple(draw(1, 6, 2, 64).detach() for _ in range(3))
        dout = draw(1, 6, 2, 64).detach()
        step_out, lse = _step(*step)
        delta = (dout * step_out).sum(-1).transpose(1, 2).contiguous()
        choices = torch.tensor([[2, 5], [7, 3], [2, 5], [6, 4], [3, 2], [7, 7]], device=device)
        plan = warpform.ops.RoutingPlan.from_topk(choices, num_groups=8, num_shared=2)
        used = plan.selected.to(dtype).repeat_interleave(16, 1)
        # The op, the same in torch, and the arguments.
        table: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
            "packing_plan": (lambda m: warpform.ops.packing_plan(m, 8), _torch_plan, (mask,)),
            "pack": (lambda t: warpform.ops.pack(t, indices, ranks), lambda t: t.flatten(0, 1)[indices], (x,)),
            "unpack": (
                lambda t: warpform.ops.unpack(t, indices, ranks),
                lambda t: padded.index_put((indices,), t).view(2, 4, 128),
                (rows,),
            ),
            "varlen_attention": (
                lambda q, k, v: warpform.ops.varlen_attention(q, k, v, offsets, offsets, 4, 4),
                lambda q, k, v: unpad(F.scaled_dot_product_attention(pad(q), pad(k), pad(v), seen)),
                (q, k, v),
            ),
            "disentangled_attention": (
                lambda *tensors: warpform.ops.disentangled_attention(*tensors, offsets, 4),
                composed,
                (q, k, v, pos_key, pos_query),
            ),
            "add_bias_residual_layer_norm": (
                norm,
                lambda x, b, r, w, c: F.layer_norm(x + b + r, (128,), w, c),
                (rows, bias, residual, weight, ln_bias),
            ),
            "bias_gelu": (
                lambda x, b: warpform.ops.bias_gelu(x, b),
                lambda x, b: F.gelu(x + b),
                (rows, bias),
            ),
            "add_residual_rms_norm": (
                warpform.ops.add_residual_rms_norm,
                lambda x, r, w: F.rms_norm(x + r, (128,), w, 1e-6),
                (rows, residual, weight),
            ),
            "rms_norm_gelu": (
                lambda x: warpform.ops.rms_norm_gelu(x),
                lambda x: F.gelu(F.rms_norm(x, (128,), eps=0.0)),
                (rows,),
            ),
            "window_attention": (
                lambda qkv, t: warpform.ops.window_attention(qkv, t, window_size=(1, 3)),
                lambda qkv, t: (
                    F.scaled_dot_product_attention(
                        *(x.transpose(1, 2) for x in qkv.flatten(1, 2).unbind(2)), t[differences].permute(2, 0, 1)
                    )
                    .transpose(1, 2)
                    .reshape(2, 1, 3, 128)
                ),
                (draw(2, 1, 3, 3, 2, 64), draw(5, 2)),
            ),
            "window_mix": (
                lambda x, w: warpform.ops.window_mix(x, w, window_size=(1, 3)),
                lambda x, w: torch.matmul(w, x.unflatten(2, (-1, 3))).flatten(2, 3),
                (draw(2, 1, 6, 128), draw(3, 3)),
            ),
            "blockdiag_multiply": (
                warpform.ops.blockdiag_multiply,
                lambda x, w: torch.bmm(x.view(6, 4, 32).transpose(0, 1), w.mT).transpose(0, 1).reshape(6, 128),
                (rows, draw(4, 32, 32)),
            ),
            "monarch_multiply": (warpform.ops.monarch_multiply, two_bmm, (rows, draw(4, 32, 32), draw(4, 32, 32))),
            "blockdiag_glu": (warpform.ops.blockdiag_glu, two_bmm_glu, (rows, draw(4, 64, 32), draw(4, 32, 32))),
            "fft_conv": (
                warpform.ops.fft_conv,
                lambda u, k: eager_spectral_conv(u, torch.view_as_real(torch.fft.rfft(k.float(), 8))),
                (draw(2, 128, 4), draw(128, 4)),
            ),
            "short_conv_gate": (
                warpform.ops.short_conv_gate,
                short_conv_gate,
                (draw(2, 4, 384), draw(384, 3), draw(384)),
            ),
            "RoutingPlan": (
                lambda c: warpform.ops.RoutingPlan.from_topk(c, num_groups=8, num_shared=2).group_mask,
                lambda c: (torch.ones_like(c[:, :1]) * 3 | 1 << c[:, :1] | 1 << c[:, 1:]).flatten(),
                (choices,),
            ),
            "hidden_gather_linear": (
                lambda x, w: warpform.ops.hidden_gather_linear(x, w, plan),
                lambda x, w: F.linear(x * used, w),
                (rows, draw(128, 128)),
            ),
            "hidden_scatter_linear": (
                lambda x, w: warpform.ops.hidden_scatter_linear(x, w, plan),
                lambda x, w: F.linear(x, w) * used,
                (rows, draw(128, 128)),
            ),
            "hidden_weight_grad": (
                lambda x, dy: warpform.ops.hidden_weight_grad(x, dy, plan, routed="in"),
                lambda x, dy: (dy.t() @ (x * used)).float(),
                (rows.detach(), draw(6, 128).detach()),
            ),
            "attention_step": (warpform.ops.attention_step, _step, step),
            "attention_step_backward": (
                warpform.ops.attention_step_backward,
                _step_backward,
                (dout, delta, *step, lse),
            ),
        }
        self.op, self.torch, self.inputs = table[op]

    def with_warpform(self) -> list[Callable[[], Any]]:
        return [functools.partial(self.op, *self.inputs)]

    def with_warpform_no_grad(self) -> list[Callable[[], Any]]:
        return [functools.partial(_under, torch.no_grad, self.op, self.inputs)]

    def with_warpform_inference_mode(self) -> list[Callable[[], Any]]:
        return [functools.partial(_under, torch.inference_mode, self.op, self.inputs)]

    def with_warpform_through_torch(self) -> list[Callable[[], Any]]:
        return [functools.partial(_through_torch, self.op, self.inputs)]

    def with_warpform_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return [functools.partial(_under, torch.no_grad, torch.compile(self.op), self.inputs)]

    def with_torch_inference_mode(self) -> list[Callable[[], Any]]:
        return [functools.partial(_under, torch.inference_mode, self.torch, self.inputs)]

    def check(self, provider: str, output: Any) -> None:
        """All against torch's composition, in relative error: a few eps, for the sizes here are small."""
        ours = output if isinstance(output, tuple) else (output,)
        with torch.no_grad():
            theirs = self.torch(*self.inputs)
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        if self.torch is _torch_plan and provider != "torch_inference_mode":
            ours = (ours[0], ours[2][: theirs[1].numel()])
        for a, b in zip(ours, theirs, strict=True):
            error, allowed = harness.relative_error(a, b), 16 * torch.finfo(self.session.dtype).eps
            assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"


def _under(mode: Callable[[], Any], function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    with mode():
        return function(*inputs)


def _through_torch(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    with _direct.closed(), torch.inference_mode():
        return function(*inputs)


def test_host(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
