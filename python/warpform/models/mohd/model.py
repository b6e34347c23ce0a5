"""Mixture of hidden dimensions (MoHD, arXiv 2412.05644): a LLaMA-style decoder whose tokens use some of their width.

Before each branch of a layer a router chooses groups of the hidden dimensions; the branch reads those of its input and
writes those of its output. What the sources leave open is an option; `MoHDConfig` says which is which.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...nn.stack import Step
from ..common.outputs import Output
from ..decoder.base import CausalLM
from ..decoder.inputs import Inputs
from .config import MoHDConfig
from .layers import LayeredStack, RoutedBranch, mohd_layer


@dataclasses.dataclass
class MoHDOutput(Output):
    """Attributes:
    loss: a scalar, where labels were given: the mean cross-entropy of the next token (0 where no label counts), in
        float32 at least, plus the weighted balance loss.
    logits: [B, S, vocab], 0 at padded tokens, or [total, vocab] where packed ids were given.
    balance_loss: the mean over routers, a scalar; None for a dense model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    balance_loss: Tensor | None = None


class MoHDForCausalLM(CausalLM):
    """The decoder with its language-model head.

    With every group shared, gates "none" (or a scale that makes them 1) and fusion at its beginning, it computes what
    the dense decoder with the same weights computes.
    """

    config_class = MoHDConfig
    config: MoHDConfig

    def set_stack(self) -> None:
        self.layers = LayeredStack(mohd_layer(self.config, i) for i in range(self.config.num_hidden_layers))

    @property
    def stack(self) -> LayeredStack:  # type: ignore[override]
        """The layers, whose branches are a stack."""
        return self.layers

    def activated_parameters(self) -> int:
        """Parameters that one token's way through the layers multiplies: of routed weights the share in use.

        Embeddings and the head do not count: they are the same in all settings.
        """
        count = 0
        for name, parameter in self.layers.named_parameters():
            block = self.layers.get_submodule(name.rsplit(".", 2)[0])
            size = parameter.numel()
            if isinstance(block, RoutedBranch) and block.router is not None:
                inwards = name.endswith("inwards.weight") and block.route_in
                outwards = name.endswith("outwards.weight") and block.route_out
                if inwards or outwards:
                    router = block.router
                    size = size * (router.num_shared + router.top_k) // router.num_groups
            count += size
        return count

    def loss(self, logits: Tensor, inputs: Inputs, step: Step) -> Tensor:
        loss = self.token_loss(logits, inputs)
        if not step.losses:
            return loss
        return loss + inputs.share * self.config.balance_loss_weight * torch.stack(step.losses).mean()

    def run(self, inputs: Inputs, step: Step) -> Any:
        """MoHDOutput: what `CausalLM.run` gives, and the balance loss."""
        out = super().run(inputs, step)
        balance = torch.stack(step.losses).mean() if step.losses else None
        return MoHDOutput(out.loss, out.logits, balance)
