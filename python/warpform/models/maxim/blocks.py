"""The parts of MAXIM (arXiv 2201.02973), on grids [batch, height, width, channels] whose channels come last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import AddBiasResidualLayerNorm, BiasActivation, MetaFormerBlock
from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import apply_linear, is_plain, linear, product
from ...nn.grids import convolve, resize
from ...nn.metaformer import run_blocks
from ...nn.window_mix import WindowMix
from .config import MAXIMConfig, Pair

# The release's GELU is that of jax.nn, which is the tanh form where nothing else is said.
GELU = "gelu_pytorch_tanh"
LEAKY_SLOPE = 0.2


class GatedMixing(nn.Module):
    """x + W2 (u * (mix(LayerNorm v) + 1)), (u, v) = GELU(W1 LayerNorm x): a gated MLP over windows.

    Args:
        channels: of x. u and v have as many.
        window_size: of the mixing.
        dilated: whether tokens are mixed across a grid.
        eps: of both norms.
    """

    def __init__(self, channels: int, window_size: Pair, *, dilated: bool, eps: float) -> None:
        super().__init__()
        self.norm = AddBiasResidualLayerNorm(channels, eps)
        self.inwards = nn.Linear(channels, 2 * channels)
        self.activation = BiasActivation(GELU)
        self.mix = WindowMix(window_size, dilated=dilated, channels=channels, eps=eps)
        self.outwards = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, channels], perhaps columns of wider rows; returns its like."""
        gate, values = self.activation(*product(self.norm(x, None, None), self.inwards)).chunk(2, -1)
        return x + apply_linear(self.mix(values, gate), self.outwards)


class MultiAxisGating(nn.Module):
    """The multi-axis gated MLP: W_o [grid(u), block(v)], (u, v) = GELU(W_i x). A mixer of `MetaFormerBlock`.

    Args:
        channels: of x.
        windows: the block, and the grid across which u is mixed.
        eps: of the norms.
    """

    def __init__(self, channels: int, windows: tuple[Pair, Pair], eps: float) -> None:
        super().__init__()
        block, grid = windows
        self.inwards = nn.Linear(channels, 2 * channels)
        self.activation = BiasActivation(GELU)
        self.grid = GatedMixing(channels, grid, dilated=True, eps=eps)
        self.block = GatedMixing(channels, block, dilated=False, eps=eps)
        self.outwards = nn.Linear(2 * channels, channels)

    def forward(self, normal: Tensor) -> tuple[Tensor, Tensor | None]:
        """normal: [batch, height, width, channels]; returns the product and the bias to be added, or None."""
        u, v = self.activation(*product(normal, self.inwards)).chunk(2, -1)
        return product(torch.cat([self.grid(u), self.block(v)], -1), self.outwards)


class ChannelAttention(nn.Module):
    """x * sigmoid(W2 relu(W1 mean x)), the mean over the grid (squeeze and excitation, arXiv 1709.01507).

    Args:
        channels: of x.
        reduction: W1 has channels // reduction outputs.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, channels]; returns the same."""
        return x * self.excite(F.relu(self.squeeze(x.mean((1, 2), keepdim=True)))).sigmoid()


class ConvolvedChannels(nn.Module):
    """Channel attention of two 3 x 3 convolutions with a leaky ReLU between: the release's RCAB without its norm.

    Args:
        channels: of x.
        reduction: of the channel attention.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, normal: Tensor) -> tuple[Tensor, None]:
        """normal: [batch, height, width, channels]; returns the same, and that no bias is to be added."""
        hidden = F.leaky_relu(convolve(normal, self.conv1), LEAKY_SLOPE)
        return self.attention(convolve(hidden, self.conv2)), None


class DenseChannels(nn.Module):
    """Channel attention of an MLP as wide as x: the release's RDCAB without its norm.

    Args:
        channels: of x.
        reduction: of the channel attention.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, channels)
        self.activation = BiasActivation(GELU)
        self.down = nn.Linear(channels, channels)
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, normal: Tensor) -> tuple[Tensor, None]:
        """normal: [batch, height, width, channels]; returns the same, and that no bias is to be added."""
        hidden = self.activation(*product(normal, self.up))
        return self.attention(apply_linear(hidden, self.down)), None


class SpatialGates(nn.Module):
    """W_o [mix_grid(u), mix_block(v)], (u, v) = GELU(W LayerNorm x): what gates the other stream of a cross-gating.

    Args:
        channels: of x.
        windows: the block and the grid.
        eps: of the norm.
    """

    def __init__(self, channels: int, windows: tuple[Pair, Pair], eps: float) -> None:
        super().__init__()
        block, grid = windows
        self.norm = AddBiasResidualLayerNorm(channels, eps)
        self.inwards = nn.Linear(channels, 2 * channels)
        self.activation = BiasActivation(GELU)
        self.grid, self.block = WindowMix(grid, dilated=True), WindowMix(block)
        self.outwards = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, channels]; returns the same."""
        u, v = self.activation(*product(self.norm(x, None, None), self.inwards)).chunk(2, -1)
        return apply_linear(torch.cat([self.grid(u), self.block(v)], -1), self.outwards)


class GatedStream(nn.Module):
    """One of the two streams of a cross-gating.

    Args:
        in_channels, channels: of what comes and of what it works on.
        windows: the block and the grid.
        eps: of the norms.
    """

    def __init__(self, in_channels: int, channels: int, windows: tuple[Pair, Pair], eps: float) -> None:
        super().__init__()
        self.enter = nn.Linear(in_channels, channels)
        self.norm = AddBiasResidualLayerNorm(channels, eps)
        self.inwards = nn.Linear(channels, channels)
        self.activation = BiasActivation(GELU)
        self.gates = SpatialGates(channels, windows, eps)
        self.outwards = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [batch, height, width, in_channels]; returns x0 = W_0 x, x1 = GELU(W LayerNorm x0) and gates of x1."""
        start = apply_linear(x, self.enter)
        hidden = self.activation(*product(self.norm(start, None, None), self.inwards))
        return start, hidden, self.gates(hidden)


class CrossGating(nn.Module):
    """Two streams, each gated by the other: y = y0 + W (y1 g_x), x = x0 + W (x1 g_y) + y.

    Args:
        x_channels, y_channels: of what comes.
        channels: of what goes.
        windows: the block and the grid.
        eps: of the norms.
        upsample: whether y comes with half the rows and columns of x.
    """

    def __init__(
        self,
        x_channels: int,
        y_channels: int,
        channels: int,
        windows: tuple[Pair, Pair],
        eps: float,
        *,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(y_channels, channels, 2, 2) if upsample else None
        self.x = GatedStream(x_channels, channels, windows, eps)
        self.y = GatedStream(channels if upsample else y_channels, channels, windows, eps)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, height, width, x_channels], y alike or half as high and wide; returns x and y like x."""
        if self.up is not None:
            y = upsample(y, self.up)
        x0, x1, x_gates = self.x(x)
        y0, y1, y_gates = self.y(y)
        y = y0 + apply_linear(y1 * x_gates, self.y.outwards)
        return x0 + apply_linear(x1 * y_gates, self.x.outwards) + y, y


class Level(CheckpointedLayers):
    """A 1 x 1 product, then groups of (multi-axis block, channel attention), and what came out of the product.

    Args:
        in_channels: of all that comes in.
        channels: of the level.
        windows: the block and the grid.
        config: of the model.
        bottom: whether channels are mixed by an MLP, not by convolutions.
        cross_gating: whether features of the stage before gate the result.
        down: whether the next level starts from it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        windows: tuple[Pair, Pair],
        config: MAXIMConfig,
        *,
        bottom: bool = False,
        cross_gating: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        eps, kind = config.layer_norm_eps, DenseChannels if bottom else ConvolvedChannels
        self.enter = nn.Linear(in_channels, channels)
        self.blocks = nn.ModuleList(
            MetaFormerBlock(
                MultiAxisGating(channels, windows, eps),
                kind(channels, config.channels_reduction),
                norm="layer",
                hidden_size=channels,
                eps=eps,
            )
            for _ in range(config.num_groups)
        )
        self.cross_gating = CrossGating(channels, channels, channels, windows, eps) if cross_gating else None
        self.down = nn.Conv2d(channels, channels, 4, 2, 1) if down else None

    def forward(self, *parts: Tensor | None, context: Tensor | None = None) -> Tensor:
        """Of parts [batch, height, width, ..] that are joined; context [batch, height, width, channels] gates."""
        given = [part for part in parts if part is not None]
        start = apply_linear(given[0] if len(given) == 1 else torch.cat(given, -1), self.enter)
        x = run_blocks(self, self.blocks, start) + start
        if self.cross_gating is not None:
            assert context is not None
            x, _ = self.cross_gating(x, context)
        return x


class ResizedLinear(nn.Module):
    """A grid resized by a power of two, and a 1 x 1 product, which as linear maps of two kinds may change places.

    The product is made on the smaller of the two grids. Upwards it is bilinear; downwards the filter is widened, as
    jax.image.resize does.

    Args:
        in_channels, channels: before and after.
        steps: the grid becomes 2 ** steps times as high and as wide.
    """

    def __init__(self, in_channels: int, channels: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.linear = nn.Linear(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, in_channels]; returns [batch, height * 2 ** steps, width * 2 ** steps, channels].

        With steps below 0 height and width are divided.
        """
        if self.steps < 0:
            return apply_linear(rescale(x, self.steps), self.linear)
        return rescale(apply_linear(x, self.linear), self.steps)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


def rescale(x: Tensor, steps: int) -> Tensor:
    """x [batch, height, width, channels], bilinearly 2 ** steps times as high and wide, smoothed before it shrinks."""
    if steps == 0:
        return x
    size = [n << steps if steps > 0 else n >> -steps for n in x.shape[1:3]]
    # Torch smooths neither float16 nor bfloat16 on a CPU.
    wide = x.float() if steps < 0 and x.device.type == "cpu" and x.dtype.itemsize == 2 else x
    out = resize(wide, size, antialias=steps < 0).to(x.dtype)
    if out.requires_grad and x.device.type == "cpu" and not torch.compiler.is_compiling():
        # The gradient of joined features is a part of wider rows, for which torch's backward takes ten times as long.
        out.register_hook(Tensor.contiguous)
    return out


def upsample(x: Tensor, convolution: nn.Module) -> Tensor:
    """convolution(x), channels last, for a transposed convolution whose stride is its kernel: one product.

    Args:
        x: [batch, height, width, in_channels].
        convolution: `nn.ConvTranspose2d` of 2 x 2, stride 2. A module that takes its place is called.

    Returns:
        [batch, 2 height, 2 width, out_channels].
    """
    if not is_plain(convolution, nn.ConvTranspose2d):
        return convolve(x, convolution)
    weight: Tensor = convolution.weight  # type: ignore[assignment]
    bias: Tensor = convolution.bias  # type: ignore[assignment]
    rows, columns = weight.shape[2:]
    out = linear(x, weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]), bias.repeat(rows * columns))
    out = out.unflatten(-1, (rows, columns, -1))  # [batch, height, width, 2, 2, out_channels]
    return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class SupervisedAttention(nn.Module):
    """The image that a stage restores, and features for the next one (MPRNet, arXiv 2102.02808, section 3.2).

    image = conv(x) + pixels;  features = conv(x) * sigmoid(conv(image)) + x

    Args:
        channels: of x.
        num_channels: of the image. The pixels are added only where there are 3.
    """

    def __init__(self, channels: int, num_channels: int) -> None:
        super().__init__()
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        self.image = nn.Conv2d(channels, num_channels, 3, padding=1)
        self.attention = nn.Conv2d(num_channels, channels, 3, padding=1)

    def forward(self, x: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """x: [batch, height, width, channels], pixels: [.., num_channels]; returns the features and the image."""
        image = convolve(x, self.image)
        if image.shape[-1] == 3:
            image = image + pixels
        return torch.addcmul(x, convolve(x, self.features), convolve(image, self.attention).sigmoid()), image
