"""The paper's ring self-attention, and Linformer on a ring: against dense attention, by gradient, by what is saved.

All ranks live in this process (LocalGroup); test_sequence_parallel.py has the same over gloo.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from helpers.compare import assert_close, poisoned
from warpform.cli.ring_model.cost_model import linformer_saved_elements, rsa_saved_elements
from warpform.distributed import LocalGroup, shard_sequence, unshard_sequence
from warpform.distributed.linformer import linformer_attention
from warpform.distributed.rsa import ring_av, ring_qk, rsa_attention
from warpform.distributed.sequence_parallel import SequenceParallelAttention

LAYOUTS = ("contiguous", "zigzag", "striped")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
NAMES = ("q", "k", "v", "key_projection", "value_projection")


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None = None) -> Tensor:
    """[B, L, H, D] from whole sequences, head by head of the definition."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


def projected(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """Linformer's definition."""
    return attention(q, torch.einsum("kl,blhd->bkhd", e, k), torch.einsum("kl,blhd->bkhd", f, v), False)


def check(
    compute: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], dims: tuple[int, ...],
    group: LocalGroup, layout: str,
) -> None:  # fmt: skip
    """Output and every gradient of a sharded computation by the rule of numerics.md."""
    whole = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    shards = [
        shard_sequence(t, group=group, dim=d, layout=layout).requires_grad_() for t, d in zip(inputs, dims, strict=True)
    ]
    with poisoned():
        out = compute(*shards)
    oracle, eager = definition(*exact), definition(*whole)

    def back(t: Tensor, dim: int = 1) -> Tensor:
        return unshard_sequence(t.detach(), group=group, dim=dim, layout=layout)

    assert out.dtype == inputs[0].dtype
    assert_close("out", back(out), oracle, eager)
    dout = torch.randn_like(oracle)
    with poisoned():
        found = torch.autograd.grad(out, shards, shard_sequence(dout, group=group, dim=1, layout=layout).to(out.dtype))
    expected = torch.autograd.grad(oracle, exact, dout.to(out.dtype).double())
    roughly = torch.autograd.grad(eager, whole, dout.to(out.dtype))
    for name, dim, *gradients in zip(NAMES, dims, found, expected, roughly, strict=False):
        assert_close(f"d{name}", back(gradients[0], dim), gradients[1], gradients[2], gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), [(1, 2, 2), (2, 3, 1), (3, 4, 2), (5, 2, 2)])
def test_rsa(ranks, heads, kv_heads, causal, layout, dtype):
    length = 14 * ranks
    shapes = ((2, length, heads, 10), (2, length, kv_heads, 10), (2, length, kv_heads, 10))
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    group = LocalGroup(ranks)
    check(
        lambda q, k, v: rsa_attention(q, k, v, group=group, causal=causal, layout=layout),
        lambda q, k, v: attention(q, k, v, causal),
        inputs,
        (1, 1, 1),
        group,
        layout,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("ranks", "heads", "kv_heads", "rank"), [(1, 2, 2, 4), (2, 3, 1, 7), (3, 4, 2, 5), (4, 2, 2, 3)]
)
def test_linformer(ranks, heads, kv_heads, rank, layout, dtype):
    length = 14 * ranks
    shapes = (
        (2, length, heads, 10), (2, length, kv_heads, 10), (2, length, kv_heads, 10), (rank, length), (rank, length),
    )  # fmt: skip
    inputs = [torch.randn(shape).mul(1 if len(shape) == 4 else length**-0.5).to(dtype) for shape in shapes]
    group = LocalGroup(ranks)
    check(
        lambda *tensors: linformer_attention(*tensors, group=group), projected, inputs, (1, 1, 1, 1, 1), group, layout
    )
    # Without a group, and over a double ring.
    exact, same = (f(*(t.double() for t in inputs)) for f in (projected, linformer_attention))
    assert_close("one rank", same, exact, exact)
    if ranks == 4:
        double = LocalGroup(4, inner_size=2)
        shards = [shard_sequence(t.double(), group=double, dim=1, layout=layout) for t in inputs]
        out = linformer_attention(*shards, group=double)
        assert_close("double ring", unshard_sequence(out, group=double, dim=1, layout=layout), exact, exact)


def test_scores_are_in_the_order_of_ranks():
    """Columns are the keys of rank 0, 1, ... as they hold them; what causal hides is -inf and has no gradient."""
    group, scale = LocalGroup(3), 0.7
    q, k = (torch.randn(1, 12, 2, 5, dtype=torch.float64) for _ in range(2))
    for layout in LAYOUTS:
        place = shard_sequence(torch.arange(12)[None], group=group, dim=1, layout=layout)[:, 0]  # [3, 4]
        scores = ring_qk(
            *(shard_sequence(t, group=group, dim=1, layout=layout).requires_grad_() for t in (q, k)),
            group=group, scale=scale, causal=True, layout=layout,
        )  # fmt: skip
        assert scores.shape == (3, 1, 2, 4, 12)
        expected = torch.einsum("bihd,bjhd->bhij", q, k) * scale
        expected = expected.masked_fill(torch.arange(12)[None, :] > torch.arange(12)[:, None], -math.inf)
        columns = place.flatten()
        for rank in range(3):
            wanted = expected[:, :, place[rank]][..., columns]
            assert_close(f"rank {rank}", scores[rank], wanted, wanted)
    # A gradient for hidden pairs goes nowhere, NaN neither.
    gradient = torch.randn_like(scores)
    keys = [shard_sequence(t, group=group, dim=1, layout="zigzag").requires_grad_() for t in (q, k)]
    scores = ring_qk(*keys, group=group, scale=scale, causal=True, layout="zigzag")
    hidden = scores.isinf()
    clean = torch.autograd.grad(scores, keys, gradient.masked_fill(hidden, 0), retain_graph=True)
    spoiled = torch.autograd.grad(scores, keys, gradient.masked_fill(hidden, math.nan))
    assert all(torch.equal(a, b) for a, b in zip(clean, spoiled, strict=True))


def test_numerical_gradients_of_each_op():
    group = LocalGroup(2)
    q, k, v = (torch.randn(2, 1, 4, h, 3, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    p = torch.randn(2, 1, 2, 4, 8, dtype=torch.float64, requires_grad=True)
    e, f = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: ring_qk(q, k, group=group, scale=0.3), (q, k))
    assert torch.autograd.gradcheck(lambda p, v: ring_av(p, v, group=group), (p, v))
    assert torch.autograd.gradcheck(lambda *t: linformer_attention(*t, group=group), (q, k, v, e, f))


def test_compiles_as_one_graph():
    group = LocalGroup(2)
    compiled = torch.compile(
        lambda q, k, v: rsa_attention(q, k, v, group=group, causal=True).square(), fullgraph=True, backend="aot_eager"
    )
    q, k, v = (torch.randn(2, 1, 4, 2, 8, requires_grad=True) for _ in range(3))
    out = compiled(q, k, v)
    expected = rsa_attention(q, k, v, group=group, causal=True).square()
    assert torch.equal(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(expected.sum(), (q, k, v)), strict=True
    ):
        assert torch.equal(a, b)


# ---- what is saved ----


@contextlib.contextmanager
def saved(module: torch.nn.Module) -> Iterator[dict[tuple, int]]:
    """Elements that autograd keeps for the backward, by where they lie; what is kept twice counts once. No weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[tuple, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            # Distinct places of a storage: views of one product are its parts, a transposed one is the same again.
            found[t.data_ptr(), t.numel()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


class OneRank(torch.nn.Module):
    """The attention layer of every rank of a LocalGroup at once: products, attention, the output's product."""

    def __init__(self, hidden: int, heads: int, group: LocalGroup, kind: str, rank: int = 0, length: int = 0) -> None:
        super().__init__()
        self.layer = SequenceParallelAttention(hidden, heads, attention=kind, linformer_rank=rank, max_seqlen=length)
        self.group, self.heads, self.kind = group, heads, kind

    def forward(self, x: Tensor) -> Tensor:
        """x: [ranks, B, L/N, hidden]."""
        layer, n = self.layer, self.group.size
        q, k, v = layer.qkv(x).unflatten(-1, (-1, layer.head_dim)).split(self.heads, dim=-2)
        if self.kind == "rsa":
            out = rsa_attention(q, k, v, group=self.group)
        else:
            projections = (
                p.unflatten(1, (n, -1)).transpose(0, 1) for p in (layer.key_projection, layer.value_projection)
            )
            out = linformer_attention(q, k, v, *projections, group=self.group)
        return layer.out(out.flatten(-2))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_rsa_saves_what_the_paper_says(ranks):
    """(4 B L Z A + B Z L^2 + B L H) / N elements a rank, exactly: q, k, v and the output, scores, the layer's input."""
    batch, length, heads, head_dim, hidden = 2, 48, 3, 8, 24
    layer = OneRank(hidden, heads, LocalGroup(ranks), "rsa")
    x = torch.randn(ranks, batch, length // ranks, hidden, requires_grad=True)
    with saved(layer) as found:
        layer(x)
    expected = rsa_saved_elements(batch, length, ranks, hidden, heads, head_dim)
    assert sum(found.values()) == ranks * expected


def test_linformer_saves_what_does_not_grow_with_the_whole_sequence():
    """As many rows a rank, as many elements a rank, however long the sequence is; and a rank's part falls as 1 / N."""

    def elements(ranks: int, length: int) -> float:
        layer = OneRank(24, 3, LocalGroup(ranks), "linformer", 16, length)
        x = torch.randn(ranks, 1, length // ranks, 24, requires_grad=True)
        with saved(layer) as found:
            layer(x)
        return sum(found.values()) / ranks

    constant = 2 * 16 * 24  # the projected keys and values, on every rank
    for ranks in (2, 4, 8):
        assert elements(ranks, 64 * ranks) == elements(1, 64)
        assert elements(ranks, 512) - constant == (elements(1, 512) - constant) / ranks
    # Within a small factor of the paper's count, which leaves out the projections' inputs but has full scores.
    paper = linformer_saved_elements(1, 512, 4, 24, 3, 8, 16)
    assert 0.5 * paper < elements(4, 512) < 1.5 * paper


# ---- what is refused ----


def shards(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, *shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: ring_qk(None, shards(1, 4, 2, 8), group=g), TypeError, "ring_qk: q must be a tensor"),
        (lambda g: ring_qk(shards(4, 2, 8), shards(1, 4, 2, 8), group=g), ValueError, "q must be of shape [ranks"),
        (lambda g: ring_qk(shards(1, 4, 2, 8), shards(1, 4, 2, 6), group=g), ValueError, "batch and head_dim of q"),
        (lambda g: ring_qk(shards(1, 4, 3, 8), shards(1, 4, 2, 8), group=g), ValueError, "must divide those of q 3"),
        (lambda g: ring_qk(shards(1, 4, 2, 8), shards(1, 4, 2, 8).double(), group=g), TypeError, "k must be float32"),
        (lambda g: ring_qk(shards(1, 4, 2, 8), shards(1, 6, 2, 8), group=g, causal=True), ValueError, "as many rows"),
        (lambda g: ring_qk(shards(1, 4, 2, 8), shards(1, 4, 2, 8), group=g, layout="x"), ValueError, "layout must be"),
        (lambda g: ring_qk(*[shards(1, 4, 2, 8)] * 2, group=LocalGroup(2, 1)), ValueError, "one ring"),
        (lambda g: ring_qk(*[torch.zeros(1, 4, 2, 8)] * 2, group=None), TypeError, "group must be"),
        (lambda g: ring_av(shards(1, 2, 4, 7), shards(1, 4, 2, 8), group=g), ValueError, "8 columns"),
        (lambda g: ring_av(shards(1, 3, 4, 8), shards(1, 4, 2, 8), group=g), ValueError, "must divide those of p 3"),
        (
            lambda g: linformer_attention(*[shards(1, 4, 2, 8)] * 3, *[shards(5, 3)] * 2, group=g),
            ValueError,
            "key_projection must have 4 columns",
        ),
        (
            lambda g: linformer_attention(*[shards(1, 4, 2, 8)] * 3, shards(5, 4), shards(6, 4), group=g),
            ValueError,
            "value_projection must be of shape",
        ),
        (
            lambda g: linformer_attention(*[shards(1, 4, 2, 8)] * 3, *[shards(5, 4).double()] * 2, group=g),
            TypeError,
            "key_projection must be float32",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as raised:
        call(LocalGroup(2))
    assert words in str(raised.value)


def test_nothing_to_attend_to():
    group = LocalGroup(2)
    for shape in ((0, 4, 2, 8), (1, 0, 2, 8)):
        q, k, v = (shards(*shape).requires_grad_() for _ in range(3))
        out = rsa_attention(q, k, v, group=group)
        assert out.shape == q.shape
        out.sum().backward()
        assert q.grad.shape == q.shape
