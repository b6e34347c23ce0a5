"""A model of warpform against the transformers class that it was made from: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .compare import assert_close


def randomise(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Every weight random, in eval mode.

    With the usual initialisation biases are 0 and attention hardly looks: mistakes there would not show. With a std
    much above 0.1, several layers amplify rounding until two runs of the same model differ by chance.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=std)
    return model.eval()


def make_mask(pattern: str, lengths: Sequence[int], seqlen: int) -> Tensor:
    """int64 [len(lengths), seqlen]; pattern: right, left or holes."""
    mask = torch.arange(seqlen) < torch.tensor(lengths).unsqueeze(1)
    if pattern == "left":
        mask = mask.flip(1)
    elif pattern == "holes":
        mask = torch.stack([row[torch.randperm(seqlen)] for row in mask])
    return mask.long()


def check_losses(ours: Callable, eager: Callable, oracle: Callable, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """The losses of several batches beside each other, by the rule of helpers.compare.

    The rounding of one number is chance: the eager loss may be exact where ours is as good as a sum can be.
    """
    in_double = [{k: x.double() if x.is_floating_point() else x for k, x in batch.items()} for batch in batches]
    with torch.no_grad():
        runs = ((ours, batches), (oracle, in_double), (eager, batches))
        assert_close("losses", *(torch.stack([model(**batch).loss for batch in given]) for model, given in runs))


def check_gradients(
    ours: nn.Module,
    loss: Tensor,
    eager: tuple[nn.Module, Tensor],
    oracle: tuple[nn.Module, Tensor],
    *,
    is_key: Callable[[str], bool] = lambda name: ".key." in name or ".k_lin." in name,
    beside: Callable[[str], str | None] = lambda name: None,
) -> None:
    """The gradient of every parameter by itself, by the rule of helpers.compare.

    beside: for a parameter of theirs whose gradient is 0 but for rounding, the one whose gradient has its scale.
    """
    grads: dict[str, dict[str, Tensor]] = {}
    for name, (model, theirs) in (("eager", eager), ("oracle", oracle)):
        parameters = dict(model.named_parameters())
        grads[name] = dict(zip(parameters, torch.autograd.grad(theirs, list(parameters.values())), strict=True))
    parameters = dict(ours.named_parameters())
    found = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    names = ours.weight_names()
    assert set(names) == set(found)
    assert {part for parts in names.values() for part in parts} == set(grads["oracle"])
    for name, parts in names.items():
        chunks = list(zip(parts, ours.split_weight(name, found[name], len(parts)), strict=True))
        if name.endswith("qkv.bias"):
            # A softmax does not see a constant added to a row, so the gradient of the key bias is 0 but for rounding,
            # which has no scale of its own; it is judged beside the other two.
            truth, yardstick = (torch.cat([grads[m][part] for part in parts]) for m in ("oracle", "eager"))
            assert_close(name, found[name], truth, yardstick, gradient=True)
            chunks = [pair for pair in chunks if not is_key(pair[0])]
        for part, chunk in chunks:
            neighbour = beside(part)
            scale = 0.0 if neighbour is None else float(grads["oracle"][neighbour].abs().max())
            assert_close(part, chunk, grads["oracle"][part], grads["eager"][part], gradient=True, scale=scale)
