"""BERT-base and DeBERTa-v3-base end to end, forward and training step, against what people run today."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Missing, Session
from torch import Tensor, nn

import warpform
from suites import encoder

PROVIDERS = (
    "warpform",
    "transformers",
    "torch_varlen",
    "transformers_compiled",
    "warpform_compiled",
    "torch_varlen_compiled",
    "transformers_graphs",
    "warpform_graphs",
    "torch_varlen_graphs",
)
# torch has no attention for DeBERTa's scores that its varlen_attn could replace.
DEBERTA_PROVIDERS = tuple(name for name in PROVIDERS if not name.startswith("torch_varlen"))

# The table of sizes. Of each model "forward" and "training": (sequences, longest); "layers", "hidden": of both.
# Lengths are uniform on [0.2 S, S], as ByteTransformer's (average 0.6 S).
_ALL = tuple((batch, seqlen) for batch in (1, 2, 4, 8, 16) for seqlen in (64, 128, 256, 512, 1024))
_UP_TO_512 = tuple(shape for shape in _ALL if shape[1] <= 512)  # what DeBERTa was made for
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "bert_base": {"forward": ((2, 8),), "training": ((2, 8),)},
        "deberta_v3_base": {"forward": ((2, 8),), "training": ((2, 8),)},
        "layers": 2,
        "hidden": 64,
    },
    "cpu": {
        "bert_base": {"forward": ((1, 128), (8, 128), (8, 256)), "training": ((4, 128),)},
        "deberta_v3_base": {"forward": ((8, 128), (4, 256)), "training": ((4, 128),)},
        "layers": 12,
        "hidden": 768,
    },
    "cuda": {
        "bert_base": {
            "forward": ((1, 64), (1, 512), (16, 64), (16, 256), (16, 1024)),
            "training": ((16, 256), (16, 1024)),
        },
        "deberta_v3_base": {"forward": ((1, 128), (16, 128), (16, 512)), "training": ((16, 512),)},
        "layers": 12,
        "hidden": 768,
    },
    "cuda everything": {
        "bert_base": {"forward": _ALL, "training": _ALL},
        "deberta_v3_base": {"forward": _UP_TO_512, "training": _UP_TO_512},
        "layers": 12,
        "hidden": 768,
    },
}

MAIN = {
    ("bert_base", "forward"): (16, 1024),
    ("bert_base", "training step"): (16, 256),
    ("deberta_v3_base", "forward"): (16, 512),
}


@dataclass(frozen=True)
class Spec(harness.Spec):
    lengths: tuple[int, ...] = ()
    seqlen: int = 1
    layers: int = 12
    width: int = 768

    family = "models"

    def build(self, session: Session) -> ModelCase:
        return ModelCase(self, session)


def specs(session: Session) -> list[Spec]:
    everything = session.everything and session.device == "cuda"
    sizes = SIZES["tiny" if session.tiny else "cuda everything" if everything else session.device]
    layers, width = sizes["layers"], sizes["hidden"]
    heads = max(1, width // 64)
    found = []
    for name, providers in (("bert_base", PROVIDERS), ("deberta_v3_base", DEBERTA_PROVIDERS)):
        for direction, key in (("forward", "forward"), ("training step", "training")):
            for batch, seqlen in sizes[name][key]:
                lengths = harness.draw_lengths(batch, seqlen)
                columns = {
                    "batch": batch, "seqlen": seqlen, "tokens": sum(lengths), "heads": heads,
                    "head_dim": width // heads, "hidden": width,
                }  # fmt: skip
                main = harness.is_main(session, MAIN.get((name, direction)) == (batch, seqlen))
                shape = (lengths, seqlen, layers, width)
                found.append(Spec(name, direction, tuple(columns.items()), providers, *shape, main=main))
    return found


@functools.cache
def models(name: str, device: str, dtype: torch.dtype, layers: int, width: int) -> tuple[nn.Module, nn.Module]:
    """The transformers model and the padding-free one on the same parameters, made once a run."""
    try:
        import transformers
    except ImportError:
        raise Missing("transformers is not installed, and the weights come from its model") from None
    torch.manual_seed(0)
    same = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    if name == "bert_base":
        vocabulary = 30522 if width >= 768 else 100
        config = transformers.BertConfig(
            **same, vocab_size=vocabulary, max_position_embeddings=1024, attn_implementation="sdpa"
        )
        theirs = transformers.BertModel(config, add_pooling_layer=False)
    else:
        config = transformers.DebertaV2Config(
            **same,
            vocab_size=128100 if width >= 768 else 100,
            max_position_embeddings=512,
            type_vocab_size=0,
            relative_attention=True,
            max_relative_positions=-1,
            position_buckets=256,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
        )
        theirs = transformers.DebertaV2Model(config)
    theirs = theirs.to(device, dtype).eval()
    return theirs, warpform.models.from_transformers(theirs).eval()


@contextmanager
def on_varlen_attn() -> Iterator[None]:
    """The padding-free model on torch alone: its varlen_attn, LayerNorm and GELU in place of warpform's ops."""
    from torch.nn.attention.varlen import varlen_attn

    ops = warpform.ops
    kept = ops.varlen_attention, ops.add_bias_residual_layer_norm, ops.bias_gelu
    ops.varlen_attention, ops.add_bias_residual_layer_norm, ops.bias_gelu = (
        varlen_attn,
        encoder.eager_norm,
        encoder.eager_gelu,
    )
    try:
        yield
    finally:
        ops.varlen_attention, ops.add_bias_residual_layer_norm, ops.bias_gelu = kept


class ModelCase(Case):
    """A padded batch in, the last hidden state of the padded batch out, for every provider.

    A training step is forward, a loss over the real tokens, and the gradient of every parameter; no optimizer, and no
    dropout, so that all compute the same.
    """

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.training = spec.direction == "training step"
        self.theirs, self.ours = models(spec.kernel, self.device, session.dtype, spec.layers, spec.width)
        for model in (self.theirs, self.ours):
            model.train(self.training)
        batch, seqlen, tokens = len(spec.lengths), spec.seqlen, sum(spec.lengths)
        lengths = torch.tensor(spec.lengths, device=self.device)
        self.mask = (torch.arange(seqlen, device=self.device) < lengths[:, None]).long()
        vocabulary = self.theirs.config.vocab_size
        # Drawn on the host, as a failed capture can leave the GPU's generator unusable.
        self.ids = torch.randint(1, vocabulary, (batch, seqlen)).to(self.device) * self.mask
        # A gradient for every real token, none for padding.
        target = torch.randn(batch, seqlen, spec.width).to(self.device, session.dtype)
        self.target = target * self.mask.unsqueeze(-1)
        # Real tokens only: 12 h^2 a token and layer for the products, two more for attention.
        products = 24 * tokens * spec.width**2
        attention = 4 * sum(s * s for s in spec.lengths) * spec.width
        if spec.kernel == "deberta_v3_base":
            # Keys and queries of relative positions, as many as the batch meets, and a product of each with the tokens.
            rows = min(2 * self.theirs.config.position_buckets, 2 * max(spec.lengths) - 1)
            products += 2 * 2 * rows * spec.width**2
            attention += 4 * sum(s * min(s, rows) for s in spec.lengths) * spec.width
        self.flops = (3 if self.training else 1) * spec.layers * (products + attention)
        # Every weight once (a training step: twice, and its gradient), ids and mask in, hidden states out.
        weights = 12 * spec.layers * spec.width**2 * session.dtype.itemsize
        hidden = batch * seqlen * spec.width * session.dtype.itemsize
        self.bytes = (3 if self.training else 1) * weights + hidden + 2 * self.ids.nbytes

    def call(
        self, model: Callable[..., Any], module: nn.Module, *, capacity: int | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """One step: the hidden state; or the loss and the gradients of two parameters that all providers share."""

        def forward() -> Tensor:
            if capacity is None:
                return model(self.ids, attention_mask=self.mask).last_hidden_state
            packing = warpform.Packing.from_mask(self.mask, capacity=capacity)
            return packing.unpack(model(packing.pack(self.ids), packing=packing).last_hidden_state)

        def infer() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (forward(),)

        parameters = list(module.parameters())
        shared = (
            self.theirs.embeddings.word_embeddings.weight,
            self.theirs.encoder.layer[0].intermediate.dense.weight,
        )
        places = [next(i for i, p in enumerate(parameters) if p is one) for one in shared]

        def step() -> tuple[Tensor, ...]:
            # Products in the model's dtype, summed in float32 at the least.
            loss = (forward() * self.target).sum(dtype=torch.float32)
            gradients = torch.autograd.grad(loss, parameters)
            return (*(gradients[i] for i in places),)

        return step if self.training else infer

    def graphed(self, call: Callable[[], tuple[Tensor, ...]]) -> list[Callable[[], Any]]:
        """The call captured once; a replay serves any batch of these sizes, for inputs are copied to fixed places."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
            # A call that waits for the device cannot be captured; better to learn it before the capture than in it.
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return output

        return [replay]

    def compile(self, model: nn.Module) -> Callable[..., Any]:
        if self.device == "cpu" and not self.session.everything:
            raise Missing("left out on a CPU, where compiling twelve layers takes minutes (--everything)")
        self.session.allow_compile()
        return harness.compiled(model)

    @property
    def capacity(self) -> int:
        """Rows of a captured graph: as a server would have them in buckets, a multiple of 256."""
        return -(-sum(self.spec.lengths) // 256) * 256

    def with_warpform(self) -> list[Callable[[], Any]]:
        return [self.call(self.ours, self.ours)]

    def with_warpform_compiled(self) -> list[Callable[[], Any]]:
        return [self.call(self.compile(self.ours), self.ours)]

    def with_warpform_graphs(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return self.graphed(self.call(self.ours, self.ours, capacity=self.capacity))

    def with_transformers(self) -> list[Callable[[], Any]]:
        return [self.call(self.theirs, self.theirs)]

    def with_transformers_compiled(self) -> list[Callable[[], Any]]:
        return [self.call(self.compile(self.theirs), self.theirs)]

    def with_transformers_graphs(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return self.graphed(self.call(self.theirs, self.theirs))

    def varlen(self, call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        def on_torch() -> tuple[Tensor, ...]:
            with on_varlen_attn():
                return call()

        return on_torch

    def with_torch_varlen(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return [self.varlen(self.call(self.ours, self.ours))]

    def with_torch_varlen_compiled(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        # A module of its own, on the same parameters, so that what is compiled for one is never used for the other.
        twin = _twin(self.ours).train(self.training)
        return [self.varlen(self.call(self.compile(twin), self.ours))]

    def with_torch_varlen_graphs(self) -> list[Callable[[], Any]]:
        self.session.need_gpu()
        return self.graphed(self.varlen(self.call(self.ours, self.ours, capacity=self.capacity)))

    @functools.cached_property
    def truth(self) -> tuple[tuple[Tensor, ...], float]:
        """transformers in float32, and the relative error that transformers itself has in the dtype that is timed."""
        same = self.call(self.theirs, self.theirs)()
        if self.session.dtype == torch.float32:
            return tuple(self.real(t) for t in same), 0.0
        kept = self.theirs, self.target
        self.theirs, self.target = copy.deepcopy(self.theirs).float(), self.target.float()
        try:
            exact = tuple(self.real(t) for t in self.call(self.theirs, self.theirs)())
        finally:
            self.theirs, self.target = kept
        errors = [harness.relative_error(self.real(a), b) for a, b in zip(same, exact, strict=True)]
        return exact, max(errors)

    def real(self, t: Tensor) -> Tensor:
        """Hidden states of real tokens; gradients as they are. Of padding transformers computes something."""
        return t if self.training else t[self.mask.bool()]

    def check(self, provider: str, output: Any) -> None:
        """At most twice the error that transformers has in the same dtype, plus 100 float32 eps for twelve layers."""
        exact, eager = self.truth
        allowed = 2 * eager + 100 * torch.finfo(torch.float32).eps
        for i, (actual, wanted) in enumerate(zip(output, exact, strict=True)):
            error = harness.relative_error(self.real(actual), wanted)
            assert error <= allowed, f"output {i}: relative error {error:.2e}, allowed {allowed:.2e}"


@functools.cache
def _twin(model: nn.Module) -> nn.Module:
    """Another module on the same parameters, the same one in each call."""
    memo = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def test_models(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
