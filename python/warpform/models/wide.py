"""Wide attention (arXiv 2210.00640): many heads in few layers, down to one, in place of few heads in many layers.

The number of heads in all layers together stays the same, and so does the size of a head, which is not tied to the
width of the stream. The feed-forward exists once per layer, so a wide model has fewer parameters and fewer steps that
wait for each other.
"""

from __future__ import annotations

import dataclasses

from .common.sequence_classifier import SequenceClassifier, SequenceClassifierConfig

__all__ = ["WideConfig", "WideForSequenceClassification"]


@dataclasses.dataclass
class WideConfig(SequenceClassifierConfig):
    """The options of a wide transformer. A preset LxH has L layers of H heads each, and 48 heads in all.

    Attributes:
        vocab_size: tokens; by default bytes.
        max_position_embeddings: the longest sequence, padding left out.
        hidden_size, intermediate_size, num_hidden_layers: of the layers.
        num_attention_heads, head_dim: of each layer; their product need not be hidden_size. head_dim None: hidden_size
            / num_attention_heads.
        norm_first: False, as in the first transformer: LayerNorm stands behind each sum. True: before each branch, and
            once more behind the last.
        hidden_act, bias, pooling, num_labels, problem_type: as of `ClassifierConfig`.

    Raises:
        ValueError: sizes that do not fit, an unknown choice.
    """

    model_type = "wide"
    presets = {
        f"{layers}x{heads}": {"num_hidden_layers": layers, "num_attention_heads": heads}
        for layers, heads in ((6, 8), (3, 16), (2, 24), (1, 48))
    }

    head_dim: int | None = 64
    norm_first: bool = False


class WideForSequenceClassification(SequenceClassifier):
    """A classifier of texts on layers of many heads.

    With few wide layers a batch of one takes less time than with many narrow ones, as fewer products wait for another.

    Args:
        config: its options.

    Attributes:
        stack: the layers, an `nn.Stack` of an attention and a feed-forward branch for each.
    """

    config_class = WideConfig
