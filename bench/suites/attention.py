"""Attention over sequences of any lengths, forward and backward, against everything in torch that computes the same."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Missing, Session
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import warpform
from helpers import oracle
from helpers.compare import assert_close

PROVIDERS = (
    "warpform",
    "warpform_mma_sync",  # the kernels for every GPU where plain calls take kernels for Hopper
    "torch_varlen",
    "sdpa_flash_padded",
    "sdpa_cudnn_padded",
    "sdpa_efficient_padded",
    "sdpa_flash_jagged",
    "sdpa_cudnn_jagged",
    "sdpa_efficient_jagged",
    "flex_compiled",
    "eager_compiled",
)
# Scores that an eager composition may write out.
MOST_SCORE_BYTES = 4e9

# The table of sizes. "equal": (tokens in all, sequence lengths, head sizes, width of all heads);
# "bytetransformer": (sequences, longest, heads, head size); "short": (sequences, shortest, longest, heads, head size);
# "gqa": (tokens in all, sequence length, heads, key heads, head size).
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "equal": (64, (16, 64), (16,), 32),
        "bytetransformer": (4, 32, 2, 16),
        "short": (8, 2, 8, 2, 16),
        "gqa": (48, 24, 4, 2, 16),
    },
    "cpu": {
        "equal": (2048, (512, 2048), (64,), 512),
        "bytetransformer": (16, 256, 12, 64),
        "short": (512, 16, 64, 12, 64),
        "gqa": (1024, 512, 16, 2, 128),
    },
    "cuda": {
        "equal": (16384, (512, 2048, 16384), (64, 128), 2048),
        "bytetransformer": (16, 1024, 12, 64),
        "short": (4096, 16, 64, 12, 64),
        "gqa": (16384, 4096, 64, 8, 128),
    },
    "cuda everything": {
        "equal": (16384, (512, 1024, 2048, 4096, 8192, 16384), (64, 128), 2048),
        "bytetransformer": (16, 1024, 12, 64),
        "short": (4096, 16, 64, 12, 64),
        "gqa": (16384, 4096, 64, 8, 128),
    },
}

# Main ones, of "equal": (sequence length, head size); with them ByteTransformer's lengths and fewer key heads.
MAIN = ((2048, 64), (16384, 128))


@dataclass(frozen=True)
class Spec(harness.Spec):
    lengths: tuple[int, ...] = ()
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    causal: bool = False

    family = "attention"

    def __str__(self) -> str:
        name = f"{self.kernel}-{self.direction}-B{len(self.lengths)}-S{max(self.lengths)}-T{sum(self.lengths)}"
        return f"{name}-H{self.heads}-{self.kv_heads}-D{self.head_dim}{'-causal' if self.causal else ''}"

    def work(self, itemsize: int) -> tuple[float, float]:
        """Two products forward, five backward, as in the FlashAttention papers; every tensor moves once."""
        total = sum(self.lengths)
        tensors = 2 * total * (self.heads + self.kv_heads) * self.head_dim  # q, k, v, out
        pairs = sum(s * (s + 1) // 2 if self.causal else s * s for s in self.lengths) * self.heads
        backward = self.direction == "backward"
        lse = 4 * total * self.heads
        return (10 if backward else 4) * pairs * self.head_dim, (2 if backward else 1) * tensors * itemsize + lse

    def build(self, session: Session) -> AttentionCase:
        return AttentionCase(self, session)


def specs(session: Session) -> list[Spec]:
    everything = session.everything and session.device == "cuda"
    sizes = SIZES["tiny" if session.tiny else "cuda everything" if everything else session.device]
    draw = random.Random(0)
    shapes: list[tuple[tuple[int, ...], int, int, int, tuple[bool, ...], bool]] = []
    batch, longest, heads, head_dim = sizes["bytetransformer"]
    lengths = tuple(draw.randint(round(0.2 * longest), longest) for _ in range(batch))
    shapes.append((lengths, heads, heads, head_dim, (False,), True))
    batch, shortest, longest, heads, head_dim = sizes["short"]
    lengths = tuple(draw.randint(shortest, longest) for _ in range(batch))
    shapes.append((lengths, heads, heads, head_dim, (False,), False))
    total, seqlen, heads, kv_heads, head_dim = sizes["gqa"]
    shapes.append(((seqlen,) * (total // seqlen), heads, kv_heads, head_dim, (True,), True))
    total, seqlens, head_dims, width = sizes["equal"]
    for head_dim in head_dims:
        for seqlen in seqlens:
            heads = width // head_dim
            main = (seqlen, head_dim) in MAIN
            shapes.append(((seqlen,) * (total // seqlen), heads, heads, head_dim, (False, True), main))
    found = []
    for lengths, heads, kv_heads, head_dim, causals, main in shapes:
        main = harness.is_main(session, main)
        for causal in causals:
            columns = {
                "batch": len(lengths),
                "seqlen": max(lengths),
                "tokens": sum(lengths),
                "heads": heads,
                "kv_heads": kv_heads,
                "head_dim": head_dim,
                "causal": int(causal),
            }
            shape = (lengths, heads, kv_heads, head_dim, causal)
            for direction in ("forward", "backward"):
                found.append(Spec("varlen_attention", direction, tuple(columns.items()), PROVIDERS, *shape, main=main))
    return found


def eager_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """softmax(q k^T) v as one writes it; q, k, v: [B, H, S, D], seen: bool, broadcast to [B, H, S, S]."""
    score = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    if seen is not None:
        score = score.masked_fill(~seen, float("-inf"))
    return torch.softmax(score, -1) @ v


def varlen_options(varlen_attn: Callable[..., Tensor], causal: bool, gqa: dict[str, bool]) -> dict[str, Any]:
    """The keywords that this torch's varlen_attn has for a causal mask and for fewer key heads.

    Before it had enable_gqa it took fewer key heads without being asked; before it had window_size, is_causal.
    """
    known = inspect.signature(varlen_attn).parameters
    mask = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return (mask if causal else {}) | (gqa if "enable_gqa" in known else {})


class AttentionCase(Case):
    """q, k, v: [T, heads, D]. Backward is timed alone, over a forward that was done before."""

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.lengths, self.longest, self.total = spec.lengths, max(spec.lengths), sum(spec.lengths)
        self.backward = spec.direction == "backward"
        self.equal = len(set(spec.lengths)) == 1
        size = session.dtype.itemsize
        queries = self.total * spec.heads * spec.head_dim
        keys = self.total * spec.kv_heads * spec.head_dim
        self.flops, self.bytes = spec.work(size)
        self.inputs = []
        for _ in range(harness.copies(self.device, (2 * queries + 2 * keys) * size)):
            shapes = [spec.heads, spec.kv_heads, spec.kv_heads, spec.heads]
            make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
            self.inputs.append([make(self.total, h, spec.head_dim) for h in shapes])  # q, k, v, dout
        self.offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)
        self.packing = warpform.Packing.from_lengths(self.lengths, device=self.device)
        self.gqa = {"enable_gqa": True} if spec.kv_heads != spec.heads else {}

    # ---- what each provider calls ----

    def calls(
        self,
        attention: Callable[..., Tensor],
        lay_out: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
        mode: Callable[[], Any] = torch.inference_mode,
    ) -> list[Callable[[], Any]]:
        """Calls of attention(q, k, v) on inputs in the provider's own layout, made before the clock runs.

        `back` turns its tensors into packed ones, for the check.
        """
        self.back = back
        found: list[Callable[[], Any]] = []
        for q, k, v, dout in self.inputs:
            qkv = [lay_out(t).detach() for t in (q, k, v)]
            if not self.backward:
                found.append(functools.partial(_infer, attention, qkv, mode))
                continue
            for t in qkv:
                t.requires_grad_()
            out = attention(*qkv)
            found.append(functools.partial(torch.autograd.grad, out, qkv, lay_out(dout), retain_graph=True))
        return found

    def with_warpform(self) -> list[Callable[[], Any]]:
        offsets, longest, causal = self.offsets, self.longest, self.spec.causal

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return warpform.ops.varlen_attention(q, k, v, offsets, offsets, longest, longest, causal=causal)

        return self.calls(attention, _same, _same)

    def with_warpform_mma_sync(self) -> list[Callable[[], Any]]:
        return harness.on_mma_sync(self.session, self.with_warpform)

    def with_torch_varlen(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        from torch.nn.attention.varlen import varlen_attn

        options = varlen_options(varlen_attn, self.spec.causal, self.gqa)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            offsets, longest = self.offsets, self.longest
            return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)

        return self.calls(attention, _same, _same)

    def padded(self, attention: Callable[..., Tensor]) -> list[Callable[[], Any]]:
        """[B, H, S, D]; where all lengths are equal that is a view's worth of work and no padding."""
        return self.calls(
            attention,
            lambda t: self.packing.unpack(t).transpose(1, 2),
            lambda t: self.packing.pack(t.transpose(1, 2).contiguous()),
        )

    def mask(self) -> Tensor | None:
        """bool, broadcast to [B, H, S, S]; None where causal alone, or nothing, says it."""
        if self.equal:
            return None
        keys = (self.packing.ranks >= 0)[:, None, None, :]
        return (
            keys & torch.ones(self.longest, self.longest, dtype=torch.bool, device=self.device).tril()
            if (self.spec.causal)
            else keys
        )

    def sdpa(self, backend: SDPBackend) -> list[Callable[[], Any]]:
        mask = self.mask()
        causal = self.spec.causal and mask is None

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **self.gqa)

        return self.padded(attention)

    def with_sdpa_flash_padded(self) -> list[Callable[[], Any]]:
        return self.sdpa(SDPBackend.FLASH_ATTENTION)

    def with_sdpa_cudnn_padded(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return self.sdpa(SDPBackend.CUDNN_ATTENTION)

    def with_sdpa_efficient_padded(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return self.sdpa(SDPBackend.EFFICIENT_ATTENTION)

    def jagged(self, backend: SDPBackend) -> list[Callable[[], Any]]:
        """Nested tensors [B, H, (S), D]."""
        self.session.need_gpu()
        offsets = self.offsets.long()
        shortest = min(self.lengths)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=self.spec.causal, **self.gqa)

        def lay_out(t: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor_from_jagged(t, offsets, min_seqlen=shortest, max_seqlen=self.longest)
            return nested.transpose(1, 2)

        # Jagged tensors do not work under inference_mode.
        return self.calls(attention, lay_out, lambda t: t.transpose(1, 2).contiguous().values(), torch.no_grad)

    def with_sdpa_flash_jagged(self) -> list[Callable[[], Any]]:
        return self.jagged(SDPBackend.FLASH_ATTENTION)

    def with_sdpa_cudnn_jagged(self) -> list[Callable[[], Any]]:
        return self.jagged(SDPBackend.CUDNN_ATTENTION)

    def with_sdpa_efficient_jagged(self) -> list[Callable[[], Any]]:
        return self.jagged(SDPBackend.EFFICIENT_ATTENTION)

    def with_flex_compiled(self) -> list[Callable[[], Any]]:
        """Equal lengths as a batch, others as one row of documents: the block mask skips what neither can see."""
        if self.device == "cpu" and self.backward:
            raise Missing("FlexAttention has no backward on a CPU")
        self.session.allow_compile()
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = harness.compiled(flex_attention, False)  # at its best: one kernel for each shape
        block_mask = None
        if self.equal:
            if self.spec.causal:
                sizes = (None, None, self.longest, self.longest)
                block_mask = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=self.device)
        else:
            # A mask of all pairs of blocks; made outside of the clock, as a model makes it once for all layers.
            lengths = torch.tensor(self.lengths, device=self.device)
            document = torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths)
            causal = self.spec.causal

            def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                same = document[i] == document[j]
                return same & (i >= j) if causal else same

            build = create_block_mask if self.total < 32_768 else harness.compiled(create_block_mask, False)
            block_mask = build(visible, None, None, self.total, self.total, device=self.device)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex(q, k, v, block_mask=block_mask, **self.gqa)

        if self.equal:
            return self.padded(attention)
        return self.calls(attention, lambda t: t.transpose(0, 1)[None], lambda t: t[0].transpose(0, 1))

    def with_eager_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        scores = len(self.lengths) * self.spec.heads * self.longest**2 * self.session.dtype.itemsize
        if scores > MOST_SCORE_BYTES:
            raise Missing(f"would write {scores / 1e9:.0f} GB of scores")
        if self.gqa:
            raise Missing("the composition has one key head per head")
        seen = self.mask()
        if self.spec.causal and seen is None:
            seen = torch.ones(self.longest, self.longest, dtype=torch.bool, device=self.device).tril()
        attention = harness.compiled(eager_attention)
        return self.padded(lambda q, k, v: attention(q, k, v, seen))

    # ---- what has to come out ----

    @functools.cached_property
    def truth(self) -> list[tuple[slice, slice, slice, list[Tensor], list[Tensor]]]:
        """The results of some sequences and key heads: rows, heads, key heads, tensors in float64 and in the dtype.

        A sequence and a key head depend on no others, so these parts are complete, and they fit in memory at any size.
        """
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        starts = [0, *accumulate(self.lengths)]
        group = self.spec.heads // self.spec.kv_heads
        found = []
        for b in sorted({order[0], order[-1], len(order) - 1}):
            for head in sorted({0, self.spec.kv_heads - 1}):
                rows, heads = slice(starts[b], starts[b + 1]), slice(head * group, (head + 1) * group)
                keys = slice(head, head + 1)
                parts = [t[rows, h] for t, h in zip(self.inputs[0], (heads, keys, keys, heads), strict=True)]
                length = [self.lengths[b]]
                how = {"causal": self.spec.causal}
                results = []
                for dtype in (torch.float64, self.session.dtype):
                    q, k, v, dout = (t.to(dtype) for t in parts)
                    if self.backward:
                        gradients = oracle.varlen_attention_gradients(dout, None, q, k, v, length, length, **how)
                        results.append(list(gradients))
                    else:
                        results.append([oracle.varlen_attention(q, k, v, length, length, **how)[0]])
                found.append((rows, heads, keys, *results))
        return found

    def check(self, provider: str, output: Any) -> None:
        tensors = [self.back(t) for t in (output if self.backward else [output])]
        names = ("dq", "dk", "dv") if self.backward else ("out",)
        for name, tensor in zip(names, tensors, strict=True):
            assert torch.isfinite(tensor).all(), f"{name}: not finite"
        for rows, heads, keys, exact, eager in self.truth:
            for name, tensor, wanted, plain in zip(names, tensors, exact, eager, strict=True):
                actual = tensor[rows, keys if name in ("dk", "dv") else heads]
                if provider.startswith("warpform"):
                    assert_close(name, actual, wanted, plain, gradient=self.backward)
                else:
                    harness.assert_near(name, actual, wanted, plain)


def _same(t: Tensor) -> Tensor:
    return t


def _infer(function: Callable[..., Tensor], inputs: list[Tensor], mode: Callable[[], Any]) -> Tensor:
    with mode():
        return function(*inputs)


def test_attention(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
