"""Training whose sequences ranks share, over gloo: step by step what one process does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers import sequence_parallel as helper
from helpers.processes import Processes

pytestmark = pytest.mark.distributed
Started = Callable[[int], Processes]


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("attention", "causal", "layout", "optimizer"),
    [
        ("ring", True, "zigzag", "sgd"),
        ("ring", True, "striped", "adamw"),
        ("ring", False, "contiguous", "sgd"),
        ("rsa", True, "zigzag", "sgd"),
        ("linformer", False, "zigzag", "sgd"),
    ],
)
def test_training_is_that_of_one_process(
    processes: Started, attention: str, causal: bool, layout: str, optimizer: str
) -> None:
    """Two replicas of two ranks each, 20 steps in float64: every loss, and every weight after every step."""
    processes(4).run(helper.train, 2, 2, attention, causal, layout, optimizer)


def test_training_without_replicas(processes: Started) -> None:
    """One sequence over four ranks."""
    processes(4).run(helper.train, 1, 4, "ring", True, "zigzag", "sgd", 5)


def test_training_of_replicas_alone(processes: Started) -> None:
    """Rings of one rank: data parallelism and nothing else."""
    processes(4).run(helper.train, 4, 1, "ring", True, "zigzag", "sgd", 5)


@pytest.mark.parametrize(
    "what",
    [
        helper.average_with_ddp,
        helper.mean_of_unequal_ranks,
        helper.gradients_that_are_missing,
        helper.weights_of_the_first_rank,
    ],
    ids=lambda function: function.__name__,
)
def test_plan(processes: Started, what: Callable[..., None]) -> None:
    processes(4).run(what, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_over_gloo_are_those_in_one_process(processes: Started, size: int, dtype: torch.dtype) -> None:
    processes(size).run(helper.same_as_in_one_process, size, dtype)


def test_ranks_that_disagree_are_told(processes: Started) -> None:
    processes(3).run(helper.ranks_that_disagree, 3)
