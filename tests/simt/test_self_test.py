"""The self-test on the kernels themselves: what it would say on a GPU, where a false alarm costs time."""

from __future__ import annotations

from typing import Any

import pytest

from warpform.cli import self_test


@pytest.mark.parametrize("family", sorted(self_test.families()))
def test_every_op_passes(simt: Any, family: str) -> None:
    ops = self_test.families()[family]
    rows = list(self_test.run(ops, device="cpu", library=simt, dtypes=("bfloat16",)))
    assert {row["op"] for row in rows} == set(ops)
    assert not [row for row in rows if not row.get("starting") and not row["ok"]]
