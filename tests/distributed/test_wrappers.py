"""Torch's wrappers for data parallelism around models: gradients are those of all ranks' batches together."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from helpers import wrappers as helper
from helpers.processes import Processes

pytestmark = pytest.mark.distributed
Started = Callable[[int], Processes]


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("Swin", "blocks"),
        ("Swinv2", "blocks"),
        ("SequenceClassification", "layers and base"),
        ("MaskedLM", "layers"),
        ("TokenClassification", "whole"),
    ],
)
def test_fully_shard(processes: Started, name: str, which: str) -> None:
    processes(2).run(helper.shard, name, which)


@pytest.mark.parametrize("static_graph", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["SequenceClassification", "Swin"])
def test_ddp_synchronises(processes: Started, name: str, static_graph: bool) -> None:
    processes(2).run(helper.replicate, name, static_graph)
