"""Decoders end to end: LLaMA against transformers, and the systems on the same stack against dense at equal width.

A forward and a training step take a padded batch with the logits, or the loss and gradients, of its real tokens. A
step of decoding adds one token to each of B sequences whose keys and values are in caches.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Missing, Session
from torch import Tensor, nn

from warpform import models
from warpform.models import DecoderForCausalLM

LLAMA_PROVIDERS = ("warpform", "transformers", "transformers_compiled")
SYSTEM_PROVIDERS = ("warpform", "dense", "transformers")


@dataclass(frozen=True)
class System:
    """A system at the width of the dense decoder.

    Attributes:
        build: makes it from the fields of the config.
        options: what its forward is called with, from the ids of a batch.
        dense: makes the dense decoder that computes the same, where there is one; else the system in float64 is what
            its results are judged by.
        decodes: whether decoding is measured too.
    """

    build: Callable[[dict[str, Any]], nn.Module]
    options: Callable[[Tensor], dict[str, Any]] = lambda ids: {}
    dense: Callable[[Any], DecoderForCausalLM] | None = None
    decodes: bool = False


def _chains(count: int, shared: bool) -> Callable[[dict[str, Any]], nn.Module]:
    def build(fields: dict[str, Any]) -> nn.Module:
        each = fields["num_attention_heads"] // count
        # With shared keys there are as many of them as heads in a chain.
        keys = each if shared else None
        config = models.CoLMConfig(**fields, num_key_value_heads=keys, chains=(each,) * count, share_kv=shared)
        return models.CoLMForCausalLM(config)

    return build


def _halves(ids: Tensor) -> dict[str, Any]:
    """The first half of each text is of one class, the rest of another, as text before an image is."""
    return {"classes": (torch.arange(ids.shape[1], device=ids.device) * 2 // ids.shape[1]).expand(ids.shape)}


SYSTEMS = {
    "matformer_eighth": System(
        lambda fields: models.MatFormerForCausalLM(models.MatFormerConfig(**fields)),
        lambda ids: {"granularity": 0},
        lambda model: model.extract(0),
        decodes=True,
    ),
    "matformer_half": System(
        lambda fields: models.MatFormerForCausalLM(models.MatFormerConfig(**fields)),
        lambda ids: {"granularity": 2},
        lambda model: model.extract(2),
    ),
    "matformer_mixed": System(
        lambda fields: models.MatFormerForCausalLM(models.MatFormerConfig(**fields)),
        lambda ids: {"granularity": torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) % 4},
    ),
    "colm_4": System(_chains(4, False), decodes=True),
    "colm_4_first_of": System(_chains(4, False), lambda ids: {"chains": 1}, lambda model: model.submodel(1)),
    "colm_air_2": System(_chains(2, True), decodes=True),
    "mot_2": System(lambda fields: models.MoTForCausalLM(models.MoTConfig(**fields, num_classes=2)), _halves),
    "ladder": System(lambda fields: models.LadderForCausalLM(models.LadderConfig(**fields)), decodes=True),
}

# Of the LLaMA "forward" and "training": (sequences, longest); "decode": (sequences, tokens before). "system": those of
# the systems. "layers", "hidden", "vocabulary": of both.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "forward": ((2, 8),), "training": ((2, 8),), "decode": ((2, 8),), "layers": 1, "hidden": 64, "vocabulary": 50,
        "system": {"batch": (2, 8), "decode": (2, 8), "layers": 1, "hidden": 64},
    },
    "cpu": {
        "forward": ((1, 512), (4, 256)), "training": ((2, 128),), "decode": ((1, 256), (4, 256)),
        "layers": 8, "hidden": 1024, "vocabulary": 32_000,
        "system": {"batch": (4, 256), "decode": (1, 256), "layers": 4, "hidden": 512},
    },
    "cuda": {
        "forward": ((1, 512), (8, 1024)), "training": ((8, 1024),), "decode": ((1, 1024), (16, 1024)),
        "layers": 8, "hidden": 1024, "vocabulary": 32_000,
        "system": {"batch": (8, 1024), "decode": (16, 1024), "layers": 8, "hidden": 1024},
    },
}  # fmt: skip


@dataclass(frozen=True)
class Spec(harness.Spec):
    lengths: tuple[int, ...] = ()
    seqlen: int = 1
    layers: int = 8
    width: int = 1024
    vocabulary: int = 32_000

    family = "decoders"

    def build(self, session: Session) -> DecoderCase:
        return DecoderCase(self, session)


def specs(session: Session) -> list[Spec]:
    sizes = SIZES["tiny" if session.tiny else session.device]
    found = []

    def add(kernel: str, direction: str, shape: tuple[int, int], like: dict[str, Any], main: bool) -> None:
        batch, seqlen = shape
        lengths = (seqlen,) * batch if direction == "decode" or batch == 1 else harness.draw_lengths(batch, seqlen)
        width = like["hidden"]
        columns = {
            "batch": batch, "seqlen": seqlen, "tokens": batch if direction == "decode" else sum(lengths),
            "heads": _heads(width), "head_dim": width // _heads(width), "hidden": width, "causal": True,
        }  # fmt: skip
        providers = LLAMA_PROVIDERS if kernel == "llama" else SYSTEM_PROVIDERS
        rest = (lengths, seqlen, like["layers"], width, sizes["vocabulary"])
        main = harness.is_main(session, main)
        found.append(Spec(kernel, direction, tuple(columns.items()), providers, *rest, main=main))

    for direction, key in (("forward", "forward"), ("training step", "training"), ("decode", "decode")):
        for shape in sizes[key]:
            add("llama", direction, shape, sizes, shape == sizes[key][-1])
    like = sizes["system"]
    for name, system in SYSTEMS.items():
        add(name, "forward", like["batch"], like, False)
        add(name, "training step", like["batch"], like, False)
        if system.decodes:
            add(name, "decode", like["decode"], like, False)
    return found


@functools.cache
def dense_pair(
    device: str, dtype: torch.dtype, layers: int, width: int, vocabulary: int, seqlen: int
) -> tuple[nn.Module, DecoderForCausalLM]:
    """transformers' LLaMA and the decoder on the same parameters."""
    try:
        import transformers
    except ImportError:
        raise Missing("transformers is not installed, and the weights come from its model") from None
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **_fields(layers, width, vocabulary, seqlen), attn_implementation="sdpa", pad_token_id=None
    )
    theirs = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    return theirs, models.from_transformers(theirs).eval()


def _heads(width: int) -> int:
    """Heads of 64, or four where the width has fewer, as chains need them."""
    return max(width // 64, 4)


def _fields(layers: int, width: int, vocabulary: int, seqlen: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": _heads(width),
        "max_position_embeddings": max(2048, 2 * seqlen),
    }


@functools.cache
def system_of(name: str, device: str, dtype: torch.dtype, *sizes: int) -> nn.Module:
    torch.manual_seed(0)
    return SYSTEMS[name].build(_fields(*sizes)).to(device, dtype).eval()


class DecoderCase(Case):
    """The same batch for every provider; each is compared with what it should compute itself."""

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.training, self.decoding = spec.direction == "training step", spec.direction == "decode"
        sizes = (spec.layers, spec.width, spec.vocabulary, spec.seqlen)
        self.theirs, self.dense = dense_pair(self.device, session.dtype, *sizes)
        self.system = None if spec.kernel == "llama" else SYSTEMS[spec.kernel]
        self.ours: Any = self.dense
        if self.system is not None:
            self.ours = system_of(spec.kernel, self.device, session.dtype, *sizes)
        batch, seqlen = len(spec.lengths), spec.seqlen
        lengths = torch.tensor(spec.lengths, device=self.device)
        self.mask = (torch.arange(seqlen, device=self.device) < lengths[:, None]).long()
        # Drawn on the host, as a failed capture can leave the GPU's generator unusable.
        self.ids = torch.randint(1, spec.vocabulary, (batch, seqlen)).to(self.device) * self.mask
        self.new = torch.randint(1, spec.vocabulary, (batch, 1)).to(self.device)
        self.labels = self.ids.masked_fill(self.mask == 0, -100)
        self.padded = spec.lengths != (seqlen,) * batch
        for model in (self.theirs, self.dense, self.ours):
            model.train(self.training)
        # Of the dense decoder: the products of layers and head, two more for the pairs that causal attention sees.
        width, wide = spec.width, spec.width * 11 // 4
        weights = spec.layers * (4 * width**2 + 3 * width * wide) + width * spec.vocabulary
        tokens = batch if self.decoding else sum(spec.lengths)
        pairs = batch * (seqlen + 1) if self.decoding else sum(n * (n + 1) // 2 for n in spec.lengths)
        self.flops = (3 if self.training else 1) * (2 * weights * tokens + 4 * spec.layers * width * pairs)
        itemsize = session.dtype.itemsize
        kept = 2 * spec.layers * width * batch * seqlen * itemsize if self.decoding else 0
        logits = tokens * spec.vocabulary * itemsize
        self.bytes = (3 if self.training else 1) * weights * itemsize + kept + logits

    def options(self, role: str) -> dict[str, Any]:
        """What a system is called with; nothing in another role."""
        return {} if self.system is None or role != "ours" else self.system.options(self.ids)

    def call(self, role: str, model: Any = None) -> Callable[[], tuple[Tensor, ...]]:
        """One step: logits; or the loss and the gradient of the embeddings, which all have.

        Args:
            role: "ours", "dense" or "theirs".
            model: called in that role; None: the one of that name.
        """
        model = getattr(self, role) if model is None else model
        if self.decoding:
            return self.decode_theirs(model) if role == "theirs" else self.decode(model, role)
        options = self.options(role)
        options |= {"attention_mask": self.mask} if self.padded else {}
        options |= {"use_cache": False} if role == "theirs" else {}
        parameters = list(model.parameters())

        def infer() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(self.ids, **options).logits,)

        def step() -> tuple[Tensor, ...]:
            loss = model(self.ids, labels=self.labels, **options).loss
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return loss[None], gradients[0]

        return step if self.training else infer

    def decode(self, model: Any, role: str) -> Callable[[], tuple[Tensor, ...]]:
        """One more token for each sequence, which is then forgotten, so that each call has the same work."""
        batch, seqlen = self.ids.shape
        given = self.options(role)
        options = {"width": model.layer_widths(given["granularity"])} if "granularity" in given else {}
        with torch.inference_mode():
            caches = model.caches(batch, seqlen + 1)
            model.decode(list(self.ids), caches, **options)

        def step() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                logits = model.decode(list(self.new), caches, **options)
            for row in range(batch):
                caches.rewind(row, seqlen)
            return (logits,)

        return step

    def decode_theirs(self, model: Any) -> Callable[[], tuple[Tensor, ...]]:
        from transformers import DynamicCache

        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(self.ids, past_key_values=cache)

        def step() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                logits = model(self.new, past_key_values=cache).logits[:, -1]
            cache.crop(-1)
            return (logits,)

        return step

    def with_warpform(self) -> list[Callable[[], Any]]:
        return [self.call("ours")]

    def with_dense(self) -> list[Callable[[], Any]]:
        return [self.call("dense")]

    def with_transformers(self) -> list[Callable[[], Any]]:
        return [self.call("theirs")]

    def with_transformers_compiled(self) -> list[Callable[[], Any]]:
        if self.device == "cpu" and not self.session.everything:
            raise Missing("left out on a CPU, where compiling eight layers takes minutes (--everything)")
        if self.decoding:
            raise Missing("its cache grows by a new tensor in every step")
        self.session.allow_compile()
        return [self.call("theirs", harness.compiled(self.theirs))]

    def exact(self, role: str) -> tuple[Tensor, ...]:
        """What a model computes in float64."""
        double = copy.deepcopy(getattr(self, role)).double()
        return tuple(self.real(t) for t in self.call(role, double)())

    @functools.cached_property
    def dense_truth(self) -> tuple[tuple[Tensor, ...], float]:
        """transformers in float64, and the relative error that it has itself in the dtype that is timed."""
        exact, same = self.exact("theirs"), self.call("theirs")()
        return exact, max(harness.relative_error(self.real(a), b) for a, b in zip(same, exact, strict=True))

    @functools.cached_property
    def system_truth(self) -> tuple[Tensor, ...]:
        """What the system should compute: the dense decoder that it is, by transformers; else itself in float64."""
        if self.system is None or self.system.dense is None or self.training or self.decoding:
            return self.exact("ours")
        dense: Any = self.system.dense(self.ours)
        options = {"attention_mask": self.mask} if self.padded else {}
        with torch.inference_mode():
            logits = dense.to_transformers().double().eval()(self.ids, **options, use_cache=False).logits
        return (self.real(logits),)

    def real(self, t: Tensor) -> Tensor:
        """Logits of real tokens; gradients as they are. Of padding transformers computes something."""
        return t[self.mask.bool()] if t.shape[:2] == self.mask.shape else t

    def check(self, provider: str, output: Any) -> None:
        """At most four times the error that transformers has in the same dtype, plus 100 eps of float32 for layers."""
        exact, error_of_theirs = self.dense_truth
        if provider == "warpform" and self.system is not None:
            exact = self.system_truth
        allowed = 4 * error_of_theirs + 100 * torch.finfo(torch.float32).eps
        for i, (actual, wanted) in enumerate(zip(output, exact, strict=True)):
            error = harness.relative_error(self.real(actual), wanted)
            assert error <= allowed, f"output {i}: relative error {error:.2e}, allowed {allowed:.2e}"


def test_decoders(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
