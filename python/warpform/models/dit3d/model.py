"""DiT-3D (arXiv 2307.01831): a diffusion transformer on voxels, some of whose blocks attend within windows.

Its blocks are those of DiT (arXiv 2212.09748): adaLN-Zero, conditioned on the timestep and the class. Parameters have
the names of the published code, so that `load_state_dict` reads its checkpoints, and blocks of a DiT for images.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from ...nn import BiasActivation, PatchEmbedding
from ...nn._checkpoint import CheckpointedLayers
from ...nn._product import apply_linear, dtype_of, is_plain, product
from ..common.init import init_normal
from ..common.pretrained import PretrainedModel
from .config import Axes, DiT3DConfig

FREQUENCIES = 256  # channels of the timestep's sinusoids
EPS = 1e-6


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep through a two-layer MLP: [B] to [B, hidden]."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        # In float64, for in float32 the angles of timesteps near 1000 are off by 1e-4.
        frequencies = 10_000.0 ** -(torch.arange(half, device=t.device, dtype=torch.float64) / half)
        angles = t.to(torch.float64)[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: Tensor = self.mlp(waves.to(dtype_of(self.mlp)))
        return embedded


class LabelEmbedder(nn.Module):
    """A row of a table for each class, and after them one for the null class if labels are ever dropped."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(y)
        return embedded


class Attention(nn.Module):
    """Self-attention of a grid of tokens, within windows or of all with all.

    Windows go through `ops.window_attention`, which reads the QKV product as it is. Global attention goes through
    torch's own: with neither padding nor windows there is nothing to skip, and its choice of kernels is what users
    expect of a plain transformer.
    """

    def __init__(self, hidden_size: int, num_heads: int, window_size: Axes | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window_size = num_heads, hidden_size // num_heads, window_size
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, X, Y, Z, hidden]; returns the same."""
        heads = (3, self.num_heads, self.head_dim)
        bias = self._padding(x)
        qkv = apply_linear(x, self.qkv).unflatten(-1, heads)  # [B, X, Y, Z, 3, H, D]
        if self.window_size is None:
            q, k, v = (t.transpose(1, 2) for t in qkv.flatten(1, 3).unbind(2))  # [B, H, X Y Z, D]
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        else:
            bias = None if bias is None else bias.view(heads)
            out = ops.window_attention(qkv, window_size=self.window_size, qkv_bias=bias)
        return apply_linear(out, self.proj)

    def _padding(self, x: Tensor) -> Tensor | None:
        """The projection of zeros, [3 * hidden], with which grids are padded that windows do not divide; else None."""
        if self.window_size is None or not any(n % w for n, w in zip(x.shape[1:4], self.window_size, strict=True)):
            return None
        padding: Tensor = self.qkv.bias if is_plain(self.qkv, nn.Linear) else self.qkv(x.new_zeros(1, x.shape[-1]))[0]
        return padding

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, window_size={self.window_size}"


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = BiasActivation(hidden_act)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(*product(x, self.fc1)))
        return out


class AdaLN(nn.Sequential):
    """`count` vectors from the condition, [B, hidden] to [B, 1, 1, 1, hidden] each; all 0 before training."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, count * hidden_size))
        self.count = count

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return super().forward(condition)[:, None, None, None].chunk(self.count, dim=-1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift; the norm has no weights of its own."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class DiTBlock(nn.Module):
    """An adaLN-Zero block: the condition shifts, scales and gates attention and MLP; before training nothing passes.

    Args:
        config: of the model.
        window_size: tokens of a window along each axis; None is global attention.
    """

    def __init__(self, config: DiT3DConfig, window_size: Axes | None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attn = Attention(hidden, config.num_heads, window_size)
        self.mlp = Mlp(hidden, int(hidden * config.mlp_ratio), config.hidden_act)
        self.adaLN_modulation = AdaLN(hidden, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: [B, X, Y, Z, hidden]; condition: [B, hidden]; returns like x."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(condition)
        x = torch.addcmul(x, gate, self.attn(modulated_norm(x, shift, scale)))
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale)))


class FinalLayer(nn.Module):
    """Tokens [B, X, Y, Z, hidden] to voxels [B, C, X p, Y p, Z p]; 0 before training."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.linear = nn.Linear(hidden_size, patch_size**3 * out_channels)
        self.adaLN_modulation = AdaLN(hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        p, (b, *grid, _) = self.patch_size, x.shape
        patches = apply_linear(modulated_norm(x, *self.adaLN_modulation(condition)), self.linear)
        patches = patches.view(b, *grid, p, p, p, self.out_channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.reshape(b, self.out_channels, *(n * p for n in grid))


def position_embedding(grid: Axes, width: int) -> Tensor:
    """[1, tokens, width], float64: a third of the channels for each axis, first sines, then cosines of its coordinate.

    What does not divide by six stays 0.
    """
    half = width // 6
    frequencies = 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
    parts = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, dtype=torch.float64)[:, None] * frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [size, 2 half]
        shape = [size if i == axis else 1 for i in range(3)]
        parts.append(waves.view(*shape, -1).expand(*grid, -1))
    return F.pad(torch.cat(parts, dim=-1).flatten(0, 2)[None], (0, width - 6 * half))


class DiT3DModel(PretrainedModel, CheckpointedLayers):
    """Predicts the noise in voxels, given the timestep and the class.

    Args:
        config: its options.
    """

    config_class = DiT3DConfig

    pos_embed: Tensor

    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.x_embedder = PatchEmbedding(config.in_channels, hidden, (config.patch_size,) * 3, name="proj")
        self.t_embedder = TimestepEmbedder(hidden)
        self.y_embedder = LabelEmbedder(config.num_classes, hidden, config.class_dropout_prob)
        # Constant, yet in the state dict, for published checkpoints hold it.
        positions = position_embedding(config.grid, hidden).to(torch.get_default_dtype())
        self.register_buffer("pos_embed", positions)  # [1, tokens, hidden]
        self.blocks = nn.ModuleList([DiTBlock(config, window) for window in config.windows])
        self.final_layer = FinalLayer(hidden, config.patch_size, config.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT's initialisation: blocks and output start at 0, so that training starts from the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for embedder in (self.y_embedder, self.t_embedder):
            embedder.apply(partial(init_normal, std=0.02))
        nn.init.zeros_(self.final_layer.linear.weight)
        for module in self.modules():
            if isinstance(module, AdaLN):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, drop_labels: Tensor | None = None) -> Tensor:
        """The noise in x; with learn_sigma, after it as many channels that say the variance.

        Args:
            x: voxels [B, in_channels, X, Y, Z], of input_size.
            t: timesteps [B], integers or fractions.
            y: int64 [B], classes from 0; num_classes is the null class. None: the null class for all.
            drop_labels: bool [B], which labels become the null class. None: in training each with class_dropout_prob,
                else none.

        Returns:
            [B, out_channels, X, Y, Z].

        Raises:
            ValueError: another shape; a null class that the model does not have (class_dropout_prob 0).
            TypeError: t, y or drop_labels of a wrong dtype.
        """
        self._check(x, t, y, drop_labels)
        y = self._labels(y, drop_labels, x.shape[0], x.device)
        condition = self.t_embedder(t) + self.y_embedder(y)  # [B, hidden]
        tokens = self.x_embedder(x) + self.pos_embed.view(1, *self.config.grid, -1)  # [B, X / p, Y / p, Z / p, hidden]
        for block in self.blocks:
            tokens = self.run_layer(block, tokens, condition)
        out: Tensor = self.final_layer(tokens, condition)
        return out

    def forward_with_guidance(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """noise(null) + scale (noise(y) - noise(null)): classifier-free guidance (arXiv 2207.12598), one batch of 2 B.

        Args:
            x, t, y: as of `forward`. No label is dropped at random, in training mode neither.
            scale: 1 is the prediction for y, 0 that without a class.

        Returns:
            [B, out_channels, X, Y, Z]; the variance, where it is learned, is that for y.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        self._check(x, t, y, None)
        drop = torch.arange(2 * x.shape[0], device=x.device) >= x.shape[0]
        out = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y]), drop_labels=drop)
        given, null = out.chunk(2)
        channels = self.config.in_channels
        noise = torch.lerp(null[:, :channels], given[:, :channels], scale)
        return torch.cat([noise, given[:, channels:]], dim=1)

    def _labels(self, y: Tensor | None, drop: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """int64 [B], with the null class where labels are dropped."""
        null, probability = self.config.num_classes, self.config.class_dropout_prob
        if probability == 0 and (y is None or drop is not None):
            raise ValueError("DiT3DModel: without labels there must be a null class, but class_dropout_prob is 0")
        if y is None:
            return torch.full((batch,), null, device=device)
        if drop is None and self.training and probability > 0:
            drop = torch.rand(batch, device=device) < probability
        return y if drop is None else torch.where(drop, null, y)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None, drop: Tensor | None) -> None:
        expected = [self.config.in_channels, *self.config.voxels]
        if x.dim() != 5 or list(x.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"DiT3DModel: x must be of shape [batch, {sizes}], got {list(x.shape)}")
        for name, value in (("t", t), ("y", y), ("drop_labels", drop)):
            if value is None:
                continue
            if value.dim() != 1 or value.shape[0] != x.shape[0]:
                raise ValueError(f"DiT3DModel: {name} must be of shape [{x.shape[0]}], got {list(value.shape)}")
            if name == "y" and value.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"DiT3DModel: y must be int64, got {value.dtype}")
            if name == "drop_labels" and value.dtype != torch.bool:
                raise TypeError(f"DiT3DModel: drop_labels must be bool, got {value.dtype}")
            if name == "t" and (value.dtype == torch.bool or value.is_complex()):
                raise TypeError(f"DiT3DModel: t must be integers or floats, got {value.dtype}")
