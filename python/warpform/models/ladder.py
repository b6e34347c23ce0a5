"""Ladder residual (arXiv 2501.06589): a branch does not read the result of the branch just before it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ..nn.stack import Stack
from .decoder.base import CausalLM
from .decoder.branches import layer_branches
from .decoder.config import DecoderConfig

_BENCHMARK = {"num_hidden_layers": 40, "vocab_size": 49_152, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_LLAMA = {
    "vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}  # fmt: skip


@dataclasses.dataclass
class LadderConfig(DecoderConfig):
    """A LLaMA-style decoder of which some layers, or all, read the residual stream late.

    Presets are the sizes of the paper's benchmark: "1b" and "3b", and Llama 3's shapes "8b" and "70b".

    Attributes:
        ladder_layers: which layers are late. None: all. A number: so many of the last; 0 is the dense decoder. A tuple:
            these, from 0 on.

    Raises:
        ValueError: a layer that there is not, one named twice, or more ladder layers than layers.
    """

    model_type = "ladder"
    other_model_types: ClassVar[tuple[str, ...]] = ()
    presets = {
        "1b": {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 24, **_BENCHMARK},
        "3b": {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 36, **_BENCHMARK},
        "8b": {
            "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
            **_LLAMA,
        },
        "70b": {
            "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
            **_LLAMA,
        },
    }  # fmt: skip

    ladder_layers: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, chosen = self.num_hidden_layers, self.ladder_layers
        if isinstance(chosen, (list, range)):
            chosen = self.ladder_layers = tuple(chosen)
        numbers = (chosen,) if isinstance(chosen, int) else () if chosen is None else chosen
        most = layers if isinstance(chosen, int) else layers - 1
        if (
            not isinstance(numbers, tuple)
            or any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= most for n in numbers)
            or len(set(numbers)) < len(numbers)
        ):
            raise self.error(
                f"ladder_layers must be None, a number from 0 to {layers}, or different layers from 0 to {layers - 1}, "
                f"got {chosen!r}"
            )

    @property
    def late_layers(self) -> tuple[int, ...]:
        """The layers that read the stream late, increasing."""
        layers, chosen = self.num_hidden_layers, self.ladder_layers
        if chosen is None or isinstance(chosen, int):
            return tuple(range(layers))[0 if chosen is None else layers - chosen :]
        return tuple(sorted(chosen))

    @property
    def lags(self) -> list[int]:
        """For each branch, attention and feed-forward of every layer, how many results before it it does not see."""
        late = set(self.late_layers)
        return [int(layer in late) for layer in range(self.num_hidden_layers) for _ in ("attention", "feed-forward")]


class LadderForCausalLM(CausalLM):
    """A decoder in which x_i = x_{i-1} + h_i(x_{i-2}) (arXiv 2501.06589): branch i does not read branch i - 1.

    i counts attentions and feed-forwards, and x_i is the stream after the first i of them; the first two read the
    embedding both. Under tensor parallelism the sum over GPUs of one branch then runs beside the work of the next.

    Where some layers alone are ladder layers, a branch of one reads the stream without the result of the branch just
    before it, whatever layer that one belongs to. So the attention of the first ladder layer already lacks the
    feed-forward of the usual layer before it. The first branch behind a ladder layer waits for everything, and so does
    the final norm: no result is left out of the stream, it comes one branch later.

    Its parameters are those of a `DecoderForCausalLM`, with the same names: `load_state_dict` takes the state dict of
    one, to be trained on in the new order.

    Args:
        config: its options.
    """

    config_class = LadderConfig
    config: LadderConfig

    def make_stack(self) -> Stack:
        """The branches of a decoder, with their lags."""
        return Stack(layer_branches(self.config), self.config.lags)


__all__ = ["LadderConfig", "LadderForCausalLM"]
