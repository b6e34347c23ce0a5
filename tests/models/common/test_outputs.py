"""Outputs of models: dictionaries with places, pytrees, and what libraries that convert or copy them make of them."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from warpform import models
from warpform.models.common.outputs import EncoderOutput, HeadOutput, Output, derive_from_model_output

TINY = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
IDS = torch.arange(14).view(2, 7) + 2


@pytest.fixture(params=[False, True], ids=["alone", "as ModelOutput"])
def derived(request: pytest.FixtureRequest) -> Iterator[None]:
    """Before and after a model of transformers was converted."""
    bases = Output.__bases__
    if request.param:
        pytest.importorskip("transformers")
        derive_from_model_output()
    yield
    Output.__bases__ = bases


def kinds() -> list[type[Output]]:
    for name in models.__all__:  # a family is imported when one of its names is asked for
        getattr(models, name)
    found, waiting = [], [Output]
    while waiting:
        classes = waiting.pop().__subclasses__()
        found += classes
        waiting += classes
    return sorted((kind for kind in found if kind.__module__.startswith("warpform.")), key=lambda kind: kind.__name__)


def filled(kind: type[Output]) -> Output:
    """An output with a tensor in each field that can hold one, and a tuple where there are several."""
    values: dict[str, Any] = {}
    for i, field in enumerate(dataclasses.fields(kind)):
        if "hidden_states" in field.name:
            values[field.name] = (torch.full((2,), float(i)), torch.full((3,), float(i)))
        elif field.name != "attentions":
            values[field.name] = torch.full((2,), float(i))
    return kind(**values)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one: Output, other: Output) -> None:
    assert type(one) is type(other) and list(one) == list(other)
    for name in one:
        assert same(one[name], other[name]) and same(getattr(one, name), getattr(other, name)), name
    assert all(getattr(other, field.name) is None for field in dataclasses.fields(one) if field.name not in one)


def test_all_kinds_are_known() -> None:
    names = {kind.__name__ for kind in kinds()}
    assert names >= {
        "EncoderOutput", "HeadOutput", "ImageClassifierOutput", "ImageModelOutput", "MoHDOutput", "SentenceOutput",
        "SequenceParallelOutput", "SwinOutput",
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_a_mapping_and_a_tuple(kind: type[Output], derived: None) -> None:
    out = filled(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name != "attentions"]
    assert list(out) == list(out.keys()) == names and len(out) == len(names)
    assert isinstance(out, dict) and dict(out.items()).keys() == dict(out).keys()
    for i, name in enumerate(names):
        assert out[name] is getattr(out, name) is out[i] is out.get(name) is out.to_tuple()[i]
    assert out[-1] is out[names[-1]] and out[:2] == out.to_tuple()[:2]
    assert "attentions" not in out and out.get("attentions") is None and "nothing" not in out
    with pytest.raises(KeyError):
        out["attentions"]
    with pytest.raises(IndexError):
        out[len(names)]
    for remove in (
        lambda: out.pop(names[0]), lambda: out.popitem(), lambda: out.clear(), lambda: out.__delitem__(names[0]),
        lambda: out.setdefault(names[0], None),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="fields cannot be removed; set one to None instead"):
            remove()
    assert list(out) == names


def test_fields_keep_their_order(derived: None) -> None:
    out = HeadOutput(logits=torch.ones(1))
    assert list(out) == ["logits"] and out[0] is out.logits
    out.loss = torch.tensor(2.0)  # as trainers do
    assert list(out) == ["loss", "logits"] and out[0] is out.loss
    out["hidden_states"] = (torch.ones(1),)
    out["loss"] = None
    assert list(out) == ["logits", "hidden_states"] and out.loss is None and out[0] is out.logits
    out.loss = torch.tensor(3.0)
    out["logits"] = torch.zeros(1)
    assert list(out) == ["loss", "logits", "hidden_states"] and out.logits is out[1]
    assert not out.logits.any()


@pytest.mark.parametrize("kind", kinds())
def test_made_again_from_what_is_in_it(kind: type[Output], derived: None) -> None:
    out = filled(kind)
    pairs = list(out.items())
    for other in (
        kind(dict(pairs)), kind(**dict(pairs)), kind(pairs), kind(pair for pair in pairs), out.copy(), copy.copy(out),
        copy.deepcopy(out), pickle.loads(pickle.dumps(out)), dataclasses.replace(out),
    ):  # fmt: skip
        assert_same(out, other)
    assert copy.copy(out)[0] is out[0] and copy.deepcopy(out)[0] is not out[0]
    only = kind(dict(pairs[:1]))
    assert list(only) == [pairs[0][0]]


@pytest.mark.parametrize("kind", kinds())
def test_a_pytree(kind: type[Output], derived: None) -> None:
    out = filled(kind)
    out["noted"] = torch.full((1,), 7.0)  # libraries add items of their own
    leaves, spec = pytree.tree_flatten(out)
    assert all(isinstance(leaf, Tensor) for leaf in leaves) and len(leaves) >= len(out)
    again = pytree.tree_unflatten(leaves, spec)
    assert_same(out, again)
    assert same(again["noted"], out["noted"]) and list(again)[-1] == "noted"
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    doubled = pytree.tree_map(lambda t: 2 * t, out)
    assert type(doubled) is kind and same(doubled[0], 2 * out[0])
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths[0] == f"['{next(iter(out))}']" and len(set(paths)) == len(leaves)
    # Leaves may become something else than tensors on their way.
    shapes = pytree.tree_map(lambda t: tuple(t.shape), out)
    assert type(shapes) is kind and shapes[0] == (2,)


def test_torch_functions_that_ask_the_pytree(derived: None) -> None:
    """`torch.func` and distributed wrappers, which differentiate what they find."""
    x = torch.ones(2, requires_grad=True)
    out = EncoderOutput(2 * x, None, (3 * x,))
    gradients = torch.autograd.grad(sum(leaf.sum() for leaf in pytree.tree_leaves(out)), x)
    assert torch.equal(gradients[0], torch.full((2,), 5.0))
    model = nn.Linear(2, 2)
    found = torch.func.functional_call(model, dict(model.named_parameters()), (torch.ones(1, 2),))
    assert torch.equal(found, model(torch.ones(1, 2)))
    batched = torch.func.vmap(lambda t: EncoderOutput(t + 1, t))(torch.arange(3.0))
    assert isinstance(batched, EncoderOutput) and torch.equal(batched.last_hidden_state, torch.arange(3.0) + 1)


def test_conversion_by_accelerate(derived: None) -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    for kind in kinds():
        out = pytree.tree_map(lambda t: t.bfloat16(), filled(kind))
        wide = operations.convert_to_fp32(out)
        assert type(wide) is kind and list(wide) == list(out)
        assert all(leaf.dtype == torch.float32 for leaf in pytree.tree_leaves(wide))
        moved = operations.send_to_device(out, "cpu")
        assert type(moved) is kind and same(moved[0], out[0])


def head(**fields: Any) -> nn.Module:
    return models.BertForSequenceClassification(models.BertConfig(**{**TINY, **fields}))


def test_export_and_back() -> None:
    model = head().eval()
    expected = model(IDS)
    program = torch.export.export(model, (IDS,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for one in (program, torch.export.load(file)):
        out = one.module()(IDS)
        assert isinstance(out, HeadOutput)
        # The same operations on the same numbers: nothing may round otherwise.
        assert torch.equal(out.logits, expected.logits)


def test_compiles_whole(fresh_dynamo: None) -> None:
    model = head()
    labels = torch.tensor([0, 1])
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, labels=labels)
    expected = model(IDS, labels=labels)
    assert isinstance(out, HeadOutput) and list(out) == ["loss", "logits"]
    assert torch.equal(out.logits, expected.logits) and torch.equal(out[0], expected[0])
    out.loss.backward()
    assert model.classifier.weight.grad is not None


def test_derived_once() -> None:
    transformers = pytest.importorskip("transformers")
    bases = Output.__bases__
    try:
        derive_from_model_output()
        derive_from_model_output()
        assert isinstance(HeadOutput(), transformers.utils.ModelOutput)
        assert Output.__mro__.count(transformers.utils.ModelOutput) == 1
    finally:
        Output.__bases__ = bases
