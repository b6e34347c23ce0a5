"""AlgoFormer (arXiv 2402.13572): layers before, layers that are repeated as often as asked, and layers behind.

The repeated part is that of looped transformers (arXiv 2311.12424): what stands before it is added to its input in
every round. So it can compute an iterative algorithm, one step a round. Layers are GPT-2's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..nn._product import apply_linear
from ..nn.activations import ACTIVATIONS
from ..nn.branches import attention_branch, feed_forward_branch
from ..nn.stack import Stack, Step
from ..packing import Packing
from .common.config import ModelConfig
from .common.init import linear_std
from .common.inputs import read_rows, step_by_places
from .common.pretrained import PretrainedModel

__all__ = ["AlgoFormer", "AlgoFormerConfig"]


@dataclasses.dataclass
class AlgoFormerConfig(ModelConfig):
    """The options of an AlgoFormer. How often it loops is no option: its parameters do not depend on it.

    Attributes:
        input_size, output_size: numbers of a row that goes in and of one that comes out.
        hidden_size, num_attention_heads: of the layers; the heads divide the width.
        pre_layers, loop_layers, post_layers: how many layers stand before the loop, in it and behind it; none may stand
            before and behind.
        max_position_embeddings: the longest sequence, padding left out.
        intermediate_size: width inside of the feed-forward; None: 4 hidden_size.
        hidden_act: of the feed-forward, one of `nn.ACTIVATIONS`.
        initializer_range: the standard deviation of new weights; None: that of `torch.nn.Linear` for hidden_size
            inputs. With GPT-2's 0.02 a narrow model had not begun to learn when this one had halved its error. New
            weights of the embedding and positions are drawn as for input_size inputs.

    Raises:
        ValueError: sizes that do not fit, an unknown choice.
    """

    model_type = "algoformer"
    positive = (
        "input_size", "output_size", "hidden_size", "num_attention_heads", "loop_layers", "max_position_embeddings",
        "intermediate_size",
    )  # fmt: skip
    divides = (("num_attention_heads", "hidden_size"),)
    choices = {"hidden_act": ACTIVATIONS}

    input_size: int = 20
    output_size: int = 1
    hidden_size: int = 256
    num_attention_heads: int = 8
    pre_layers: int = 1
    loop_layers: int = 1
    post_layers: int = 1
    max_position_embeddings: int = 82
    intermediate_size: int | None = None
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = None

    def __post_init__(self) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__()
        if self.initializer_range is None:
            self.initializer_range = linear_std(self.hidden_size)
        for name in ("pre_layers", "post_layers"):
            if getattr(self, name) < 0:
                raise self.error(f"{name} must be at least 0, got {getattr(self, name)}")


class RowEmbedding(nn.Module):
    """Rows of numbers to rows of the width of the layers, with learned positions added.

    Args:
        input_size, hidden_size: numbers of a row before and after.
        max_position_embeddings: positions.
    """

    def __init__(self, input_size: int, hidden_size: int, max_position_embeddings: int) -> None:
        super().__init__()
        self.values = nn.Linear(input_size, hidden_size)
        self.positions = nn.Embedding(max_position_embeddings, hidden_size)

    def reset_parameters(self) -> None:
        """Draws rows and positions of like size, which the layers can tell from each other from the beginning."""
        for module in (self.values, self.positions):
            nn.init.normal_(module.weight, std=linear_std(self.values.in_features))

    def forward(self, x: Tensor, step: Step | None = None) -> Tensor:
        """x: [total, input_size] with their step, or [..., L, input_size] without -> the same with hidden_size."""
        places = torch.arange(x.shape[-2], device=x.device) if step is None else step.positions
        return apply_linear(x, self.values) + self.positions(places)


class AlgoFormer(PretrainedModel):
    """y = head(post(z_T)), where z_{t+1} = loop(z_t + e), z_0 = 0 and e = pre(embed(x)).

    A row sees itself and those before it. Its position is its place among the rows of its sequence, and is added once,
    in `embed`.

    Args:
        config: its options.

    Attributes:
        embed: called with packed rows [total, input_size] and their `nn.Step`, or with [B, L, input_size] alone.
        pre, loop, post: an `nn.Stack` each, called with packed rows and their step.
        head: LayerNorm and the product that gives y.
    """

    config_class = AlgoFormerConfig

    def __init__(self, config: AlgoFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = RowEmbedding(config.input_size, config.hidden_size, config.max_position_embeddings)
        self.pre = self.make_stack(config.pre_layers)
        self.loop = self.make_stack(config.loop_layers)
        self.post = self.make_stack(config.post_layers)
        self.head = nn.Sequential(
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps), nn.Linear(config.hidden_size, config.output_size)
        )
        self.apply(self.init_weights)
        self.embed.reset_parameters()

    def make_stack(self, layers: int) -> Stack:
        """So many layers as GPT-2 has them."""
        config, width = self.config, self.config.hidden_size
        heads, eps = config.num_attention_heads, config.layer_norm_eps
        return Stack(
            branch
            for _ in range(layers)
            for branch in (
                attention_branch(width, heads, width // heads, eps=eps),
                feed_forward_branch(width, config.intermediate_size, activation=config.hidden_act, eps=eps),
            )
        )

    def forward(
        self,
        x: Tensor,
        steps: int,
        return_all: bool = False,
        *,
        no_grad_steps: int = 0,
        attention_mask: Tensor | None = None,
        lengths: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Loops `steps` times.

        Args:
            x: [B, L, input_size], or [total, input_size] with `packing`.
            steps: T.
            return_all: y after every t = 1 to T, for losses over the last of them; else after T.
            no_grad_steps: the first so many loops keep nothing for the backward pass. Their result is a constant to
                those that follow, and so is the y after them.
            attention_mask: bool or integer [B, L], nonzero where there is a row; None = all are there.
            lengths: integers [B]: how many rows of a sequence are there, the first ones; in place of attention_mask.
            packing: says that x is packed, and then y is too; in place of attention_mask and lengths.

        Returns:
            y [B, L, output_size], 0 where no row is, or [total, output_size]; with return_all [T, ...].

        Raises:
            ValueError: steps below 1, no_grad_steps that are not from 0 to steps - 1, x or what says where its rows are
                of another shape, more than one that says it, more rows than max_position_embeddings (a RuntimeError in
                a compiled or exported model, which learns it from the mask as it runs).
        """
        config, name = self.config, type(self).__name__
        if steps < 1:
            raise ValueError(f"{name}: steps must be at least 1, got {steps}")
        if not 0 <= no_grad_steps < steps:
            raise ValueError(f"{name}: no_grad_steps must be from 0 to steps - 1, {steps - 1}, got {no_grad_steps}")
        if lengths is not None:
            if attention_mask is not None or packing is not None:
                raise ValueError(f"{name}: lengths must be None with attention_mask or packing, which say the same")
            if x.dim() == 3:
                if lengths.shape != x.shape[:1]:
                    raise ValueError(f"{name}: lengths must have shape [{x.shape[0]}], got {list(lengths.shape)}")
                attention_mask = Packing.from_lengths(lengths, x.shape[1], device=x.device).ranks >= 0
        packing, padded, rows = read_rows(
            name, "x", x, (config.input_size,), attention_mask, packing, config.max_position_embeddings
        )
        step = step_by_places(packing)
        start = self.pre(self.embed(rows, step), step)
        z = torch.zeros_like(start)
        found = []
        for t in range(steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and t >= no_grad_steps):
                z = self.loop(z + start, step)
                if return_all or t == steps - 1:
                    y = self.head(self.post(z, step))
                    found.append(packing.unpack(y) if padded else y)
        return torch.stack(found) if return_all else found[-1]
