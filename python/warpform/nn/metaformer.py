"""The block that vision backbones share: token mixing, then channel mixing, each normalised before and added.

A grid of tokens [batch, *grid, channels] goes in and out, channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checkpoint import CheckpointedLayers
from ._product import is_plain
from .norm import AddBiasResidualLayerNorm

# What a block adds up to: the stream, and what is still to be added to it: a product and its bias.
Terms = tuple[Tensor, Tensor | None, Tensor | None]


class DropPath(nn.Module):
    """In training, drops what a block adds for whole samples (stochastic depth, arXiv 1603.09382).

    Args:
        probability: of dropping; what is kept is scaled by 1 / (1 - probability).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    @property
    def drops(self) -> bool:
        """Tells whether a call may change anything."""
        return self.training and self.probability > 0.0

    def factor(self, x: Tensor) -> Tensor:
        """What each sample of x [batch, ...] is multiplied by, [batch, 1, ...]: 0, or 1 / (1 - probability)."""
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.probability)
        return kept if self.probability == 1.0 else kept / (1 - self.probability)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, ...]."""
        return x * self.factor(x) if self.drops else x

    def extra_repr(self) -> str:
        return f"{self.probability}"


class SampleNorm(nn.GroupNorm):
    """GroupNorm of one group: a sample is normalised over all its tokens and channels (PoolFormer, arXiv 2111.11418).

    Args:
        hidden_size: C, the channels.
        eps: added to the variance.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(1, hidden_size, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, *grid, C]; returns the same shape."""
        if x.device.type == "cpu":
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return self._by_rows(x)

    def _by_rows(self, x: Tensor) -> Tensor:
        """The same by LayerNorm of samples as rows. torch's GroupNorm of a GPU copies x to channels first and back."""
        rows = F.layer_norm(x.flatten(1), (math.prod(x.shape[1:]),), eps=self.eps)
        return torch.addcmul(self.bias, rows.view(x.shape), self.weight)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"layer": AddBiasResidualLayerNorm, "group": SampleNorm}


def add_terms(hidden: Tensor, added: Tensor | None, bias: Tensor | None) -> Tensor:
    """The sum of what a block leaves for the next one to add."""
    if added is not None:
        hidden = hidden + added
    return hidden if bias is None else hidden + bias


class MetaFormerBlock(nn.Module):
    """x <- c1 x + c2 s1 mixer(norm1 x), then x <- c3 x + c4 s2 channel_mixer(norm2 x) (MetaFormer, arXiv 2111.11418).

    A mixer takes the normalised grid [batch, *grid, channels] and returns a product of the same shape, and a bias
    [channels] that is still to be added, or None. The LayerNorm that follows adds both in its one pass over memory,
    also from one block to the next (`run_blocks`). A mixer with a method `residual(hidden, norm, scale)` makes the
    whole half in one operation, hidden + scale * mixer(norm(hidden)), and returns None where it cannot.

    Args:
        mixer: mixes tokens. None leaves the first half out.
        channel_mixer: works on each token alone, such as `FeedForward`. None leaves the second half out.
        norm: "layer" (`AddBiasResidualLayerNorm`, each token), "group" (`SampleNorm`, each sample), or what makes a
            norm. What returns the same module twice makes a block of one norm for both halves.
        hidden_size: the channels; None: what `channel_mixer.up` takes, a linear layer or a convolution, else what
            `mixer.out` gives.
        eps: of the norms that have names.
        layer_scale: what the vectors s1 and s2, one factor a channel, begin with (arXiv 2103.17239). None: there are
            none.
        coefficients: whether there are c1 to c4, which begin with 1 (SReT, arXiv 2111.05297).
        drop_path, dropout: in training only, on what each half adds.

    Attributes:
        mixer, mixer_norm, mixer_scale, channel_mixer, channel_mixer_norm, channel_mixer_scale: the parts. Those of a
            half that is left out are missing. A class of blocks may name its halves otherwise (`part_names`).
        coefficients: a parameter [2 for each half], or None.

    Raises:
        ValueError: neither half, an unknown norm, or no hidden_size where it is needed.
    """

    part_names: ClassVar[tuple[str, str]] = ("mixer", "channel_mixer")
    coefficients: nn.Parameter | None

    def __init__(
        self,
        mixer: nn.Module | None,
        channel_mixer: nn.Module | None,
        *,
        norm: str | Callable[[], nn.Module],
        hidden_size: int | None = None,
        eps: float = 1e-6,
        layer_scale: float | None = None,
        coefficients: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        halves = {
            part: module
            for part, module in zip(self.part_names, (mixer, channel_mixer), strict=True)
            if module is not None
        }
        if not halves:
            raise ValueError(f"{name}: mixer or channel_mixer must be given, got None for both")
        if isinstance(norm, str) and norm not in NORMS:
            raise ValueError(f"{name}: norm must be one of {', '.join(NORMS)} or what makes a norm, got {norm!r}")
        if hidden_size is None:
            hidden_size = _channels_of(mixer, channel_mixer)
        if hidden_size is None and (isinstance(norm, str) or layer_scale is not None):
            raise ValueError(f"{name}: hidden_size must be given, as neither mixer nor channel_mixer tells it")
        self.halves = tuple(halves)
        for part, module in halves.items():
            self.add_module(part, module)
            made = norm() if callable(norm) else NORMS[norm](cast("int", hidden_size), eps)
            self.add_module(f"{part}_norm", made)
            scale = None
            if layer_scale is not None:
                scale = nn.Parameter(torch.full((cast("int", hidden_size),), layer_scale))
            self.register_parameter(f"{part}_scale", scale)
        self.register_parameter("coefficients", nn.Parameter(torch.ones(2 * len(halves))) if coefficients else None)
        self.drop_path = DropPath(drop_path)
        self.dropout = dropout

    def forward(
        self,
        hidden: Tensor,
        added: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        finish: bool = True,
        **mixing: Any,
    ) -> Tensor | Terms:
        """The block on hidden + added + bias.

        Args:
            hidden, added: [batch, *grid, channels]; None adds nothing.
            bias: [channels], or None.
            finish: False leaves the last addition to the next block, whose first normalisation makes it.
            **mixing: further arguments of the mixer.

        Returns:
            [batch, *grid, channels]; with finish False three such terms, for the next block or for `add_terms`.
        """
        terms = self.run(hidden, added, bias, **mixing)
        return add_terms(*terms) if finish else terms

    def run(self, hidden: Tensor, added: Tensor | None, bias: Tensor | None, **mixing: Any) -> Terms:
        """`forward` without the last addition."""
        terms: Terms = (hidden, added, bias)
        for index, part in enumerate(self.halves):
            terms = self.run_half(index, part, terms, **(mixing if part == self.part_names[0] else {}))
        return terms

    def run_half(self, index: int, part: str, terms: Terms, **mixing: Any) -> Terms:
        """One half of the block, without its last addition."""
        module, norm = getattr(self, part), getattr(self, f"{part}_norm")
        scale: Tensor | None = getattr(self, f"{part}_scale")
        if self.coefficients is None and hasattr(module, "residual") and not (self.training and self.dropout > 0.0):
            hidden = add_terms(*terms)
            whole = module.residual(hidden, norm, scale)
            if whole is not None:
                return (self._drop_whole(hidden, whole), None, None)
            terms = (hidden, None, None)
        normal, hidden = normalise(norm, *terms)
        added, bias = self._drop(*module(normal, **mixing))
        if self.coefficients is not None:
            kept, taken = self.coefficients[2 * index], self.coefficients[2 * index + 1]
            scale = taken if scale is None else taken * scale
            hidden = kept * hidden
        if scale is None:
            return hidden, added, bias
        return torch.addcmul(hidden, added if bias is None else added + bias, scale), None, None

    def _drop(self, added: Tensor, bias: Tensor | None, *, dropout: bool = True) -> tuple[Tensor, Tensor | None]:
        probability = self.dropout if dropout and self.training else 0.0
        if probability == 0.0 and not self.drop_path.drops:
            return added, bias
        added = added if bias is None else added + bias
        return self.drop_path(F.dropout(added, probability)), None

    def _drop_whole(self, hidden: Tensor, whole: Tensor) -> Tensor:
        """The stream where `whole` is what the half makes of it, with drop path on the difference."""
        return torch.lerp(hidden, whole, self.drop_path.factor(whole)) if self.drop_path.drops else whole


def _channels_of(mixer: nn.Module | None, channel_mixer: nn.Module | None) -> int | None:
    """The channels that go into `channel_mixer.up` or come out of `mixer.out`, or None where neither tells them."""
    up, out = getattr(channel_mixer, "up", None), getattr(mixer, "out", None)
    if isinstance(up, nn.Linear):
        return up.in_features
    if isinstance(up, nn.Conv2d):
        return up.in_channels
    return out.out_features if isinstance(out, nn.Linear) else None


def normalise(norm: nn.Module, hidden: Tensor, added: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """norm(hidden + added + bias) and that sum, in one pass where the norm is `AddBiasResidualLayerNorm`."""
    if not isinstance(norm, AddBiasResidualLayerNorm):
        hidden = add_terms(hidden, added, bias)
        return norm(hidden), hidden
    if added is None:
        hidden = add_terms(hidden, None, bias)
        return cast("Tensor", norm(hidden, None, None)), hidden
    return cast("tuple[Tensor, Tensor]", norm(added, bias, hidden, return_sum=True))


def run_blocks(
    model: CheckpointedLayers,
    blocks: nn.Module | Iterable[nn.Module],
    hidden: Tensor,
    *,
    each: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Tensor:
    """One block after another on hidden [batch, *grid, channels]; each makes the last addition of its predecessor.

    Args:
        model: whose `run_layer` runs a block, with gradient checkpointing where that is on.
        blocks: a list of `MetaFormerBlock`s, one as often as it runs. What takes the place of one is called on the grid
            of tokens.
        hidden: the stream.
        each: for each block keywords of its own; None: there are none.
        **options: keywords of every block.
    """
    terms: Terms = (hidden, None, None)
    for index, block in enumerate(cast("Iterable[nn.Module]", blocks)):
        own = options if each is None else {**options, **each[index]}
        if isinstance(block, MetaFormerBlock) and is_plain(block, type(block)):
            terms = model.run_layer(block, *terms, finish=False, **own)
        else:
            # Hooks and wrappers of a block find the grid of tokens in it and out of it.
            terms = model.run_layer(block, add_terms(*terms), **own), None, None
    return add_terms(*terms)
