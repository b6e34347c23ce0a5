"""MoHD: equal to a dense decoder where nothing is left out, to a masked one where something is; and it trains."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.compare import assert_close
from helpers.generation import check_generation
from helpers.training import train
from warpform import Packing, ops
from warpform.models import MoHDConfig, MoHDForCausalLM
from warpform.nn import HiddenRouter
from warpform.ops import RoutingPlan

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_groups": 8,
    "num_shared": 3,
    "top_k": 2,
}
DENSE = {**TINY, "num_groups": 0, "num_shared": 0, "top_k": 0}


def model_of(**fields: Any) -> MoHDForCausalLM:
    return MoHDForCausalLM(MoHDConfig(**{**TINY, **fields})).double()


def sharpen(model: nn.Module) -> None:
    """Weights as large as a trained model's, so that an error anywhere is seen in the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2 * parameter.size(1) ** -0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "fusion" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max())


def batch() -> tuple[Tensor, Tensor]:
    """ids and a mask with padding on the left, on the right, and a hole."""
    mask = torch.ones(4, 13, dtype=torch.int64)
    mask[1, :5], mask[2, 9:], mask[3, 4:6] = 0, 0, 0
    return torch.randint(TINY["vocab_size"], mask.shape), mask


def llama_of(model: MoHDForCausalLM) -> Any:
    """transformers' LLaMA with the weights of a dense decoder."""
    transformers = pytest.importorskip("transformers")
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            attn_implementation="eager",
            pad_token_id=None,
        )
    ).double()
    state = {"model.embed_tokens.weight": model.tokens.weight, "model.norm.weight": model.norm.weight}
    state["lm_head.weight"] = model.head.weight
    width, kv = config.num_attention_heads * config.heads_dim, config.kv_heads * config.heads_dim
    for i, layer in enumerate(model.layers):
        to = f"model.layers.{i}."
        query, key, value = layer.attention.inwards.weight.split((width, kv, kv))
        gate, up = layer.feed_forward.inwards.weight.chunk(2)
        state |= {
            f"{to}input_layernorm.weight": layer.attention.norm.weight,
            f"{to}self_attn.q_proj.weight": query,
            f"{to}self_attn.k_proj.weight": key,
            f"{to}self_attn.v_proj.weight": value,
            f"{to}self_attn.o_proj.weight": layer.attention.outwards.weight,
            f"{to}post_attention_layernorm.weight": layer.feed_forward.norm.weight,
            f"{to}mlp.gate_proj.weight": gate,
            f"{to}mlp.up_proj.weight": up,
            f"{to}mlp.down_proj.weight": layer.feed_forward.outwards.weight,
        }
    theirs.load_state_dict({name: t.detach() for name, t in state.items()})
    return theirs


def test_the_dense_decoder_is_llama() -> None:
    ours = model_of(**DENSE)
    sharpen(ours)
    # Rows without padding before or between tokens: of others transformers' attention in float64 makes NaN.
    ids, mask = (t[::2] for t in batch())
    kept = mask.bool()
    labels = ids.masked_fill(~kept, -100)
    theirs = llama_of(ours)(ids, attention_mask=mask, labels=labels)
    out = ours(ids, mask, labels=labels)
    # transformers makes its rotary tables in float32: they differ from ours by its rounding of the largest angle.
    unit = torch.finfo(torch.float32).eps * TINY["max_position_embeddings"]
    difference, size = (out.logits - theirs.logits)[kept].detach().abs().max(), theirs.logits.detach().abs().max()
    assert float(difference) < unit * float(size)
    assert abs(float(out.loss.detach() - theirs.loss.detach())) < unit * float(size)


@pytest.mark.parametrize("how", ({"gates": "none"}, {"scale_mode": "none", "gates": "both", "renormalise": True}))
def test_all_groups_and_gates_of_one_are_the_dense_decoder(how: dict[str, Any], monkeypatch: Any) -> None:
    """To 1e-12: outputs, and the gradient of every parameter that both have."""
    sparse = model_of(num_shared=8, top_k=0, **how)
    if how["gates"] != "none":
        monkeypatch.setattr(HiddenRouter, "_gates", lambda self, scores, selected: torch.ones_like(scores))
    dense = model_of(**DENSE)
    sharpen(dense)
    missing, unexpected = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and all("router" in name or "fusion" in name for name in missing)
    ids, mask = batch()
    results = []
    for model in (sparse, dense):
        out = model(ids, mask, labels=ids)
        names = [name for name, _ in dense.named_parameters()]
        grads = torch.autograd.grad(out.loss, [model.get_parameter(name) for name in names])
        results.append((out.logits, *grads))
    for one, other in zip(*results, strict=True):
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))


def masked_gather(x: Tensor, w: Tensor, plan: RoutingPlan, gates: Any = None, bias: Any = None) -> Tensor:
    """hidden_gather_linear as a dense product with zeros."""
    factor = plan.selected.to(x.dtype) if gates is None else plan.selected * gates
    return nn.functional.linear(x * factor.repeat_interleave(x.size(1) // factor.size(1), 1), w, bias)


def masked_scatter(x: Tensor, w: Tensor, plan: RoutingPlan, gates: Any = None, bias: Any = None) -> Tensor:
    """hidden_scatter_linear as a dense product, then zeros."""
    factor = plan.selected.to(x.dtype) if gates is None else plan.selected * gates
    return nn.functional.linear(x, w, bias) * factor.repeat_interleave(w.size(0) // factor.size(1), 1)


@pytest.mark.parametrize("gates", ("in", "out", "both", "none"))
@pytest.mark.parametrize("scale_mode", ("sum", "groups", "active", "none"))
def test_any_routing_is_the_masked_dense_computation(gates: str, scale_mode: str, monkeypatch: Any) -> None:
    """To 1e-12: outputs, and the gradient of every parameter, the router's too."""
    model = model_of(gates=gates, scale_mode=scale_mode, renormalise=scale_mode == "groups")
    sharpen(model)
    ids, mask = batch()
    results = []
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(ops, "hidden_gather_linear", masked_gather)
            monkeypatch.setattr(ops, "hidden_scatter_linear", masked_scatter)
        out = model(ids, mask, labels=ids)
        results.append((out.loss, out.logits, *torch.autograd.grad(out.loss, list(model.parameters()))))
    for one, other in zip(*results, strict=True):
        assert largest(one - other) <= 1e-12 * max(1.0, largest(other))


@pytest.mark.parametrize(
    "options",
    ({"route_in": False, "gates": "out"}, {"route_out": False}, {"sparse_attention": False}, {"fusion": False}),
    ids=lambda o: next(iter(o)),
)
def test_options_leave_parts_dense(options: dict[str, Any]) -> None:
    model, (ids, mask) = model_of(**options), batch()
    out = model(ids, mask, labels=ids)
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    full = model_of(**{**options, "num_shared": 8, "top_k": 0})
    assert model.activated_parameters() < full.activated_parameters()


def test_packed_and_padded_agree() -> None:
    model, (ids, mask) = model_of(), batch()
    packing = Packing.from_mask(mask)
    padded = model(ids, mask, labels=ids)
    packed = model(packing.pack(ids), labels=packing.pack(ids), packing=packing)
    assert torch.equal(packing.pack(padded.logits), packed.logits) and torch.equal(padded.loss, packed.loss)
    assert not padded.logits[mask == 0].any()


def test_later_tokens_and_other_rows_change_nothing() -> None:
    model, (ids, mask) = model_of(), batch()
    before = model(ids, mask).logits
    other = ids.clone()
    other[0, 7:] = (other[0, 7:] + 1) % TINY["vocab_size"]
    other[2] = (other[2] + 3) % TINY["vocab_size"]
    after = model(other, mask).logits
    # Products of other rows may be summed in another order.
    eager = model.float()(ids, mask).logits
    assert_close("logits", after[0, :7].float(), before[0, :7], eager[0, :7])
    assert not torch.equal(after[0, 7:], before[0, 7:])


@pytest.mark.parametrize("prompts", ((5,), (3, 9, 1)), ids=("one", "ragged"))
def test_generation_with_a_cache_is_generation_without(prompts: tuple[int, ...]) -> None:
    model = model_of()
    sharpen(model)
    check_generation(model, [torch.randint(TINY["vocab_size"], (n,)) for n in prompts])


@pytest.mark.parametrize(("size", "millions"), (("355M", 355), ("495M", 493), ("1.13B", 1128)))
def test_presets_have_their_sizes(size: str, millions: int) -> None:
    counts = {}
    for setting in ("dense", "50%", "75%", "2x", "3x", "4x"):
        with torch.device("meta"):
            model = MoHDForCausalLM(MoHDConfig.preset(size, setting))
        counts[setting] = model.activated_parameters()
        if setting == "dense":
            assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    # Beside the routed share: the router and the fusion, a twentieth of the dense model or, at four times its width, an
    # eighth.
    for setting, share, more in (
        ("50%", 0.5, 0.05),
        ("75%", 0.75, 0.05),
        ("2x", 1, 0.1),
        ("3x", 1, 0.12),
        ("4x", 1, 0.14),
    ):
        assert share <= counts[setting] / counts["dense"] <= share + more, setting


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"num_groups must divide hidden_size 48, got 7"):
        model_of(num_groups=7)
    with pytest.raises(ValueError, match=r"top_k must be within 0 to the 5 specialised groups, got 6"):
        model_of(top_k=6)
    with pytest.raises(ValueError, match=r"gates must be one of in, out, both, none, got 'up'"):
        model_of(gates="up")
    with pytest.raises(ValueError, match=r"setting must be one of dense, 50%, .* got '5x'"):
        MoHDConfig.preset("355M", "5x")
    model, (ids, mask) = model_of(), batch()
    with pytest.raises(ValueError, match=r"attention_mask must be of shape \[4, 13\]"):
        model(ids, mask[:2])
    with pytest.raises(ValueError, match=r"at most max_position_embeddings, 64, tokens, got 65"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"prompts must be tensors of at least one token"):
        model.generate([ids[0, :0]], 3)


# ---- router ----


def test_gates_of_each_scale() -> None:
    x = torch.randn(5, 48)
    chosen = {}
    for mode in ("sum", "groups", "active", "none"):
        torch.manual_seed(3)
        router = HiddenRouter(48, 8, 3, 2, scale_mode=mode)
        routed = router(x)
        scores = (x @ router.centroids.t()).softmax(1)
        used = scores * routed.plan.selected
        alpha = {"sum": 8 * used.sum(1), "groups": 8.0, "active": 5 / used.sum(1), "none": 1.0}[mode]
        expected = used * (alpha.unsqueeze(1) if isinstance(alpha, Tensor) else alpha)
        assert_close(mode, routed.gates, expected.double(), expected)
        chosen[mode] = routed.plan.selected
    selected = chosen["sum"]
    assert selected[:, :3].all() and (selected.sum(1) == 5).all()
    assert all(torch.equal(selected, other) for other in chosen.values())
    # The scale's coupling: the gradient of one gate reaches the scores of all.
    router = HiddenRouter(6, 8, 3, 2, scale_mode="sum").double()
    few = torch.randn(3, 6, dtype=torch.float64)
    centroids = router.centroids.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: _gates_of(router, c, few), centroids)


def _gates_of(router: HiddenRouter, centroids: Tensor, x: Tensor) -> Tensor:
    routed = torch.func.functional_call(router, {"centroids": centroids}, (x,))
    return routed.gates


def test_balance_loss_is_one_where_loads_are_even_and_more_where_not() -> None:
    router = HiddenRouter(4, 4, 0, 1)
    with torch.no_grad():
        router.centroids.copy_(torch.eye(4))
    even = 10 * torch.eye(4).repeat(3, 1)
    assert abs(float(router(even).balance_loss.detach()) - 1) < 1e-6
    assert float(router(even[:1]).balance_loss.detach()) > 3.9


# ---- training ----


@pytest.mark.slow
def test_it_learns_text_and_spreads_its_load() -> None:
    """Bytes of CPython's help topics: below what the frequency of bytes alone gives, with every group in use."""
    text = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    known, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "balance_loss_weight": 0.02}
    torch.manual_seed(0)
    model = MoHDForCausalLM(MoHDConfig(**{**TINY, **sizes, "scale_mode": "groups"}))
    counts = known.bincount(minlength=256).float() + 1
    by_frequency = -(counts / counts.sum())[held_out].log().mean().item()
    evaluation = held_out[: 64 * 60].view(-1, 64)

    def held_out_loss() -> tuple[float, float]:
        with torch.inference_mode():
            out = model(evaluation, labels=evaluation)
            return float(out.loss - model.config.balance_loss_weight * out.balance_loss), float(out.balance_loss)

    before, _ = held_out_loss()

    def loss() -> Tensor:
        begin = torch.randint(len(known) - 64, (16, 1))
        ids = known[begin + torch.arange(64)]
        return model(ids, labels=ids).loss

    train(model, loss, steps=150, rate=6e-3)
    after, balance = held_out_loss()
    assert before > by_frequency and after < by_frequency - 0.6, (before, after, by_frequency)
    assert balance < 1.3, balance
    loads = []
    hooks = [
        module.register_forward_hook(lambda m, x, routed: loads.append(routed.plan.selected.float().mean(0)))
        for module in model.modules()
        if isinstance(module, HiddenRouter)
    ]
    held_out_loss()
    for hook in hooks:
        hook.remove()
    assert len(loads) == 2 * model.config.num_hidden_layers
    # Two of five specialised groups: 0.4 each where they are used alike; none is left out, none takes every token.
    assert all(0.1 < float(load) < 0.9 for shares in loads for load in shares[3:]), loads
