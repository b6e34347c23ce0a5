"""The attention of a Swin you have, without moving windows: no roll, no partition, no mask, the same gradients.

`warpform.models.from_transformers` takes whole models. This is how to put the op into code of your own.
Run: python examples/swap_window_attention.py   (needs transformers 5.9 or later)
"""

import copy
import time
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification
from transformers.models.swin.modeling_swin import SwinLayer

import warpform


def forward(
    self: SwinLayer, hidden: Tensor, grid: tuple[int, int], always_partition: bool = False, **_: object
) -> tuple[Tensor, None]:
    """In place of SwinLayer.forward; hidden: [batch, height * width, channels]."""
    if not always_partition:
        self.set_shift_and_window_size(grid)
    attention, heads = self.attention, self.attention.num_attention_heads
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    normal = self.layernorm_before(hidden).unflatten(1, grid)
    context = warpform.ops.window_attention(
        F.linear(normal, weight, bias).unflatten(-1, (3, heads, -1)),  # [batch, height, width, 3, heads, head_dim]
        attention.relative_position_bias.relative_position_bias_table,
        window_size=int(self.window_size),
        shift_size=int(self.shift_size),
        qkv_bias=bias.view(3, heads, -1),  # what the model's zero padding becomes in the product above
    )
    hidden = hidden + self.drop_path(self.dropout(attention.o_proj(context).flatten(1, 2)))
    return hidden + self.dropout(self.mlp(self.layernorm_after(hidden))), None


torch.manual_seed(0)
model = SwinForImageClassification(SwinConfig(depths=(2, 2), num_heads=(3, 6))).eval()  # your weights here
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.normal_()  # zeros before training, which would show nothing

fused = copy.deepcopy(model)
for layer in fused.modules():
    if isinstance(layer, SwinLayer):
        layer.forward = MethodType(forward, layer)

images = torch.randn(4, 3, 224, 200)  # windows of 7 do not divide 56 x 50 tokens
logits = {}
for name, one in (("transformers", model), ("warpform", fused)):
    one(images)
    start = time.perf_counter()
    logits[name] = one(images).logits
    logits[name].sum().backward()
    print(f"{name:>12}: {1000 * (time.perf_counter() - start):.0f} ms forward and backward")


def difference(one: Tensor, other: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


gradients = [
    (ours.grad, parameter.grad, name)
    for ours, (name, parameter) in zip(fused.parameters(), model.named_parameters(), strict=True)
    # The same number added to a whole row of scores changes nothing: this gradient is rounding alone.
    if not name.endswith("k_proj.bias")
]
worst = max((difference(ours, theirs), name) for ours, theirs, name in gradients)
print(f"largest difference of a logit {difference(logits['warpform'], logits['transformers']):.1e}")
print(f"largest difference of a gradient {worst[0]:.1e}, of {worst[1]}")
assert worst[0] < 1e-3
