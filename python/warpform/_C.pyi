"""Facts about warpform's kernels, plans of their launches, and direct calls of the ops (csrc/python)."""

from collections.abc import Callable
from typing import Any

import torch

class Library:
    """What a library of warpform offers: the package's own, `library`, or the emulator's."""

    def __init__(self, path: str) -> None: ...
    def build_info(self) -> dict[str, str]: ...
    def kernel_table(self, device: str = "cuda") -> list[dict[str, Any]]: ...
    def ops(self) -> list[str]: ...
    def direct(
        self, op: str, fallback: Callable[..., Any], recorded: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """A call of the op past torch's dispatcher.

        `fallback` gets the arguments where the dispatcher is needed, and `recorded` where only gradients are wanted;
        None: `fallback` then too.
        """

    def supported(self, op: str, dtype: Any = None, device: Any = "cuda", **sizes: int) -> str | None: ...
    def launch_plan(self, op: str, *args: Any, **kwargs: Any) -> dict[str, Any]: ...

library: Library

def build_info() -> dict[str, str]:
    """The facts of the build: version, cuda, cuda_runtime, cuda_archs, hopper, torch_headers, compiler, sources."""

def kernel_table(device: str = "cuda") -> list[dict[str, Any]]:
    """Every configuration that has a kernel: op, dtype and the bounds of sizes.

    Args:
        device: "cuda", or "cpu" for the kernels of this process's CPU, which has none where its instruction set is too
            old or WARPFORM_CPU_ISA=0.

    Raises:
        ValueError: another device.
    """

def supported(
    op: str, dtype: torch.dtype | str | None = None, device: torch.device | str = "cuda", **sizes: int
) -> str | None:
    """Why no kernel serves an op, or None where one does.

    Args:
        op: a name of torch.ops.warpform.
        dtype: of the tensor that the kernels are chosen by; None for any.
        device: "cuda" asks about CUDA kernels in general, "cuda:0" about that GPU and its driver too, "cpu" about this
            process's CPU.
        sizes: by the names of `kernel_table`, such as head_dim=64; other names are not looked at.

    Raises:
        ValueError: an op or a kind of device that warpform does not have.
    """

def launch_plan(
    op: str, *args: Any, sm_count: int = 132, shared_memory_limit: int = 232448, **kwargs: Any
) -> dict[str, Any]:
    """What a call of torch.ops.warpform.OP with these arguments would launch.

    Args:
        op: a name of torch.ops.warpform.
        args, kwargs: the op's arguments. Of tensors only shape, strides and dtype are looked at: any device will do.
        sm_count, shared_memory_limit: of the GPU, the second in bytes that a block may ask for. An H100's by default.

    Returns:
        A dict about the first launch that works on tiles, or the first: kernel, tile (rows, columns, depth), stages,
        splits, grid, threads, shared_bytes, blocks_per_sm, registers_counted (whether a GPU said how many blocks an SM
        takes; else threads and shared memory bound it), waves; and launches, a list with one such dict for each launch
        in order. Where nothing is launched it has launches alone.

    Raises:
        TypeError, ValueError: what the op raises for the arguments; or ValueError with the reason, where no kernel
            serves them.
    """

def use_torch(
    tensor_type: type, parameter_type: type, grad_enabled: Callable[[], bool], from_handle: Callable[[Any], Any],
    frees_handle: bool,
    autograd_excluded: Callable[[], bool],
    busy: tuple[Callable[[], Any], ...],
    flags: tuple[tuple[dict[str, Any], str, Any], ...],
) -> None: ...  # fmt: skip
def set_open(open: bool) -> None: ...
