"""A training step without padding from end to end: a small BERT learns to fill gaps in CPython's help topics.

Texts are laid end to end as they are; attention sees where each begins, and only masked tokens go through the decoder.

Run: python examples/train_masked_lm.py
"""

import collections
import math
import re
import time
from pydoc_data.topics import topics

import torch

import warpform
from warpform.models import BertConfig, BertForMaskedLM

STEPS, BATCH_TOKENS, VOCABULARY = 100, 2048, 1000
UNKNOWN, MASK = 0, 1

torch.manual_seed(0)
torch.set_num_threads(min(torch.get_num_threads(), 4))

# Real text, a paragraph at a time: some are 8 tokens long and some 100.
paragraphs = [p for _, topic in sorted(topics.items()) for p in topic.split("\n\n")]
words = [re.findall(r"\w+|[^\w\s]", p.lower())[:100] for p in paragraphs]
words = [w for w in words if len(w) >= 8]
common = [word for word, _ in collections.Counter(x for w in words for x in w).most_common(VOCABULARY - 2)]
number = {word: i for i, word in enumerate(common, 2)}
texts = [torch.tensor([number.get(x, UNKNOWN) for x in w]) for w in words]
held_out, texts = texts[::10], [text for i, text in enumerate(texts) if i % 10]

config = BertConfig(
    vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
    max_position_embeddings=128, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
)  # fmt: skip
device = "cuda" if torch.cuda.is_available() else "cpu"
model = BertForMaskedLM(config).to(device)


def masked(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, warpform.Packing]:
    """ids and labels [total]: of 15 % of the tokens the model sees a mask, and is asked for them."""
    ids = torch.cat(batch).to(device)
    chosen = (torch.rand(ids.shape, device=device) < 0.15) & (ids != UNKNOWN)
    packing = warpform.Packing.from_lengths([len(text) for text in batch], device=device)
    return ids.masked_fill(chosen, MASK), ids.masked_fill(~chosen, -100), packing


def held_out_loss() -> float:
    torch.manual_seed(1)
    ids, labels, packing = masked(held_out)
    with torch.inference_mode():
        return model.eval()(ids, labels=labels, packing=packing, return_logits=False).loss.item()


# What guessing by frequency alone would give: a model below it reads the context.
counts = torch.cat(texts).bincount(minlength=VOCABULARY).float()
counts[UNKNOWN] = 0
probabilities = (counts + 1) / (counts + 1).sum()
_, labels, _ = masked(held_out)
frequency = -probabilities[labels[labels >= 0].cpu()].log().mean().item()

optimizer = torch.optim.AdamW(model.parameters())
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
before, start, tokens = held_out_loss(), time.perf_counter(), 0
for step in range(STEPS):
    model.train()
    batch: list[torch.Tensor] = []
    while sum(map(len, batch)) < BATCH_TOKENS:
        batch.append(texts[int(torch.randint(len(texts), ()))])
    ids, labels, packing = masked(batch)
    loss = model(ids, labels=labels, packing=packing, return_logits=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    tokens += len(ids)
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.2f}, {tokens / (time.perf_counter() - start):,.0f} tokens/s")

after = held_out_loss()
print(f"held-out loss {before:.2f} -> {after:.2f}; uniform {math.log(VOCABULARY):.2f}, by frequency {frequency:.2f}")
