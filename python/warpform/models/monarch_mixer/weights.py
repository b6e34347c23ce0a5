"""Published weights of M2-BERT: their names, and the fields of a config that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..common.weights import rename

# Training may have wrapped the model; checkpoints without a head lack "bert.".
_PUBLISHED = (
    (r"^module\.", ""),
    (r"^model\.", ""),
    (r"^(?!bert\.|cls\.|classifier\.)", "bert."),
    (r"^cls\.predictions\.bias$", "cls.predictions.decoder.bias"),
)
# Buffers of the published convolution, and the head of sentence order, which no model here has.
_UNUSED = re.compile(r"(^|\.)flashfft\.|^cls\.seq_relationship\.")


def check_fields(what: str, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises ValueError where the fields of a published config are not what `config_of_weights` found, by name."""
    for name, told in sizes.items():
        given = fields.get(name)
        if given is None or given == told:
            continue
        if name == "vocab_size" and isinstance(given, int) and given + -given % 8 == told:
            continue  # the published code makes the vocabulary a multiple of 8, whatever its config says
        if name == "max_position_embeddings" and not sizes["use_positional_encodings"]:
            continue  # without positions it is a limit and no size
        raise ValueError(
            f"{what}: {name} must be {told!r} as the weights tell, and the published config says {given!r}"
        )


def config_of_weights(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that published weights tell by their names and shapes; names begin as in the model without a head.

    Raises:
        ValueError: weights that lack what the fields are read from.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"weights must be those of M2-BERT under the published names, but lack {name}")
        return tuple(weights[name].shape)

    layers = {int(found[1]) for name in weights if (found := re.match(r"encoder\.layer\.(\d+)\.", name))}
    first = "encoder.layer.0."
    filters = f"{first}attention.filter_fn."
    vocab_size, hidden_size = shape("embeddings.word_embeddings.weight")
    nblocks, up, _ = shape(f"{first}mlp.gated_layers.weight")
    _, l_max, emb_dim = shape(f"{filters}pos_emb.z")
    positions = "embeddings.position_embeddings.weight"
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": nblocks * up // 2,
        "type_vocab_size": shape("embeddings.token_type_embeddings.weight")[0],
        "use_positional_encodings": positions in weights,
        "max_position_embeddings": shape(positions)[0] if positions in weights else l_max,
        "long_conv_l_max": l_max,
        "hyena_emb_dim": emb_dim,
        "hyena_filter_order": shape(f"{filters}implicit_filter.0.weight")[0],
        "hyena_training_additions": f"{first}attention.layernorm.weight" in weights,
        "bidirectional": f"{filters}implicit_filter_rev.0.weight" in weights,
        "residual_long_conv": f"{first}attention.filter_fn2.bias" in weights,
        "monarch_mlp_nblocks": nblocks,
    }
    return fields


def canonical(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights under the names of the model with a head: "bert." begins those of the encoder."""
    renamed = {rename(name, _PUBLISHED): weight for name, weight in weights.items()}
    return {name: weight for name, weight in renamed.items() if not _UNUSED.search(name)}
