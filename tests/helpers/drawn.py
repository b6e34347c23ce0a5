"""Tests on drawn cases: hypothesis chooses the case, and the seed of the random tensors with it."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .seeds import seed_everything

SEEDS = st.integers(0, 2**16)


def drawn(max_examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """@given, with a seed of torch in every example. A quick run on a CPU draws a quarter of the examples.

    Inputs come from torch's global generator, so without it an example would not determine them: a failure could be
    neither repeated nor shrunk. A test that has a parameter `seed` is told it too.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        wants_seed = "seed" in signature.parameters
        if not wants_seed:
            parameter = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, annotation=int)
            signature = signature.replace(parameters=[*signature.parameters.values(), parameter])

        @functools.wraps(test)
        def seeded(*args: Any, **kwargs: Any) -> None:
            values = signature.bind(*args, **kwargs).arguments
            seed_everything(values["seed"])
            if not wants_seed:
                del values["seed"]
            test(**values)

        seeded.__signature__ = signature  # type: ignore[attr-defined]  # what hypothesis and pytest read
        every = os.environ.get("CI") or torch.cuda.is_available()
        examples = max_examples if every else -(-max_examples // 4)
        return settings(max_examples=examples)(given(seed=SEEDS, **strategies)(seeded))

    return decorate
