"""Modules of Swin transformers: a grid of tokens [batch, height, width, channels] in and out, or with depth before.

Windows are never cut out: shift, padding and windows are arithmetic on indices inside of `ops.window_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _autocast, ops
from ..ops._dtypes import accumulation_dtype
from ._product import apply_linear, is_plain, linear, product, product_with_bias
from .feed_forward import FeedForward
from .metaformer import MetaFormerBlock, Terms, add_terms
from .norm import AddBiasResidualLayerNorm

POSITION_CHANNELS = 512  # of the MLP that makes Swin V2's position bias


def fit_window(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], list[int]]:
    """The window and shift for a grid that may be smaller than the window.

    A square window in two dimensions follows Swin's code: where the shorter axis is no longer than the window, that
    length is the window of both axes, and nothing is shifted. Others follow Video Swin's, the same for each axis alone.
    """
    if len(window) == 2 and window[0] == window[1]:
        shortest = min(grid)
        return ([shortest] * 2, [0, 0]) if shortest <= window[0] else (list(window), list(shift))
    fitted = [(n, 0) if n <= w else (w, s) for n, w, s in zip(grid, window, shift, strict=True)]
    return [w for w, _ in fitted], [s for _, s in fitted]


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias for each relative position (Swin, arXiv 2103.14030, eq. 4).

    Args:
        hidden_size: channels of a token; num_heads must divide it.
        num_heads: heads.
        window_size: tokens along each axis of a window, two or three numbers.
        shift_size: by how much windows are shifted along each axis, below window_size; None is nothing.
        qkv_bias: whether queries, keys and values have a bias.
        attention_dropout: dropout on the probabilities. The fused attention keeps none, so a value above 0 raises in
            training mode.
        clamp: whether windows shrink on grids that are smaller (see `fit_window`), with the middle of the table; else
            such grids are padded.

    Raises:
        ValueError: num_heads does not divide hidden_size, a shift outside of its window.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        shift_size: Sequence[int] | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        if num_heads <= 0 or hidden_size % num_heads != 0:
            raise ValueError(f"num_heads must divide hidden_size {hidden_size}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.window_size = tuple(window_size)
        self.shift_size = (0,) * len(self.window_size) if shift_size is None else tuple(shift_size)
        if len(self.shift_size) != len(self.window_size) or any(
            not 0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)
        ):
            raise ValueError(f"shift_size must be below window_size {self.window_size}, got {self.shift_size}")
        self.attention_dropout = attention_dropout
        self.clamp = clamp
        self.make_parameters(hidden_size, qkv_bias)
        self.out = nn.Linear(hidden_size, hidden_size)

    def make_parameters(self, hidden_size: int, qkv_bias: bool) -> None:
        """The parameters before attention; those after it are alike in all kinds of attention."""
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        entries = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(entries, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self) -> Tensor | None:
        """The bias [3 * hidden] of queries, keys and values."""
        return self.qkv.bias

    def project(self, hidden: Tensor) -> Tensor:
        """hidden: [..., hidden]; returns queries, keys and values, [..., 3 * hidden]."""
        return apply_linear(hidden, self.qkv)

    def padding(self, hidden: Tensor) -> Tensor | None:
        """What padded positions hold, [3 * hidden]: the projection of zeros; None for nothing."""
        if is_plain(self.qkv, nn.Linear):
            return self.bias()
        return self.project(hidden.new_zeros(1, hidden.shape[-1]))[0]

    def attend(self, qkv: Tensor, window: list[int], how: dict[str, Any]) -> Tensor:
        """qkv: [batch, *grid, 3, heads, d]; returns [batch, *grid, hidden]."""
        table = self.relative_position_bias_table
        if window != list(self.window_size):
            sides = [2 * w - 1 for w in self.window_size]
            table = table.unflatten(0, sides)
            for axis, (own, w) in enumerate(zip(self.window_size, window, strict=True)):
                table = table.narrow(axis, own - w, 2 * w - 1)
            table = table.reshape(-1, self.num_heads)
        return ops.window_attention(qkv, table, window_size=window, **how)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: [batch, *grid, hidden]. Returns the product of the same shape and the bias [hidden] to be added, or
        None where it is added.

        Raises:
            NotImplementedError: training mode with attention dropout above 0.
        """
        if self.training and self.attention_dropout > 0.0:
            raise NotImplementedError(
                f"attention_probs_dropout_prob is {self.attention_dropout}, and attention dropout is not supported in "
                "training mode: set attention_probs_dropout_prob=0.0 in the config, or call eval()"
            )
        grid = hidden.shape[1:-1]
        window, shift = list(self.window_size), list(self.shift_size)
        if self.clamp:
            window, shift = fit_window(grid, window, shift)
        heads = (3, self.num_heads, self.head_dim)
        padded = any(n % w for n, w in zip(grid, window, strict=True))
        # Before the tokens, so that a hook that keeps what it sees has those of the tokens in the end.
        padding = self.padding(hidden) if padded else None
        padding = None if padding is None else padding.view(heads)
        qkv = self.project(hidden).unflatten(-1, heads)
        return product(self.attend(qkv, window, {"shift_size": shift, "qkv_bias": padding}), self.out)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, window_size={self.window_size}, "
            f"shift_size={self.shift_size}"
        )


class CosineWindowAttention(WindowAttention):
    """Cosine attention inside windows, with a position bias made by an MLP (Swin V2, arXiv 2111.09883, section 3).

    Keys have no bias.

    Args:
        pretrained_window_size: the window that distances are measured in, so that a model goes to other windows without
            change; None, or 0 along an axis, is window_size.
        mask_value: added to the scores of pairs that shifting brought together. transformers adds -100 twice, so -200.
        hidden_size, num_heads, window_size, shift_size, qkv_bias, attention_dropout, clamp: of `WindowAttention`.
            Windows do not shrink by default: the window is part of the position bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        pretrained_window_size: Sequence[int] | None = None,
        mask_value: float = -100.0,
        clamp: bool = False,
        **options: Any,
    ) -> None:
        pretrained = (0,) * len(window_size) if pretrained_window_size is None else tuple(pretrained_window_size)
        self._pretrained_window_size = pretrained
        self.mask_value = mask_value
        super().__init__(hidden_size, num_heads, window_size, clamp=clamp, **options)

    def make_parameters(self, hidden_size: int, qkv_bias: bool) -> None:
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(hidden_size)) if qkv_bias else None
        self.logit_scale = nn.Parameter(torch.full((self.num_heads, 1, 1), math.log(10.0)))
        self.position_up = nn.Linear(len(self.window_size), POSITION_CHANNELS)
        self.position_down = nn.Linear(POSITION_CHANNELS, self.num_heads, bias=False)
        self.register_buffer("distances", self._distances(self.window_size), persistent=False)

    def _distances(self, window: Sequence[int], device: torch.device | None = None) -> Tensor:
        """[prod(2 w - 1), axes]: sign(x) log2(1 + |x|) / log2(8) of x = 8 * distance / (pretrained window - 1)."""
        axes = []
        for own, w, pretrained in zip(self.window_size, window, self._pretrained_window_size, strict=True):
            longest = (pretrained if pretrained > 0 else own) - 1
            axes.append(torch.arange(1 - w, w, device=device).float() / max(longest, 1))
        x = 8 * torch.stack(torch.meshgrid(axes, indexing="ij"), -1).flatten(0, -2)
        return x.sign() * torch.log2(x.abs() + 1.0) / 3.0

    def restore_buffers(self) -> None:
        """Makes buffers again on the device of the parameters: they have no values where a model was made on the meta
        device and got its parameters one by one."""
        self.distances = self._distances(self.window_size, self.logit_scale.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CosineWindowAttention:
        # Distances stay float32, whatever the model is cast to.
        super()._apply(fn, recurse)
        self.restore_buffers()
        return self

    def position_bias(self, distances: Tensor) -> Tensor:
        """distances: [entries, axes]; returns 16 * sigmoid(MLP(distances)), [entries, heads]: in float32 at least, as
        rounding it to half precision would move scores by up to 0.06."""
        up, down = self.position_up, self.position_down
        with _autocast.off(distances.device):
            if not (is_plain(up, nn.Linear) and is_plain(down, nn.Linear)):
                # They take the dtype of the model, which the attention scale has too.
                out: Tensor = down(F.relu(up(distances.to(self.logit_scale.dtype))))
                return 16 * torch.sigmoid(out.to(accumulation_dtype(out.dtype)))
            dtype = accumulation_dtype(up.weight.dtype)
            x = F.relu(linear(distances.to(dtype), up.weight.to(dtype), up.bias.to(dtype)))
            return 16 * torch.sigmoid(linear(x, down.weight.to(dtype)))

    def bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def project(self, hidden: Tensor) -> Tensor:
        return product_with_bias(hidden, self.qkv, self.bias())

    def attend(self, qkv: Tensor, window: list[int], how: dict[str, Any]) -> Tensor:
        distances: Tensor = self.distances
        if window != list(self.window_size):
            distances = self._distances(window, qkv.device)
        table = self.position_bias(distances)
        scale = self.logit_scale.flatten()
        return ops.window_attention(
            qkv, table, window_size=window, logit_scale=scale, mask_value=self.mask_value, **how
        )


class SwinBlock(MetaFormerBlock):
    """Swin's block (arXiv 2103.14030, eq. 3): window attention and a feed-forward block, normalised before each.

    Args:
        hidden_size, num_heads, window_size, shift_size, qkv_bias, attention_dropout, clamp: of `WindowAttention`.
        mlp_ratio: channels inside of the feed-forward block, in hidden_size.
        hidden_act: one of `ACTIVATIONS`.
        eps: of both normalisations.
        hidden_dropout, drop_path: in training only, on what attention and the feed-forward block add.
        **attention: further options of the attention.
    """

    attention_class: type[WindowAttention] = WindowAttention
    attention: WindowAttention
    attention_norm: AddBiasResidualLayerNorm
    feed_forward: FeedForward
    feed_forward_norm: AddBiasResidualLayerNorm
    part_names = ("attention", "feed_forward")

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: Sequence[int],
        *,
        shift_size: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        hidden_act: str = "gelu",
        eps: float = 1e-5,
        hidden_dropout: float = 0.0,
        drop_path: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__(
            self.attention_class(hidden_size, num_heads, window_size, shift_size=shift_size, **attention),
            FeedForward(hidden_size, int(mlp_ratio * hidden_size), hidden_act),
            norm="layer",
            hidden_size=hidden_size,
            eps=eps,
            drop_path=drop_path,
            dropout=hidden_dropout,
        )


class SwinV2Block(SwinBlock):
    """Swin V2's block (arXiv 2111.09883, section 3.2): cosine attention, and normalisation of what each part adds.

    It takes the arguments of `SwinBlock`; **attention takes pretrained_window_size and mask_value too. hidden_dropout
    is on the feed-forward block alone.
    """

    attention_class = CosineWindowAttention

    def run(self, hidden: Tensor, added: Tensor | None, bias: Tensor | None, **mixing: Any) -> Terms:
        hidden = add_terms(hidden, added, bias)
        added, bias = self.attention(hidden, **mixing)
        added, _ = self._drop(self.attention_norm(added, bias, None), None, dropout=False)
        hidden = hidden + added
        added, bias = self.feed_forward(hidden)
        if self.training and self.dropout > 0.0:
            added, bias = F.dropout(added if bias is None else added + bias, self.dropout), None
        return (hidden, *self._drop(self.feed_forward_norm(added, bias, None), None, dropout=False))


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens into one of twice the channels (Swin, arXiv 2103.14030, section 3.1).

    Odd grids are padded with zeros. The four tokens lie in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column).

    Args:
        hidden_size: channels of a token.
        post_norm: whether normalisation follows the product, as in Swin V2, rather than comes before it.
        eps: of the normalisation.
    """

    def __init__(self, hidden_size: int, *, post_norm: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm = AddBiasResidualLayerNorm((2 if post_norm else 4) * hidden_size, eps)
        self.reduction = nn.Linear(4 * hidden_size, 2 * hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [batch, height, width, hidden]; returns [batch, ceil(height / 2), ceil(width / 2), 2 * hidden]."""
        height, width = hidden.shape[1:3]
        if height % 2 or width % 2:
            hidden = F.pad(hidden, (0, 0, 0, width % 2, 0, height % 2))
        # [batch, y, row, x, column, hidden] -> [batch, y, x, column, row, hidden]
        parts = hidden.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        joined = parts.flatten(3)
        if self.post_norm:
            return self.norm(apply_linear(joined, self.reduction), None, None)
        return apply_linear(self.norm(joined, None, None), self.reduction)
