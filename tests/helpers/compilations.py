"""How often torch.compile compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Compilations:
    """A backend which counts the graphs it is given."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(graph, example_inputs)  # raises for dynamo to trace once more, which is no recompilation
        self.count += 1
        return compiled
