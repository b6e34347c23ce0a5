"""An addition to transformers' `save_pretrained`: it saves a model with a part of ours under transformers' names."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from .convertible import ConvertibleModel
from .pretrained import file_weights


def teach_save_pretrained(model: nn.Module) -> None:
    """Has `save_pretrained` of transformers write what was put into a model under the names that it reads back.

    A class of transformers knows nothing about the parameters of a part that was replaced: it would write them under
    names that it takes for unknown weights when it reads them, and draw those that it misses at random.

    Args:
        model: of transformers; its base class learns it, once in a process.
    """
    base: Any = next((cls for cls in type(model).__mro__ if cls.__name__ == "PreTrainedModel"), None)
    if base is None or hasattr(base.save_pretrained, "_warpform"):
        return
    save_pretrained = base.save_pretrained

    @functools.wraps(save_pretrained)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        parts = {} if adapters_alone else _replaced_parts(self)
        if parts:
            state = kwargs.get("state_dict")
            state = dict(self.state_dict() if state is None else state)
            for prefix, part in parts.items():
                renamed = file_weights(part, state, prefix)
                state = {name: w for name, w in state.items() if not name.startswith(prefix)} | renamed
            kwargs["state_dict"] = state
        return save_pretrained(self, *args, **kwargs)

    wrapper._warpform = True  # type: ignore[attr-defined]
    base.save_pretrained = wrapper


def _replaced_parts(model: nn.Module) -> dict[str, ConvertibleModel]:
    """The models of this package in a transformers model, by the beginning of their weights' names."""
    parts: dict[str, ConvertibleModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, ConvertibleModel) and not any(f"{name}.".startswith(prefix) for prefix in parts):
            parts[f"{name}."] = module
    return parts
