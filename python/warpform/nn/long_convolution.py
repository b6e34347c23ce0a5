"""Long convolutions with implicit filters (Hyena, arXiv 2302.10866), and Monarch Mixer's mixer of a sequence on them.

Parameters and buffers have the names and shapes of Monarch Mixer's published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import _autocast, ops
from ..ops._dtypes import accumulation_dtype
from ._product import apply_linear, is_plain
from .norm import AddBiasResidualLayerNorm

Self = TypeVar("Self", bound="ImplicitFilter")

# exp(-t |delta|) at t = 1, the filter's end, reaches TARGET at t = 1.5 for the slowest channel, at 0.3 for the fastest.
TARGET, SLOWEST, FASTEST = 1e-2, 1.5, 0.3
SHORTEST = 256  # `ops.fft_conv_spectrum` has no transform of fewer than twice as many points


def _linspace(start: float, end: float, steps: int) -> Tensor:
    """torch.linspace on the device of an enclosing `with torch.device(...)`.

    The device is passed, because transformers replaces torch.linspace while it loads a model. If torch first lists the
    functions that take the device at that time, the original takes it no more in this process.
    """
    return torch.linspace(start, end, steps, device=torch.get_default_device())


class Sin(nn.Module):
    """sin(w_mod * freq * x) with a trained frequency for each channel.

    Args:
        dim: channels.
        omega: the frequencies at the start.
        w_mod: a factor that is not trained.
    """

    def __init__(self, dim: int, omega: float = 10.0, w_mod: float = 1.0) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, dim), float(omega)))
        self.w_mod = w_mod

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim]; returns the same shape."""
        return torch.sin(self.w_mod * self.freq * x)


class FilterPositions(nn.Module):
    """The input of the filter's MLP at each place: time from 0 to 1, and cosines and sines of it (arXiv 2302.10866).

    Place i of l_max has angles 2 pi f i / l_max for the frequencies f = linspace(1e-4, bands - 1, bands) of emb_dim =
    2 bands + 1.

    Args:
        emb_dim: odd, 3 at least.
        l_max: places.

    Attributes:
        z: [1, l_max, emb_dim], trained (published recipes give it a small rate of its own).
        t: [1, l_max, 1], constant: the time again, for the decay.

    Raises:
        ValueError: an emb_dim that is even or below 3, an l_max below 1.
    """

    t: Tensor

    def __init__(self, emb_dim: int, l_max: int) -> None:
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3, got {emb_dim}")
        if l_max < 1:
            raise ValueError(f"l_max must be at least 1, got {l_max}")
        bands = (emb_dim - 1) // 2
        t = _linspace(0, 1, l_max)[:, None]
        angles = 2 * math.pi / l_max * torch.arange(l_max, dtype=t.dtype)[:, None]
        angles = angles * _linspace(1e-4, bands - 1, bands)
        self.z = nn.Parameter(torch.cat([t, angles.cos(), -angles.sin()], dim=1)[None])
        self.register_buffer("t", t[None])


class ExponentialModulation(nn.Module):
    """exp(-t |delta|), a decay for each channel, from fast to slow.

    Args:
        hidden_size: channels.

    Attributes:
        deltas: [1, 1, hidden], constant.
    """

    deltas: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        slow, fast = math.log(TARGET) / SLOWEST, math.log(TARGET) / FASTEST
        self.register_buffer("deltas", _linspace(slow, fast, hidden_size)[None, None])

    def forward(self, t: Tensor) -> Tensor:
        """t: [taps, 1]; returns [hidden, taps]."""
        return torch.exp(-self.deltas[0].abs().t() * t.t())


class _Cached(NamedTuple):
    """A spectrum, and what it was made from."""

    places: int
    sources: list[tuple[dict[str, Any], str, Tensor, int, int]]  # of each: owner, name, it, version, address
    spectrum: Tensor


class ImplicitFilter(nn.Module):
    """Convolves along a sequence with taps that an MLP of their place gives: parameters do not grow with the filter.

    A tap is MLP([t, cos, -sin]) * exp(-t |delta|), with sine activations, and does not depend on the length of the
    sequence: shorter sequences use the first taps, longer ones find 0 beyond l_max. All is computed in float32 (float64
    in a float64 model): `.to(bfloat16)` leaves this module in float32, where the time of 32,768 places can be told
    apart, and autocast leaves it alone.

    Where no gradient reaches them, taps are computed once and their spectrum is kept until a parameter changes; see
    `forget`.

    Args:
        hidden_size: channels, each with its own filter.
        l_max: taps.
        bidirectional: whether there are taps to the right too, from a second MLP.
        order: width of the MLP; it has two hidden layers of it behind the first.
        emb_dim: what the MLP reads at a place, see `FilterPositions`.
        omega, w_mod: of the sines, see `Sin`; all of a filter's layers share one.

    Attributes:
        bias: [hidden], the factor D of the term D * u.

    Raises:
        ValueError: an emb_dim that is even or below 3, an l_max below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        l_max: int,
        *,
        bidirectional: bool = False,
        order: int = 128,
        emb_dim: int = 5,
        omega: float = 10.0,
        w_mod: float = 1.0,
    ) -> None:
        super().__init__()
        self.l_max = l_max
        self.bias = nn.Parameter(torch.randn(hidden_size))
        self.pos_emb = FilterPositions(emb_dim, l_max)
        sin = Sin(order, omega, w_mod)

        def mlp() -> nn.Sequential:
            hidden = [module for _ in range(2) for module in (nn.Linear(order, order), sin)]
            return nn.Sequential(nn.Linear(emb_dim, order), sin, *hidden, nn.Linear(order, hidden_size, bias=False))

        self.implicit_filter = mlp()
        self.implicit_filter_rev = mlp() if bidirectional else None
        self.modulation = ExponentialModulation(hidden_size)
        self._cached: _Cached | None = None

    def forward(self, u: Tensor, pregate: Tensor | None = None, postgate: Tensor | None = None) -> Tensor:
        """postgate * (conv(pregate * u) + D * pregate * u); u, gates: [batch, hidden, seqlen], returns the same."""
        return ops.fft_conv(u, None, self.bias, pregate, postgate, spectrum=self.spectrum(u.shape[-1]))

    def taps(self, seqlen: int) -> tuple[Tensor, Tensor | None]:
        """The filter to the left and to the right (None where there is none), [hidden, min(seqlen, l_max)] each.

        The first tap to the left is that of the place itself, the first to the right that of the next place.
        """
        with _autocast.off(self.bias.device):
            z, t = (x[0, :seqlen] for x in (self.pos_emb.z, self.pos_emb.t))
            decay = self.modulation(t)
            k, *others = (
                _transposed(mlp, z) * decay
                for mlp in (self.implicit_filter, self.implicit_filter_rev)
                if mlp is not None
            )
        return k, others[0] if others else None

    def spectrum(self, seqlen: int) -> Tensor:
        """The spectrum of both filters for sequences of this length, for `ops.fft_conv`; kept where possible."""
        if torch.compiler.is_compiling():
            return self._spectrum(seqlen)
        # One for all lengths that have the same number of points in their transform.
        places = 1 << (max(seqlen, SHORTEST) - 1).bit_length()
        cached = self._cached
        if cached is not None and cached.places == places and _unchanged(cached):
            return cached.spectrum
        self._cached = None
        needs_gradient = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        capturing = self.bias.is_cuda and torch.cuda.is_current_stream_capturing()
        # A CUDA graph would go on reading a spectrum that a later length has replaced.
        if needs_gradient or capturing:
            return self._spectrum(seqlen)
        # Outside of inference mode: what is kept may meet a call that differentiates its other inputs.
        with torch.inference_mode(False), torch.no_grad():
            spectrum = self._spectrum(places)
        sources = _sources(self)
        if sources is not None:
            self._cached = _Cached(places, sources, spectrum)
        return spectrum

    def forget(self) -> None:
        """Drops the kept spectrum, [hidden, about 2 seqlen] numbers.

        Needed only where parameters were written through `.data`, which leaves no trace; `train()` and `eval()`, moving
        the module and loading weights drop it too, and other changes are noticed.
        """
        self._cached = None

    def _spectrum(self, seqlen: int) -> Tensor:
        k, k_reverse = self.taps(seqlen)
        return ops.fft_conv_spectrum(k, k_reverse, seqlen=seqlen)

    def train(self: Self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies fn as `nn.Module` does, but lets no tensor become narrower than float32."""
        self.forget()

        def widened(x: Tensor) -> Tensor:
            moved = fn(x)
            if not moved.is_floating_point() or moved.dtype == accumulation_dtype(moved.dtype):
                return moved
            return x.to(moved.device, accumulation_dtype(moved.dtype))

        return super()._apply(widened, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}

    def extra_repr(self) -> str:
        return f"{self.bias.shape[0]}, l_max={self.l_max}, bidirectional={self.implicit_filter_rev is not None}"


def _transposed(mlp: nn.Sequential, z: Tensor) -> Tensor:
    """mlp(z).T, contiguous; z: [taps, emb_dim]."""
    if not is_plain(mlp, nn.Sequential) or not is_plain(mlp[-1], nn.Linear):
        return mlp(z).t().contiguous()
    *layers, last = mlp
    for layer in layers:
        z = layer(z)
    return torch.mm(cast("nn.Linear", last).weight, z.t())


_KNOWN = (ImplicitFilter, FilterPositions, ExponentialModulation, Sin, nn.Sequential, nn.Linear)


def _sources(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor, int, int]] | None:
    """The dictionary that holds each parameter and buffer, and its state.

    None where that cannot be told, as in inference mode, or where a module may do more than its parameters tell: an
    adapter can be switched off.
    """
    sources = []
    for child in dict.fromkeys(module.modules()):
        if not is_plain(child, type(child)) or not (child is module or type(child) in _KNOWN):
            return None
        for places in (child._parameters, child._buffers):
            for name, x in places.items():
                if x is not None:
                    if x.is_inference():
                        return None
                    sources.append((places, name, x, x._version, x.data_ptr()))
    return sources


def _unchanged(cached: _Cached) -> bool:
    """Tells whether all tensors are the same and not written to since, and need no gradient where gradients are on."""
    for places, name, x, version, address in cached.sources:
        if places.get(name) is not x or x._version != version or x.data_ptr() != address:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
    return True


class MonarchMixerSequenceMixer(nn.Module):
    """Monarch Mixer's mixer along a sequence (arXiv 2310.12109): a gated long convolution, and one that is not gated.

    x1, x2, v = split(short_filter(in_linear(u))), y = x2 * long_conv(x1 * v) + long_conv2(u), out_linear(y). The short
    filter is causal, in bidirectional mixers too.

    Args:
        hidden_size: d.
        l_max: taps of the long convolutions.
        bidirectional: whether they look to the right too.
        residual: whether there is the second one.
        pre_norm: a LayerNorm before everything (`hyena_training_additions` of the published code).
        **filters: order, emb_dim, omega and w_mod of `ImplicitFilter`.

    Raises:
        ValueError: as `ImplicitFilter`.
    """

    def __init__(
        self,
        hidden_size: int,
        l_max: int,
        *,
        bidirectional: bool = False,
        residual: bool = True,
        pre_norm: bool = False,
        **filters: Any,
    ) -> None:
        super().__init__()
        self.filter_fn = ImplicitFilter(hidden_size, l_max, bidirectional=bidirectional, **filters)
        self.filter_fn2 = (
            ImplicitFilter(hidden_size, l_max, bidirectional=bidirectional, **filters) if residual else None
        )
        self.in_linear = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_linear = nn.Linear(hidden_size, hidden_size)
        # Holds the weights under their usual name and shape; the op does the work.
        self.short_filter = nn.Conv1d(3 * hidden_size, 3 * hidden_size, 3, groups=3 * hidden_size, padding=2)
        self.layernorm = AddBiasResidualLayerNorm(hidden_size, 1e-5) if pre_norm else None

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """u: [batch, seqlen, hidden]; returns the same shape.

        mask: [batch, seqlen], nonzero = token. Other positions become 0 before each convolution, so that the
        output at tokens does not depend on padding. None: padding takes part, as in the published code.
        """
        u, _, v, gate = self.project(u, mask)
        return self.finish(self.mix(v, gate), u)

    def project(self, u: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the inputs of the long convolutions from u and mask of `forward`.

        Returns u, normalised where there is a norm and 0 at padding; its projection [batch, seqlen, 3 hidden]; what the
        gated convolution is of, and its gate, [batch, hidden, seqlen] each.
        """
        if self.layernorm is not None:
            u = self.layernorm(u, None, None)
        x = apply_linear(u, self.in_linear)
        padding = None if mask is None else mask == 0
        if padding is not None:
            u, x = (rows.masked_fill(padding[:, :, None], 0.0) for rows in (u, x))
        if is_plain(self.short_filter, nn.Conv1d):
            v, gate = ops.short_conv_gate(x, self.short_filter.weight.squeeze(1), self.short_filter.bias)
        else:
            x1, gate, v = self.short_filter(x.transpose(1, 2))[..., : x.shape[1]].chunk(3, dim=1)
            v = v * x1
        if padding is not None:
            v = v.masked_fill(padding[:, None], 0.0)
        return u, x, v, gate

    def mix(self, v: Tensor, gate: Tensor) -> Tensor:
        """The gated long convolution; v, gate: [batch, hidden, seqlen], returns the same shape."""
        return cast("Tensor", self.filter_fn(v, postgate=gate))

    def finish(self, y: Tensor, u: Tensor) -> Tensor:
        """Computes the output [batch, seqlen, hidden] from the gated convolution y, and u as `project` returns it."""
        if self.filter_fn2 is not None:
            y = y + self.filter_fn2(u.transpose(1, 2))
        return apply_linear(y.transpose(1, 2), self.out_linear)
