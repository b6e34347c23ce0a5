"""A whole encoder as one compiled graph for all sizes, and as one CUDA graph for all batches of a capacity.

The second part needs a GPU; without one the script says so and ends well.

Run: python examples/compile_and_cuda_graph.py   (compiling needs a C++ compiler, on a GPU Triton)
"""

from pydoc_data.topics import topics

import torch

import warpform
from warpform.models import BertConfig, BertModel

BATCH, SEQLEN = 8, 512
CAPACITY = BATCH * SEQLEN * 3 // 4  # rows of the captured graph: the tokens of every batch that it will serve must fit

torch.manual_seed(0)
torch.set_num_threads(min(torch.get_num_threads(), 4))
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

# Random weights, for an example that needs no package beside torch. A token is a byte, 0 is padding.
config = BertConfig(
    vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
    max_position_embeddings=SEQLEN,
)  # fmt: skip
model = BertModel(config).to(device, dtype).eval()
paragraphs = [p.encode()[:SEQLEN] for _, topic in sorted(topics.items()) for p in topic.split("\n\n") if p]


def padded(texts: list[bytes]) -> torch.Tensor:
    """ids [texts, SEQLEN]."""
    return torch.tensor([list(text.ljust(SEQLEN, b"\0")) for text in texts], device=device)


# 1. Compiled without a break (fullgraph), and once for all sizes (dynamic): a second compilation would raise here.
compiled = torch.compile(model, fullgraph=True, dynamic=True)
stance = "default"
with torch.inference_mode():
    for count in (8, 3, 5):
        ids = padded(paragraphs[count : 2 * count])
        packing = warpform.Packing.from_mask(ids != 0)  # waits for the device once, to read the number of tokens
        with torch.compiler.set_stance(stance):
            out = compiled(packing.pack(ids), packing=packing).last_hidden_state
        stance = "fail_on_recompile"
        difference = (out - model(packing.pack(ids), packing=packing).last_hidden_state).abs().max()
        print(f"compiled: {packing.total} tokens of {ids.numel()} places, largest difference {difference:.1e}")

if device == "cpu":
    print("a CUDA graph needs a GPU; this machine has none that torch can use")
    raise SystemExit(0)

# 2. A CUDA graph replays the same kernels at the same addresses. With a capacity every tensor has one size whatever the
# batch holds, and the host reads nothing, so the lengths may change from one replay to the next.
ids = padded(paragraphs[:BATCH])


def encode() -> torch.Tensor:
    packing = warpform.Packing.from_mask(ids != 0, capacity=CAPACITY)
    return packing.unpack(model(packing.pack(ids), packing=packing).last_hidden_state)  # [BATCH, SEQLEN, hidden]


with torch.inference_mode():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first call must not be part of the graph
        encode()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = encode()

    for start in (BATCH, 2 * BATCH):
        ids.copy_(padded(paragraphs[start : start + BATCH]))  # new text, into the place that the graph reads
        graph.replay()
        assert torch.equal(captured, encode())
        print(f"replayed: {int((ids != 0).sum())} tokens of {ids.numel()} places, the same bits as without a graph")
