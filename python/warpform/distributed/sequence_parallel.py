"""Training a transformer whose sequences are shared by several ranks (arXiv 2105.13120), with data parallelism around.

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "sequence"))
    plan = SequenceParallel.from_mesh(mesh)
    model = plan.apply(model)                                # rings in its attention, weights of the first rank
    ids, labels = plan.shard(ids), plan.shard(labels)        # [B, L] of this replica -> [B, L / N]
    model(ids, labels).loss.backward()                       # the mean over every label of every rank
    plan.reduce_gradients(model)                             # then the optimizer's step

Every rank holds all weights (but what grows with the sequence, see `SEQUENCE_DIM`) and some rows of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn._product import apply_linear
from ..nn.rotary import apply_rotary
from ..ops import _check
from ..ops._dtypes import accumulation_dtype
from .layouts import check_layout, shard_positions, shard_sequence, unshard_sequence
from .linformer import linformer_attention
from .ring_attention import ring_attention
from .rsa import rsa_attention

ATTENTIONS = ("ring", "rsa", "linformer")
# The name of an attribute of parameters with a dimension that is the sequence; its value is that dimension. The plan
# cuts them along it, so that nothing a rank holds grows with the whole sequence.
SEQUENCE_DIM = "sequence_dim"
# Gradients are summed in buckets of this many bytes, as torch's DistributedDataParallel does.
BUCKET = 25 << 20


class SequenceParallelAttention(nn.Module):
    """Self-attention over sequences that ranks share; without a plan over all there is.

    Args:
        hidden_size, num_heads, num_kv_heads: sizes; num_kv_heads None is num_heads.
        causal: a row sees itself and those before it.
        attention: "ring", "rsa" or "linformer".
        linformer_rank, max_seqlen: K and L of Linformer's two projections [K, L].
    """

    key_projection: nn.Parameter
    value_projection: nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        causal: bool = False,
        attention: str = "ring",
        linformer_rank: int = 256,
        max_seqlen: int | None = None,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_dim = hidden_size // num_heads
        self.causal, self.attention = causal, attention
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.out = nn.Linear(num_heads * self.head_dim, hidden_size)
        self.plan: SequenceParallel | None = None
        if attention == "linformer":
            if max_seqlen is None or causal:
                raise ValueError("linformer attention must have max_seqlen, and must not be causal")
            for name in ("key_projection", "value_projection"):
                # Rows of K sums over L: a variance of 1 / L keeps what they sum at its size.
                parameter = nn.Parameter(torch.randn(linformer_rank, max_seqlen) * max_seqlen**-0.5)
                setattr(parameter, SEQUENCE_DIM, 1)
                self.register_parameter(name, parameter)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
        """hidden: [B, L/N, hidden]; rotary: cosines and sines [L/N, D / 2] of these rows as `nn.rotary` makes
        them, or None.

        Returns the output [B, L/N, hidden], and None: no bias is left to add.
        """
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q, k, v = (
            apply_linear(hidden, self.qkv).unflatten(-1, (-1, self.head_dim)).split(heads, dim=2)
        )  # [B, L/N, heads, D]
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        return apply_linear(self.attend(q, k, v).flatten(2), self.out), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, L/N, H, D], k and v: [B, L/N, Hkv, D]; returns [B, L/N, H, D]."""
        plan = self.plan
        if self.attention == "linformer":
            group = None if plan is None else plan.group
            timeout = None if plan is None else plan.timeout
            return linformer_attention(
                q, k, v, self.key_projection, self.value_projection, group=group, timeout=timeout
            )
        if plan is None:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            grouped = self.num_kv_heads != self.num_heads
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=grouped)
            return out.transpose(1, 2)
        function = ring_attention if self.attention == "ring" else rsa_attention
        return function(q, k, v, group=plan.group, causal=self.causal, layout=plan.layout, timeout=plan.timeout)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, attention={self.attention}"
        )


class SequenceParallel:
    """Which ranks share a sequence, which hold other sequences, and what to do so that the sum of all is one training.

    Args:
        group: the ranks that share sequences, each some rows of every sequence. Neighbours in it exchange most.
        data_group: the ranks that hold the same rows of other sequences; None: there are none.
        layout: which rows each rank holds, "zigzag", "striped" or "contiguous"; zigzag and striped give all ranks the
            same work where attention is causal.
        timeout: seconds that a message of attention may take; None: the group's own, as of all else.

    Raises:
        TypeError: group or data_group is not a process group.
        ValueError: an unknown layout.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        data_group: dist.ProcessGroup | None = None,
        layout: str = "zigzag",
        timeout: float | None = None,
    ) -> None:
        for name, one in (("group", group), ("data_group", data_group)):
            if not isinstance(one, dist.ProcessGroup) and (one is not None or name == "group"):
                raise TypeError(f"SequenceParallel: {name} must be a ProcessGroup, got {_check.describe(one)}")
        check_layout("SequenceParallel", layout)
        self.group, self.data_group, self.layout, self.timeout = group, data_group, layout, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.data_size = 1 if data_group is None else dist.get_world_size(data_group)
        self.data_rank = 0 if data_group is None else dist.get_rank(data_group)

    @classmethod
    def from_mesh(
        cls, mesh: Any, *, sequence: str = "sequence", data: str | None = "data", **how: Any
    ) -> SequenceParallel:
        """From a DeviceMesh with dimensions of these names; without one named `data` there is no data parallelism.

        Raises:
            ValueError: no dimension of the name `sequence`.
        """
        names = tuple(mesh.mesh_dim_names or ())
        if sequence not in names:
            raise ValueError(f"SequenceParallel: mesh must have a dimension {sequence!r}, got {names}")
        data_group = mesh.get_group(data) if data in names else None
        return cls(mesh.get_group(sequence), data_group=data_group, **how)

    # ---- inputs ----

    def shard(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """This rank's rows of whole sequences, the same ones of tokens, labels and masks. x: [B, L, ...] by default.

        Raises:
            ValueError: a length that the layout cannot divide.
        """
        return shard_sequence(x, group=self.group, dim=dim, layout=self.layout)

    def shard_batch(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """The same of a batch of all replicas, [D * B, L, ...]: of this replica's B sequences this rank's rows.

        Raises:
            ValueError: a batch or a length that does not divide.
        """
        if x.shape[0] % self.data_size:
            raise ValueError(
                f"SequenceParallel: x must be of a batch that {self.data_size} replicas divide, got {list(x.shape)}"
            )
        return self.shard(x.chunk(self.data_size)[self.data_rank], dim=dim)

    def positions(self, seqlen: int, *, device: torch.device | str | None = None) -> Tensor:
        """int64 [L/N]: where in a sequence of seqlen tokens this rank's rows are."""
        return shard_positions(seqlen, group=self.group, layout=self.layout, device=device)

    # ---- the model ----

    def apply(self, model: nn.Module) -> nn.Module:
        """Makes attention go around the ring, in place, and gives every rank the weights of the first.

        What is as long as the sequence (Linformer's projections) is cut: each rank keeps its part. Parameters stay the
        objects that they were.

        Raises:
            ValueError: no module of the model takes a plan, or one has a plan already.
        """
        takers = [module for module in model.modules() if hasattr(module, "plan")]
        if not takers:
            raise ValueError(
                f"SequenceParallel: model must have attention that takes a plan (SequenceParallelAttention), got "
                f"{type(model).__name__}"
            )
        if any(module.plan is not None for module in takers):
            raise ValueError("SequenceParallel: model must be without a plan, got one that has been applied before")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                self._broadcast(tensor)
            for parameter, dim in self._sharded(model):
                parameter.data = self.shard(parameter.data, dim=dim).contiguous()
        for module in takers:
            module.plan = self  # type: ignore[assignment]
        return model

    def _broadcast(self, tensor: Tensor) -> None:
        whole = tensor.contiguous()
        for group in filter(None, (self.group, self.data_group)):
            dist.broadcast(whole, group=group, group_src=0)
        tensor.copy_(whole)

    @staticmethod
    def _sharded(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
        for parameter in model.parameters():
            dim = getattr(parameter, SEQUENCE_DIM, None)
            if dim is not None:
                yield parameter, dim

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of the model with what was cut put together again, on every rank; it loads without a plan.

        Raises:
            ValueError: as `unshard_sequence`.
        """
        cut = {name: getattr(p, SEQUENCE_DIM, None) for name, p in model.named_parameters(remove_duplicate=False)}
        state = {}
        for name, value in model.state_dict().items():
            dim = cut.get(name)
            state[name] = (
                value.detach().clone()
                if dim is None
                else unshard_sequence(value.detach(), group=self.group, dim=dim, layout=self.layout)
            )
        return state

    # ---- loss and gradients ----

    def mean(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean over all ranks: the sum of every rank's total over the sum of every rank's count.

        Its gradient on a rank is that of the rank's own total, so that gradients are to be summed over ranks, not
        averaged: `reduce_gradients`. For a wrapper that averages (DistributedDataParallel over all ranks) multiply the
        loss by their number.

        Args:
            total: a sum over this rank's rows, a scalar.
            count: how many there were, a scalar without gradient.

        Returns:
            A scalar, the same on all ranks; 0 if there was nothing to count.
        """
        return _Mean.apply(total, count, self)

    def reduce_gradients(self, model: nn.Module) -> None:
        """Sums the gradients of all ranks, in float32 at the least: of parameters that every rank holds over all of
        them, of those that were cut only over replicas. A parameter without a gradient counts as 0, for it may have one
        elsewhere.
        """
        cut = {id(parameter) for parameter, _ in self._sharded(model)}
        shared = [p for p in model.parameters() if p.requires_grad and id(p) not in cut]
        own = [p for p in model.parameters() if p.requires_grad and id(p) in cut]
        self._sum_gradients(shared, [self.group, self.data_group])
        self._sum_gradients(own, [self.data_group])

    @staticmethod
    @torch.no_grad()
    def _sum_gradients(parameters: list[nn.Parameter], groups: list[dist.ProcessGroup | None]) -> None:
        found = [group for group in groups if group is not None and dist.get_world_size(group) > 1]
        if not found:
            return
        for bucket in _buckets(parameters):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in bucket if p.grad is not None]
            dtype = accumulation_dtype(gradients[0].dtype)
            flat = torch.cat([g.flatten().to(dtype) for g in gradients])
            for group in found:
                dist.all_reduce(flat, group=group)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, plan: SequenceParallel) -> Tensor:
        both = torch.stack([total.detach().double(), count.detach().double()])  # whose integers are exact to 2^53
        for group in filter(None, (plan.group, plan.data_group)):
            dist.all_reduce(both, group=group)
        summed, counted = both[0], torch.where(both[1] == 0, 1, both[1])
        ctx.save_for_backward(counted)
        return (summed / counted).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (count,) = ctx.saved_tensors
        return (gradient / count).to(gradient.dtype), None, None


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """In order, those of one dtype and device together, up to BUCKET bytes."""
    found: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        alike = not found or (p.dtype == found[0].dtype and p.device == found[0].device)
        if found and (not alike or size + p.nbytes > BUCKET):
            yield found
            found, size = [], 0
        found.append(p)
        size += p.nbytes
    if found:
        yield found
