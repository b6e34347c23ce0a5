"""Learned causal Monarch matrices against the same entry by entry, and against the Monarch form of the paper."""

from __future__ import annotations

import cmath
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import plain_m2 as plain
from helpers.compare import assert_close
from warpform import ops
from warpform.nn import CausalMonarchConvolution, CausalMonarchMixer, ImplicitFilter, TriangularMonarch


def randomised(module: torch.nn.Module, std: float) -> Any:
    """Weights at random, above the diagonals too, where nothing may read them."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("outer", "inner"):
                parameter.normal_(std=std)
    return module


@pytest.mark.parametrize("seqlen", (1, 4, 7, 12, 20))
def test_triangular_matrix(seqlen: int) -> None:
    module = randomised(TriangularMonarch(4, 5), 0.5).double()
    matrix = plain.triangular(module.outer, module.inner, seqlen)
    assert torch.equal(matrix.triu(1), torch.zeros_like(matrix)) and (matrix.diag() == 1).all()
    u = torch.randn(3, seqlen, dtype=torch.float64)
    torch.testing.assert_close(module(u), u @ matrix.T, atol=1e-13, rtol=0)
    torch.testing.assert_close(module.solve(module(u)), u, atol=1e-12, rtol=0)
    torch.testing.assert_close(module.row(seqlen - 1), matrix[-1], atol=1e-14, rtol=0)
    assert torch.equal(TriangularMonarch(4, 5).double()(u), u)  # before training


def test_triangular_matrix_has_an_end() -> None:
    with pytest.raises(ValueError, match="seqlen must be at most 20, got 21"):
        TriangularMonarch(4, 5)(torch.zeros(1, 21))


def test_starts_as_a_plain_convolution() -> None:
    module = CausalMonarchConvolution(37).double()
    u, k = torch.randn(2, 3, 37, dtype=torch.float64), torch.randn(3, 37, dtype=torch.float64)
    torch.testing.assert_close(module(u, k), ops.fft_conv(u, k), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("l_max", "block", "seqlen"), ((50, None, 50), (50, None, 41), (24, 4, 24), (30, 7, 23), (9, 1, 9))
)
def test_convolution_and_gradients(l_max: int, block: int | None, seqlen: int) -> None:
    module = randomised(CausalMonarchConvolution(l_max, block), 0.1)
    u, k = torch.randn(2, 3, seqlen), torch.randn(3, seqlen - seqlen // 4)
    runs = []
    for dtype in (torch.float64, torch.float32):
        weights = plain.weights_of(module, dtype)
        taps = torch.nn.functional.pad(k.to(dtype), (0, seqlen // 4))
        out = plain.monarch_convolution(weights, taps, u.to(dtype).transpose(1, 2)).transpose(1, 2)
        runs.append((weights, out))
    out = module(u, k)
    (truth_weights, truth), (eager_weights, eager) = runs
    assert_close("out", out, truth, eager)
    if block == 1 or seqlen != l_max:
        return  # some weights are read by no output
    probe = torch.randn_like(truth)
    losses = [(o * probe.to(o.dtype)).sum() for o in (out, truth, eager)]
    plain.check_gradients(module, losses[:1], (truth_weights, losses[1:2]), (eager_weights, losses[2:]))


def monarch_form(module: CausalMonarchConvolution, u: Tensor, k: Tensor) -> Tensor:
    """M0^-1 (M1 u . M2 k) in complex numbers, with M = monarch_multiply by factors made of Q's coefficients.

    N = m^2, u and k [n] with n = N / 2 zero-padded to N. C_a, [m / 2, m / 2], is extended by an identity.
    """
    m = module.q0.block
    size, half = m * m, m // 2

    def root(n: int, power: int) -> complex:
        return cmath.exp(-2j * math.pi * (power % n) / n)

    def matrix(q: TriangularMonarch) -> Tensor:
        lower = (q.outer.tril(-1) + torch.eye(m)).to(torch.complex128)
        blocks = torch.eye(m, dtype=torch.complex128).repeat(m, 1, 1)
        blocks[:, :half, :half] = (q.inner.tril(-1) + torch.eye(half)).to(torch.complex128)
        fourier = torch.tensor([[root(m, i * e) for e in range(m)] for i in range(m)], dtype=torch.complex128)
        w1 = torch.stack([fourier @ blocks[a] for a in range(m)])  # R_a [i, b]
        w2 = torch.stack(
            [
                torch.tensor([[root(size, d * (i + m * o)) for d in range(m)] for o in range(m)], dtype=lower.dtype)
                @ lower
                for i in range(m)
            ]
        )  # L_i [i', a]
        return plain.monarch_matrix(w1, w2)

    m0, m1, m2 = (matrix(q) for q in (module.q0, module.q1, module.q2))

    def permuted(x: Tensor) -> Tensor:
        """x[a m + b] = u[a + m b], zero-padded."""
        padded = torch.cat([x, x.new_zeros(size - len(x))]).to(torch.complex128)
        return padded.view(m, m).T.flatten()

    y = torch.linalg.solve(m0, (m1 @ permuted(u)) * (m2 @ permuted(k)))
    assert y.imag.abs().max() < 1e-10
    return y.real.view(m, m).T.flatten()[: size // 2]


@pytest.mark.parametrize("m", (4, 8, 16))
def test_is_the_monarch_form(m: int) -> None:
    n = m * m // 2
    module = randomised(CausalMonarchConvolution(n), 0.3 / math.sqrt(m)).double()
    assert module.q0.block == m and module.q0.blocks == m // 2
    u, k = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    found = module(u.view(1, 1, n), k.view(1, n)).flatten()
    plain_convolution = ops.fft_conv(u.view(1, 1, n), k.view(1, n)).flatten()
    truth = monarch_form(module, u, k)
    assert (found - truth).abs().max() < 1e-12 * truth.abs().max()
    assert (found - plain_convolution).abs().max() > 0.1  # the matrices do something


@pytest.mark.parametrize("n", (50, 512, 2048))
def test_is_causal(n: int) -> None:
    """What comes later changes nothing, to 1e-12 of the output, and what is at a place does."""
    module = randomised(CausalMonarchConvolution(n), 0.02).double()
    u, k = torch.randn(1, 2, n, dtype=torch.float64), torch.randn(2, n, dtype=torch.float64) / math.sqrt(n)
    out = module(u, k)
    for place in (1, n // 3, n - 1):
        later = u.clone()
        later[:, :, place:] = torch.randn(1, 2, n - place, dtype=torch.float64)
        difference = (module(later, k) - out).abs().amax((0, 1))
        assert difference[:place].max() < 1e-12 * out.abs().max()
        assert difference[place] > 1e-6


class Counted(TorchDispatchMode):
    """Multiplications of matrix products, triangular solves and real FFTs."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.work += out.numel() * args[0].shape[-1]
        elif name == "linalg_solve_triangular":
            self.work += out.numel() * args[0].shape[-1] / 2
        elif name in ("_fft_r2c", "_fft_c2r"):
            points = max(out.shape[-1], args[0].shape[-1])
            self.work += max(out.numel(), args[0].numel()) * math.log2(points)
        elif name == "spectral_conv":  # one there, one back
            points = 2 * (args[1].shape[1] - 1)
            self.work += 2 * out.numel() / out.shape[-1] * points * math.log2(points)
        return out


def test_cost_is_sub_quadratic() -> None:
    """Four times the length: eight times the work, where a quadratic one would be sixteen."""
    work = []
    for n in (512, 2048, 8192):
        module = CausalMonarchConvolution(n)
        with torch.no_grad(), Counted() as counted:
            module(torch.randn(1, 2, n), torch.randn(2, n))
        matrices = 2 * 2.5 * n * (module.q0.block + module.q0.blocks)  # two rows, by Q1 and Q2 and Q0^-1
        assert counted.work >= matrices + 6 * 2 * n * math.log2(2 * n)  # nothing escapes the count
        work.append(counted.work)
    assert all(later / earlier < 8.5 for earlier, later in itertools.pairwise(work)), work
    assert work[-1] < 2 * 8192**2 / 10  # beside the products of two rows with one matrix


MIXERS = {
    "monarch": {},
    "plain": {"monarch": False},
    "monarch, one convolution": {"residual": False, "block": 4},
    "normalised before": {"pre_norm": True},
}


@pytest.mark.parametrize("kind", MIXERS)
def test_mixer_token_by_token(kind: str) -> None:
    """Rows of `step` are those of `forward`, from any prompt on."""
    module = randomised(CausalMonarchMixer(8, 37, order=4, **MIXERS[kind]), 0.3).double()
    u = torch.randn(2, 37, 8, dtype=torch.float64)
    truth = plain.mixer(plain.weights_of(module, torch.float64), u)
    assert (module(u) - truth).abs().max() < 1e-12
    for prompt in (1, 2, 20):
        out, state = module.start(u[:, :prompt])
        rows = [*out.unbind(1), *(module.step(u[:, t], state) for t in range(prompt, 37))]
        assert (torch.stack(rows, dim=1) - truth).abs().max() < 1e-12
    with pytest.raises(ValueError, match="at most l_max = 37 tokens"):
        module.step(u[:, 0], state)


def test_mixer_gradients() -> None:
    module = randomised(CausalMonarchMixer(8, 18, order=4, block=4), 0.1)
    inputs = torch.randn(4, 3, 18, 8)
    runs = []
    for dtype in (torch.float64, torch.float32):
        weights = plain.weights_of(module, dtype)
        runs.append((weights, [plain.mixer(weights, u.to(dtype)).square().sum() for u in inputs]))
    plain.check_gradients(module, [module(u).square().sum() for u in inputs], *runs)


def test_filters_are_made_on_the_meta_device_whatever_transformers_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers replaces torch.linspace while it loads a model; torch may list what takes a device just then."""
    from torch.utils import _device

    constructors = _device._device_constructors
    constructors.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *args, **options: None)
        constructors()
    try:
        with torch.device("meta"):
            made = ImplicitFilter(8, 32, emb_dim=5)
        assert all(t.is_meta for t in (*made.parameters(), *made.buffers()))
    finally:
        constructors.cache_clear()
