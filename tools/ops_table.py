"""Writes the table of ops in docs/ops.md from the registry of ops and the library's table of kernels.

    python tools/ops_table.py          writes it in place
    python tools/ops_table.py --check  exits 1 where it would change something

The library must have been built with kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from report.readme import replace  # noqa: E402

HEADER = [
    "| op | CPU, all but float64 | CUDA float16, bfloat16 | CUDA float32 | CUDA float64 | what CUDA kernels take "
    "| what CPU kernels take |",
    "|---|---|---|---|---|---|---|",
]
KERNEL, REFERENCE, SILENT = "kernel", "reference, with a warning", "reference"
NAMES = {
    "block_sizes": "sizes of blocks",
    "max_taps": "taps",
    "max_pool_size": "pool_size",
    "max_kernel_size": "taps along an axis",
    "max_cols": "columns",
    "num_groups": "groups",
    "window_tokens": "tokens of a window",
}


def table(ops: Iterable[Any], kernels: list[dict[str, Any]], cpu_kernels: list[dict[str, Any]]) -> list[str]:
    """Lines of the table: a row for each op that is not the backward of another.

    ops: `RegisteredOp`s. kernels: rows of `_kernel_table`. cpu_kernels: rows of `_cpu_kernel_table`.
    """
    ops = list(ops)
    names = {op.name for op in ops}
    lines = list(HEADER)
    for op in ops:
        if op.name.endswith("_backward"):
            continue
        rows, cpu_rows = ([row for row in some if row["op"] == op.name] for some in (kernels, cpu_kernels))
        backward = f"{op.name}_backward" in names
        for some in (kernels, cpu_kernels) if backward else ():
            forward, back = (
                {str(row.get("dtype")) for row in some if row["op"] == name}
                for name in (op.name, f"{op.name}_backward")
            )
            if forward != back:
                raise ValueError(f"{op.name} has kernels for other dtypes than its backward: the table needs two rows")
        cells = [_backend(rows, dtypes) for dtypes in (("float16", "bfloat16"), ("float32",), ("float64",))]
        on_cpu = _backend(cpu_rows, ("float32", "float16", "bfloat16"), otherwise=SILENT)
        label = f"`{op.name}`" + (", `_backward`" if backward else "")
        limits = [_limits(rows), _limits(cpu_rows) if cpu_rows else ""]
        lines.append(f"| {' | '.join([label, on_cpu, *cells, *limits])} |")
    return lines


def _backend(rows: list[dict[str, Any]], dtypes: tuple[str, ...], otherwise: str = REFERENCE) -> str:
    """Names the backend for tensors of these dtypes; rows without a floating-point dtype serve an op that has none."""
    found = {str(row.get("dtype", "any")) for row in rows}
    floating = any(dtype.startswith(("float", "bfloat")) for dtype in found)
    return KERNEL if rows and (not floating or set(dtypes) <= found) else otherwise


def _limits(rows: list[dict[str, Any]]) -> str:
    """The sizes that the kernels take, in words."""
    parts: list[str] = []
    for key, value in (rows[0] if rows else {}).items():
        if key in ("op", "dtype", "parameter_dtypes", "approximate", "tile"):
            continue
        name = NAMES.get(key, key)
        value = value if isinstance(value, dict) else {"max": value}
        words = [f"a multiple of {value['multiple_of']}"] if "multiple_of" in value else []
        most = value.get("max", value.get("most"))
        words += [f"up to {most}"] if most is not None else []
        parts.append(f"{name} {', '.join(words)}")
    return "; ".join(parts) or "any size"


def main(arguments: list[str]) -> int:
    sys.path.insert(0, str(ROOT / "python"))
    from warpform import _library
    from warpform.ops import _register

    page = ROOT / "docs" / "ops.md"
    kernels = _library.kernel_table()
    if not kernels or not _library.kernel_table("cpu"):
        print("ops_table: needs a build with nvcc (make build) and a CPU that has kernels", file=sys.stderr)
        return 2
    text = page.read_text(encoding="utf-8")
    new = replace(text, "ops", table(_register.ops().values(), kernels, _library.kernel_table("cpu")))
    if "--check" in arguments:
        print("ops_table: docs/ops.md is current" if new == text else "ops_table: run python tools/ops_table.py")
        return int(new != text)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
