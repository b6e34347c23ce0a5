"""Wide attention against torch's own layers, values and gradients; padding changes nothing; it tells texts apart."""

from __future__ import annotations

import os
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.compilations import Compilations
from helpers.parity import make_mask, randomise
from helpers.training import train
from warpform import Packing
from warpform.models import WideConfig, WideForSequenceClassification
from warpform.nn import Step

TINY: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 5,
    "head_dim": 8, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
# torch's layers have heads of hidden_size / num_attention_heads.
SQUARE: dict[str, Any] = {**TINY, "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 32}
LENGTHS = (13, 6, 9, 1)


def model_of(**fields: Any) -> WideForSequenceClassification:
    model = randomise(WideForSequenceClassification(WideConfig(**{**TINY, **fields})))
    assert isinstance(model, WideForSequenceClassification)
    return model.double()


def batch(pattern: str = "right") -> tuple[Tensor, Tensor]:
    """ids and a mask; the ids at real tokens are the same for each pattern."""
    mask = make_mask(pattern, LENGTHS, 13)
    ids = torch.randint(61, mask.shape)
    ids[mask.bool()] = torch.arange(sum(LENGTHS)) * 7 % 61
    return ids, mask


class Plain(nn.Module):
    """The same of torch's modules, padded."""

    def __init__(self, model: WideForSequenceClassification) -> None:
        super().__init__()
        config = model.config
        width = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_attention_heads, config.intermediate_size, 0.0, config.hidden_act,
            config.layer_norm_eps, batch_first=True, norm_first=config.norm_first,
        )  # fmt: skip
        norm = nn.LayerNorm(width, config.layer_norm_eps) if config.norm_first else None
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, norm, enable_nested_tensor=False)
        self.classifier = nn.Linear(width, config.num_labels)
        self.load_state_dict({theirs: model.state_dict()[ours] for theirs, ours in self.names(model).items()})

    def names(self, model: WideForSequenceClassification) -> dict[str, str]:
        """For each of its parameters that of the model."""
        found = {}
        for name in self.state_dict():
            ours = name
            for i in range(model.config.num_hidden_layers):
                for theirs, place in (
                    ("self_attn.in_proj_", f"{2 * i}.inwards."), ("self_attn.out_proj.", f"{2 * i}.outwards."),
                    ("norm1.", f"{2 * i}.norm."), ("linear1.", f"{2 * i + 1}.inwards."),
                    ("linear2.", f"{2 * i + 1}.outwards."), ("norm2.", f"{2 * i + 1}.norm."),
                ):  # fmt: skip
                    ours = ours.replace(f"encoder.layers.{i}.{theirs}", f"stack.branches.{place}")
            found[name] = ours.replace("encoder.norm.", "norm.")
        return found

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden states, and logits."""
        places = (mask.cumsum(1) - 1).clamp(min=0)
        x = self.embeddings(ids) + self.positions(places)
        hidden = self.encoder(x, src_key_padding_mask=mask == 0)
        real = mask.unsqueeze(2).to(hidden.dtype)
        return hidden, self.classifier((hidden * real).sum(1) / real.sum(1))


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


@pytest.mark.parametrize("norm_first", (False, True))
@pytest.mark.parametrize("activation", ("gelu", "relu"))
def test_it_is_the_encoder_of_torch(norm_first: bool, activation: str) -> None:
    """To 1e-12: hidden states, logits, the loss and the gradient of every parameter."""
    model = model_of(**SQUARE, norm_first=norm_first, hidden_act=activation)
    plain = Plain(model).double()
    (ids, mask), labels = batch("holes"), torch.tensor([0, 2, 1, 2])
    hidden, logits = plain(ids, mask)
    loss = nn.functional.cross_entropy(logits, labels)
    out = model(ids, mask, labels=labels)
    packing = Packing.from_mask(mask)
    places = packing.pack(mask.cumsum(1) - 1)
    rows = model.embeddings(packing.pack(ids)) + model.positions(places)
    states = model.stack(rows, Step(places, packing.cu_seqlens, packing.max_seqlen), model.norm)
    names = plain.names(model)
    assert sorted(names.values()) == sorted(name for name, _ in model.named_parameters())
    theirs = torch.autograd.grad(loss, list(plain.parameters()))
    ours = torch.autograd.grad(out.loss, [model.get_parameter(names[name]) for name, _ in plain.named_parameters()])
    pairs = [(out.logits, logits), (out.loss, loss), (states, packing.pack(hidden)), *zip(ours, theirs, strict=True)]
    for one, other in pairs:
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))
    assert all(largest(gradient) > 0 for gradient in ours)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("norm_first", (False, True))
def test_other_dtypes(norm_first: bool, dtype: torch.dtype) -> None:
    model, (ids, mask) = model_of(**SQUARE, norm_first=norm_first).to(dtype), batch()
    eager, oracle = Plain(model).to(dtype), Plain(model).double()
    with torch.no_grad():
        found = model(ids, mask).logits
        assert found.dtype == dtype
        assert_close("logits", found, oracle(ids, mask)[1], eager(ids, mask)[1])


@pytest.mark.parametrize("pooling", ("mean", "max", "first", "last"))
def test_padding_changes_nothing(pooling: str) -> None:
    """Bit for bit, wherever it is; nor do packed tokens, embeddings in place of ids, or the sequences beside it."""
    model = model_of(pooling=pooling, norm_first=pooling == "max")
    ids, mask = batch()
    expected = model(ids, mask).logits
    for pattern in ("left", "holes"):
        assert torch.equal(model(*batch(pattern)).logits, expected)
    wide = torch.zeros(4, 20, dtype=torch.int64), torch.zeros(4, 20, dtype=torch.int64)
    wide[0][:, 7:], wide[1][:, 7:] = ids, mask  # more than max_position_embeddings places, but not tokens
    assert torch.equal(model(*wide).logits, expected)
    packing = Packing.from_mask(mask)
    assert torch.equal(model(packing.pack(ids), packing=packing).logits, expected)
    roomy = Packing.from_mask(mask, capacity=40)  # products of more rows may be summed in another order
    assert largest(model(roomy.pack(ids), packing=roomy).logits - expected) <= 1e-12
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=mask).logits, expected)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, :length]).logits
        assert largest(alone - expected[row : row + 1]) <= 1e-12
    # Positions are looked at: other orders of the tokens give other logits.
    assert largest(model(ids[:1].flip(1)).logits - expected[:1]) > 1e-6


def test_a_sequence_without_a_token() -> None:
    model, (ids, mask) = model_of(), batch()
    before = model(ids, mask).logits
    mask[1] = 0
    after = model(ids, mask).logits
    assert not after[1].any() and largest(after[[0, 2, 3]] - before[[0, 2, 3]]) <= 1e-12
    assert not model(ids, torch.zeros_like(mask)).logits.any()


@pytest.mark.parametrize(
    ("size", "count"), (("6x8", 6_316_032), ("3x16", 4_735_488), ("2x24", 4_208_640), ("1x48", 3_681_792))
)
def test_presets_have_their_sizes(size: str, count: int) -> None:
    config = WideConfig.preset(size)
    assert config.num_hidden_layers * config.num_attention_heads == 48
    with torch.device("meta"):
        model = WideForSequenceClassification(config)
        logits = model(torch.zeros(2, 9, dtype=torch.int64)).logits
    assert sum(parameter.numel() for parameter in model.stack.parameters()) == count
    # Per layer: queries, keys, values, output; feed-forward; two norms.
    heads, width, inside = 64 * config.num_attention_heads, 256, 1024
    layer = 3 * heads * (width + 1) + width * (heads + 1) + inside * (width + 1) + width * (inside + 1) + 4 * width
    assert count == config.num_hidden_layers * layer
    assert logits.shape == (2, 2) and logits.is_meta


def test_labels_of_each_kind() -> None:
    model, (ids, mask) = model_of(num_labels=1), batch()
    numbers = torch.randn(4, dtype=torch.float64)
    out = model(ids, mask, labels=numbers)
    assert torch.equal(out.loss, nn.functional.mse_loss(out.logits.flatten(), numbers))
    model = model_of()
    several = torch.randint(2, (4, 3)).double()
    out = model(ids, mask, labels=several)
    assert torch.equal(out.loss, nn.functional.binary_cross_entropy_with_logits(out.logits, several))
    assert out[0] is out.loss and out[1] is out.logits


def test_bad_input() -> None:
    model, (ids, mask) = model_of(), batch()
    name = "WideForSequenceClassification"
    for arguments, message in (
        ({"input_ids": ids, "attention_mask": mask[:2]}, r"attention_mask must be of shape \[4, 13\] as input_ids is"),
        ({"input_ids": ids[0]}, r"input_ids must be of shape \[batch, seqlen\], got \[13\]"),
        ({}, "exactly one of input_ids and inputs_embeds must be given"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(4, 13, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(4, 13, 23)}, r"inputs_embeds must have shape \[4, 13, 24\], got \[4, 13, 23\]"),
        ({"input_ids": torch.zeros(1, 17).long()}, "must have at most max_position_embeddings, 16, tokens, got 17"),
        ({"input_ids": ids, "labels": torch.zeros(3).long()}, r"labels must have shape \[4\], got \[3\]"),
        ({"input_ids": ids, "packing": Packing.from_mask(mask)}, r"input_ids must have shape \[29\], got \[4, 13\]"),
        (
            {"input_ids": ids, "attention_mask": mask, "packing": Packing.from_mask(mask)},
            "attention_mask must be None with packing",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            model(**arguments)
    for fields, message in (
        ({"head_dim": None}, "num_attention_heads must divide hidden_size 24 where head_dim is None, got 5"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"pooling": "sum"}, "pooling must be one of mean, max, first, last, got 'sum'"),
        ({"hidden_act": "swishy"}, "hidden_act must be one of .*, got 'swishy'"),
    ):
        with pytest.raises(ValueError, match=f"^WideConfig: {message}$"):
            WideConfig(**{**TINY, **fields})
    with pytest.raises(ValueError, match="size must be one of 6x8, 3x16, 2x24, 1x48, got '4x12'"):
        WideConfig.preset("4x12")


@pytest.mark.slow
def test_compiles_as_one_graph_for_all_batches() -> None:
    model = model_of(num_hidden_layers=1)
    backend = Compilations()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for rows in (4, 3, 5):
            ids, mask = torch.randint(61, (rows, 11)), (torch.rand(rows, 11) < 0.6).long()
            assert largest(compiled(ids, mask).logits - model(ids, mask).logits) <= 1e-12
    assert backend.count == 1


@pytest.mark.slow
def test_it_tells_prose_from_code() -> None:
    """Windows of 256 bytes of CPython's help topics, and of the sources of its library."""
    folder = Path(os.__file__).parent
    sources = [folder / f"{name}.py" for name in ("argparse", "ast", "dataclasses", "inspect", "typing")]
    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    code = b"\n".join(path.read_bytes() for path in sources)
    texts = [torch.tensor(list(text)) for text in (prose, code)]

    def windows(count: int, held_out: bool) -> tuple[Tensor, Tensor]:
        """As many of each, from the last tenth or from the rest."""
        ids = []
        for text in texts:
            border = len(text) * 9 // 10
            part = text[border:] if held_out else text[:border]
            ids.append(part[torch.randint(len(part) - 256, (count, 1)) + torch.arange(256)])
        return torch.cat(ids), torch.arange(2).repeat_interleave(count)

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    model = WideForSequenceClassification(WideConfig(**sizes, head_dim=8, max_position_embeddings=256))

    def loss() -> Tensor:
        ids, labels = windows(8, held_out=False)
        found: Tensor = model(ids, labels=labels).loss
        return found

    train(model, loss, steps=150, rate=5e-3)
    ids, labels = windows(100, held_out=True)
    with torch.inference_mode():
        accuracy = (model.eval()(ids).logits.argmax(1) == labels).float().mean().item()
    assert accuracy >= 0.8, accuracy
