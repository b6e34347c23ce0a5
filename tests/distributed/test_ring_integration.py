"""attn_implementation="warpform_ring" in models of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import warpform
from helpers import ring_models
from helpers.processes import Processes
from warpform.distributed import LocalGroup

pytest.importorskip("transformers")


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "layout"), [("llama", "zigzag"), ("llama", "striped"), ("bert", "contiguous")])
def test_model_is_that_of_one_process(processes: Callable[[int], Processes], name: str, layout: str) -> None:
    processes(3).run(ring_models.check_model, name, layout)


@pytest.mark.distributed
def test_what_is_not_supported_is_refused(processes: Callable[[int], Processes]) -> None:
    for positions, packed, padding, attentions in processes(2).run(ring_models.refusals):
        assert "position_ids must be those of shard_positions" in positions
        assert "packed sequences" in packed
        assert "padding" in padding
        assert "output_attentions" in attentions


def test_a_local_group_is_refused() -> None:
    with pytest.raises(TypeError, match="of processes"):
        warpform.integrations.ring.register(LocalGroup(2))
