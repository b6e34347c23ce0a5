"""Results do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same_on_threads(call: Callable[[], Sequence[Tensor]]) -> None:
    """The results of the call, the same bits on 1, 2 and 3 of torch's threads."""
    before = torch.get_num_threads()
    expected: Sequence[Tensor] | None = None
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found = call()
            expected = found if expected is None else expected
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert torch.equal(one, other), f"result {i} differs on {threads} threads"
    finally:
        torch.set_num_threads(before)
