"""The table of families: which folder has which public names. Nothing is imported to read it.

A new architecture is a folder, or a file where it is short, with its own `__all__`, and a line here.
"""

from __future__ import annotations

FAMILIES: dict[str, tuple[str, ...]] = {
    "activator": ("ActivatorConfig", "ActivatorForImageClassification"),
    "albert": (
        "AlbertConfig",
        "AlbertForMaskedLM",
        "AlbertForSequenceClassification",
        "AlbertForTokenClassification",
        "AlbertModel",
    ),
    "algoformer": ("AlgoFormer", "AlgoFormerConfig"),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertModel",
    ),
    "colm": ("CoLMConfig", "CoLMForCausalLM"),
    "decoder": ("DecoderConfig", "DecoderForCausalLM"),
    "deberta": (
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
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertModel",
    ),
    "dit3d": ("DiT3DConfig", "DiT3DModel"),
    "duoformer": ("DuoFormerConfig", "DuoFormerForImageClassification"),
    "hiera": (
        "HieraBackbone",
        "HieraConfig",
        "HieraForImageClassification",
        "HieraModel",
        "HieraOutput",
        "TurboViTConfig",
        "TurboViTForImageClassification",
    ),
    "ladder": ("LadderConfig", "LadderForCausalLM"),
    "matformer": ("MatFormerConfig", "MatFormerForCausalLM"),
    "maxim": ("ImageRestorationOutput", "MAXIMConfig", "MAXIMForImageRestoration"),
    "minimal": ("MinimalTransformerConfig", "MinimalTransformerForImageClassification"),
    "mohd": ("MoHDConfig", "MoHDForCausalLM"),
    "monarch_mixer": (
        "M2BertConfig",
        "M2BertForMaskedLM",
        "M2BertForSentenceEmbedding",
        "M2BertForSequenceClassification",
        "M2BertModel",
        "M2GPTConfig",
        "M2GPTForCausalLM",
        "M2ViTConfig",
        "M2ViTForImageClassification",
        "SentenceOutput",
    ),
    "mot": ("MoTConfig", "MoTForCausalLM"),
    "p2at": ("P2ATConfig", "P2ATForSemanticSegmentation", "P2ATOutput"),
    "poolformer": ("PoolFormerConfig", "PoolFormerForImageClassification", "PoolFormerModel"),
    "resnet": ("ResNetBackbone", "ResNetConfig"),
    "segformer": (
        "SegformerConfig",
        "SegformerForImageClassification",
        "SegformerForSemanticSegmentation",
        "SegformerModel",
    ),
    "sequence_parallel_transformer": (
        "SequenceParallelOutput",
        "SequenceParallelTransformer",
        "SequenceParallelTransformerConfig",
        "next_tokens",
    ),
    "sret": ("SReTConfig", "SReTForImageClassification"),
    "swin": (
        "SwinBackbone",
        "SwinConfig",
        "SwinForImageClassification",
        "SwinModel",
        "SwinOutput",
        "Swinv2Backbone",
        "Swinv2Config",
        "Swinv2ForImageClassification",
        "Swinv2Model",
    ),
    "wide": ("WideConfig", "WideForSequenceClassification"),
}

# Public names that belong to no family, by the module that has them.
OTHERS: dict[str, tuple[str, ...]] = {
    "auto": ("from_pretrained", "from_transformers", "list_models"),
    "common.backbone": ("BackboneOutput",),
    "common.outputs": (
        "EncoderOutput",
        "HeadOutput",
        "ImageClassifierOutput",
        "ImageModelOutput",
        "SemanticSegmenterOutput",
    ),
    "sentence_encoder": ("SentenceEncoder",),
}

# For each model_type in a config.json the class that `from_pretrained` makes: the model without a head where
# transformers has the architecture, else what the file names, or this where it names nothing.
MODEL_TYPES: dict[str, str] = {
    "activator": "ActivatorForImageClassification",
    "albert": "AlbertModel",
    "algoformer": "AlgoFormer",
    "bert": "BertModel",
    "colm": "CoLMForCausalLM",
    "deberta": "DebertaModel",
    "deberta-v2": "DebertaV2Model",
    "distilbert": "DistilBertModel",
    "llama": "DecoderForCausalLM",
    "mistral": "DecoderForCausalLM",
    "qwen2": "DecoderForCausalLM",
    "dit3d": "DiT3DModel",
    "duoformer": "DuoFormerForImageClassification",
    "hiera": "HieraModel",
    "ladder": "LadderForCausalLM",
    "m2_bert": "M2BertModel",
    "m2_gpt": "M2GPTForCausalLM",
    "m2_vit": "M2ViTForImageClassification",
    "matformer": "MatFormerForCausalLM",
    "maxim": "MAXIMForImageRestoration",
    "minimal_transformer": "MinimalTransformerForImageClassification",
    "mohd": "MoHDForCausalLM",
    "mot": "MoTForCausalLM",
    "p2at": "P2ATForSemanticSegmentation",
    "poolformer": "PoolFormerModel",
    "resnet": "ResNetBackbone",
    "segformer": "SegformerModel",
    "sequence_parallel_transformer": "SequenceParallelTransformer",
    "sret": "SReTForImageClassification",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
    "turbovit": "TurboViTForImageClassification",
    "wide": "WideForSequenceClassification",
}

# Classes of transformers whose counterpart here has another name.
COUNTERPARTS: dict[str, str] = {
    "LlamaForCausalLM": "DecoderForCausalLM",
    "MistralForCausalLM": "DecoderForCausalLM",
    "Qwen2ForCausalLM": "DecoderForCausalLM",
}

# The module of each public name.
PLACES: dict[str, str] = {name: place for place, names in (FAMILIES | OTHERS).items() for name in names}


def is_model(name: str) -> bool:
    """Tells whether a public name is a model's, and not that of a config, an output or a function."""
    return name[0].isupper() and not name.endswith(("Config", "Output"))
