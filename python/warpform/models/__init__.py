"""Architectures assembled from warpform's ops, made from a transformers model or from a folder of weights."""

from ._output import EncoderOutput, HeadOutput
from ._registry import from_pretrained, from_transformers
from ._swin_base import ImageClassifierOutput, SwinOutput
from ._swin_config import SwinConfig, Swinv2Config
from .albert import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from .bert import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from .deberta import (
    DebertaConfig,
    DebertaForMaskedLM,
    DebertaForSequenceClassification,
    DebertaForTokenClassification,
    DebertaModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)
from .distilbert import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from .dit3d import DiT3DConfig, DiT3DModel
from .m2 import M2BertModel
from .m2_config import M2BertConfig
from .m2_gpt import M2GPTConfig, M2GPTForCausalLM
from .m2_heads import (
    M2BertForMaskedLM,
    M2BertForSentenceEmbedding,
    M2BertForSequenceClassification,
    SentenceOutput,
)
from .m2_vit import M2ViTConfig, M2ViTForImageClassification
from .mohd import MoHDConfig, MoHDForCausalLM
from .sentence_encoder import SentenceEncoder
from .sequence_parallel_transformer import (
    SequenceParallelOutput,
    SequenceParallelTransformer,
    SequenceParallelTransformerConfig,
)
from .swin import SwinForImageClassification, SwinModel, Swinv2ForImageClassification, Swinv2Model

__all__ = [
    "AlbertConfig",
    "AlbertForMaskedLM",
    "AlbertForSequenceClassification",
    "AlbertForTokenClassification",
    "AlbertModel",
    "BertConfig",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "DebertaConfig",
    "DebertaForMaskedLM",
    "DebertaForSequenceClassification",
    "DebertaForTokenClassification",
    "DebertaModel",
    "DebertaV2Config",
    "DebertaV2ForMaskedLM",
    "DebertaV2ForSequenceClassification",
    "DebertaV2ForTokenClassification",
    "DebertaV2Model",
    "DiT3DConfig",
    "DiT3DModel",
    "DistilBertConfig",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertModel",
    "EncoderOutput",
    "HeadOutput",
    "ImageClassifierOutput",
    "M2BertConfig",
    "M2BertForMaskedLM",
    "M2BertForSentenceEmbedding",
    "M2BertForSequenceClassification",
    "M2BertModel",
    "M2GPTConfig",
    "M2GPTForCausalLM",
    "M2ViTConfig",
    "M2ViTForImageClassification",
    "MoHDConfig",
    "MoHDForCausalLM",
    "SentenceEncoder",
    "SentenceOutput",
    "SequenceParallelOutput",
    "SequenceParallelTransformer",
    "SequenceParallelTransformerConfig",
    "SwinConfig",
    "SwinForImageClassification",
    "SwinModel",
    "SwinOutput",
    "Swinv2Config",
    "Swinv2ForImageClassification",
    "Swinv2Model",
    "from_pretrained",
    "from_transformers",
]
