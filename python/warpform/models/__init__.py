"""Architectures assembled from warpform's ops, made from a transformers model or from a folder of weights."""

from ._output import EncoderOutput
from ._registry import from_pretrained, from_transformers
from .bert import BertConfig, BertModel

__all__ = ["BertConfig", "BertModel", "EncoderOutput", "from_pretrained", "from_transformers"]
