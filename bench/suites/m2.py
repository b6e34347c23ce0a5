"""M2-BERT-80M at lengths from 128 on, beside BERT-base: hidden states of sequences without padding.

The two have nothing in common but their sizes, so each is checked against its own kind: M2-BERT against the same model
on torch's products and FFTs, BERT against transformers on fused attention.
"""

from __future__ import annotations

import copy
import functools
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
from suites import fft_conv, monarch

PROVIDERS = ("warpform", "padding_free_bert", "transformers_sdpa", "transformers_eager", "torch_m2")

# The table of sizes: (sequences, their length); layers and width.
SIZES: dict[str, tuple[tuple[tuple[int, int], ...], int, int]] = {
    "tiny": (((2, 8),), 2, 64),
    "cpu": (((8, 128), (2, 512), (1, 2048), (1, 4096)), 12, 768),
    "cuda": (tuple((32768 // seqlen, seqlen) for seqlen in (128, 256, 512, 1024, 2048, 4096, 8192)), 12, 768),
}
MAIN = (512, 4096)  # lengths
# Past this length, on a CPU, attention that keeps all scores takes minutes.
LONGEST_EAGER_ON_CPU = 2048


@dataclass(frozen=True)
class Spec(harness.Spec):
    batch: int = 1
    seqlen: int = 128
    layers: int = 12
    width: int = 768

    family = "m2"

    def build(self, session: Session) -> M2Case:
        return M2Case(self, session)


def specs(session: Session) -> list[Spec]:
    shapes, layers, width = SIZES["tiny" if session.tiny else session.device]
    found = []
    for batch, seqlen in shapes:
        columns = {"batch": batch, "seqlen": seqlen, "tokens": batch * seqlen, "hidden": width}
        main = harness.is_main(session, seqlen in MAIN)
        shape = (batch, seqlen, layers, width)
        found.append(Spec("m2_bert_80m", "forward", tuple(columns.items()), PROVIDERS, *shape, main=main))
    return found


@contextmanager
def on_torch() -> Iterator[None]:
    """warpform's model on torch alone: its products, FFTs and LayerNorm in place of warpform's ops."""
    ops = warpform.ops

    def conv(u: Tensor, k: None, skip: Tensor, *gates: Tensor | None, spectrum: Tensor, **how: Any) -> Tensor:
        return fft_conv.eager_spectral_conv(u, spectrum, skip, *gates, **how)

    def short(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        c = torch.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.size(1) - 1, groups=x.size(2))
        first, gate, value = c[..., : x.size(1)].chunk(3, 1)
        return value * first, gate

    def glu(x: Tensor, w_up: Tensor, w_down: Tensor, bias: Tensor | None = None) -> Tensor:
        out = monarch.two_bmm_glu(x.flatten(0, -2), w_up, w_down).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias

    def norm(
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        ln_bias: Tensor,
        eps: float,
        *,
        return_sum: bool,
    ) -> Tensor:
        assert not return_sum
        for term in (bias, residual):
            x = x if term is None else x + term
        return F.layer_norm(x, weight.shape, weight, ln_bias, eps)

    own = {
        "fft_conv": conv, "short_conv_gate": short, "blockdiag_glu": glu,
        "add_bias_residual_layer_norm": norm,
    }  # fmt: skip
    kept = {name: getattr(ops, name) for name in own}
    for name, function in own.items():
        setattr(ops, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(ops, name, function)


class M2Case(Case):
    """Ids [batch, seqlen] in, the last hidden state out, at inference, filters transformed beforehand."""

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        width, tokens = spec.width, spec.batch * spec.seqlen
        self.vocabulary = 30528 if width >= 768 else 100
        options = {
            "hidden_size": width, "num_hidden_layers": spec.layers, "vocab_size": self.vocabulary,
            "max_position_embeddings": spec.seqlen,
        }  # fmt: skip
        torch.manual_seed(0)
        self.model = warpform.models.M2BertModel(warpform.models.M2BertConfig(**options), add_pooling_layer=False)
        self.model = self.model.to(self.device, session.dtype).eval()
        self.ids = torch.randint(1, self.vocabulary, (spec.batch, spec.seqlen)).to(self.device)
        # A layer takes 4 d^2 a token in and out, 3 d^2 in the MLP's blocks, and two convolutions of two transforms.
        transforms = 2 * 2 * 2.5 * 2 * max(1, (2 * spec.seqlen).bit_length() - 1)
        self.flops = tokens * spec.layers * (2 * 7 * width**2 + transforms * width)
        weights = sum(p.numel() for p in self.model.encoder.parameters())
        self.bytes = weights * session.dtype.itemsize + tokens * width * session.dtype.itemsize

    @functools.cached_property
    def berts(self) -> dict[str, nn.Module]:
        """BERT-base on eager attention, on fused attention, and padding-free, on the same parameters."""
        try:
            import transformers
        except ImportError:
            raise Missing("transformers is not installed") from None
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=self.spec.width,
            num_hidden_layers=self.spec.layers,
            num_attention_heads=max(1, self.spec.width // 64),
            intermediate_size=4 * self.spec.width,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.spec.seqlen,
            attn_implementation="eager",
        )
        eager = transformers.BertModel(config, add_pooling_layer=False).to(self.device, self.session.dtype).eval()
        sdpa = copy.deepcopy(eager, {id(p): p for p in eager.parameters()})
        sdpa.set_attn_implementation("sdpa")
        free = warpform.models.from_transformers(eager).eval()
        return {"transformers_eager": eager, "transformers_sdpa": sdpa, "padding_free_bert": free}

    def call(self, model: nn.Module) -> list[Callable[[], Any]]:
        mask = torch.ones_like(self.ids)

        def infer() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(self.ids, attention_mask=mask).last_hidden_state,)

        return [infer]

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.call(self.model)

    def with_torch_m2(self) -> list[Callable[[], Any]]:
        (call,) = self.call(self.model)

        def infer() -> tuple[Tensor, ...]:
            with on_torch():
                return call()

        return [infer]

    def with_padding_free_bert(self) -> list[Callable[[], Any]]:
        return self.call(self.berts["padding_free_bert"])

    def with_transformers_sdpa(self) -> list[Callable[[], Any]]:
        return self.call(self.berts["transformers_sdpa"])

    def with_transformers_eager(self) -> list[Callable[[], Any]]:
        if self.device == "cpu" and self.spec.seqlen > LONGEST_EAGER_ON_CPU and not self.session.everything:
            raise Missing("left out on a CPU at this length (--everything)")
        return self.call(self.berts["transformers_eager"])

    @functools.cached_property
    def truth(self) -> tuple[Tensor, float]:
        """The same model on torch in float32, and the relative error of that in the dtype that is timed."""
        return self.exact(self.model, self.with_torch_m2)

    @functools.cached_property
    def bert_truth(self) -> tuple[Tensor, float]:
        """Fused attention: at these lengths eager attention would take most of the run."""
        return self.exact(self.berts["transformers_sdpa"], self.with_transformers_sdpa)

    def exact(self, model: nn.Module, prepare: Callable[[], list[Callable[[], Any]]]) -> tuple[Tensor, float]:
        (same,) = prepare()[0]()
        if self.session.dtype == torch.float32:
            return same, 0.0
        wide = copy.deepcopy(model).float()
        (call,) = self.call(wide)
        with on_torch() if model is self.model else torch.inference_mode():
            (found,) = call()
        return found, harness.relative_error(same, found)

    def check(self, provider: str, output: tuple[Tensor, ...]) -> None:
        """At most twice the error that torch's own has in the same dtype, plus 100 float32 eps for all the layers."""
        exact, eager = self.truth if provider in ("warpform", "torch_m2") else self.bert_truth
        error, allowed = harness.relative_error(output[0], exact), 2 * eager + 100 * torch.finfo(torch.float32).eps
        assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"


def test_m2(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
