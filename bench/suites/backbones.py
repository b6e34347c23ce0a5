"""Backbones of images end to end, forward and training step: images a second beside the transformers model.

PoolFormer, SegFormer's encoder (MiT), SegFormer whole and Hiera. A further model of transformers is a line in `MODELS`
and its sizes in `SIZES`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Case, Missing, Session
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import warpform

PROVIDERS = (
    "warpform",
    "transformers",
    "transformers_channels_last",
    "transformers_compiled",
    "warpform_compiled",
)

_MIT = {"sr_ratios": (8, 4, 2, 1), "num_attention_heads": (1, 2, 5, 8), "drop_path_rate": 0.0}
_B0 = {**_MIT, "depths": (2, 2, 2, 2), "hidden_sizes": (32, 64, 160, 256), "decoder_hidden_size": 256}
_B5 = {**_MIT, "depths": (3, 6, 40, 3), "hidden_sizes": (64, 128, 320, 512)}
_S12 = {"depths": (2, 2, 6, 2), "hidden_sizes": (64, 128, 320, 512)}


@dataclass(frozen=True)
class Model:
    """What is timed.

    Attributes:
        name: of the class in transformers, with which that of its config begins.
        kind: what the class's name has behind it; what a run returns first is compared.
        width: channels of the first stage, whose tokens have stride 4.
        fields: of its config.
        tiny: what is other than `fields` where only the code is run.
    """

    name: str
    kind: str
    width: int
    fields: dict[str, Any]
    tiny: dict[str, Any]


_TINY = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 40, 32)}
_TINY_HIERA = {"depths": (1, 1, 1, 1), "embed_dim": 8, "image_size": (64, 64)}
MODELS = {
    "poolformer_s12": Model("PoolFormer", "ForImageClassification", 64, {**_S12, "num_labels": 1000}, _TINY),
    "mit_b0": Model("Segformer", "Model", 32, _B0, _TINY),
    "mit_b5": Model("Segformer", "Model", 64, _B5, _TINY),
    "segformer_b0": Model(
        "Segformer", "ForSemanticSegmentation", 32, {**_B0, "num_labels": 19, "classifier_dropout_prob": 0.0}, _TINY
    ),
    "hiera_t": Model("Hiera", "ForImageClassification", 96, {"depths": (1, 2, 7, 2), "num_labels": 1000}, _TINY_HIERA),
    "hiera_b": Model("Hiera", "ForImageClassification", 96, {"depths": (2, 3, 16, 3), "num_labels": 1000}, _TINY_HIERA),
}

# The table of sizes: (model, pixels of a side, batch of a forward, batch of a training step). A batch of 0 is left out.
SIZES: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "tiny": (("poolformer_s12", 32, 2, 2), ("mit_b0", 32, 2, 2), ("segformer_b0", 32, 1, 2), ("hiera_t", 64, 1, 1)),
    "cpu": (
        ("poolformer_s12", 224, 4, 2),
        ("mit_b0", 512, 1, 1),
        ("segformer_b0", 512, 1, 0),
        ("mit_b5", 256, 1, 0),
        ("hiera_t", 224, 4, 2),
        ("hiera_b", 224, 2, 0),
    ),
    "cuda": (
        ("poolformer_s12", 224, 128, 128),
        ("mit_b0", 512, 32, 16),
        ("segformer_b0", 512, 32, 0),
        ("mit_b5", 512, 8, 4),
        ("hiera_t", 224, 128, 128),
        ("hiera_b", 224, 128, 64),
    ),
}
MAIN = ("poolformer_s12", "mit_b5", "hiera_b")


@dataclass(frozen=True)
class Spec(harness.Spec):
    batch: int = 1
    image: int = 224

    family = "backbones"

    def __str__(self) -> str:
        return f"{self.kernel}-{self.direction.replace(' ', '_')}-B{self.batch}-{self.image}x{self.image}"

    def build(self, session: Session) -> BackboneCase:
        return BackboneCase(self, session)


def specs(session: Session) -> list[Spec]:
    found = []
    for name, image, *batches in SIZES["tiny" if session.tiny else session.device]:
        for direction, batch in zip(("forward", "training step"), batches, strict=True):
            if batch == 0:
                continue
            columns = {
                "batch": batch,
                "tokens": batch * (image // 4) ** 2,
                "hidden": MODELS[name].width,
                "grid": f"{image // 4}x{image // 4}",
            }
            main = harness.is_main(session, name in MAIN)
            found.append(Spec(name, direction, tuple(columns.items()), PROVIDERS, batch, image, main=main))
    return found


def transformers_model(name: str, tiny: bool, **options: Any) -> nn.Module:
    """The model of transformers, with random weights."""
    try:
        import transformers
    except ImportError:
        raise Missing("transformers is not installed, and the weights come from its model") from None
    model = MODELS[name]
    config = getattr(transformers, f"{model.name}Config")(**{**model.fields, **(model.tiny if tiny else {}), **options})
    made: nn.Module = getattr(transformers, model.name + model.kind)(config)
    return made


@functools.cache
def models(name: str, tiny: bool, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The transformers model and warpform's, on the same parameters."""
    torch.manual_seed(0)
    theirs = transformers_model(name, tiny)
    for place, parameter in theirs.named_parameters():
        if "layer_scale" in place:
            nn.init.uniform_(parameter, 0.5, 1.0)  # 1e-5 before training, which would hide mistakes
    theirs = theirs.to(device, dtype)
    return theirs, warpform.models.from_transformers(theirs)


def count_flops(name: str, tiny: bool, image: int) -> float:
    """Counts a forward of one image: convolutions and products, those of attention too.

    Of SegFormer's head what its result needs: the products of each map at its own stride, and that with the classes.
    """
    with torch.device("meta"):
        model = transformers_model(name, tiny, attn_implementation="eager")
        inner = getattr(model, model.base_model_prefix, model)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            maps = inner(torch.empty(1, 3, image, image), output_hidden_states=True).hidden_states
    flops = float(counter.get_total_flops())
    if MODELS[name].kind == "ForSemanticSegmentation":
        width, classes = model.config.decoder_hidden_size, model.config.num_labels
        flops += sum(2.0 * x.numel() * width for x in maps) + 2.0 * maps[0][0, 0].numel() * width * classes
    return flops


class BackboneCase(Case):
    """Images [B, 3, S, S] in, what the model returns first out, for every provider.

    A training step is forward, a loss over that output, and the gradient of every parameter; no optimizer.
    """

    end_to_end = True

    def __init__(self, spec: Spec, session: Session) -> None:
        self.spec, self.session, self.device = spec, session, session.device
        self.training = spec.direction == "training step"
        self.theirs, self.ours = models(spec.kernel, session.tiny, self.device, session.dtype)
        for model in (self.theirs, self.ours):
            model.train(self.training)
        self.pixels = torch.randn(spec.batch, 3, spec.image, spec.image, device=self.device, dtype=session.dtype)
        with torch.no_grad():
            self.target = torch.randn_like(copy.deepcopy(self.theirs)(self.pixels)[0])
        self.images = spec.batch
        steps = 3 if self.training else 1
        self.flops = steps * spec.batch * count_flops(spec.kernel, session.tiny, spec.image)
        weights = sum(p.numel() for p in self.theirs.parameters()) * session.dtype.itemsize
        # Every weight once (a training step: twice, and its gradient), pixels in, the output out.
        self.bytes = steps * weights + self.pixels.nbytes + self.target.nbytes

    def shared(self) -> list[nn.Parameter]:
        """The first, the middle and the last weight that both models hold as the same parameter."""
        ours = {id(p) for p in self.ours.parameters()}
        weights = [p for p in self.theirs.parameters() if id(p) in ours and p.dim() > 1]
        return [weights[0], weights[len(weights) // 2], weights[-1]]

    def call(
        self, model: Callable[..., Any], wanted: Sequence[nn.Parameter] | None = None, *, channels_last: bool = False
    ) -> Callable[[], tuple[Tensor, ...]]:
        """One step: the output; or the gradients of the wanted parameters, by default of those that models share."""
        pixels, target = self.pixels, self.target
        if channels_last:
            pixels = pixels.contiguous(memory_format=torch.channels_last)

        def infer() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (model(pixels)[0],)

        parameters = list(model.parameters())  # type: ignore[attr-defined]
        chosen = self.shared() if wanted is None else wanted
        places = [next(i for i, p in enumerate(parameters) if p is one) for one in chosen]

        def step() -> tuple[Tensor, ...]:
            # Products in the model's dtype, summed in float32 at the least.
            loss = (model(pixels)[0] * target).sum(dtype=torch.float32)
            gradients = torch.autograd.grad(loss, parameters)
            return (*(gradients[i] for i in places),)

        return step if self.training else infer

    def compiled(self, model: nn.Module) -> list[Callable[[], Any]]:
        if self.device == "cpu" and not self.session.everything:
            raise Missing("left out on a CPU, where compiling a model takes minutes (--everything)")
        self.session.allow_compile()
        return [self.call(harness.compiled(model, False))]

    def with_warpform(self) -> list[Callable[[], Any]]:
        return [self.call(self.ours)]

    def with_warpform_compiled(self) -> list[Callable[[], Any]]:
        return self.compiled(self.ours)

    def with_transformers(self) -> list[Callable[[], Any]]:
        return [self.call(self.theirs)]

    def with_transformers_channels_last(self) -> list[Callable[[], Any]]:
        return [self.call(self.theirs, channels_last=True)]

    def with_transformers_compiled(self) -> list[Callable[[], Any]]:
        return self.compiled(self.theirs)

    @functools.cached_property
    def truth(self) -> tuple[tuple[Tensor, ...], float]:
        """transformers in float32, and the relative error that transformers itself has in the dtype that is timed."""
        same = self.call(self.theirs)()
        if self.session.dtype == torch.float32:
            return same, 0.0
        wide = copy.deepcopy(self.theirs).float()
        pairs = list(zip(self.theirs.parameters(), wide.parameters(), strict=True))
        wanted = [next(twin for p, twin in pairs if p is one) for one in self.shared()]
        kept = self.target, self.pixels
        self.target, self.pixels = kept[0].float(), kept[1].float()
        try:
            exact = self.call(wide, wanted)()
        finally:
            self.target, self.pixels = kept
        return exact, max(harness.relative_error(a, b) for a, b in zip(same, exact, strict=True))

    def check(self, provider: str, output: Any) -> None:
        """At most twice the error that transformers has in the same dtype, plus 100 float32 eps for all the layers."""
        exact, eager = self.truth
        allowed = 2 * eager + 100 * torch.finfo(torch.float32).eps
        for i, (actual, wanted) in enumerate(zip(output, exact, strict=True)):
            error = harness.relative_error(actual, wanted)
            assert error <= allowed, f"output {i}: relative error {error:.2e}, allowed {allowed:.2e}"


def test_backbones(spec: Spec, provider: str, measure: Callable[[harness.Spec, str], None]) -> None:
    measure(spec, provider)
