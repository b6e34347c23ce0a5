"""Patch embedding against the convolution whose weights it holds, with two axes and with three."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.compare import assert_close
from warpform.nn import PatchEmbedding
from warpform.nn.patch_embedding import embed_patches

CASES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((4, 4), (8, 12)), ((2, 3), (4, 9)), ((2, 2, 2), (4, 6, 2)), ((1, 4, 2), (3, 8, 4)),
]  # fmt: skip


def convolve(x: Tensor, conv: Any) -> Tensor:
    """torch's convolution with the weights of `conv` and a stride of its kernel, channels last."""
    function = F.conv2d if conv.weight.dim() == 4 else F.conv3d
    return function(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), stride=conv.weight.shape[2:]).movedim(1, -1)


def made(patch: tuple[int, ...], **options: Any) -> PatchEmbedding:
    torch.manual_seed(0)
    return PatchEmbedding(3, 16, patch, **options)


@pytest.mark.parametrize(("patch", "sizes"), CASES, ids=str)
def test_it_is_a_convolution(patch: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    embedding = made(patch)
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(1))
    out = embedding(x)
    assert out.shape == (2, *(n // p for n, p in zip(sizes, patch, strict=True)), 16)
    conv = embedding.projection
    assert_close("out", out, convolve(x.double(), conv), convolve(x, conv))
    assert [name for name, _ in embedding.named_parameters()] == ["projection.weight", "projection.bias"]
    assert type(conv) is (nn.Conv2d if len(patch) == 2 else nn.Conv3d)


@pytest.mark.parametrize(("patch", "sizes"), CASES, ids=str)
def test_a_hook_sees_the_convolution(patch: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Then the convolution is called as it is, and gives the same."""
    embedding = made(patch, name="proj").double()
    x = torch.randn(2, 3, *sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before, seen = embedding(x), []
    embedding.proj.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(embedding(x), before)
    assert len(seen) == 1 and seen[0].shape[1] == 16
    torch.testing.assert_close(embed_patches(x, embedding.proj), before)


def test_padding_adds_zeros_at_the_end() -> None:
    embedding = made((4, 3), pad=True)
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(embedding(x), embedding(F.pad(x, (0, 2, 0, 3))))
    assert torch.equal(embedding(x[:, :, :4, :6]), made((4, 3))(x[:, :, :4, :6]))
    volume = made((2, 2, 3), pad=True)
    y = torch.randn(1, 3, 3, 2, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(volume(y), volume(F.pad(y, (0, 2, 0, 0, 0, 1))))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"patch_size must be two or three numbers of at least 1, got \(4,\)"):
        made((4,))
    with pytest.raises(ValueError, match=r"numbers of at least 1, got \(4, 0\)"):
        made((4, 0))
    embedding = made((4, 4))
    for shape in ((2, 3, 8), (2, 3, 8, 8, 8), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"PatchEmbedding: x must be of shape \[batch, 3, 2 sizes\]"):
            embedding(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"sizes that patches of \(4, 4\) divide, got \[2, 3, 8, 6\]"):
        embedding(torch.zeros(2, 3, 8, 6))
