"""Texts to vectors: tokenizer, encoder, pooling and normalisation as a sentence-transformers folder describes them.

Nothing is padded, so batches are filled by a budget of tokens and not by a number of texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import first_tokens, last_tokens, max_pool, mean_pool
from ..packing import Packing
from .auto import from_pretrained
from .common.pretrained import PretrainedModel
from .common.texts import read_texts

__all__ = ["SentenceEncoder"]

Self = TypeVar("Self", bound="SentenceEncoder")


def _mean_sqrt_length(hidden: Tensor, packing: Packing) -> Tensor:
    return mean_pool(hidden, packing) * packing.lengths.sqrt().unsqueeze(1).to(hidden.dtype)


# In the order in which sentence-transformers puts several side by side.
_POOLINGS: dict[str, Callable[[Tensor, Packing], Tensor]] = {
    "cls": first_tokens,
    "max": max_pool,
    "mean": mean_pool,
    "mean_sqrt_len_tokens": _mean_sqrt_length,
    "lasttoken": last_tokens,
}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "spiece.model", "tokenizer.model")


class SentenceEncoder(nn.Module):
    """One vector for each text, without ever padding one.

    Args:
        model: an encoder of `warpform.models`.
        tokenizer: called as a tokenizer of transformers; only `input_ids` are taken from what it returns.
        pooling: "mean", "cls", "max", "mean_sqrt_len_tokens", "lasttoken", or several, whose vectors are put side by
            side.
        normalize: whether vectors get length 1.
        max_seq_length: tokens at which texts are cut, at most the model's positions; None = those.
        lower_case: make texts lower case before the tokenizer sees them.
        prompt: put before every text.

    Raises:
        ValueError: an unknown pooling, a max_seq_length below 1.
    """

    def __init__(
        self,
        model: PretrainedModel,
        tokenizer: Callable[..., Any],
        *,
        pooling: str | Sequence[str] = "mean",
        normalize: bool = True,
        max_seq_length: int | None = None,
        lower_case: bool = False,
        prompt: str = "",
    ) -> None:
        super().__init__()
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        for name in self.pooling:
            if name not in _POOLINGS:
                raise ValueError(f"SentenceEncoder: pooling must be of {', '.join(_POOLINGS)}, got {name!r}")
        if not self.pooling:
            raise ValueError("SentenceEncoder: pooling must name at least one way")
        if max_seq_length is not None and max_seq_length < 1:
            raise ValueError(f"SentenceEncoder: max_seq_length must be at least 1, got {max_seq_length}")
        positions = model.config.max_position_embeddings
        self.model = model
        self.tokenizer = tokenizer
        self.normalize = normalize
        self.max_seq_length = positions if max_seq_length is None else min(max_seq_length, positions)
        self.lower_case = lower_case
        self.prompt = prompt

    @classmethod
    def from_pretrained(
        cls: type[Self],
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Reads a folder as sentence-transformers saves it; nothing that is pickled, and nothing from a network.

        `modules.json` says what there is: a transformer, a pooling, perhaps a normalisation. Without it, it is mean
        pooling of the model in the folder, not normalised, which is what sentence-transformers makes of such a folder.

        Args:
            folder: with `modules.json`, the folders that it names, `config.json`, safetensors and a tokenizer.
            dtype, device: as in `warpform.models.from_pretrained`.

        Raises:
            FileNotFoundError: no such folder, or a file that is missing in it.
            ValueError: a file that cannot be read; a module or an option that is not supported, by name.
            ImportError: transformers, which has the tokenizers, is not installed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"SentenceEncoder: there is no folder {folder}")
        parts = list(_modules(folder))
        kinds = [kind for kind, _ in parts]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"], ["Transformer"]):
            raise ValueError(
                f"SentenceEncoder: modules.json in {folder} must hold Transformer, Pooling and perhaps Normalize, "
                f"others are not supported, got {', '.join(kinds) or 'nothing'}"
            )
        home = parts[0][1]
        settings = _read_json(home / "sentence_bert_config.json") or {}
        general = _read_json(folder / "config_sentence_transformers.json") or {}
        pooling_config = _read_json(parts[1][1] / "config.json", required=True) if len(parts) > 1 else {}
        assert pooling_config is not None
        prompt = (general.get("prompts") or {}).get(general.get("default_prompt_name")) or ""
        if prompt and not pooling_config.get("include_prompt", True):
            raise ValueError("SentenceEncoder: include_prompt=False is not supported")
        tokenizer = _tokenizer(home)
        length = settings.get("max_seq_length")
        if length is None:
            length = getattr(tokenizer, "model_max_length", None)
        return cls(
            from_pretrained(home, dtype=dtype, device=device),
            tokenizer,
            pooling=_pooling(pooling_config),
            normalize=kinds[-1] == "Normalize",
            max_seq_length=length,
            lower_case=bool(settings.get("do_lower_case", False)),
            prompt=prompt,
        ).eval()

    def forward(self, input_ids: Tensor, packing: Packing) -> Tensor:
        """input_ids: int64 [total] and their packing; returns [batch, dim], in the dtype of the model. Differentiable.

        The way to train one: `encode` is for inference. Texts without a token give zeros.
        """
        hidden = self.model(input_ids, packing=packing, return_dict=True).last_hidden_state
        vectors = torch.cat([_POOLINGS[name](hidden, packing) for name in self.pooling], dim=1)
        return F.normalize(vectors, dim=1) if self.normalize else vectors

    @torch.inference_mode()
    def encode(self, texts: str | Iterable[str], *, batch_tokens: int = 16384) -> Tensor:
        """The vectors of texts, in their order.

        Texts are tokenised all at once and taken longest first, which puts texts of one length together and shows at
        the start how much memory it takes. The encoder is in eval mode afterwards.

        Args:
            texts: a text, or many: a list, an array of numpy, a Series of pandas, a generator.
            batch_tokens: tokens in a batch, at most; a text that is longer has a batch of its own.

        Returns:
            [texts, dim] on the device and in the dtype of the model; [dim] for one text that is not in a container.

        Raises:
            TypeError: texts that are not strings.
            ValueError: batch_tokens below 1.
        """
        texts, single = read_texts("SentenceEncoder.encode", texts)
        if batch_tokens < 1:
            raise ValueError(f"SentenceEncoder.encode: batch_tokens must be at least 1, got {batch_tokens}")
        self.eval()
        parameter = next(self.model.parameters())
        ids = self._tokenize(texts)
        width = self.model.config.hidden_size * len(self.pooling)
        vectors = torch.empty(len(ids), width, dtype=parameter.dtype, device=parameter.device)
        for places in batches([len(x) for x in ids], batch_tokens):
            packing = Packing.from_lengths([len(ids[i]) for i in places], device=parameter.device)
            tokens = torch.tensor([token for i in places for token in ids[i]], dtype=torch.int64)
            where = torch.tensor(places, device=parameter.device)
            vectors[where] = self(tokens.to(parameter.device), packing).to(parameter.dtype)
        return vectors[0] if single else vectors

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        texts = [self.prompt + text for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        ids: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)["input_ids"]
        return ids

    def extra_repr(self) -> str:
        return f"pooling={'+'.join(self.pooling)}, normalize={self.normalize}, max_seq_length={self.max_seq_length}"


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts, longest first, in batches of at most batch_tokens tokens, or of one text."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[i] > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    """The kind and the folder of each part that modules.json lists."""
    path = folder / "modules.json"
    if not path.is_file():
        yield "Transformer", folder
        return
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"SentenceEncoder: {path} is not a list of modules: {error}") from None
    for kind, name in found:
        # The list comes with the weights, from anywhere: it must not lead out of the folder.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"SentenceEncoder: {path} names a folder outside: {name!r}")
        yield kind, folder / name


def _read_json(path: Path, *, required: bool = False) -> dict[str, Any] | None:
    if not path.is_file():
        if required:
            raise FileNotFoundError(f"SentenceEncoder: {path} is missing")
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"SentenceEncoder: {path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"SentenceEncoder: {path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def _pooling(fields: dict[str, Any]) -> tuple[str, ...]:
    """The names in the config of a pooling: `pooling_mode`, or in older folders a switch for each."""
    named = fields.get("pooling_mode")
    if named is not None:
        chosen = [named] if isinstance(named, str) else list(named)
    else:
        chosen = []
        for key, value in fields.items():
            if key.startswith("pooling_mode_") and value:
                name = key.removeprefix("pooling_mode_")
                chosen.append({"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}.get(name, name))
        chosen = chosen or ["mean"]
    for name in chosen:
        if name not in _POOLINGS:
            raise ValueError(f"SentenceEncoder: pooling_mode {name!r} is not supported, only {', '.join(_POOLINGS)}")
    return tuple(name for name in _POOLINGS if name in chosen)


def _tokenizer(folder: Path) -> Any:
    # Without its files transformers makes a tokenizer that knows no word, and says nothing.
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"SentenceEncoder: {folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("SentenceEncoder.from_pretrained needs transformers: pip install transformers") from error
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
