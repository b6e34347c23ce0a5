"""Monarch Mixer's modules against dense matrices and convolutions written from the formulas, in float64."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor

from helpers import plain_m2 as plain
from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import randomise
from warpform.nn import (
    BlockdiagLinear,
    ImplicitFilter,
    MonarchLinear,
    MonarchMixerMLP,
    MonarchMixerSequenceMixer,
)


def check_module(module: torch.nn.Module, formula, x: Tensor) -> None:
    """Output and the gradient of every parameter and of x; formula(weights, x) is the definition."""
    runs = []
    for dtype in (torch.float64, torch.float32):
        weights = plain.weights_of(module, dtype)
        inputs = x.to(dtype).requires_grad_()
        runs.append((weights, inputs, formula(weights, inputs)))
    x = x.clone().requires_grad_()
    out = module(x)
    (truth_weights, truth_x, truth), (eager_weights, eager_x, eager) = runs
    assert_close("out", out, truth, eager)
    probe = torch.randn_like(truth)
    losses = [(o * probe.to(o.dtype)).sum() for o in (out, truth, eager)]
    inputs = zip(losses, (x, truth_x, eager_x), strict=True)
    dx = [torch.autograd.grad(loss, one, retain_graph=True)[0] for loss, one in inputs]
    assert_close("dx", *dx, gradient=True)
    plain.check_gradients(module, losses[:1], (truth_weights, losses[1:2]), (eager_weights, losses[2:]))


# ---- linear maps ----


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(("in_features", "out_features", "nblocks"), ((12, 20, 4), (20, 12, 4), (13, 22, 4), (7, 7, 1)))
def test_blockdiag_linear(in_features: int, out_features: int, nblocks: int, bias: bool) -> None:
    module = BlockdiagLinear(in_features, out_features, bias, nblocks)

    def dense(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        matrix = torch.block_diag(*weights["weight"])[:out_features, :in_features]
        return plain.linear({**weights, "weight": matrix}, x)

    assert module.weight.abs().max() <= 1 / math.sqrt(module.weight.shape[2])
    check_module(module, dense, torch.randn(3, 5, in_features))


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    ("in_features", "out_features", "nblocks"), ((24, 24, 4), (12, 32, 4), (32, 12, 4), (13, 22, 4), (27, 18, 9))
)
def test_monarch_linear(in_features: int, out_features: int, nblocks: int, bias: bool) -> None:
    module = MonarchLinear(in_features, out_features, bias, nblocks)

    def dense(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        matrix = plain.monarch_matrix(weights["blkdiag1"], weights["blkdiag2"])[:out_features, :in_features]
        return plain.linear({**weights, "weight": matrix}, x)

    check_module(module, dense, torch.randn(3, 5, in_features))
    matrix = plain.monarch_matrix(module.blkdiag1, module.blkdiag2)[:out_features, :in_features]
    torch.testing.assert_close(module.to_dense(), matrix)


def test_monarch_linear_has_the_published_parameters() -> None:
    with torch.device("meta"):
        up, down = MonarchLinear(768, 3072), MonarchLinear(3072, 768)
    assert [list(p.shape) for p in (up.blkdiag1, up.blkdiag2)] == [[4, 192, 192], [4, 768, 192]]
    assert [list(p.shape) for p in (down.blkdiag1, down.blkdiag2)] == [[4, 192, 768], [4, 192, 192]]
    assert sum(p.numel() for p in up.parameters()) == 737_280 + 3072


@pytest.mark.parametrize(
    ("in_features", "out_features", "nblocks"), ((24, 24, 4), (12, 32, 4), (13, 22, 4), (18, 27, 3))
)
def test_projection_of_a_monarch_matrix_is_itself(in_features: int, out_features: int, nblocks: int) -> None:
    original = MonarchLinear(in_features, out_features, nblocks=nblocks).double()
    linear = torch.nn.Linear(in_features, out_features).double()
    with torch.no_grad():
        linear.weight.copy_(original.to_dense())
        linear.bias.copy_(original.bias)
    projected = MonarchLinear.from_linear(linear.eval(), nblocks=nblocks)
    x = torch.randn(7, in_features, dtype=torch.float64)
    assert not projected.training and (projected(x) - linear(x)).abs().max() < 1e-13


def test_projection_is_nearer_than_what_training_finds() -> None:
    """Gradient descent from the projection, and from anywhere else, ends no nearer."""
    torch.manual_seed(0)
    dense = torch.randn(16, 24, dtype=torch.float64)

    def distance(module: MonarchLinear) -> Tensor:
        return (module.to_dense() - dense).square().sum()

    best = MonarchLinear.from_dense(dense, nblocks=4)
    nearest = distance(best).item()
    for start in (copy.deepcopy(best), MonarchLinear(24, 16, bias=False, nblocks=4).double()):
        optimizer = torch.optim.Adam(start.parameters(), lr=0.01)
        for _ in range(100):
            optimizer.zero_grad()
            distance(start).backward()
            optimizer.step()
        assert distance(start).item() > nearest - 1e-9
    assert nearest < 0.7 * dense.square().sum().item()


@pytest.mark.parametrize("nblocks", (1, 2, 4))
@pytest.mark.parametrize("add_and_norm", (True, False))
def test_mlp(nblocks: int, add_and_norm: bool) -> None:
    torch.manual_seed(0)
    module = MonarchMixerMLP(16, 24, nblocks=nblocks, add_and_norm=add_and_norm)
    randomise(module, 0.3).train()
    check_module(module, lambda w, x: plain.mlp(w, x, 1e-12 if add_and_norm else None), torch.randn(2, 9, 16))


def test_mlp_drops_what_is_inside() -> None:
    module = randomise(MonarchMixerMLP(8, dropout=1.0), 0.5).train()
    x = torch.randn(3, 8)
    nothing = torch.nn.functional.layer_norm(x + module.wo.bias, (8,), *module.layernorm.parameters(), 1e-12)
    torch.testing.assert_close(module(x), nothing)
    assert (module.eval()(x) - nothing).abs().max() > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockdiagLinear(8, 0), "BlockdiagLinear: features and nblocks must be at least 1, got 0 and 4"),
        (lambda: MonarchLinear(8, 8, nblocks=0), "MonarchLinear: features and nblocks must be at least 1, got 8 and 0"),
        (lambda: MonarchLinear.from_dense(torch.zeros(3)), r"weight must be 2-D, got shape \[3\]"),
        (lambda: MonarchMixerMLP(10), "nblocks must divide hidden_size 10, got 4"),
        (lambda: MonarchMixerMLP(8, 6), "nblocks must divide intermediate_size 6, got 4"),
        (lambda: ImplicitFilter(8, 0), "l_max must be at least 1, got 0"),
        (lambda: ImplicitFilter(8, 4, emb_dim=4), "emb_dim must be odd and at least 3, got 4"),
    ],
)
def test_bad_options(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- filters ----


def test_filter_starts_as_published() -> None:
    module = ImplicitFilter(7, 11, emb_dim=7, order=5, bidirectional=True)
    for i in range(11):
        angles = [2 * math.pi * i / 11 * f for f in (1e-4, 1.00005, 2.0)]
        row = [i / 10, *map(math.cos, angles), *(-math.sin(a) for a in angles)]
        torch.testing.assert_close(module.pos_emb.z[0, i].detach(), torch.tensor(row), atol=2e-6, rtol=0)
        assert module.pos_emb.t[0, i, 0].item() == pytest.approx(i / 10)
    slow, fast = math.log(0.01) / 1.5, math.log(0.01) / 0.3
    deltas = torch.tensor([slow + (fast - slow) * c / 6 for c in range(7)])
    torch.testing.assert_close(module.modulation.deltas[0, 0], deltas)
    assert (module.implicit_filter[1].freq == 10).all()
    names = {name for name, _ in module.named_parameters()}
    assert "implicit_filter.1.freq" in names and not any(".3." in n or ".5." in n or "rev.1" in n for n in names)


@pytest.mark.parametrize("seqlen", (1, 8, 20, 27))
def test_taps(seqlen: int) -> None:
    """Those of a shorter sequence are the first of all; there are none beyond l_max."""
    module = randomise(ImplicitFilter(6, 20, order=4, bidirectional=True, w_mod=1.0), 0.3)
    k, k_reverse = module.taps(seqlen)
    truth, eager = (plain.weights_of(module, dtype) for dtype in (torch.float64, torch.float32))
    assert k.shape == k_reverse.shape == (6, min(seqlen, 20))
    for rev, found in (("", k), ("_rev", k_reverse)):
        assert_close("taps", found, plain.taps(truth, seqlen, rev), plain.taps(eager, seqlen, rev))


def test_filters_stay_in_float32() -> None:
    """In bfloat16 the first 256 of 32,768 places would have the same time."""
    mixer = MonarchMixerSequenceMixer(8, 40, order=4).bfloat16()
    assert {p.dtype for p in mixer.filter_fn.parameters()} == {torch.float32}
    assert {b.dtype for b in mixer.filter_fn.buffers()} == {torch.float32}
    assert mixer.in_linear.weight.dtype == torch.bfloat16
    assert mixer(torch.randn(2, 30, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    mixer.double()
    assert {p.dtype for p in mixer.parameters()} == {torch.float64}
    mixer.half()
    assert {p.dtype for p in mixer.filter_fn.parameters()} == {torch.float32}
    alone, _ = mixer.filter_fn.taps(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        k, _ = mixer.filter_fn.taps(12)
    assert torch.equal(k, alone)


# ---- what is kept of filters ----


class Counting(ImplicitFilter):
    """Counts how often taps are made."""

    made = 0

    def taps(self, seqlen: int) -> tuple[Tensor, Tensor | None]:
        self.made += 1
        return super().taps(seqlen)


def test_spectrum_is_kept_until_something_changes() -> None:
    module = Counting(4, 300, order=4).eval()
    u = torch.randn(2, 4, 300)

    def check(what: str, expected: int, length: int = 100) -> None:
        """The output is right, and taps have been made this often so far."""
        before = module.made
        with torch.inference_mode():
            out = module(u[:, :, :length])
        made = module.made - before
        module.forget()
        with torch.no_grad():
            assert torch.equal(module(u[:, :, :length]), out), what
        assert made == expected, what

    check("the first call", 1)
    for length in (100, 37, 256):  # all of 512 points
        check("another length", 0, length)
    check("more points", 1, 257)
    check("fewer points", 1)
    changes = {
        "in place": lambda: module.implicit_filter[0].weight.mul_(1.5),
        "a frequency that layers share": lambda: module.implicit_filter[1].freq.add_(1),
        "a buffer": lambda: module.modulation.deltas.mul_(2),
        "other data": lambda: setattr(module.pos_emb.z, "data", module.pos_emb.z.data * 0.5),
        "another parameter": lambda: setattr(
            module.implicit_filter[6], "weight", torch.nn.Parameter(module.implicit_filter[6].weight * 2)
        ),
        "weights loaded": lambda: module.load_state_dict({k: v * 0.9 for k, v in module.state_dict().items()}),
        "train and eval": lambda: module.train().eval(),
        "another dtype": lambda: module.double().float(),
    }
    for what, change in changes.items():
        with torch.no_grad():
            change()
        check(what, 1)
        check(what, 0)


def test_spectrum_is_kept_only_where_its_gradient_is_not_needed() -> None:
    module = Counting(4, 30, order=4)
    u = torch.randn(2, 4, 30, requires_grad=True)
    with torch.inference_mode():
        module(u)
    for _ in range(2):
        module(u).sum().backward()
    assert module.made == 3 and all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    module.requires_grad_(False)
    with torch.inference_mode():
        module(u)
    u.grad = None
    module(u).sum().backward()  # with what was kept in inference mode
    assert module.made == 4 and u.grad.abs().max() > 0
    module.pos_emb.z.requires_grad_()
    module(u).sum().backward()
    assert module.made == 5


def test_copies_keep_nothing() -> None:
    module = Counting(4, 3000, order=4).eval()
    u = torch.randn(2, 4, 3000)
    with torch.no_grad():
        kept = module.spectrum(3000)
        module(u)
        twin = copy.deepcopy(module)
        twin.implicit_filter[6].weight.mul_(3)
        assert not torch.equal(twin(u), module(u))
        file = io.BytesIO()
        torch.save(module, file)
        assert file.tell() < 4 * kept.numel()
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(u), module(u))
    with torch.inference_mode():
        unversioned = Counting(4, 3000, order=4).eval()
        unversioned(u)
        before = unversioned(u)
        unversioned.implicit_filter[6].weight.mul_(3)
        assert unversioned.made == 2 and not torch.equal(unversioned(u), before)


# ---- the mixer ----

MIXERS = {
    "as in M2-BERT": {"bidirectional": True},
    "causal": {},
    "without the second convolution": {"bidirectional": True, "residual": False},
    "normalised before": {"pre_norm": True, "emb_dim": 3},
}


def make_mixer(hidden_size: int = 8, l_max: int = 20, **options) -> MonarchMixerSequenceMixer:
    torch.manual_seed(0)
    module = MonarchMixerSequenceMixer(hidden_size, l_max, order=6, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("seqlen", (20, 13, 1, 26))
@pytest.mark.parametrize("kind", MIXERS)
def test_mixer(kind: str, seqlen: int) -> None:
    options = MIXERS[kind]
    if seqlen == 1 and options.get("bidirectional"):
        # Taps to the right have nothing to weigh, and no gradient that is not 0.
        module, x = make_mixer(**options), torch.randn(3, 1, 8)
        truth, eager = (plain.mixer(plain.weights_of(module, d), x.to(d)) for d in (torch.float64, torch.float32))
        assert_close("out", module(x), truth, eager)
        return
    check_module(make_mixer(**options), plain.mixer, torch.randn(3, seqlen, 8))


def test_causal_mixer_does_not_look_ahead() -> None:
    module = make_mixer(l_max=40).double()
    u = torch.randn(2, 40, 8, dtype=torch.float64)
    later = torch.cat([u[:, :17], torch.randn(2, 23, 8, dtype=torch.float64)], dim=1)
    difference = (module(later) - module(u)).abs().amax((0, 2))
    assert difference[:17].max() < 1e-12 < 1e-3 < difference[17]


def test_mask_keeps_padding_out() -> None:
    """Of any length, on either side, whatever it holds; without a mask it takes part."""
    module = make_mixer(bidirectional=True, l_max=64).double()
    u = torch.randn(2, 11, 8, dtype=torch.float64)
    alone = module(u)
    for left, right in ((0, 9), (6, 0), (5, 30)):
        padded = torch.full((2, left + 11 + right, 8), float("nan"), dtype=torch.float64)
        padded[:, left : left + 11] = u
        mask = torch.zeros(2, left + 11 + right, dtype=torch.int64)
        mask[:, left : left + 11] = 1
        found = module(padded.nan_to_num(7.0), mask)[:, left : left + 11]
        assert (found - alone).abs().max() < 1e-12
        assert (module(padded.nan_to_num(7.0))[:, left : left + 11] - alone).abs().max() > 1e-3
        assert torch.equal(module(padded, mask)[:, left : left + 11], found)


def test_mixer_in_bfloat16() -> None:
    """Within what each step rounds: the projections, the convolutions' inputs and outputs, the sum."""
    module = make_mixer(bidirectional=True).bfloat16()
    u = torch.randn(4, 20, 8).bfloat16()
    truth = plain.mixer(plain.weights_of(module, torch.float64), u.double())
    rounded = {
        name: w if name.startswith("filter") else w.bfloat16()
        for name, w in plain.weights_of(module, torch.float32).items()
    }
    x = plain.linear(plain.under(rounded, "in_linear."), u).float()
    short = {k: w.float() for k, w in plain.under(rounded, "short_filter.").items()}
    x1, x2, v = plain.short_convolution(short, x).chunk(3, -1)
    v, x2 = (x1 * v).bfloat16().float(), x2.bfloat16().float()
    y = (x2 * plain.long_convolution(plain.under(rounded, "filter_fn."), v)).bfloat16()
    y = y + plain.long_convolution(plain.under(rounded, "filter_fn2."), u.float()).bfloat16()
    eager = plain.linear(plain.under(rounded, "out_linear."), y)
    assert_close("out", module(u), truth, eager)


@pytest.mark.slow
def test_mixer_compiles_as_one_graph_for_all_batch_sizes() -> None:
    module = make_mixer(bidirectional=True)
    backend = Compilations()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        u = torch.randn(batch, 20, 8, requires_grad=True)
        out = compiled(u)
        torch.testing.assert_close(out, module(u))
        out.sum().backward()
    assert backend.count == 1
