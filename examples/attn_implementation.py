"""Attention without padding in a transformers model, by the name of an attention implementation.

Run: python examples/attn_implementation.py   (needs transformers)
"""

import torch
import transformers

import warpform

warpform.integrations.transformers.register()

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

# Random weights, for an example that downloads nothing; from_pretrained takes attn_implementation too.
torch.manual_seed(0)
config = transformers.MistralConfig(
    vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2,
    intermediate_size=256, sliding_window=32,
)  # fmt: skip
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="warpform")
model = model.to(device, dtype).eval()

# Four prompts, padded on the left as for generation.
lengths = torch.tensor([64, 3, 17, 40], device=device)
mask = (torch.arange(64, device=device) >= 64 - lengths.unsqueeze(1)).long()
ids = torch.randint(3, 1000, mask.shape, device=device)

with torch.inference_mode():
    ours = model(ids, attention_mask=mask).logits[mask.bool()]
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    theirs = model(ids, attention_mask=mask).logits[mask.bool()]

print(f"{mask.sum()} tokens in {mask.numel()} places; largest difference from sdpa {(ours - theirs).abs().max():.1e}")
print("generated", tokens[:, 64:].tolist())
