"""Long and short convolutions: cases, inputs, oracles, and whole checks of one op on one case.

The oracles add up the sums of the definitions; only for long sequences is the long one a complex FFT in float64.
`library` is torch.ops.warpform or torch.ops.warpform_simt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from .cases import misaligned, random, strided
from .compare import assert_close

# Up to here, convolutions are matrices of all pairs of positions.
_LONGEST_SUM = 700


def points_of(seqlen: int) -> int:
    """How many points a spectrum for this length has: n of the contract."""
    power = 256
    while power < seqlen:
        power *= 2
    return 2 * power


# ---- cases ----


@dataclass(frozen=True)
class FftConvCase:
    """One call of spectral_conv or fft_conv: u and gates [batch, channels, seqlen]."""

    name: str
    batch: int
    channels: int
    seqlen: int
    taps: int | None = None  # None: as many as seqlen
    reverse_taps: int | None = None  # None: causal
    skip: str | None = "float32"  # or "u", its dtype, or None
    pregate: bool = False
    postgate: bool = False
    layout: str = "contiguous"
    constant: float | None = None  # u is this everywhere, and the filter of one sign: sums are as large as they get

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ShortConvCase:
    """One call of short_conv_gate: x [batch, seqlen, 3 * channels], weight [3 * channels, taps]."""

    name: str
    batch: int
    seqlen: int
    channels: int
    taps: int = 3
    bias: bool = True
    layout: str = "contiguous"

    def __str__(self) -> str:
        return self.name


def _gated(name: str, batch: int, channels: int, seqlen: int, **how: Any) -> FftConvCase:
    return FftConvCase(name, batch, channels, seqlen, pregate=True, postgate=True, **how)


FFT_CONV_CASES = (
    FftConvCase("plain", 4, 3, 256, skip=None),
    FftConvCase("skip", 2, 5, 256),
    FftConvCase("skip_as_u", 3, 2, 200, skip="u"),
    _gated("gated", 4, 3, 256),
    _gated("gated_without_skip", 2, 2, 250, skip=None),
    FftConvCase("pregate_alone", 3, 2, 130, pregate=True),
    FftConvCase("postgate_alone", 3, 2, 130, postgate=True),
    FftConvCase("two_sided", 2, 3, 255, reverse_taps=255),
    _gated("two_sided_gated", 3, 3, 190, reverse_taps=190),
    FftConvCase("few_taps", 2, 3, 256, taps=5),
    FftConvCase("few_taps_two_sided", 2, 2, 100, taps=9, reverse_taps=3),
    FftConvCase("one_tap", 2, 2, 64, taps=1),
    FftConvCase("no_taps_behind", 2, 2, 64, taps=7, reverse_taps=0),
    FftConvCase("one_position", 5, 4, 1),
    _gated("one_position_gated", 5, 4, 1, reverse_taps=1),
    FftConvCase("two_positions", 3, 4, 2, reverse_taps=2),
    FftConvCase("seven", 2, 9, 7),
    _gated("thirty_three", 5, 2, 33),
    FftConvCase("one_row", 1, 1, 256),
    FftConvCase("one_row_odd", 1, 3, 101, reverse_taps=100),
    FftConvCase("many_rows", 19, 2, 64, reverse_taps=64),
    FftConvCase("no_batch", 0, 3, 64),
    FftConvCase("no_channels", 2, 0, 64),
    _gated("no_positions", 2, 3, 0, taps=0),
    FftConvCase("past_256", 2, 2, 257),
    _gated("l400", 3, 2, 400, reverse_taps=400),
    FftConvCase("l512", 2, 2, 512),
    _gated("l513", 1, 2, 513, reverse_taps=513),
    FftConvCase("l700", 3, 1, 700, reverse_taps=17),
    _gated("l1024", 2, 1, 1024),
    _gated("strided", 2, 3, 96, layout="strided"),
    _gated("transposed", 2, 3, 80, layout="transposed"),
    _gated("misaligned", 2, 3, 120, layout="misaligned"),
    FftConvCase("constant", 2, 1, 256, constant=8.0),
)

# Every size of transform that kernels have, whole and not, with few rows: an emulator takes its time.
LONG_FFT_CONV_CASES = (
    _gated("l1500", 2, 1, 1500, reverse_taps=1500),
    FftConvCase("l2048", 1, 1, 2048),
    _gated("l4095", 1, 1, 4095),
    FftConvCase("l4096", 2, 1, 4096, reverse_taps=4096),
    _gated("l5000", 2, 1, 5000),
    FftConvCase("l8192", 1, 1, 8192, skip=None),
    _gated("l16384", 1, 1, 16384, reverse_taps=16384),
    FftConvCase("l20001", 2, 1, 20001),
    _gated("l32768", 1, 1, 32768),
    FftConvCase("l32768_constant", 2, 1, 32768, constant=8.0),
)

SHORT_CONV_CASES = (
    ShortConvCase("plain", 2, 100, 32),
    ShortConvCase("without_bias", 3, 70, 24, bias=False),
    ShortConvCase("aligned", 2, 128, 64),
    ShortConvCase("beyond_a_tile", 1, 133, 72),
    ShortConvCase("one_position", 4, 1, 16),
    ShortConvCase("two_positions", 3, 2, 16),
    ShortConvCase("three_positions", 2, 3, 8, bias=False),
    ShortConvCase("one_channel", 2, 65, 1),
    ShortConvCase("odd", 3, 37, 13),
    ShortConvCase("odd_length", 2, 101, 40),
    ShortConvCase("odd_channels", 2, 96, 7),
    ShortConvCase("one_tap", 2, 33, 16, taps=1),
    ShortConvCase("two_taps", 2, 33, 16, taps=2),
    ShortConvCase("four_taps", 2, 67, 24, taps=4),
    ShortConvCase("more_taps_than_positions", 2, 2, 8, taps=4),
    ShortConvCase("many_rows", 17, 40, 8),
    ShortConvCase("long", 1, 700, 16),
    ShortConvCase("no_batch", 0, 12, 8),
    ShortConvCase("no_positions", 2, 0, 8),
    ShortConvCase("no_channels", 2, 12, 0),
    ShortConvCase("strided", 3, 40, 16, layout="strided"),
    ShortConvCase("transposed", 3, 40, 16, layout="transposed"),
    ShortConvCase("misaligned", 2, 40, 16, layout="misaligned"),
)

LAYOUTS = ("contiguous", "strided", "transposed", "misaligned")


@st.composite
def fft_conv_cases(draw: st.DrawFn, longest: int = 600) -> FftConvCase:
    """Any lengths, filters and gates."""
    seqlen = draw(st.one_of(st.integers(4, min(longest, 300)), st.integers(4, longest)))
    return FftConvCase(
        "drawn",
        draw(st.integers(0, 5)),
        draw(st.integers(1, 4)),
        seqlen,
        taps=draw(st.none() | st.integers(1, seqlen)),
        reverse_taps=draw(st.none() | st.integers(0, seqlen)),
        skip=draw(st.sampled_from((None, "float32", "u"))),
        pregate=draw(st.booleans()),
        postgate=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def short_conv_cases(draw: st.DrawFn) -> ShortConvCase:
    """Any sizes."""
    return ShortConvCase(
        "drawn",
        draw(st.integers(0, 4)),
        draw(st.integers(2, 150)),
        draw(st.one_of(st.integers(2, 40), st.integers(1, 9).map(lambda n: 8 * n))),
        taps=draw(st.integers(1, 4)),
        bias=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


# ---- inputs ----


@dataclass
class FftConvInputs:
    """Tensors of one FftConvCase, and the gradient that comes back."""

    u: Tensor  # [batch, channels, seqlen]
    k: Tensor  # [channels, taps], float32 (float64)
    k_reverse: Tensor | None
    spectrum: Tensor  # [channels, n / 2 + 1, 2], of k and k_reverse
    skip: Tensor | None  # [channels]
    pregate: Tensor | None  # as u
    postgate: Tensor | None  # as u
    dout: Tensor

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """spectral_conv's tensors, in the schema's order."""
        return self.u, self.spectrum, self.skip, self.pregate, self.postgate


@dataclass
class ShortConvInputs:
    """Tensors of one ShortConvCase, and the gradients that come back."""

    x: Tensor  # [batch, seqlen, 3 * channels]
    weight: Tensor  # [3 * channels, taps]
    bias: Tensor | None  # [3 * channels]
    dgated: Tensor  # [batch, channels, seqlen]
    dgate: Tensor


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return strided(t)
    if layout == "transposed":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return misaligned(t) if layout == "misaligned" else t


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fft_conv_inputs(case: FftConvCase, dtype: torch.dtype, device: str = "cpu") -> FftConvInputs:
    """Fresh random tensors; taps shrink along the filter, as implicit filters' do."""
    shape, wide = (case.batch, case.channels, case.seqlen), _wide(dtype)

    def filters(taps: int) -> Tensor:
        decay = torch.linspace(0, 3, taps).neg().exp() * (1 + taps) ** -0.5
        return random(case.channels, taps, dtype=torch.float32, device=device).mul_(decay.to(device)).to(wide)

    k = filters(case.seqlen if case.taps is None else case.taps)
    k_reverse = None if case.reverse_taps is None else filters(case.reverse_taps)
    u, pregate, postgate, dout = (_laid_out(random(*shape, dtype=dtype, device=device), case.layout) for _ in range(4))
    if case.constant is not None:
        u.fill_(case.constant)
        k.abs_()
    skip = None
    if case.skip is not None:
        skip = random(case.channels, dtype=wide if case.skip == "float32" else dtype, device=device)
    return FftConvInputs(
        u,
        k,
        k_reverse,
        spectrum_of(k, k_reverse, case.seqlen),
        skip,
        pregate if case.pregate else None,
        postgate if case.postgate else None,
        dout.contiguous(),
    )


def spectrum_of(k: Tensor, k_reverse: Tensor | None, seqlen: int) -> Tensor:
    """[channels, n / 2 + 1, 2] in k's dtype, from a complex FFT in float64: tap j of k_reverse sits at n - 1 - j."""
    points = points_of(seqlen)
    circle = k.new_zeros(k.size(0), points, dtype=torch.float64)
    circle[:, : k.size(1)] = k
    if k_reverse is not None:
        circle[:, points - k_reverse.size(1) :] = k_reverse.flip(1)
    if circle.numel() == 0:
        return k.new_zeros(0, points // 2 + 1, 2)
    transformed = torch.fft.fft(circle.to(torch.complex128))[:, : points // 2 + 1]
    return torch.view_as_real(transformed).to(k.dtype).contiguous()


def short_conv_inputs(case: ShortConvCase, dtype: torch.dtype, device: str = "cpu") -> ShortConvInputs:
    """Fresh random tensors."""
    width = 3 * case.channels
    x = _laid_out(random(case.batch, case.seqlen, width, dtype=dtype, device=device), case.layout)
    weight = random(width, case.taps, dtype=dtype, device=device)
    bias = random(width, dtype=dtype, device=device) if case.bias else None
    dgated, dgate = (random(case.batch, case.channels, case.seqlen, dtype=dtype, device=device) for _ in range(2))
    return ShortConvInputs(x, weight, bias, dgated, dgate)


# ---- oracles ----


def fft_conv(
    u: Tensor,
    k: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
    k_reverse: Tensor | None = None,
) -> Tensor:
    """The sum over all pairs of positions: conv[i] adds k[i - j] v[j] for j <= i and k_reverse[j - i - 1] v[j] else."""
    seqlen = u.size(-1)
    place = torch.arange(seqlen, device=u.device)
    lag = place[:, None] - place

    def weights(taps: Tensor, of: Tensor) -> Tensor:
        """taps[:, of] where there is such a tap, else 0."""
        padded = torch.cat((taps, taps.new_zeros(taps.size(0), 1)), 1)
        return padded[:, torch.where((of >= 0) & (of < taps.size(1)), of, taps.size(1))]

    matrix = weights(k, lag)  # [channels, seqlen, seqlen]
    if k_reverse is not None:
        matrix = matrix + weights(k_reverse, -lag - 1)
    v = u if pregate is None else u * pregate
    y = torch.einsum("cij,bcj->bci", matrix, v)
    y = y if skip is None else y + skip[:, None] * v
    return y if postgate is None else y * postgate


def spectral_conv(
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> Tensor:
    """The filter from its spectrum by sums of cosines and sines, then the circular convolution by all pairs; the two
    by complex FFTs where sequences are long. Differentiable, in float64."""
    seqlen, bins = u.size(-1), spectrum.size(1)
    points = 2 * (bins - 1)
    # Bins between the first and the last stand for their conjugates too; of those two only the real part counts.
    weight = torch.full((bins,), 2.0, dtype=u.dtype, device=u.device)
    weight[0] = weight[-1] = 1
    v = u if pregate is None else u * pregate
    if seqlen <= _LONGEST_SUM or v.numel() == 0:  # FFT libraries refuse an empty batch
        steps = torch.arange(bins, device=u.device)[:, None] * torch.arange(points, device=u.device) % points
        angle = steps.to(u.dtype) * (2 * math.pi / points)
        real, imaginary = (spectrum * weight[:, None]).unbind(-1)
        circle = (real @ angle.cos() - imaginary @ angle.sin()) / points  # [channels, n]
        place = torch.arange(seqlen, device=u.device)
        y = torch.einsum("cij,bcj->bci", circle[:, (place[:, None] - place) % points], v)
    else:
        full = torch.view_as_complex(spectrum.contiguous()) * weight
        padded = torch.nn.functional.pad(v, (0, points - seqlen))
        product = torch.fft.fft(padded)[..., :bins] * full
        y = torch.fft.ifft(torch.nn.functional.pad(product, (0, points - bins))).real[..., :seqlen]
    y = y if skip is None else y + skip[:, None] * v
    return y if postgate is None else y * postgate


def eager_spectral_conv(
    u: Tensor,
    spectrum: Tensor,
    skip: Tensor | None = None,
    pregate: Tensor | None = None,
    postgate: Tensor | None = None,
) -> Tensor:
    """As PyTorch users write it: products in u's dtype around torch.fft, which takes float32 at least."""
    points, wide = 2 * (spectrum.size(1) - 1), _wide(u.dtype)
    v = u if pregate is None else u * pregate
    if v.numel() == 0:  # which torch.fft does not take
        terms = (spectrum.sum(), *(t.sum() for t in (skip, postgate) if t is not None))
        return v * sum(terms).to(v.dtype)
    product = torch.fft.rfft(v.to(wide), points) * torch.view_as_complex(spectrum.contiguous())
    y = torch.fft.irfft(product, points)[..., : u.size(-1)]
    y = y.to(u.dtype) if skip is None else (y + (skip[:, None] * v)).to(u.dtype)
    return y if postgate is None else y * postgate


def short_conv_gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tap by tap, channels first."""
    taps, width = weight.size(1), x.size(2)
    padded = torch.cat((x.new_zeros(x.size(0), taps - 1, width), x), 1).transpose(1, 2)
    c = x.new_zeros(x.size(0), width, x.size(1))
    for j in range(taps):
        c = c + weight[:, j, None] * padded[:, :, j : j + x.size(1)]
    c = c if bias is None else c + bias[:, None]
    channels = width // 3
    return c[:, 2 * channels :] * c[:, :channels], c[:, channels : 2 * channels]


# ---- checks ----


def check_spectral_conv(
    library: Any,
    case: FftConvCase,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    eager: Callable[..., Tensor] = eager_spectral_conv,
    eager_backward: Callable[..., Sequence[Tensor | None]] | None = None,
    backward: bool = True,
) -> None:
    """spectral_conv and its backward, every gradient by itself.

    eager, eager_backward: what results are measured against, called as the ops are: the same computation in the dtype
    under test. Kernels that round between the stages of a transform are measured against one that does so too. Without
    eager_backward, gradients are autograd's through eager.
    """
    inputs = fft_conv_inputs(case, dtype, device)
    y = library.spectral_conv(*inputs.tensors)
    assert y.dtype == dtype and y.is_contiguous()
    truth, truths = _spectral_oracle(spectral_conv, inputs, torch.float64)
    names = ("du", "dspectrum", "dskip", "dpregate", "dpostgate")
    if eager_backward is None:
        found, yardsticks = _spectral_oracle(eager, inputs, None)
    else:
        results = eager_backward(inputs.dout, *inputs.tensors) if backward else ()
        found = eager(*inputs.tensors)
        yardsticks = {name: g for name, g in zip(names, results, strict=False) if g is not None}
    assert_close("y", y, truth, found)
    if not backward:
        return
    gradients = library.spectral_conv_backward(inputs.dout, *inputs.tensors)
    for name, g, given in zip(names, gradients, inputs.tensors, strict=True):
        if given is None:
            assert g.shape == (0,), name
            continue
        assert g.dtype == given.dtype and g.is_contiguous(), name
        # A sum over a filter's batch, and all the more one number for all positions, may cancel.
        scale = skip_terms(inputs) if name == "dskip" else 0.0
        yardstick = yardsticks[name].to(dtype) if name == "dspectrum" else yardsticks[name]
        assert_close(name, g, truths[name], yardstick, gradient=True, scale=scale)


def _spectral_oracle(
    definition: Callable[..., Tensor], inputs: FftConvInputs, dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients by name; dtype None leaves every tensor its own."""
    tensors = [None if t is None else t.detach().to(dtype or t.dtype, copy=True).contiguous() for t in inputs.tensors]
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    y = definition(*tensors)
    found = iter(torch.autograd.grad((y * inputs.dout.to(y.dtype)).sum(), leaves))
    names = ("du", "dspectrum", "dskip", "dpregate", "dpostgate")
    return y.detach(), {name: next(found) for name, t in zip(names, tensors, strict=True) if t is not None}


def skip_terms(inputs: FftConvInputs) -> float:
    """The size that partial sums of one channel's gradient of skip have: terms of either sign cancel in the end.

    A partial sum is about the root of the sum of squares of its terms. A kernel rounds some twenty of them one after
    another on the way to one number; independent errors of up to half a unit add up to some 1.3 units. With one such
    root as the scale, 1 of 150 draws of case l512 in the emulator was past its bound, and one on an H100 by 0.2 units.
    """
    terms = inputs.dout.double() * inputs.u.double()
    for gate in (inputs.pregate, inputs.postgate):
        terms = terms if gate is None else terms * gate.double()
    return 2 * float(terms.square().sum((0, 2)).max().sqrt()) if terms.numel() else 0.0


def check_short_conv_gate(
    library: Any, case: ShortConvCase, dtype: torch.dtype, device: str = "cpu", *, backward: bool = True
) -> None:
    """short_conv_gate and its backward, every gradient by itself."""
    inputs = short_conv_inputs(case, dtype, device)
    arguments = (inputs.x, inputs.weight, inputs.bias)
    outputs = library.short_conv_gate(*arguments)
    truth, truths = _short_conv_oracle(inputs, torch.float64)
    eager, yardsticks = _short_conv_oracle(inputs, dtype)
    for name, out, expected, yardstick in zip(("gated", "gate"), outputs, truth, eager, strict=True):
        assert out.dtype == dtype and out.is_contiguous(), name
        assert_close(name, out, expected, yardstick)
    if not backward:
        return
    gradients = library.short_conv_gate_backward(inputs.dgated, inputs.dgate, *arguments)
    for name, g, given in zip(("dx", "dweight", "dbias"), gradients, arguments, strict=True):
        if given is None:
            assert g.shape == (0,), name
            continue
        assert g.dtype == dtype and g.is_contiguous(), name
        assert_close(name, g, truths[name], yardsticks[name], gradient=True)


def _short_conv_oracle(inputs: ShortConvInputs, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """gated and gate, and the gradients by name, computed in dtype."""
    given = (inputs.x, inputs.weight, inputs.bias)
    tensors = [None if t is None else t.detach().to(dtype, copy=True).contiguous() for t in given]
    leaves = [t.requires_grad_() for t in tensors if t is not None]
    gated, gate = short_conv_gate(*tensors)
    loss = (gated * inputs.dgated.to(dtype)).sum() + (gate * inputs.dgate.to(dtype)).sum()
    found = iter(torch.autograd.grad(loss, leaves))
    names = ("dx", "dweight", "dbias")
    gradients = {name: next(found) for name, t in zip(names, tensors, strict=True) if t is not None}
    return (gated.detach(), gate.detach()), gradients
