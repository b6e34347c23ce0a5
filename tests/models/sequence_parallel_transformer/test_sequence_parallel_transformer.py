"""The transformer for shared sequences, on one process: against transformers' classes, by every gradient, and learning.

tests/distributed/test_sequence_parallel.py has the same model over several processes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform.models import SequenceParallelTransformer, SequenceParallelTransformerConfig
from warpform.models.sequence_parallel_transformer import next_tokens

Config = SequenceParallelTransformerConfig
SMALL = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}


def randomised(model: nn.Module) -> nn.Module:
    """No parameter 0 or 1, for a bias that is left out would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def transplant(ours: nn.Module, theirs: nn.Module, names: dict[str, tuple[str, ...]]) -> None:
    """Weights of transformers into ours, QKV joined; every one of ours is in `names`."""
    parameters = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    assert set(mine) == set(names)
    with torch.no_grad():
        for name, parts in names.items():
            mine[name].copy_(torch.cat([parameters[part] for part in parts]))


def names_of(
    layers: int, ours: dict[str, tuple[str, ...]], layer: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Weights and biases, those of each layer with its number put in."""
    names = {}
    for i in range(layers):
        for name, parts in layer.items():
            for leaf in ("weight", "bias"):
                names[f"layers.{i}.{name}.{leaf}"] = tuple(f"{part}.{leaf}".replace("#", str(i)) for part in parts)
    return names | ours


def compare(
    ours: nn.Module, theirs: nn.Module, names: dict[str, tuple[str, ...]], outputs: tuple[Tensor, Tensor]
) -> None:
    """Outputs, and the gradient of every parameter, in float64."""
    mine, reference = outputs
    assert_close("output", mine, reference, reference)
    weight = torch.randn_like(reference)
    ours_parameters, their_parameters = dict(ours.named_parameters()), dict(theirs.named_parameters())
    found = torch.autograd.grad((mine * weight).sum(), list(ours_parameters.values()), allow_unused=True)
    expected = dict(
        zip(
            their_parameters,
            torch.autograd.grad((reference * weight).sum(), list(their_parameters.values()), allow_unused=True),
            strict=True,
        )
    )
    for name, gradient in zip(ours_parameters, found, strict=True):
        wanted = torch.cat([expected[part] for part in names[name]])
        assert_close(f"d {name}", gradient, wanted, wanted, gradient=True)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_decoder_is_a_starcoder2(kv_heads):
    """LayerNorm first, rotary positions, fewer key heads, biases: logits, loss and gradients."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Starcoder2Config(
        vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=40, hidden_act="gelu", norm_epsilon=1e-5, use_bias=True, max_position_embeddings=64,
        attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, tie_word_embeddings=False,
        sliding_window=None, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = randomised(transformers.Starcoder2ForCausalLM(config)).double().eval()
    fields = SMALL | {"num_key_value_heads": kv_heads, "tie_word_embeddings": False, "max_position_embeddings": 64}
    ours = SequenceParallelTransformer(Config.decoder(**fields)).double()
    names = names_of(
        3,
        {
            "tokens.weight": ("model.embed_tokens.weight",),
            "norm.weight": ("model.norm.weight",),
            "norm.bias": ("model.norm.bias",),
            "head.weight": ("lm_head.weight",),
        },
        {
            "attention_norm": ("model.layers.#.input_layernorm",),
            "attention.qkv": tuple(f"model.layers.#.self_attn.{x}_proj" for x in "qkv"),
            "attention.out": ("model.layers.#.self_attn.o_proj",),
            "feed_forward_norm": ("model.layers.#.post_attention_layernorm",),
            "feed_forward.up": ("model.layers.#.mlp.c_fc",),
            "feed_forward.down": ("model.layers.#.mlp.c_proj",),
        },
    )
    transplant(ours, theirs, names)
    ids = torch.randint(0, 37, (2, 19))
    out = ours(ids, next_tokens(ids))
    # transformers' rotary tables and its loss are float32 whatever the model's dtype.
    theirs_exact(theirs, config)
    reference = theirs(ids)
    loss = F.cross_entropy(reference.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close("loss", out.loss, loss, loss)
    compare(ours, theirs, names, (out.logits, reference.logits))


def theirs_exact(model: nn.Module, config: object) -> None:
    """Rotary tables of the transformers model in float64."""
    head_dim = config.hidden_size // config.num_attention_heads
    rotary = model.model.rotary_emb

    def forward(x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        inverse = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = position_ids.double()[..., None] * inverse
        return tuple(torch.cat([t, t], dim=-1) for t in (angles.cos(), angles.sin()))

    rotary.forward = forward


def test_encoder_is_a_megatron_bert():
    """LayerNorm first and learned positions, every token sees every other: hidden states and gradients."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MegatronBertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32,
        type_vocab_size=1, layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = randomised(transformers.MegatronBertModel(config, add_pooling_layer=False)).double().eval()
    with torch.no_grad():
        theirs.embeddings.token_type_embeddings.weight.zero_()
    ours = SequenceParallelTransformer(
        Config.encoder(**SMALL, max_position_embeddings=32, layer_norm_eps=1e-5)
    ).double()
    names = names_of(
        3,
        {
            "tokens.weight": ("embeddings.word_embeddings.weight",),
            "positions.weight": ("embeddings.position_embeddings.weight",),
            "norm.weight": ("encoder.ln.weight",),
            "norm.bias": ("encoder.ln.bias",),
        },
        {
            "attention_norm": ("encoder.layer.#.attention.ln",),
            "attention.qkv": tuple(f"encoder.layer.#.attention.self.{x}" for x in ("query", "key", "value")),
            "attention.out": ("encoder.layer.#.attention.output.dense",),
            "feed_forward_norm": ("encoder.layer.#.ln",),
            "feed_forward.up": ("encoder.layer.#.intermediate.dense",),
            "feed_forward.down": ("encoder.layer.#.output.dense",),
        },
    )
    transplant(ours, theirs, names)
    ids = torch.randint(1, 37, (2, 19))  # to the padding token transformers gives no gradient
    compare(ours, theirs, names, (ours(ids).last_hidden_state, theirs(ids).last_hidden_state))


def test_linformer_is_its_definition():
    """Keys and values projected to K rows (arXiv 2006.04768, equation 7), head by head."""
    config = Config.encoder(**SMALL, max_position_embeddings=12, attention="linformer", linformer_rank=5)
    model = randomised(SequenceParallelTransformer(config)).double()
    attention = model.layers[0].attention
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    out, bias = attention(x)
    assert bias is None
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(24, dim=-1)
    heads = []
    for h in range(4):
        one = slice(6 * h, 6 * h + 6)
        keys, values = attention.key_projection @ k[..., one], attention.value_projection @ v[..., one]
        heads.append(torch.softmax(q[..., one] @ keys.transpose(1, 2) / 6**0.5, dim=-1) @ values)
    expected = torch.cat(heads, dim=-1) @ attention.out.weight.T + attention.out.bias
    assert_close("out", out, expected, expected)
    with pytest.raises(ValueError, match="key_projection must have 10 columns"):
        model(torch.zeros(1, 10, dtype=torch.int64))


def test_a_decoder_sees_no_later_token_and_an_encoder_all():
    for config, sees in ((Config.decoder(**SMALL), False), (Config.encoder(**SMALL), True)):
        model = randomised(SequenceParallelTransformer(config)).double()
        ids = torch.randint(0, 37, (1, 9))
        other = ids.clone()
        other[0, 6] = (other[0, 6] + 1) % 37
        with torch.inference_mode():
            changed = (model(ids).logits != model(other).logits).any(-1)[0]
        assert changed[6:].all() and changed[:6].all() == sees and changed[:6].any() == sees


def test_loss_is_the_mean_over_labels_that_count():
    model = SequenceParallelTransformer(Config.decoder(**SMALL)).double()
    ids = torch.randint(0, 37, (3, 8))
    labels = next_tokens(ids)
    assert torch.equal(labels[:, :-1], ids[:, 1:]) and (labels[:, -1] == -100).all()
    labels[1] = -100
    out = model(ids, labels)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert_close("loss", out.loss, expected, expected)
    assert out[1] is out.logits and model(ids).loss is None


def test_bfloat16_and_autocast():
    """In bfloat16, and in float32 under autocast, near the same in float32; rotary positions are not cast away."""
    torch.manual_seed(3)
    model = SequenceParallelTransformer(Config.decoder(**SMALL, num_key_value_heads=2))
    ids = torch.randint(0, 37, (2, 16))
    exact = model(ids, next_tokens(ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids, next_tokens(ids))
    half = model.to(torch.bfloat16)(ids, next_tokens(ids))
    for out in (cast, half):
        assert out.loss.dtype == torch.float32
        assert (out.loss - exact.loss).abs() < 0.02 * exact.loss


@pytest.mark.slow
def test_a_decoder_learns_to_copy():
    """The second half of a sequence repeats the first, which takes attention over its length to predict."""
    torch.manual_seed(0)
    fields = SMALL | {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SequenceParallelTransformer(Config.decoder(**fields))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        first = torch.randint(0, 12, (32, 8))
        ids = torch.cat([first, first], dim=1)
        labels = next_tokens(ids)
        labels[:, :7] = -100
        loss = model(ids, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25, "chance is ln 12 = 2.5"


@pytest.mark.slow
def test_compiles_without_a_plan():
    model = SequenceParallelTransformer(Config.decoder(**SMALL))
    ids = torch.randint(0, 37, (2, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close("loss", compiled(ids, ids).loss, model(ids, ids).loss.double(), model(ids, ids).loss)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 25}, "num_attention_heads must divide hidden_size 25"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads 4"),
        ({"hidden_act": "x"}, "hidden_act must be one of"),
        ({"position_embedding": "x"}, "position_embedding must be one of"),
        ({"attention": "x"}, "attention must be one of ring, rsa, linformer"),
        ({"attention": "linformer"}, "must not be linformer where causal"),
        ({"num_attention_heads": 8}, "an even head_dim, got 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    ],
)
def test_bad_configs(fields, words):
    with pytest.raises(ValueError, match=words):
        Config.decoder(**{**SMALL, **fields})


def test_bad_input():
    model = SequenceParallelTransformer(Config.decoder(**SMALL, max_position_embeddings=8))
    with pytest.raises(ValueError, match="input_ids must be of shape"):
        model(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most max_position_embeddings 8 tokens over all ranks, got 9"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="labels must be of shape"):
        model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64))
