"""One sequence over several processes: exact causal attention, and its gradients, without any of them holding it whole.

    torchrun --nproc-per-node 4 examples/ring_attention.py

Over gloo here, which needs no GPU. On a machine with GPUs use NCCL, one GPU a process, and the same calls.
"""

import os
import tempfile

import torch
import torch.distributed as dist

from warpform.distributed import ring_attention, shard_positions, shard_sequence, unshard_sequence

torch.set_num_threads(1)
if "RANK" in os.environ:  # torchrun
    dist.init_process_group("gloo")
else:  # called plainly: a ring of one
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)
group = dist.group.WORLD
rank, size = dist.get_rank(), dist.get_world_size()

# Every rank makes the whole sequence from one seed, as a data loader would read it, and keeps its own tokens.
torch.manual_seed(0)
batch, length, heads, kv_heads, head_dim = 1, 64 * size, 8, 2, 32
q, k, v = (torch.randn(batch, length, h, head_dim) for h in (heads, kv_heads, kv_heads))
own_q, own_k, own_v = (shard_sequence(t, group=group, dim=1).requires_grad_() for t in (q, k, v))
positions = shard_positions(length, group=group)  # for rotary embeddings

# Keys and values go around the ring while each rank attends to those it has. In training this is a layer's attention.
out = ring_attention(own_q, own_k, own_v, group=group, causal=True, timeout=60.0)
out.square().mean().backward()
print(
    f"rank {rank} of {size}: tokens {positions[0]} to {positions[-1]}, {out.numel()} of {q.numel()} outputs", flush=True
)

# What one process would have computed.
whole = unshard_sequence(out.detach(), group=group, dim=1)
q, k, v = (t.transpose(1, 2) for t in (q, k, v))
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
difference = (whole - expected).abs().max().item()
assert difference < 1e-5, difference
if rank == 0:
    print(f"largest difference from one process: {difference:.1e}")
dist.destroy_process_group()
