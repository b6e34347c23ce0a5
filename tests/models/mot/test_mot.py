"""Mixture-of-Transformers: Chameleon where classes are equal, its formula token by token where not; and it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.training import digits, train
from warpform import Packing, models
from warpform.models import MoTConfig, MoTForCausalLM
from warpform.nn import ClassLayerNorm, ClassLinear, ClassRMSNorm

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OF_CLASSES = (ClassLinear, ClassRMSNorm, ClassLayerNorm)


def model_of(**fields: Any) -> MoTForCausalLM:
    """A model in float64 with weights as large as a trained one's, so that an error anywhere is seen in the logits."""
    model = MoTForCausalLM(MoTConfig(**{**TINY, "num_classes": 3, **fields})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=2 * parameter.size(-1) ** -0.5)
    return model


def batch(num_classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """ids, a mask with padding on the left, on the right and a hole, and classes, which are wild at padding."""
    mask = torch.ones(4, 13, dtype=torch.int64)
    mask[1, :5], mask[2, 9:], mask[3, 4:6] = 0, 0, 0
    classes = torch.randint(num_classes, mask.shape).masked_fill(mask == 0, 99)
    return torch.randint(TINY["vocab_size"], mask.shape), mask, classes


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def assert_same(one: Tensor, other: Tensor) -> None:
    assert largest(one - other) <= 1e-12 * max(1.0, largest(other))


# ---- sizes ----


@pytest.mark.parametrize(
    ("size", "matrices"),
    (
        ("37M", 36_962_304),
        ("94M", 94_371_840),
        ("443M", 442_499_072),
        ("1.5B", 1_501_560_832),
        ("7B", 7_012_876_288),
    ),
)
def test_presets_have_their_sizes(size: str, matrices: int) -> None:
    for classes in (1, 3):
        config = MoTConfig.preset(size, num_classes=classes)
        with torch.device("meta"):
            model = MoTForCausalLM(config)
        d, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        counted = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
        assert counted == 2 * 65_536 * d + classes * layers * (4 * d * d + 3 * d * f)
        assert classes > 1 or counted == matrices
        assert (
            sum(p.numel() for name, p in model.named_parameters() if "norm" in name) == classes * (2 * layers + 1) * d
        )


# ---- Chameleon of transformers ----


def chameleon_of(**fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    images = {
        "embed_dim": 32, "num_embeddings": 2, "latent_channels": 32, "resolution": 8, "base_channels": 32,
        "channel_multiplier": [1], "num_res_blocks": 1, "attn_type": "none",
    }  # fmt: skip
    config = transformers.ChameleonConfig(
        **{
            **TINY,
            "swin_norm": True,
            "pad_token_id": None,
            "vocabulary_map": {"<image>": 3, "IMGIMGAZ": 5, "IMGIMGBZ": 6},
            "vq_config": images,
            "rms_norm_eps": 1e-3,
            **fields,
        }
    )
    model = transformers.ChameleonForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "norm" not in name:
                parameter.normal_(std=2 * parameter.size(1) ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif "vqmodel" not in name:
                parameter.normal_(std=0.3)
    return model


IMAGE_TOKENS = [5, 6]  # whose logits Chameleon sets to the least number


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and rotary positions of Chameleon, which are in float32 whatever the model's dtype, in float64."""
    from transformers.models.chameleon import modeling_chameleon as theirs

    def rms_norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        dim = TINY["hidden_size"] // TINY["num_attention_heads"]
        theta = self.config.rope_parameters["rope_theta"]
        angles = position_ids[..., None] * theta ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    monkeypatch.setattr(theirs.ChameleonRMSNorm, "forward", rms_norm)
    monkeypatch.setattr(theirs.ChameleonRotaryEmbedding, "forward", rotary)


@pytest.mark.parametrize("num_classes", (1, 3))
@pytest.mark.parametrize("fields", ({}, {"attention_bias": True, "mlp_bias": True}), ids=("", "biases"))
def test_equal_classes_are_chameleon_whatever_the_labels(
    num_classes: int, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12: logits, and the gradient of every parameter, which is the sum over classes here."""
    in_float64(monkeypatch)
    theirs = chameleon_of(**fields)
    ours = MoTForCausalLM.from_transformers(theirs, num_classes)
    assert ours.config.num_classes == num_classes and not ours.training
    # Rows without padding before or between tokens: others have other positions there.
    ids, mask, classes = (t[::2] for t in batch(num_classes))
    real = mask.bool()
    probe = torch.randn(*ids.shape, TINY["vocab_size"], dtype=torch.float64) * mask.unsqueeze(2)
    probe[..., IMAGE_TOKENS] = 0
    expected, found = theirs(ids, attention_mask=mask).logits, ours(ids, mask, classes=classes).logits
    kept = [i for i in range(TINY["vocab_size"]) if i not in IMAGE_TOKENS]
    assert_same(found[real][:, kept], expected[real][:, kept])

    parameters = {name: p for name, p in theirs.named_parameters() if "vqmodel" not in name}
    gradients = torch.autograd.grad(expected, list(parameters.values()), probe)
    own = list(ours.parameters())
    for parameter, gradient in zip(own, torch.autograd.grad(found, own, probe), strict=True):
        parameter.data = gradient
    one = MoTForCausalLM(MoTConfig(**{**vars(ours.config), "num_classes": 1})).double()
    shared = {
        name: g if name in ("tokens.weight", "head.weight") else g.sum(0, True) for name, g in ours.state_dict().items()
    }
    one.load_state_dict(shared)
    named = dict(one.to_transformers(copy.deepcopy(theirs)).named_parameters())
    for name, gradient in zip(parameters, gradients, strict=True):
        assert_same(named[name], gradient)


def test_chameleon_as_it_is() -> None:
    """In its own float32 parts, and its loss where no image tokens are masked."""
    theirs = chameleon_of(vocabulary_map={"<image>": 3})
    ours = MoTForCausalLM.from_transformers(theirs, 2)
    ids, mask, classes = (t[::2] for t in batch(2))
    labels = ids.masked_fill(mask == 0, -100)
    expected = theirs(ids, attention_mask=mask, labels=labels)
    found = ours(ids, mask, classes=classes, labels=labels)
    # Its rotary tables differ from ours by the rounding of the largest angle to float32.
    unit = torch.finfo(torch.float32).eps * TINY["max_position_embeddings"] * largest(expected.logits)
    assert largest((found.logits - expected.logits)[mask.bool()]) < unit
    assert largest(found.loss - expected.loss) < unit


def test_there_and_back(tmp_path: Path) -> None:
    theirs = chameleon_of()
    ours = MoTForCausalLM.from_transformers(theirs, 1)
    other = chameleon_of()
    assert ours.to_transformers(other) is other
    state, kept = other.state_dict(), theirs.state_dict()
    for name, weight in state.items():
        assert "vqmodel" in name or torch.equal(weight, kept[name])
    # Nothing is shared: training one changes nothing in the other.
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(p.any() for name, p in theirs.named_parameters() if "vqmodel" not in name)
    several = MoTForCausalLM.from_transformers(theirs, 3, max_position_embeddings=20)
    several.save_pretrained(tmp_path)
    loaded = models.from_pretrained(tmp_path)
    assert isinstance(loaded, MoTForCausalLM) and loaded.config == several.config
    assert loaded.config.max_position_embeddings == 20
    ids, mask, classes = batch()
    assert torch.equal(loaded(ids, mask, classes=classes).logits, several(ids, mask, classes=classes).logits)


def test_tied_embeddings_stay_tied() -> None:
    theirs = chameleon_of(tie_word_embeddings=True)
    ours = MoTForCausalLM.from_transformers(theirs, 2)
    assert ours.head.weight is ours.tokens.weight
    ids = torch.arange(9)[None]
    difference = (ours(ids, classes=ids % 2).logits - theirs(ids).logits)[..., 7:]
    assert largest(difference) < torch.finfo(torch.float32).eps * TINY["max_position_embeddings"] * 10


# ---- classes of their own ----


def plain(model: MoTForCausalLM, ids: Tensor, classes: Tensor) -> Tensor:
    """The formula for one sequence, with a weight gathered for every token: ids, classes [S] -> logits [S, vocab]."""
    config, length = model.config, len(ids)
    heads, kv, dim = config.num_attention_heads, config.kv_heads, config.heads_dim

    def product(module: Any, x: Tensor) -> Tensor:
        return torch.einsum("ti,toi->to", x, module.weight[classes])

    def rms_norm(module: Any, x: Tensor) -> Tensor:
        weight = module.weight[classes].view(length, *[1] * (x.dim() - 2), -1)
        return x * (x.square().mean(-1, keepdim=True) + module.eps).rsqrt() * weight

    angles = torch.arange(length)[:, None, None] * config.rope_theta ** (-torch.arange(0, dim, 2).double() / dim)
    turns = torch.polar(torch.ones_like(angles), angles)

    def turn(x: Tensor) -> Tensor:
        pairs = torch.complex(*(half.double() for half in x.chunk(2, -1))) * turns
        return torch.cat((pairs.real, pairs.imag), -1).to(x.dtype)

    x = model.tokens.weight[ids]
    branches: list[Any] = list(model.stack.branches)
    for attention, feed_forward in zip(branches[::2], branches[1::2], strict=True):
        q, k, v = product(attention.inwards, x).view(length, -1, dim).split((heads, kv, kv), 1)
        if config.qk_norm == "rms":
            q, k = rms_norm(attention.core.q_norm, q), rms_norm(attention.core.k_norm, k)
        q, k, v = turn(q), turn(k).repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) * dim**-0.5
        mixed = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        seen = torch.einsum("hij,jhd->ihd", mixed, v).flatten(1)
        x = x + rms_norm(attention.norm, product(attention.outwards, seen))
        gate, up = product(feed_forward.inwards, x).chunk(2, 1)
        x = x + rms_norm(feed_forward.norm, product(feed_forward.outwards, F.silu(gate) * up))
    return rms_norm(model.norm, x) @ model.head.weight.t()


@pytest.mark.parametrize("qk_norm", (None, "rms"))
def test_each_token_has_the_weights_of_its_class(qk_norm: str | None) -> None:
    """To 1e-12: logits, and the gradient of every parameter."""
    model = model_of(qk_norm=qk_norm)
    ids, mask, classes = batch()
    kept = mask.bool()
    expected = torch.cat([plain(model, ids[b, kept[b]], classes[b, kept[b]]) for b in (0, 2)])
    found = model(ids, mask, classes=classes).logits[::2][kept[::2]]
    assert_same(found, expected)
    probe, parameters = torch.randn_like(expected), list(model.parameters())
    gradients = [torch.autograd.grad(logits, parameters, probe) for logits in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    model = model_of(qk_norm="rms").to(dtype)
    ids, classes = torch.randint(TINY["vocab_size"], (13,)), torch.randint(3, (13,))
    with torch.no_grad():
        eager = plain(model, ids, classes)
        found = model(ids[None], classes=classes[None]).logits[0]
        assert found.dtype == dtype
        assert_close("logits", found, plain(copy.deepcopy(model).double(), ids, classes), eager)


def test_tokens_before_the_first_of_a_class_do_not_see_its_weights() -> None:
    """Bit for bit, and their gradient is exactly 0."""
    model = model_of(qk_norm="layer")
    ids = torch.randint(TINY["vocab_size"], (2, 12))
    classes = torch.tensor([0, 2, 0, 2, 2, 0, 0, 1, 2, 1, 0, 2]).repeat(2, 1)
    before = model(ids, classes=classes).logits
    of_classes = [p for m in model.modules() if isinstance(m, OF_CLASSES) for p in m.parameters(recurse=False)]
    early = torch.autograd.grad(before[:, :7].square().sum(), of_classes, retain_graph=True)
    late = torch.autograd.grad(before[:, 7:].square().sum(), of_classes)
    assert all(not gradient[1].any() and gradient[[0, 2]].any() for gradient in early)
    assert all(gradient[1].any() for gradient in late)
    with torch.no_grad():
        for parameter in of_classes:
            parameter[1].normal_()
        after = model(ids, classes=classes).logits
    assert torch.equal(after[:, :7], before[:, :7])
    # Later ones see it through attention, whatever class they are of.
    assert all(largest(after[:, i] - before[:, i]) > 0.1 for i in range(7, 12))


def test_a_class_without_tokens_gets_a_gradient_of_zeros() -> None:
    model, (ids, mask, classes) = model_of(qk_norm="rms"), batch()
    classes = classes.masked_fill(classes == 1, 2)
    model(ids, mask, classes=classes, labels=ids).loss.backward()
    for module in model.modules():
        if isinstance(module, OF_CLASSES):
            for parameter in module.parameters(recurse=False):
                assert parameter.grad is not None and not parameter.grad[1].any() and parameter.grad[2].any()


def test_names_of_classes_mean_nothing() -> None:
    """Labels and weights permuted together change nothing."""
    model, (ids, mask, classes) = model_of(qk_norm="layer"), batch()
    new = torch.tensor([2, 0, 1])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, OF_CLASSES):
                for parameter in module.parameters(recurse=False):
                    parameter[new] = parameter.clone()
    renamed = torch.where(mask.bool(), new[classes.clamp(max=2)], -7)
    assert_same(other(ids, mask, classes=renamed).logits, model(ids, mask, classes=classes).logits)
    assert largest(model(ids, mask, classes=renamed).logits - model(ids, mask, classes=classes).logits) > 0.1


def test_without_classes_all_tokens_are_of_the_first() -> None:
    model, (ids, mask, _) = model_of(), batch()
    assert torch.equal(model(ids, mask).logits, model(ids, mask, classes=torch.zeros_like(ids)).logits)


@pytest.mark.parametrize("checkpointing", (False, True), ids=("", "checkpointing"))
def test_packed_padded_and_embeddings_agree(checkpointing: bool) -> None:
    model, (ids, mask, classes) = model_of(qk_norm="rms").train(), batch()
    packing = Packing.from_mask(mask)
    padded = model(ids, mask, classes=classes, labels=ids)
    expected = torch.autograd.grad(padded.loss, list(model.parameters()))
    if checkpointing:
        model.gradient_checkpointing_enable()
    packed = model(packing.pack(ids), classes=packing.pack(classes), labels=packing.pack(ids), packing=packing)
    assert torch.equal(packing.pack(padded.logits), packed.logits) and torch.equal(padded.loss, packed.loss)
    assert not padded.logits[mask == 0].any()
    for one, other in zip(torch.autograd.grad(packed.loss, list(model.parameters())), expected, strict=True):
        assert torch.equal(one, other)
    # A capacity leaves rows that hold no token.
    roomy = Packing.from_mask(mask, capacity=mask.numel())
    wild = roomy.pack(classes).masked_fill(roomy.indices < 0, 99)
    assert_same(model(roomy.pack(ids), classes=wild, packing=roomy).logits[: packing.total], packed.logits)
    embedded = model(inputs_embeds=model.tokens(ids), attention_mask=mask, classes=classes, labels=ids)
    assert torch.equal(embedded.logits, padded.logits) and torch.equal(embedded.loss, padded.loss)
    with_positions = model(ids, mask, classes=classes, position_ids=torch.arange(13)[None])
    assert torch.equal(with_positions.logits, padded.logits)
    halved = model(ids, mask, classes=classes, labels=ids, num_items_in_batch=2 * (packing.total - 4)).loss
    assert_same(2 * halved, padded.loss)
    with pytest.raises(ValueError, match=r"^MoTForCausalLM: output_attentions is not supported$"):
        model(ids, mask, classes=classes, output_attentions=True)


# ---- generation ----


def by_id(ids: Tensor) -> Tensor:
    """Three modalities, each with token ids of its own."""
    return (ids >= 20).long() + (ids >= 40).long()


@pytest.mark.parametrize(
    ("prompts", "new_classes"),
    (((5,), by_id), ((3, 9, 1), by_id), ((3, 9, 1), 2)),
    ids=("one, by id", "ragged, by id", "ragged, all of the last"),
)
def test_generation_with_a_cache_is_generation_without(
    prompts: tuple[int, ...], new_classes: int | Callable[[Tensor], Tensor]
) -> None:
    model = model_of(qk_norm="layer")
    texts = [torch.randint(TINY["vocab_size"], (n,)) for n in prompts]
    classes = [by_id(text) for text in texts]
    expected = []
    for text, known in zip(texts, classes, strict=True):
        for _ in range(6):
            new = model(text[None], classes=known[None]).logits[0, -1:].argmax(1)
            added = new_classes(new) if callable(new_classes) else torch.full_like(new, new_classes)
            text, known = torch.cat((text, new)), torch.cat((known, added))
        expected.append(text)
    found = model.generate(texts, 6, classes=classes, new_classes=new_classes)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # An end token stops its own sequence alone.
    end = int(expected[0][prompts[0] + 2])
    stopped = model.generate(texts, 6, classes=classes, new_classes=new_classes, eos_token_id=end)
    for text, whole, n in zip(stopped, expected, prompts, strict=True):
        continued = whole[n:].tolist()
        stop = n + continued.index(end) + 1 if end in continued else len(whole)
        assert torch.equal(text, whole[:stop])


def test_prompts_may_be_a_tensor() -> None:
    model, ids = model_of(), torch.randint(TINY["vocab_size"], (2, 5))
    both = model.generate(ids, 3, classes=by_id(ids))
    for row, text in zip(ids, both, strict=True):
        assert torch.equal(model.generate(row, 3, classes=by_id(row))[0], text)
    assert torch.equal(model.generate(ids, 3)[0], model.generate(ids, 3, classes=torch.zeros_like(ids))[0])
    drawn = [
        model.generate(ids, 4, classes=by_id(ids), temperature=1.0, top_k=9, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


# ---- bad input ----


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^MoTConfig: num_classes must be at least 1, got 0$"):
        model_of(num_classes=0)
    with pytest.raises(ValueError, match=r"^MoTConfig: qk_norm must be None or one of rms, layer, got 'batch'$"):
        model_of(qk_norm="batch")
    model, (ids, mask, classes) = model_of(), batch()
    with pytest.raises(ValueError, match=r"^MoTForCausalLM: classes must have shape \[4, 13\], got \[4, 12\]$"):
        model(ids, mask, classes=classes[:, 1:])
    with pytest.raises(TypeError, match=r"^MoTForCausalLM: classes must be integers, got float32 of shape"):
        model(ids, mask, classes=classes.float())
    with pytest.raises(TypeError, match=r"^MoTForCausalLM: classes must be integers, got bool of shape"):
        model(ids, mask, classes=classes > 0)
    for wrong in (3, -1):
        with pytest.raises(ValueError, match=rf"^MoTForCausalLM: classes must be within 0 to 2, got {wrong}$"):
            model(ids, mask, classes=classes.masked_fill(mask == 1, wrong))
    with pytest.raises(
        ValueError, match=r"generate: classes must be of the prompts' shapes \[\[13\]\], got \[\[12\]\]$"
    ):
        model.generate(ids[0], 3, classes=classes[0, 1:])
    with pytest.raises(ValueError, match=r"generate: new_classes must be within 0 to 2, got 3$"):
        model.generate(ids[0], 3, new_classes=3)
    with pytest.raises(ValueError, match=r"what new_classes returns must have shape \[1\], got \[1, 1\]$"):
        model.generate(ids[0], 3, new_classes=lambda new: new[None])
    with pytest.raises(ValueError, match=r"^MoTForCausalLM: classes must be within 0 to 2, got 7$"):
        model.generate(ids[0], 3, new_classes=lambda new: torch.full_like(new, 7))
    with pytest.raises(ValueError, match=r"generate: prompts must be tensors of at least one token"):
        model.generate([], 3)


def test_what_is_no_chameleon() -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"swin_norm=True, whose norms stand on the output, got .* swin_norm=False$"):
        MoTForCausalLM.from_transformers(chameleon_of(swin_norm=False), 2)
    with pytest.raises(ValueError, match=r"^MoTConfig: attention_dropout=0.1 is not supported$"):
        MoTForCausalLM.from_transformers(chameleon_of(attention_dropout=0.1), 2)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    with pytest.raises(TypeError, match=r"chameleon must be a ChameleonForConditionalGeneration of .* got .*Llama"):
        MoTForCausalLM.from_transformers(llama, 2)
    theirs = chameleon_of()
    with pytest.raises(ValueError, match=r"^MoTConfig: num_classes must be at least 1, got 0$"):
        MoTForCausalLM.from_transformers(theirs, 0)
    with pytest.raises(TypeError, match=r"MoTConfig has no field 'classes'"):
        MoTForCausalLM.from_transformers(theirs, 2, classes=2)
    with pytest.raises(ValueError, match=r"must have the config of this model, and that one class, .* num_classes$"):
        MoTForCausalLM.from_transformers(theirs, 2).to_transformers(theirs)
    with pytest.raises(ValueError, match=r"and that one class, got other rms_norm_eps$"):
        MoTForCausalLM.from_transformers(theirs, 1, rms_norm_eps=0.1).to_transformers(theirs)
    theirs.model.layers[0].mlp.up_proj = nn.Sequential(theirs.model.layers[0].mlp.up_proj)
    with pytest.raises(ValueError, match=r"^MoTForCausalLM.from_transformers: the parameters of this Chameleon.* lack"):
        MoTForCausalLM.from_transformers(theirs, 2)


# ---- training ----

WORDS = [w.encode() for w in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")]


@pytest.mark.slow
def test_it_learns_words_and_images_in_one_sequence() -> None:
    """A digit as a word of bytes and as 64 pixels of 17 greys, in either order: each modality below its unigrams."""
    data = digits()

    def texts(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [N, 69], a mask and classes: bytes are of class 0, greys, whose ids begin at 256, of class 1."""
        greys = ((images.flatten(1) + 1) * 8).round().long() + 256
        rows = []
        for i, (grey, label) in enumerate(zip(greys, labels.tolist(), strict=True)):
            word = torch.tensor(list(WORDS[label]))
            rows.append(torch.cat((word, grey) if i % 2 else (grey, word)))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        return ids.clamp(min=0), (ids >= 0).long(), (ids >= 256).long()

    known, held_out = texts(data.images, data.labels), texts(data.held_out_images, data.held_out_labels)
    model = MoTForCausalLM(
        MoTConfig(
            vocab_size=273,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=80,
            num_classes=2,
            qk_norm="rms",
        )
    )

    def losses(ids: Tensor, mask: Tensor, classes: Tensor) -> list[float]:
        """Of each modality's tokens, but the first of a sequence."""
        with torch.inference_mode():
            logits = model(ids, mask, classes=classes).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return [float(each[(classes[:, 1:] == c) & mask[:, 1:].bool()].mean()) for c in (0, 1)]

    entropies = []
    for modality in (0, 1):
        tokens = known[0][(known[2] == modality) & known[1].bool()]
        share = tokens.bincount() / len(tokens)
        entropies.append(-float(share.xlogy(share).sum()))
    before = losses(*held_out)

    def loss() -> Tensor:
        ids, mask, classes = (t[torch.randint(len(known[0]), (16,))] for t in known)
        return model(ids, mask, classes=classes, labels=ids.masked_fill(mask == 0, -100)).loss

    train(model, loss, steps=150, rate=6e-3)
    after = losses(*held_out)
    assert all(b > e for b, e in zip(before, entropies, strict=True)), (before, entropies)
    assert all(a < e - 0.3 for a, e in zip(after, entropies, strict=True)), (after, entropies)


@pytest.mark.slow
def test_compiled_it_is_the_same(fresh_dynamo: None) -> None:
    """In one graph, with classes: there a CPU takes the op that GPUs take."""
    model, (ids, mask, classes) = model_of(qk_norm="layer", num_hidden_layers=1).float(), batch()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        eager = model(ids, mask, classes=classes).logits
        found = compiled(ids, mask, classes=classes).logits
        assert_close("logits", found, copy.deepcopy(model).double()(ids, mask, classes=classes).logits, eager)
