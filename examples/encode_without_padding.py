"""The ops themselves: attention over three sequences of different lengths, with no padding anywhere.

Run: python examples/encode_without_padding.py
"""

import torch

import warpform

heads, head_dim = 4, 32
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

# A padded batch as a tokenizer makes it: lengths 5, 2 and 3.
mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], device=device)
padded = torch.randn(3, 5, 3 * heads * head_dim, device=device, dtype=dtype)

# Its 10 tokens laid end to end.
packing = warpform.Packing.from_mask(mask)
qkv = packing.pack(padded).view(packing.total, 3, heads, head_dim)

with torch.inference_mode():
    out = warpform.ops.varlen_attention(
        *qkv.unbind(1), packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen
    )
    print("packed:", list(out.shape), "of", mask.numel(), "places,", packing.total, "hold a token")

    # And back, zeros where there was padding.
    print("padded:", list(packing.unpack(out.flatten(1)).shape))
