"""The parts of P2AT. Each takes and gives features [batch, height, width, channels]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...nn._product import apply_linear
from ...nn.conv_norm import ConvNorm, on_one_place
from ...nn.grids import channels_first, channels_last, depthwise, resize
from ...ops._dtypes import accumulation_dtype
from .config import P2ATConfig

VALUE_RATIO = 2  # dimensions of a value to those of a key
GAMMA = 1e-6  # what the layer scale of decoder blocks begins with
POSITIONS = 4  # tables of positions: of queries and keys of rows, then of columns


class P2ATDetails(nn.Module):
    """r + BN(3x3 r), r = BN(W x): local details."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.residual = ConvNorm(channels, channels)
        self.local = ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(x)
        out: Tensor = self.local(x) + x
        return out


class P2ATPyramid(nn.Module):
    """c * PReLU BN(grouped 3x3 of [p1, p2, p3]), c = PReLU BN(W x), for means p1 over 3x3 of c, p2 over 5x5 of p1, p3
    over 7x7 of p2, in which the zeros around a map count.

    There are as many groups as channels, so an output sees three neighbouring channels of the joined maps, which are of
    one map nearly always.
    """

    def __init__(self, channels: int, released: bool) -> None:
        super().__init__()
        self.inwards = ConvNorm(channels, channels, activation="prelu")
        self.pooled = ConvNorm(3 * channels, channels, 3, groups=channels, activation="prelu")
        self.released = released

    def forward(self, x: Tensor) -> Tensor:
        whole = self.inwards(x)
        maps = [channels_first(whole)]
        for size in (3, 5, 7):
            maps.append(F.avg_pool2d(maps[-1], size, 1, size // 2))
        first, second, third = maps[1:]
        joined = torch.cat([first, first if self.released else second, third], 1)
        out: Tensor = self.pooled(channels_last(joined)) * whole
        return out


class AxialAttention(nn.Module):
    """PReLU BN W(v + rows + columns) * details: attention over the means of rows, and over those of columns.

    The mean of a product is the product of the mean, so queries and keys are made of means alone. Rows and columns of
    all images are the sequences of one `ops.varlen_attention`, in which queries and keys are padded with zeros to the
    dimensions of values.

    Args:
        config: of the model.

    Attributes:
        query_key: queries and keys, side by side.
        positions: [4, heads * key_dim, num_positions]: of queries and keys of rows, then of columns.
        rows, columns: what follows each; only that of rows has BatchNorm and PReLU.
    """

    def __init__(self, config: P2ATConfig) -> None:
        super().__init__()
        channels, keys = config.hidden_size, config.num_attention_heads * config.key_dim
        values = VALUE_RATIO * keys
        self.num_heads, self.key_dim = config.num_attention_heads, config.key_dim
        self.details = P2ATDetails(channels)
        self.pyramid = P2ATPyramid(channels, config.released)
        self.query_key = nn.Linear(channels, 2 * keys, bias=False)
        self.value = nn.Linear(channels, values, bias=False)
        self.positions = nn.Parameter(torch.randn(POSITIONS, keys, config.num_positions))
        self.rows = ConvNorm(values, values, activation="prelu")
        self.columns = ConvNorm(values, values, norm=False)
        self.out = ConvNorm(values, channels, activation="prelu")

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, height, width, hidden_size]; returns the same shape."""
        pooled = self.pyramid(x)
        value = apply_linear(pooled, self.value)
        rows, columns = self.attend(pooled, value)
        mixed = value + self.rows(rows.unsqueeze(2)) + self.columns(columns.unsqueeze(1))
        out: Tensor = self.out(mixed) * self.details(x)
        return out

    def attend(self, pooled: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over rows [batch, height, values] and over columns [batch, width, values].

        Args:
            pooled: [batch, height, width, hidden_size].
            value: [batch, height, width, values].
        """
        batch, height, width, _ = pooled.shape
        means = torch.cat([pooled.mean(2), pooled.mean(1)], 1)  # [batch, height + width, hidden_size]
        query_key = apply_linear(means, self.query_key).unflatten(2, (2, -1))
        query_key = query_key + torch.cat([self.places(0, height), self.places(2, width)])
        values = torch.cat([value.mean(2), value.mean(1)], 1)
        query, key, values = (
            t.unflatten(2, (self.num_heads, -1)) for t in (query_key[:, :, 0], query_key[:, :, 1], values)
        )
        padding = (0, values.shape[-1] - self.key_dim)
        query, key = F.pad(query, padding), F.pad(key, padding)
        # The sequences are rows and columns of each image in turn.
        ends = torch.tensor([height, height + width], device=pooled.device)
        starts = (height + width) * torch.arange(batch, device=pooled.device).unsqueeze(1)
        offsets = F.pad((starts + ends).flatten(), (1, 0)).int()
        longest = max(height, width)
        query, key, values = query.flatten(0, 1), key.flatten(0, 1), values.flatten(0, 1)
        scale = self.key_dim**-0.5
        out = ops.varlen_attention(query, key, values, offsets, offsets, longest, longest, softmax_scale=scale)
        assert isinstance(out, Tensor)
        rows, columns = out.flatten(1).unflatten(0, (batch, height + width)).split([height, width], 1)
        return rows, columns

    def places(self, first: int, size: int) -> Tensor:
        """Positions of queries and keys along an axis of `size`: [size, 2, keys]; the axis' own are from `first` on."""
        own = self.positions[first : first + 2]
        wide = own.to(accumulation_dtype(own.dtype))
        return F.interpolate(wide, size, mode="linear", align_corners=False).to(own.dtype).permute(2, 0, 1)


class P2ATFeedForward(nn.Module):
    """W2 ReLU(depthwise 3x3(W1 x))."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.up = nn.Linear(channels, inside, bias=False)
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside)
        self.down = nn.Linear(inside, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(depthwise(apply_linear(x, self.up), self.depthwise, "relu"), self.down)


class P2ATBlock(nn.Module):
    """x + attention(x), then x + feed-forward(x), without norms before them."""

    def __init__(self, config: P2ATConfig) -> None:
        super().__init__()
        self.attention = AxialAttention(config)
        self.feed_forward = P2ATFeedForward(config.hidden_size, config.mlp_ratio * config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.feed_forward(x)
        return out


class P2ATDecoder(nn.Module):
    """x + gamma * W2 hardswish(W1 BN(depthwise k x k(x)))."""

    def __init__(self, config: P2ATConfig, kernel_size: int) -> None:
        super().__init__()
        channels = config.hidden_size
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.up = nn.Linear(channels, config.mlp_ratio * channels)
        self.down = nn.Linear(config.mlp_ratio * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), GAMMA))

    def forward(self, x: Tensor) -> Tensor:
        normal = channels_last(self.norm(channels_first(depthwise(x, self.depthwise))))
        inside = F.hardswish(apply_linear(normal, self.up))
        return torch.addcmul(x, self.gamma, apply_linear(inside, self.down))


class P2ATFusion(nn.Module):
    """BN W[l, u, s] + s u + sigmoid(s l) of three maps: l of the fine one, s of the middle one, u of the deep one.

    l = W(W mean(h) + sigmoid(W h)), h = PReLU BN W fine; s = BN W middle; u = PReLU BN W deep * softmax over channels
    of (W deep + b). s and u are resized to the grid of l.

    Args:
        fine, middle: channels of these maps; the deep one has those of the result.
        channels: of the result.
    """

    def __init__(self, fine: int, middle: int, channels: int) -> None:
        super().__init__()
        self.fine = ConvNorm(fine, channels, activation="prelu")
        self.fine_mean = nn.Linear(channels, channels, bias=False)
        self.fine_gate = nn.Linear(channels, channels, bias=False)
        self.fine_out = nn.Linear(channels, channels, bias=False)
        self.deep = ConvNorm(channels, channels, activation="prelu")
        self.deep_gate = nn.Linear(channels, channels)
        self.middle = ConvNorm(middle, channels)
        self.out = ConvNorm(3 * channels, channels)

    def forward(self, fine: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
        """Maps [batch, *grid, channels], each with a grid of its own; returns one of the grid of `fine`."""
        fine = self.fine(fine)
        mean = apply_linear(fine.mean((1, 2), keepdim=True), self.fine_mean)
        fine = apply_linear(mean + torch.sigmoid(apply_linear(fine, self.fine_gate)), self.fine_out)
        grid = fine.shape[1:3]
        deep = resize(self.deep(deep) * torch.softmax(apply_linear(deep, self.deep_gate), -1), grid)
        middle = resize(self.middle(middle), grid)
        joined: Tensor = self.out(torch.cat([fine, deep, middle], -1))
        return joined + middle * deep + torch.sigmoid(middle * fine)


class P2ATContextOut(ConvNorm):
    """ConvNorm of maps of 1 x 1."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, 1, 1, in_channels]; returns [batch, 1, 1, out_channels]."""
        return self.finish(on_one_place(x[:, 0, 0], self.conv)[:, :, None, None])


class P2ATContext(nn.Module):
    """x + PReLU BN 7x7(weight * 3x3(mean of x) + bias): on one place a convolution has one tap, that in its middle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inwards = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.out = P2ATContextOut(channels, channels, 7, activation="prelu")

    def forward(self, x: Tensor) -> Tensor:
        mean = on_one_place(x.mean((1, 2)), self.inwards) * self.weight + self.bias
        out: Tensor = x + self.out(mean[:, None, None])
        return out


class P2ATHead(nn.Module):
    """W ReLU BN(3x3(ReLU BN x)) + b."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.inwards_norm = nn.BatchNorm2d(channels)
        self.inwards = ConvNorm(channels, channels, 3, activation="relu")
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """x: [batch, h, w, channels]; returns [batch, classes, *size]."""
        x = channels_last(F.relu(self.inwards_norm(channels_first(x))))
        logits = channels_first(apply_linear(self.inwards(x), self.classifier))
        return F.interpolate(logits, size, mode="bilinear", align_corners=True)
