"""attn_implementation="warpform" under torch.compile(fullgraph=True): what it answers and refuses without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform.integrations import transformers as integration

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
GQA = {**TINY, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3}
MIXED = {**GQA, "layer_types": ["sliding_attention", "full_attention"]}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
WINDOWED = {
    "Mistral": GQA,
    "ModernBert": {**TINY, **SPECIAL, "local_attention": 6, "global_attn_every_n_layers": 2},
    "Gemma2": {**MIXED, "attn_logit_softcapping": 2.0},
    "Gemma3Text": MIXED,
    "Qwen2": {**GQA, "use_sliding_window": True, "max_window_layers": 1},
    # Its layers do not hand the window on to attention: the mask alone knows it.
    "Qwen2Moe": {**GQA, "use_sliding_window": True, "max_window_layers": 0, "num_experts": 2, "num_experts_per_tok": 2},
    "Starcoder2": GQA,
}
NAMES = [pytest.param(n, marks=() if n == "Mistral" else pytest.mark.slow) for n in WINDOWED]
SEQLEN = 11


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    integration.register()
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(family: str, implementation: str = "warpform", kind: str = "Model", **fields: object) -> nn.Module:
    torch.manual_seed(1)
    options = {**WINDOWED.get(family, TINY), **fields}
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, family + kind)._from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    return model


def states(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    if hasattr(model.config, "use_cache"):
        kwargs.setdefault("use_cache", False)
    return model(ids, **kwargs).last_hidden_state


def padding(side: str) -> Tensor:
    mask = torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [4], [1], [6]])
    return mask.flip(1) if side == "left" else mask


@pytest.mark.parametrize("name", NAMES)
def test_windows(name: str) -> None:
    """Padding left, right and none, sequences longer than the window; transformers' attention is the judge."""
    model, eager = build(name), build(name, "eager")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for side in ("left", "right", "none"):
            ids = torch.randint(3, 97, (4, SEQLEN))
            mask = None if side == "none" else padding(side)
            real = torch.ones(4, SEQLEN, dtype=torch.bool) if mask is None else mask
            given = {} if mask is None else {"attention_mask": mask.long()}
            found = states(compiled, ids, **given)[real]
            torch.testing.assert_close(found, states(model, ids, **given)[real])
            torch.testing.assert_close(found, states(eager, ids, **given)[real])


@pytest.mark.slow
def test_gradients() -> None:
    model, eager = build("Mistral"), build("Mistral", "eager")
    exact = copy.deepcopy(model).double()  # transformers' own attention overflows in float64 where it sees no key
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = torch.randint(3, 97, (4, SEQLEN)), padding("left")
    found = []
    for one, parameters in ((compiled, model.parameters()), (exact, exact.parameters()), (eager, eager.parameters())):
        loss = states(one, ids, attention_mask=mask.long())[mask].square().sum()
        found.append(torch.autograd.grad(loss, list(parameters)))
    for (name, _), *gradients in zip(model.named_parameters(), *found, strict=True):
        assert_close(name, *gradients, gradient=True)


@pytest.mark.slow
def test_packed_sequences_by_position_ids_alone() -> None:
    model, eager = build("Mistral"), build("Mistral", "eager")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for lengths in ((3, 1, 7), (11,), (5, 6)):
            positions = torch.cat([torch.arange(n) for n in lengths])
            positions = torch.stack([positions, torch.arange(SEQLEN)])
            ids = torch.randint(3, 97, (2, SEQLEN))
            found = states(compiled, ids, position_ids=positions)
            torch.testing.assert_close(found, states(eager, ids, position_ids=positions))


@pytest.mark.slow
def test_a_decoder_made_bidirectional() -> None:
    """config.is_causal = False: the mask says so, the attention module does not."""
    model, eager, mask = build("Mistral"), build("Mistral", "eager"), padding("right")
    for one in (model, eager):
        one.config.is_causal = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(3, 97, (4, SEQLEN))
    with torch.no_grad():
        found, expected = (states(one, ids, attention_mask=mask.long())[mask] for one in (compiled, eager))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["Llama", pytest.param("Mistral", marks=pytest.mark.slow)])
def test_a_static_cache(family: str) -> None:
    """A prompt padded on the left and then one token at a time, against the whole at once."""
    fields = {"num_key_value_heads": 1}
    model, eager = build(family, **fields), build(family, "eager", **fields)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, mask = torch.randint(3, 97, (4, 9)), padding("left")[:, 2:]
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    parts = []
    with torch.no_grad():
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            given = {"attention_mask": mask[:, :end].long(), "past_key_values": cache, "use_cache": True}
            positions = torch.arange(begin, end).expand(4, -1)
            parts.append(states(compiled, ids[:, begin:end], position_ids=positions, **given))
        expected = states(eager, ids, attention_mask=mask.long())
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask])


def refused(model: nn.Module, message: str, **kwargs: object) -> None:
    """By the same sentence in eager mode, compiled with breaks and compiled as one graph."""
    ids = torch.randint(3, 97, (2, SEQLEN))
    for function in (
        model,
        torch.compile(model, backend="eager"),
        torch.compile(model, backend="eager", fullgraph=True),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            states(function, ids, **kwargs)


def test_chunks_are_refused() -> None:
    fields = {"num_key_value_heads": 1, "head_dim": 8, "attention_chunk_size": 4, "num_local_experts": 2}
    refused(build("Llama4Text", **fields), "masks attention by chunked_overlay")


@pytest.mark.parametrize("family", [pytest.param("Bert", marks=pytest.mark.slow), "GPT2"])
def test_probabilities_are_refused(family: str) -> None:
    """GPT-2 does not hand the argument on to its layers."""
    fields = {"n_embd": 16, "n_head": 2, "n_layer": 1} if family == "GPT2" else {}
    refused(build(family, **fields), "output_attentions needs attn_implementation", output_attentions=True)


@pytest.mark.slow
def test_holes_are_refused() -> None:
    mask = torch.ones(2, SEQLEN, dtype=torch.int64)
    mask[0, 5] = 0
    refused(build("Mistral"), "a sliding window needs masks without holes", attention_mask=mask)


@pytest.mark.parametrize("field", ["use_relative_position_bias", "use_shared_relative_position_bias"])
def test_the_bias_of_beit_is_refused(field: str) -> None:
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8,
        **{field: True},
    )  # fmt: skip
    # Older releases of transformers have attention of BEiT's own, for which the name is refused.
    with pytest.raises(ValueError, match=r"relative position bias \(BEiT\)|Beit.* ignores attn_implementation"):
        transformers.BeitModel._from_config(config, attn_implementation="warpform").eval()(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("name", ["relative_position_bias", "bias_of_a_later_model", "sink_of_a_later_model"])
def test_unknown_biases_are_refused(name: str) -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=name):
        integration.attention(nn.Identity(), q, q, q, None, is_causal=True, **{name: torch.ones(1)})
