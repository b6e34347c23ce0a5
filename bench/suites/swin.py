"""Swin end to end, forward and training step: images a second beside the transformers model."""

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
from suites.torch_windows import Sizes, Windows, flex_windows

PROVIDERS = (
    "warpform",
    "transformers_eager",
    "transformers_sdpa",
    "transformers_sdpa_compiled",
    "transformers_eager_compiled",
    "warpform_compiled",
    "flex_compiled",
)

# The table of sizes: (name, image, window, embedding, depths, heads, batch of a forward, batch of a training step).
SWIN_T = ("swin_t", 224, 7, 96, (2, 2, 6, 2), (3, 6, 12, 24))
SWIN_B = ("swin_b", 224, 7, 128, (2, 2, 18, 2), (4, 8, 16, 32))
SIZES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "tiny": (("swin_t", 32, 4, 16, (2, 2), (1, 2), 2, 2),),
    "cpu": ((*SWIN_T, 4, 2), (*SWIN_B, 2, 1)),
    "cuda": ((*SWIN_T, 128, 128), (*SWIN_B, 128, 64)),
}


@dataclass(frozen=True)
class Spec(harness.Spec):
    batch: int = 1
    image: int = 224
    window: int = 7
    width: int = 96
    depths: Sizes = ()
    heads: Sizes = ()

    family = "swin"

    def __str__(self) -> str:
        return f"{self.kernel}-{self.direction.replace(' ', '_')}-B{self.batch}-{self.image}x{self.image}"

    def build(self, session: Session) -> SwinCase:
        return SwinCase(self, session)

    @property
    def stages(self) -> list[tuple[int, int, int, int]]:
        """For each stage: tokens along an axis, width, side of a window, number of blocks."""
        side = self.image // 4
        found = []
        for i, depth in enumerate(self.depths):
            found.append((side, self.width << i, min(self.window, side), depth))
            side = -(-side // 2)
        return found


def specs(session: Session) -> list[Spec]:
    found = []
    for name, image, window, width, depths, heads, *batches in SIZES["tiny" if session.tiny else session.device]:
        for direction, batch in zip(("forward", "training step"), batches, strict=True):
            side = image // 4
            columns = {
                "batch": batch, "tokens": batch * side * side, "hidden": width, "grid": f"{side}x{side}",
                "window": f"{window}x{window}",
            }  # fmt: skip
            shape = (batch, image, window, width, depths, heads)
            main = harness.is_main(session, name == SWIN_T[0])
            found.append(Spec(name, direction, tuple(columns.items()), PROVIDERS, *shape, main=main))
    return found


@functools.cache
def models(
    device: str, dtype: torch.dtype, image: int, window: int, width: int, depths: Sizes, heads: Sizes
) -> dict[str, nn.Module]:
    """The transformers model on eager attention and on SDPA, and warpform's, all on the same parameters."""
    try:
        import transformers
    except ImportError:
        raise Missing("transformers is not installed, and the weights come from its model") from None
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=image,
        window_size=window,
        embed_dim=width,
        depths=list(depths),
        num_heads=list(heads),
        drop_path_rate=0.0,
        attn_implementation="eager",
    )
    theirs = transformers.SwinModel(config, add_pooling_layer=False)
    for name, parameter in theirs.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)  # 0 before training, which would hide mistakes
    theirs = theirs.to(device, dtype)
    sdpa = twin(theirs)
    sdpa.set_attn_implementation("sdpa")
    ours = warpform.models.from_transformers(theirs)
    return {"transformers_eager": theirs, "transformers_sdpa": sdpa, "warpform": ours, "flex": twin(ours)}


def twin(model: nn.Module) -> nn.Module:
    """Another module on the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@contextmanager
def on_flex(cut: dict[tuple[Sizes, Sizes, Sizes], Windows]) -> Iterator[None]:
    """warpform's model on FlexAttention in place of its op, with the windows in `cut`."""

    def window_attention(
        qkv: Tensor, table: Tensor, *, window_size: int | Sizes, shift_size: int | Sizes = 0, **how: Any
    ) -> Tensor:
        assert how.get("logit_scale") is None and how.get("scale") is None, "not the attention of Swin V1"
        window, shift = ((v, v) if isinstance(v, int) else tuple(v) for v in (window_size, shift_size))
        windows = cut[tuple(qkv.shape[1:3]), window, shift]
        return windows.join(flex_windows(windows.cut(qkv), table, windows))

    kept = warpform.ops.window_attention
    warpform.ops.window_attention = window_attention
    try:
        yield
    finally:
        warpform.ops.window_attention = kept


class SwinCase(Case):
    """Images [B, 3, S, S] in, the last hidden state [B, tokens, C] out, for every provider.

    A training step is forward, a loss over the last hidden state, and the gradient of every parameter; no optimizer.
    """

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.training = spec.direction == "training step"
        self.models = models(self.device, session.dtype, spec.image, spec.window, spec.width, spec.depths, spec.heads)
        for model in self.models.values():
            model.train(self.training)
        self.theirs = self.models["transformers_eager"]
        side, width, _, _ = spec.stages[-1]
        make = functools.partial(torch.randn, device=self.device, dtype=session.dtype)
        self.pixels = make(spec.batch, 3, spec.image, spec.image)
        self.target = make(spec.batch, side * side, width)
        self.images = spec.batch
        self.flops = (3 if self.training else 1) * self.count_flops()
        weights = sum(p.numel() for p in self.theirs.parameters()) * session.dtype.itemsize
        # Every weight once (a training step: twice, and its gradient), pixels in, hidden states out.
        self.bytes = (3 if self.training else 1) * weights + self.pixels.nbytes + self.target.nbytes

    def count_flops(self) -> float:
        """Counts a forward: the products of patches, blocks and merges, and attention."""
        flops = 2.0 * (self.spec.image // 4) ** 2 * 48 * self.spec.width
        for i, (side, width, window, depth) in enumerate(self.spec.stages):
            tokens = side * side
            flops += depth * tokens * (24 * width**2 + 4 * window**2 * width)
            if i + 1 < len(self.spec.stages):
                flops += 2 * (-(-side // 2)) ** 2 * 4 * width * 2 * width
        return self.spec.batch * flops

    def call(self, model: Callable[..., Any], module: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        """One step: the hidden state; or the gradients of three parameters that all providers share."""

        def infer() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(self.pixels).last_hidden_state,)

        parameters = list(module.parameters())
        block = self.theirs.encoder.layers[0].blocks[1]
        table = next(p for n, p in block.named_parameters() if n.endswith("relative_position_bias_table"))
        shared = (self.theirs.embeddings.patch_embeddings.projection.weight, block.mlp.fc1.weight, table)
        places = [next(i for i, p in enumerate(parameters) if p is one) for one in shared]

        def step() -> tuple[Tensor, ...]:
            # Products in the model's dtype, summed in float32 at the least.
            loss = (model(self.pixels).last_hidden_state * self.target).sum(dtype=torch.float32)
            gradients = torch.autograd.grad(loss, parameters)
            return (*(gradients[i] for i in places),)

        return step if self.training else infer

    def plain(self, name: str) -> list[Callable[[], Any]]:
        return [self.call(self.models[name], self.models[name])]

    def compiled(self, name: str) -> list[Callable[[], Any]]:
        if self.device == "cpu" and not self.session.everything:
            raise Missing("left out on a CPU, where compiling a model takes minutes (--everything)")
        self.session.allow_compile()
        return [self.call(harness.compiled(self.models[name], False), self.models[name])]

    def with_warpform(self) -> list[Callable[[], Any]]:
        return self.plain("warpform")

    def with_warpform_compiled(self) -> list[Callable[[], Any]]:
        return self.compiled("warpform")

    def with_transformers_eager(self) -> list[Callable[[], Any]]:
        return self.plain("transformers_eager")

    def with_transformers_sdpa(self) -> list[Callable[[], Any]]:
        return self.plain("transformers_sdpa")

    def with_transformers_eager_compiled(self) -> list[Callable[[], Any]]:
        return self.compiled("transformers_eager")

    def with_transformers_sdpa_compiled(self) -> list[Callable[[], Any]]:
        return self.compiled("transformers_sdpa")

    def with_flex_compiled(self) -> list[Callable[[], Any]]:
        if self.device == "cpu" and self.training:
            raise Missing("FlexAttention has no backward on a CPU")
        (call,) = self.compiled("flex")
        cut = {}
        for side, _, window, _ in self.spec.stages:
            for shift in {0, self.spec.window // 2 if window < side else 0}:
                key = (side, side), (window, window), (shift, shift)
                cut[key] = Windows.make(*key, self.device, self.session.dtype)

        def on_torch() -> tuple[Tensor, ...]:
            with on_flex(cut):
                return call()

        return [on_torch]

    @functools.cached_property
    def truth(self) -> tuple[tuple[Tensor, ...], float]:
        """transformers in float32, and the relative error that transformers itself has in the dtype that is timed."""
        same = self.call(self.theirs, self.theirs)()
        if self.session.dtype == torch.float32:
            return same, 0.0
        kept = self.theirs, self.target, self.pixels
        self.theirs, self.target, self.pixels = copy.deepcopy(kept[0]).float(), kept[1].float(), kept[2].float()
        try:
            exact = self.call(self.theirs, self.theirs)()
        finally:
            self.theirs, self.target, self.pixels = kept
        return exact, max(harness.relative_error(a, b) for a, b in zip(same, exact, strict=True))

    def check(self, provider: str, output: Any) -> None:
        """At most twice the error that transformers has in the same dtype, plus 100 float32 eps for all the layers."""
        exact, eager = self.truth
        allowed = 2 * eager + 100 * torch.finfo(torch.float32).eps
        for i, (actual, wanted) in enumerate(zip(output, exact, strict=True)):
            error = harness.relative_error(actual, wanted)
            assert error <= allowed, f"output {i}: relative error {error:.2e}, allowed {allowed:.2e}"


def test_swin(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
