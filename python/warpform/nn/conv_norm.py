"""A convolution, BatchNorm and an activation on a grid whose channels come last."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ._product import apply_linear, is_plain, linear
from .grids import channels_first, channels_last

ACTIVATION_LAYERS = ("relu", "prelu")


def on_one_place(x: Tensor, conv: nn.Module) -> Tensor:
    """conv of a map of 1 x 1, where only the middle tap of an `nn.Conv2d` that keeps the size of the grid counts.

    Args:
        x: [batch, in_channels].
        conv: the convolution, without a bias. A module that takes its place, such as an adapter, is called.

    Returns:
        [batch, out_channels].
    """
    if not is_plain(conv, nn.Conv2d):
        out: Tensor = conv(x[:, :, None, None])
        return out[:, :, 0, 0]
    weight = cast("nn.Conv2d", conv).weight
    rows, columns = weight.shape[2:]
    return linear(x, weight[:, :, rows // 2, columns // 2])


def needs_places(norm: nn.Module | None) -> bool:
    """Tells whether a norm is an `nn.BatchNorm2d` in training mode, which needs more than one place a channel.

    It is no `nn.SyncBatchNorm`, whose statistics span processes, of which each may have one place.
    """
    return isinstance(norm, nn.BatchNorm2d) and norm.training


class ConvNorm(nn.Module):
    """activation(BatchNorm(convolution(x))), of stride 1 and padded so that the grid keeps its size.

    A convolution of one tap is an `nn.Linear`, with a weight [out_channels, in_channels].

    Args:
        in_channels, out_channels: channels.
        kernel_size: taps along each side, an odd number.
        groups: of the convolution.
        bias: of the convolution.
        norm: whether BatchNorm follows.
        activation: "relu", "prelu" with one slope a channel, or None.

    A module that takes the place of `conv`, such as an adapter, is called on what `conv` takes: with one tap and one
    group [batch, height, width, in_channels], else [batch, in_channels, height, width].

    Attributes:
        pointwise: whether `conv` is an `nn.Linear`.
        conv: `nn.Linear` or `nn.Conv2d`.
        norm: `nn.BatchNorm2d`, or None.
        activation: `nn.ReLU` or `nn.PReLU`, or None.

    Raises:
        ValueError: an even kernel_size, or an unknown activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"ConvNorm: kernel_size must be an odd number, got {kernel_size}")
        if activation not in (None, *ACTIVATION_LAYERS):
            raise ValueError(f"ConvNorm: activation must be None, relu or prelu, got {activation!r}")
        self.pointwise = kernel_size == 1 and groups == 1
        self.conv: nn.Module
        if self.pointwise:
            self.conv = nn.Linear(in_channels, out_channels, bias=bias)
        else:
            padding = kernel_size // 2
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, groups=groups, bias=bias)
        self.norm: nn.Module | None = nn.BatchNorm2d(out_channels) if norm else None
        self.activation: nn.Module | None = None
        if activation is not None:
            self.activation = nn.ReLU() if activation == "relu" else nn.PReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, in_channels]; returns [batch, height, width, out_channels]."""
        if self.pointwise:
            return self.finish(channels_first(apply_linear(x, self.conv)))
        return self.finish(self.conv(channels_first(x)))

    def finish(self, product: Tensor) -> Tensor:
        """Norm and activation of what the convolution gave.

        Args:
            product: [batch, out_channels, height, width], in torch's channels_last format.

        Returns:
            [batch, height, width, out_channels].

        Raises:
            ValueError: less than two places in training mode, of which `nn.BatchNorm2d` has no variance.
        """
        if self.norm is not None:
            batch, _, height, width = product.shape
            if needs_places(self.norm) and batch * height * width < 2:
                raise ValueError(
                    "ConvNorm: x must have more than one place a channel in training mode, where BatchNorm normalises "
                    f"over them, got {[batch, height, width]}: give more images, or call eval()"
                )
            product = self.norm(product)
        if self.activation is not None:
            product = self.activation(product)
        return channels_last(product)
