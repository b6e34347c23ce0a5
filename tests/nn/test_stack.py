"""Branches and stacks: the order of sums, the fused ways, caches, and what the cores compute."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform import Packing
from warpform.nn import Activation, AttentionCore, Branch, GatedActivation, Stack, Step
from warpform.nn.cache import KeyValueCache
from warpform.nn.norm import norm_of_sum
from warpform.nn.rotary import apply_rotary, rotary_tables

HIDDEN, HEADS, KV, DIM = 24, 4, 2, 8
LENGTHS = (5, 1, 9)


def attention(**options: Any) -> Branch:
    core = AttentionCore(HEADS, KV, DIM, **options)
    return Branch(
        nn.RMSNorm(HIDDEN, 1e-6),
        nn.Linear(HIDDEN, core.width, bias=False),
        core,
        nn.Linear(HEADS * DIM, HIDDEN, bias=False),
    )


def feed_forward(placement: str = "before", norm: Callable[[], nn.Module] = lambda: nn.RMSNorm(HIDDEN)) -> Branch:
    return Branch(norm(), nn.Linear(HIDDEN, 26), GatedActivation(), nn.Linear(13, HIDDEN), placement=placement)


def branches(layers: int = 3) -> list[Branch]:
    made = [branch for _ in range(layers) for branch in (attention(), feed_forward())]
    for branch in made:
        branch.double()
        nn.init.uniform_(branch.norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
    return made


def step() -> Step:
    return Step.of(Packing.from_lengths(LENGTHS))


def rows() -> Tensor:
    return torch.randn(sum(LENGTHS), HIDDEN, dtype=torch.float64)


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).detach().abs().max()) <= 1e-13 * max(1.0, float(other.detach().abs().max()))


def watched(stack: Stack) -> Stack:
    """The same stack, where nothing may be fused: every branch is called."""
    for branch in stack.branches:
        branch.register_forward_hook(lambda *call: None)
    return stack


# ---- the order of sums ----


def one_after_the_other(parts: list[Branch], x: Tensor) -> Tensor:
    for part in parts:
        x = x + part(x, step())
    return x


def ladder(parts: list[Branch], x: Tensor) -> Tensor:
    """x_i = x_{i-1} + h_i(x_{i-2}): the first two read the input."""
    before, now = x, x
    for part in parts:
        before, now = now, now + part(before, step())
    return now


def half_a_ladder(parts: list[Branch], x: Tensor) -> Tensor:
    """The first layer as usual. From the second on the ladder's order, whose first branch reads the whole sum."""
    return ladder(parts[2:], one_after_the_other(parts[:2], x))


def parallel(parts: list[Branch], x: Tensor) -> Tensor:
    for one, other in zip(parts[::2], parts[1::2], strict=True):
        x = x + one(x, step()) + other(x, step())
    return x


@pytest.mark.parametrize(
    ("lags", "order"),
    (
        (None, one_after_the_other),
        ([1] * 6, ladder),
        ([0, 0, 0, 1, 1, 1], half_a_ladder),
        ([0, 1] * 3, parallel),
    ),
    ids=("usual", "ladder", "hybrid", "parallel"),
)
def test_lags_are_the_published_orders(lags: list[int] | None, order: Callable[..., Tensor], monkeypatch: Any) -> None:
    parts, x = branches(), rows().requires_grad_()
    expected = order(parts, x)
    weights = [p for part in parts for p in part.parameters()]
    grads = torch.autograd.grad(expected.square().sum(), [x, *weights])
    stack, fused = Stack(parts, lags), []
    after_sum = Branch.after_sum
    monkeypatch.setattr(Branch, "after_sum", lambda *call: fused.append(call) or after_sum(*call))
    for watching in (False, True):  # with sums and norms in one pass, and, where the branches are watched, apart
        fused.clear()
        found = (watched(stack) if watching else stack)(x, step())
        assert bool(fused) != watching
        assert close(found, expected)
        for one, other in zip(torch.autograd.grad(found.square().sum(), [x, *weights]), grads, strict=True):
            assert close(one, other)


def test_the_last_norm_takes_the_last_sum() -> None:
    parts, x, norm = branches(), rows(), nn.RMSNorm(HIDDEN).double()
    for lags in (None, [1] * 6):
        stack = Stack(parts, lags)
        assert close(stack(x, step(), norm), norm(stack(x, step())))
    assert torch.equal(Stack([])(x, step()), x)


@pytest.mark.parametrize("placement", ("before", "output", "sum"))
@pytest.mark.parametrize("kind", ("RMSNorm", "LayerNorm"))
def test_placements(placement: str, kind: str) -> None:
    parts = [feed_forward(placement, lambda: getattr(nn, kind)(HIDDEN)).double() for _ in range(2)]
    x = expected = rows()
    for part in parts:
        norm, kept = part.norm, expected
        inner = norm(kept) if placement == "before" else kept
        out = part.outwards(part.core(part.inwards(inner)))
        out = norm(out) if placement == "output" else out
        expected = norm(kept + out) if placement == "sum" else kept + out
    assert close(Stack(parts)(x, step()), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "make",
    (
        lambda: nn.RMSNorm(HIDDEN),
        lambda: nn.RMSNorm(HIDDEN, 1e-3),
        lambda: nn.RMSNorm(HIDDEN, elementwise_affine=False),
        lambda: nn.LayerNorm(HIDDEN),
        lambda: nn.LayerNorm(HIDDEN, bias=False),
        lambda: nn.LayerNorm(HIDDEN, elementwise_affine=False),
    ),
    ids=("rms", "eps", "plain rms", "layer", "no bias", "plain layer"),
)
def test_norms_are_those_of_torch(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Small rows, where an eps that was taken for another shows."""
    norm, x, residual = make().to(dtype), 0.02 * torch.randn(7, HIDDEN), 0.02 * torch.randn(7, HIDDEN)
    x, residual = x.to(dtype), residual.to(dtype)
    exact, total = norm.double(), x.double() + residual.double()
    truth = exact(total)
    if getattr(norm, "eps", 0) is None:
        truth = total * (total.square().mean(1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    norm.to(dtype)
    normed, added = norm_of_sum(norm, x, None, residual)
    assert_close("norm", normed, truth, norm(x + residual))
    assert_close("sum", added, total, x + residual)


def test_norms_in_float32_of_a_stack_in_bfloat16() -> None:
    stack = Stack(branches()).bfloat16()
    for branch in stack.branches:
        branch.norm.float()
    exact = copy.deepcopy(stack).double()
    x = rows().bfloat16()
    assert_close("stream", stack(x, step()), exact(x.double(), step()), watched(copy.deepcopy(stack))(x, step()))
    assert stack.caches(1, 4).parts[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("placement", ("before", "output", "sum"))
def test_a_stream_in_float32_stays_so_under_autocast(placement: str) -> None:
    stack, x = Stack(branches()).float(), rows().float()
    for branch in stack.branches:
        branch.placement = placement
    truth = copy.deepcopy(stack).double()(x.double(), step())
    with torch.autocast("cpu", torch.bfloat16):
        out, apart = stack(x, step()), watched(copy.deepcopy(stack))(x, step())
    assert out.dtype == torch.float32
    # Products are rounded to bfloat16 in both.
    assert_close("stream", out, truth, apart)


class Doubled(Branch):
    def forward(self, x: Tensor, step: Step, cache: Any = None) -> Any:
        return 2 * super().forward(x, step, cache)


class Wrapper(nn.Module):
    """What wraps a module as FSDP and checkpoints do: it is called, and has the attributes of what is within."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *call: Any) -> Any:
        self.calls += 1
        return self.inner(*call)


def test_branches_with_a_forward_of_their_own_are_called() -> None:
    parts, x = branches(), rows()
    expected = one_after_the_other(parts, x)
    wrapped = Stack([Wrapper(part) for part in parts])
    assert close(wrapped(x, step()), expected)
    assert [branch.calls for branch in wrapped.branches] == [1] * len(parts)
    with torch.no_grad():
        cached = wrapped(x, Step.after(wrapped.caches(1, 20), [len(x)], [0]))
    assert close(cached, Stack(parts)(x, one_text(len(x))))
    parts[3].__class__ = Doubled
    assert close(Stack(parts)(x, step()), one_after_the_other(parts, x))


def one_text(length: int) -> Step:
    return Step.of(Packing.from_lengths([length]))


def test_a_hook_on_a_core_sees_all_rows() -> None:
    part, seen = feed_forward().double(), []
    part.core.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with torch.inference_mode():
        part(torch.randn(1100, HIDDEN, dtype=torch.float64), one_text(1100))
    assert seen == [1100]


def test_slices_are_the_whole() -> None:
    parts, x = branches(), rows()
    stack = Stack(parts)
    assert close(stack.slice(2, 6)(stack.slice(0, 2)(x, step()), step()), stack(x, step()))
    assert list(stack.slice(2, 4).branches) == parts[2:4]


def test_a_branch_can_be_put_in_and_stand_twice() -> None:
    parts, x = branches(), rows()
    stack = Stack(parts[:2] + parts[4:])
    for i, part in enumerate(parts[2:4]):
        stack.insert(2 + i, part)
    assert close(stack(x, step()), one_after_the_other(parts, x))
    twice = Stack(parts[:2] * 2)
    assert close(twice(x, step()), one_after_the_other(parts[:2] * 2, x))
    assert sum(p.numel() for p in twice.parameters()) == sum(p.numel() for b in parts[:2] for p in b.parameters())


class Later:
    """What a sum over other GPUs that is still running gives: it is there once it is waited for."""

    def __init__(self, out: Tensor) -> None:
        self.out, self.waited = out, 0

    def wait(self) -> Tensor:
        self.waited += 1
        return self.out


def test_pending_results_are_waited_for_once() -> None:
    parts, x, pending = branches(1), rows(), []

    class Slow(Branch):
        def body(self, x: Tensor, step: Step, cache: Any = None) -> Any:
            pending.append(Later(super().body(x, step, cache)))
            return pending[-1]

    for part in parts:
        part.__class__ = Slow
    found = Stack(parts, [1, 1])(x, step())
    assert [later.waited for later in pending] == [1, 1]
    for part in parts:
        part.__class__ = Branch
    assert close(found, ladder(parts, x))


def test_losses_come_along_and_checkpointing_keeps_their_gradients() -> None:
    class Routed(Branch):
        def body(self, x: Tensor, step: Step, cache: Any = None) -> Any:
            out = super().body(x, step, cache)
            return out, out.square().mean()

    parts = branches(2)
    for part in parts[1::2]:
        part.__class__ = Routed
    x, results = rows(), []
    for again in (False, True):
        stack = Stack(parts).train()
        stack.gradient_checkpointing = again
        now = step()
        out = stack(x, now)
        assert len(now.losses) == 2
        loss = out.square().mean() + sum(now.losses)
        results.append((loss, *torch.autograd.grad(loss, list(stack.parameters()))))
    for one, other in zip(*results, strict=True):
        assert close(one, other)


def test_a_module_that_depends_on_the_step() -> None:
    class Half(nn.Linear):
        def at_step(self, x: Tensor, step: Step) -> Tensor:
            return self(x) * step.width

    part = feed_forward().double()
    half = Half(13, HIDDEN).double()
    half.load_state_dict(part.outwards.state_dict())
    x, now = rows(), step()
    now.width = 0.5
    whole = part(x, now)
    part.outwards = half
    assert close(part(x, now), 0.5 * whole)
    # What wraps a module, and hands on its attributes, is called.
    part.outwards = Wrapper(half)
    assert close(part(x, now), whole) and part.outwards.calls == 1


# ---- attention ----


def plain_attention(
    core: AttentionCore, product: Tensor, lengths: tuple[int, ...], sees: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sequence by sequence and head by head, from the formula. sees(i, j) says whether query i sees key j."""
    out = []
    for rows_ in product.split(lengths):
        n = len(rows_)
        heads = rows_.view(n, -1, core.head_dim)
        q, k, v = heads.split((core.num_heads, core.num_kv_heads, core.num_kv_heads), 1)
        for norm, which in ((core.q_norm, "q"), (core.k_norm, "k")):
            if norm is not None:
                q, k = (norm(q), k) if which == "q" else (q, norm(k))
        if core.rotary is not None:
            tables = rotary_tables(torch.arange(n), core.rotary.dim, core.rotary.theta, torch.float64)
            q, k = (apply_rotary(t, *tables) for t in (q, k))
        group = core.num_heads // core.num_kv_heads
        i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
        scale = core.head_dim**-0.5 if core.softmax_scale is None else core.softmax_scale
        found = []
        for h in range(core.num_heads):
            scores = scale * q[:, h] @ k[:, h // group].t()
            weights = scores.masked_fill(~sees(i, j), -math.inf).softmax(1).nan_to_num()
            found.append(weights @ v[:, h // group])
        out.append(torch.cat(found, 1))
    return torch.cat(out)


@pytest.mark.parametrize(
    ("options", "sees"),
    (
        ({}, lambda i, j: j <= i),
        ({"causal": False}, lambda i, j: j >= 0 * i),
        ({"window": 3}, lambda i, j: (j <= i) & (i - j < 3)),
        ({"window": 1}, lambda i, j: i == j),
        ({"window": 3, "causal": False}, lambda i, j: (i - j).abs() < 3),
        ({"softmax_scale": 0.7, "rotary_share": 0.5}, lambda i, j: j <= i),
        ({"rotary_share": 0}, lambda i, j: j <= i),
        ({"q_norm": nn.RMSNorm(DIM).double(), "k_norm": nn.LayerNorm(DIM).double()}, lambda i, j: j <= i),
    ),
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_attention(options: dict[str, Any], sees: Callable[[Tensor, Tensor], Tensor]) -> None:
    core = AttentionCore(HEADS, KV, DIM, **options)
    product = torch.randn(sum(LENGTHS), core.width, dtype=torch.float64, requires_grad=True)
    found, expected = core(product, step()), plain_attention(core, product, LENGTHS, sees)
    assert close(found, expected)
    weight = torch.randn_like(expected)
    one, other = (torch.autograd.grad((out * weight).sum(), product)[0] for out in (found, expected))
    assert close(one, other)


def test_key_ranges() -> None:
    """Each token sees one run of keys: blocks within causal text, and a token that sees nothing."""
    core = AttentionCore(HEADS, KV, DIM)
    product = torch.randn(sum(LENGTHS), core.width, dtype=torch.float64, requires_grad=True)
    causal = step()
    causal.key_ranges = torch.cat([torch.stack((torch.zeros(n), torch.arange(n) + 1), 1) for n in LENGTHS]).int()
    assert close(core(product, causal), core(product, step()))
    blocks, none = step(), 0
    ends = [torch.tensor([[0, 0], *([[0, 3]] * 2), *([[1, n]] * (n - 3))])[:n] for n in LENGTHS]
    blocks.key_ranges = torch.cat(ends).int()
    expected = torch.cat(
        [
            plain_attention(core, rows_, (len(rows_),), lambda i, j, r=run: (j >= r[:, :1]) & (j < r[:, 1:]))
            for rows_, run in zip(product.split(LENGTHS), ends, strict=True)
        ]
    )
    found = core(product, blocks)
    assert close(found, expected) and not found[none].any()
    one, other = (torch.autograd.grad(out.square().sum(), product)[0] for out in (found, expected))
    assert close(one, other) and torch.isfinite(one).all()
    blocks.key_ranges = blocks.key_ranges[1:]
    with pytest.raises(ValueError, match=r"key_ranges must be of shape \[15, 2\], got \[14, 2\]"):
        core(product, blocks)


# ---- caches ----


def test_tokens_one_by_one_are_all_at_once() -> None:
    """Sequences of other lengths, some of which rest in some steps; and a token that is taken back."""
    parts, x = branches(), rows()
    stack = Stack(parts, [0, 0, 1, 1, 1, 1]).eval()
    whole = stack(x, step()).split(LENGTHS)
    texts = x.split(LENGTHS)
    caches = stack.caches(3, max(LENGTHS), dtype=torch.float64)
    found: list[list[Tensor]] = [[], [], []]

    @torch.no_grad()
    def feed(counts: dict[int, int]) -> None:
        taken = [texts[row][caches.lengths[row] :][:count] for row, count in counts.items()]
        now = Step.after(caches, list(counts.values()), list(counts))
        out = stack(torch.cat(taken), now).split(list(counts.values()))
        for row, rows_ in zip(counts, out, strict=True):
            found[row].append(rows_)

    feed({0: 2, 1: 1, 2: 4})
    feed({0: 1, 2: 3})
    feed({2: 1})
    caches.rewind(2, 7)
    found[2] = [torch.cat(found[2])[:7]]
    feed({0: 2, 2: 2})
    for row, expected in enumerate(whole):
        assert close(torch.cat(found[row]), expected)
    with pytest.raises(ValueError, match=r"a sequence may have at most 9 tokens, got 10"):
        Step.after(caches, [1], [2])
    for counts, given, text in (
        ([1, 1], [1, 0], r"rows must be some of 0 to 2, increasing, got \[1, 0\]"),
        ([1, 1], [0, 0], r"rows must be some of 0 to 2, increasing, got \[0, 0\]"),
        ([1], [-1], r"rows must be some of 0 to 2, increasing, got \[-1\]"),
        ([1], [3], r"rows must be some of 0 to 2, increasing, got \[3\]"),
        ([], [], r"rows must be some of 0 to 2, increasing, got \[\]"),
        ([0], [0], r"each of the 1 rows must get at least one token, got \[0\]"),
        ([1, 1], [0], r"each of the 1 rows must get at least one token, got \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=text):
            Step.after(caches, counts, given)
    with pytest.raises(ValueError, match=r"length must be from 0 to the 9 tokens there are, got 10"):
        caches.rewind(2, 10)


def test_caches_of_another_stack_are_refused() -> None:
    stack, other = Stack(branches()), Stack(branches(1))
    x = torch.randn(1, HIDDEN, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"gradients do not go through a cache; decode under torch.no_grad\(\)"):
        stack(x, Step.after(stack.caches(1, 4), [1], [0]))
    stack.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the cache must hold torch.float64 as the keys are, got torch.float32"):
        stack(x, Step.after(stack.caches(1, 4, dtype=torch.float32), [1], [0]))
    with pytest.raises(ValueError, match=r"caches that this stack made, for 6 branches, got those of 2"):
        stack(x, Step.after(other.caches(1, 4), [1], [0]))
    caches = stack.caches(1, 4)
    caches.parts[0] = KeyValueCache(1, 4, KV + 1, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"keys of \[heads, head_dim\] \[2, 8\], .* got \[3, 8\]"):
        stack(x, Step.after(caches, [1], [0]))
    assert caches.lengths == [0]  # after an error there is nothing new
    state = stack.caches(1, 4)
    state.parts[0] = object()
    with pytest.raises(ValueError, match=r"a object cannot be taken back"):
        state.rewind(0, 0)


# ---- the rest ----


def test_activations() -> None:
    x = torch.randn(7, 10, dtype=torch.float64)
    gate, up = x.chunk(2, 1)
    assert close(GatedActivation()(x), F.silu(gate) * up)
    assert close(GatedActivation("gelu")(x), F.gelu(gate) * up)
    assert close(Activation("relu")(x), F.relu(x))
    with torch.inference_mode():
        assert close(GatedActivation()(x), F.silu(gate) * up)


def test_rows_in_blocks_are_the_same_rows() -> None:
    """A CPU takes some rows of a feed-forward at a time in inference; its results are those of all at once."""
    part = feed_forward().double()
    x = torch.randn(1100, HIDDEN, dtype=torch.float64)
    now = Step.of(Packing.from_lengths([1100]))
    expected = part(x, now)
    with torch.inference_mode():
        assert close(part(x, now), expected)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"placement must be one of before, output, sum, got 'after'"):
        feed_forward("after")
    with pytest.raises(ValueError, match=r"lags must be 2 numbers of at least 0, one for each branch, got \[0\]"):
        Stack(branches(1), [0])
    with pytest.raises(ValueError, match=r"lags must be 2 numbers of at least 0, one for each branch, got \[0, -1\]"):
        Stack(branches(1), [0, -1])
    with pytest.raises(ValueError, match=r"num_kv_heads must divide num_heads 4, got 3"):
        AttentionCore(4, 3, 8)
    with pytest.raises(ValueError, match=r"window must be at least 1, itself, got 0"):
        AttentionCore(4, window=0)
    with pytest.raises(ValueError, match=r"even number of dimensions, got 7"):
        AttentionCore(4, head_dim=7)
    with pytest.raises(ValueError, match=r"rotary_share must be from 0 to 1, got 1.5"):
        AttentionCore(4, rotary_share=1.5)
    stack = Stack(branches(1))
    for place, lag in ((-1, 0), (3, 0), (1, -1)):
        with pytest.raises(ValueError, match=rf"place must be from 0 to 2 and lag at least 0, got {place} and {lag}"):
            stack.insert(place, feed_forward(), lag)
    stack.branches.append(feed_forward())
    with pytest.raises(ValueError, match=r"a lag for each of the 3 branches, got 2; put a branch in by Stack.insert"):
        stack(rows(), step())
    part = attention().double()
    with pytest.raises(ValueError, match=r"a cache needs the places of new tokens; make the step by Step.after"):
        part(rows(), step(), part.cache(3, 9, dtype=torch.float64))
