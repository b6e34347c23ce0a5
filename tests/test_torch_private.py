"""What warpform uses of torch beyond its public names is there, and is used in one file alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import warpform
from warpform import _torch_private

PACKAGE = Path(warpform.__file__).resolve().parent
# `torch._x`, `torch.y._x`, forward_ad._x; torch._check and torch._assert_async are documented.
PRIVATE = re.compile(
    r"\b(?:torch(?!\.ops)(?:\.\w+)*|forward_ad|distributed_c10d)\._(?!check\b|assert_async\b|_version__|_file__)\w+"
)


def test_this_torch_has_all_of_them() -> None:
    found = _torch_private.missing()
    assert not found, f"torch {torch.__version__} lacks {', '.join(found)}: see _torch_private.py"


def test_a_torch_without_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*_torch_private.NAMES, "torch._C:_no_such_name", "torch._no_such_module:name")
    monkeypatch.setattr(_torch_private, "NAMES", names)
    assert _torch_private.missing() == ["torch._C:_no_such_name", "torch._no_such_module:name"]
    monkeypatch.setitem(_torch_private._FOUND, "make_autograd_impl", None)
    with pytest.raises(ImportError, match="make_autograd_impl.*lacks"):
        _torch_private.autograd_rule(None, print, None)
    monkeypatch.setitem(_torch_private._FOUND, "_are_functorch_transforms_active", None)
    monkeypatch.setitem(_torch_private._FOUND, "is_fake", None)
    assert not _torch_private.in_functorch() and not _torch_private.is_fake(torch.ones(1))


def test_they_do_what_they_are_used_for() -> None:
    assert not _torch_private.in_forward_mode() and not _torch_private.in_functorch()
    with torch.autograd.forward_ad.dual_level():
        assert _torch_private.in_forward_mode()
    assert torch.func.vmap(lambda x: x * _torch_private.in_functorch())(torch.ones(2)).all()
    with torch._subclasses.FakeTensorMode() as mode:
        assert _torch_private.is_fake(mode.from_tensor(torch.ones(1)))
    assert not _torch_private.is_fake(torch.ones(1))


def test_no_other_file_uses_any() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "_torch_private.py"
        for match in PRIVATE.finditer(path.read_text(encoding="utf-8"))
    }
    assert not found, f"use these through _torch_private.py: {sorted(found)}"
