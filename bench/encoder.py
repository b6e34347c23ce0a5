"""The encoder's ops against eager and compiled torch, and BERT-base end to end against what people run today."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import Case, Missing, Session
from torch import Tensor, nn

import warpform
from helpers import oracle
from helpers.compare import assert_close

OP_PROVIDERS = ("warpform", "torch_eager", "torch_compiled")
MODEL_PROVIDERS = (
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
DIFFERENTIABLE = ("pack", "unpack", "add_bias_residual_layer_norm", "bias_gelu")

# The table of sizes. "ops": (sequences, longest, hidden, intermediate); "forward", "training": (sequences, longest);
# "layers", "hidden": of the model. Lengths are uniform on [0.2 S, S], as ByteTransformer's (average 0.6 S).
_ALL = tuple((batch, seqlen) for batch in (1, 2, 4, 8, 16) for seqlen in (64, 128, 256, 512, 1024))
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"ops": (3, 8, 32, 64), "forward": ((2, 8),), "training": ((2, 8),), "layers": 2, "hidden": 64},
    "cpu": {
        "ops": (8, 256, 768, 3072),
        "forward": ((1, 128), (8, 128), (8, 256)),
        "training": ((4, 128),),
        "layers": 12,
        "hidden": 768,
    },
    "cuda": {
        "ops": (16, 1024, 768, 3072),
        "forward": ((1, 64), (1, 512), (16, 64), (16, 256), (16, 1024)),
        "training": ((16, 256), (16, 1024)),
        "layers": 12,
        "hidden": 768,
    },
    "cuda everything": {
        "ops": (16, 1024, 768, 3072),
        "forward": _ALL,
        "training": _ALL,
        "layers": 12,
        "hidden": 768,
    },
}


@dataclass(frozen=True)
class OpSpec(harness.Spec):
    lengths: tuple[int, ...] = ()
    seqlen: int = 1

    family = "encoder"

    def build(self, session: Session) -> OpCase:
        return OpCase(self, session)


@dataclass(frozen=True)
class ModelSpec(harness.Spec):
    lengths: tuple[int, ...] = ()
    seqlen: int = 1
    layers: int = 12
    width: int = 768

    family = "encoder"

    def build(self, session: Session) -> ModelCase:
        return ModelCase(self, session)


def draw_lengths(batch: int, seqlen: int) -> tuple[int, ...]:
    """Uniform on [0.2 S, S], the same in every run."""
    draw = random.Random(batch * 10_000 + seqlen)
    return tuple(draw.randint(max(1, round(0.2 * seqlen)), seqlen) for _ in range(batch))


def specs(session: Session) -> list[harness.Spec]:
    everything = session.everything and session.device == "cuda"
    sizes = SIZES["tiny" if session.tiny else "cuda everything" if everything else session.device]
    batch, seqlen, hidden, intermediate = sizes["ops"]
    lengths = draw_lengths(batch, seqlen)
    found: list[harness.Spec] = []
    for op in ("packing_plan", *DIFFERENTIABLE):
        width = intermediate if op == "bias_gelu" else hidden
        columns = {"batch": batch, "seqlen": seqlen, "tokens": sum(lengths), "hidden": width}
        for direction in ("forward", "backward") if op in DIFFERENTIABLE else ("forward",):
            found.append(OpSpec(op, direction, tuple(columns.items()), OP_PROVIDERS, lengths, seqlen))
    layers, width = sizes["layers"], sizes["hidden"]
    for direction, shapes in (("forward", sizes["forward"]), ("training step", sizes["training"])):
        for batch, seqlen in shapes:
            lengths = draw_lengths(batch, seqlen)
            heads = max(1, width // 64)
            columns = {
                "batch": batch, "seqlen": seqlen, "tokens": sum(lengths), "heads": heads, "head_dim": width // heads,
                "hidden": width,
            }  # fmt: skip
            model = (MODEL_PROVIDERS, lengths, seqlen, layers, width)
            found.append(ModelSpec("bert_base", direction, tuple(columns.items()), *model))
    return found


# ---- the ops ----


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def eager_plan(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    """What padding-free codes in transformers compute from a mask, and read: offsets, indices, the longest."""
    lengths = mask.sum(1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), indices, int(lengths.max())


def eager_pack(x: Tensor, indices: Tensor) -> Tensor:
    return x.flatten(0, 1)[indices]


def eager_unpack(t: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    return t.new_zeros(batch * seqlen, t.size(1)).index_put((indices,), t).view(batch, seqlen, -1)


def eager_norm(x: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, ln_bias: Tensor, eps: float) -> Tensor:
    total = x + residual if bias is None else x + bias + residual
    return F.layer_norm(total, (x.size(-1),), weight, ln_bias, eps)


def eager_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


class OpCase(Case):
    """One op on packed or padded rows. Backward is timed alone, over a forward that was done before."""

    EPS = 1e-12

    def __init__(self, spec: OpSpec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.backward = spec.direction == "backward"
        batch, seqlen, width = len(spec.lengths), spec.seqlen, dict(spec.sizes)["hidden"]
        self.batch, self.tokens = batch, sum(spec.lengths)
        self.packing = warpform.Packing.from_lengths(spec.lengths, seqlen, device=self.device)
        row = width * session.dtype.itemsize
        packed, padded, op = self.tokens * row, batch * seqlen * row, spec.kernel
        # Elementwise work is a handful of operations a value; these workloads are bound by bytes.
        self.bytes = {
            "packing_plan": batch * seqlen * 5 + self.tokens * 16,
            "pack": (packed + padded if self.backward else 2 * packed) + self.tokens * 8,
            "unpack": (2 * packed if self.backward else packed + padded) + self.tokens * 8,
            "add_bias_residual_layer_norm": 3 * packed,
            "bias_gelu": 3 * packed if self.backward else 2 * packed,
        }[op]
        rows, grid, line = (self.tokens, width), (batch, seqlen, width), (width,)
        shapes = {
            "packing_plan": (),
            "pack": (grid,),
            "unpack": (rows,),
            "add_bias_residual_layer_norm": (rows, line, rows, line, line),
            "bias_gelu": (rows, line),
        }[op]
        out = {"pack": rows, "unpack": grid}.get(op, rows)
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        mask = self.packing.ranks >= 0
        count = harness.copies(self.device, self.bytes)
        if op == "packing_plan":
            self.inputs = [[mask.clone()] for _ in range(count)]
        else:
            self.inputs = [[make(shape) for shape in shapes] for _ in range(count)]
        self.douts = [make(out) for _ in range(count)] if self.backward else []

    def calls(self, op: Callable[..., Any]) -> list[Callable[[], Any]]:
        found: list[Callable[[], Any]] = []
        for i, inputs in enumerate(self.inputs):
            if not self.backward:
                found.append(functools.partial(_infer, op, inputs))
                continue
            leaves = [t.detach().requires_grad_() for t in inputs]
            found.append(functools.partial(torch.autograd.grad, op(*leaves), leaves, self.douts[i], retain_graph=True))
        return found

    def eager(self, wrap: Callable[..., Any] = _same) -> Callable[..., Any]:
        """torch's composition; with `wrap`, what that makes of it (torch.compile)."""
        indices, batch, seqlen = self.packing.indices, self.batch, self.spec.seqlen
        table: dict[str, Callable[..., Any]] = {"packing_plan": wrap(eager_plan), "bias_gelu": wrap(eager_gelu)}
        pack, unpack, layer_norm = wrap(eager_pack), wrap(eager_unpack), wrap(eager_norm)
        table["pack"] = lambda x: pack(x, indices)
        table["unpack"] = lambda t: unpack(t, indices, batch, seqlen)
        table["add_bias_residual_layer_norm"] = lambda *tensors: layer_norm(*tensors, self.EPS)
        return table[self.spec.kernel]

    def with_warpform(self) -> list[Callable[[], Any]]:
        ops, packing = warpform.ops, self.packing
        table: dict[str, Callable[..., Any]] = {
            "packing_plan": warpform.Packing.from_mask,
            "pack": packing.pack,
            "unpack": packing.unpack,
            "add_bias_residual_layer_norm": lambda *tensors: ops.add_bias_residual_layer_norm(*tensors, self.EPS),
            "bias_gelu": lambda x, bias: ops.bias_gelu(x, bias),
        }
        return self.calls(table[self.spec.kernel])

    def with_torch_eager(self) -> list[Callable[[], Any]]:
        return self.calls(self.eager())

    def with_torch_compiled(self) -> list[Callable[[], Any]]:
        self.session.allow_compile()
        return self.calls(self.eager(harness.compiled))

    def check(self, provider: str, output: Any) -> None:
        inputs = self.inputs[0]
        if self.spec.kernel == "packing_plan":
            offsets, indices, longest = eager_plan(*inputs)
            if isinstance(output, warpform.Packing):
                output = (output.cu_seqlens, output.indices, output.max_seqlen)
            assert torch.equal(output[0], offsets) and torch.equal(output[1], indices) and output[2] == longest
            return
        names = [f"gradient {i}" for i in range(len(inputs))] if self.backward else ["out"]
        outputs = output if self.backward else [output]
        eager = self.run(self.eager(), inputs)
        if self.spec.kernel in ("pack", "unpack"):
            for name, actual, wanted in zip(names, outputs, eager, strict=True):
                assert torch.equal(actual, wanted), f"{name}: values were moved to other places, or changed"
            return
        if self.spec.kernel == "bias_gelu":
            truth = self.run(lambda x, b: oracle.bias_gelu(x, b, "none"), [t.double() for t in inputs])
        else:
            doubles = [t.double() for t in inputs]
            truth = self.run(lambda *t: oracle.add_bias_residual_layer_norm(*t, self.EPS)[0], doubles)
        for name, actual, wanted, plain in zip(names, outputs, truth, eager, strict=True):
            if provider == "warpform":
                assert_close(name, actual, wanted, plain, gradient=self.backward)
            else:
                harness.assert_near(name, actual, wanted, plain)

    def run(self, op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The output, or the gradients, of `op` in the dtype of the inputs."""
        if not self.backward:
            return [_infer(op, inputs)]
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(op(*leaves), leaves, self.douts[0].to(leaves[0].dtype)))


def _infer(function: Callable[..., Any], inputs: list[Tensor]) -> Any:
    with torch.inference_mode():
        return function(*inputs)


# ---- BERT end to end ----


@functools.cache
def models(device: str, dtype: torch.dtype, layers: int, width: int) -> tuple[nn.Module, nn.Module]:
    """The transformers model and the padding-free one on the same parameters, made once a run."""
    try:
        import transformers
    except ImportError:
        raise Missing("transformers is not installed, and the weights come from its model") from None
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        max_position_embeddings=1024,
        vocab_size=30522 if width >= 768 else 100,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    theirs = transformers.BertModel(config, add_pooling_layer=False).to(device, dtype).eval()
    return theirs, warpform.models.from_transformers(theirs).eval()


@contextmanager
def on_varlen_attn() -> Iterator[None]:
    """The padding-free model on torch alone: its varlen_attn, LayerNorm and GELU in place of warpform's ops."""
    from torch.nn.attention.varlen import varlen_attn

    ops = warpform.ops
    kept = ops.varlen_attention, ops.add_bias_residual_layer_norm, ops.bias_gelu
    ops.varlen_attention, ops.add_bias_residual_layer_norm, ops.bias_gelu = varlen_attn, eager_norm, eager_gelu
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

    def __init__(self, spec: ModelSpec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.training = spec.direction == "training step"
        self.theirs, self.ours = models(self.device, session.dtype, spec.layers, spec.width)
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


def test_encoder(spec: harness.Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
