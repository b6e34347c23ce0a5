"""Draws docs/plots/ring-steps.svg: who holds what, and who computes what, at each step of a ring of four.

    python tools/ring_figure.py

Masks come from the code that ring attention runs by, so that the figure shows what it does.
"""

from __future__ import annotations

from pathlib import Path

import torch

from warpform.distributed._blocks import block_of
from warpform.distributed.layouts import LAYOUTS, positions_of

RANKS, ROWS = 4, 8
UNIT, CELL, LEFT, TOP = 7, 56, 104, 44
TARGET = Path(__file__).resolve().parent.parent / "docs" / "plots" / "ring-steps.svg"


def seen(layout: str, rank: int, source: int) -> torch.Tensor:
    """Which of the rank's queries meet which of the source's keys, bool [ROWS, ROWS]."""
    block = block_of(layout, True, rank, source, RANKS)
    pairs = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    if block is not None:
        half = ROWS // 2
        queries = slice(half if block.q_rows == "last" else 0, None)
        keys = slice(0, half if block.k_rows == "first" else None)
        rows = block.q_offset + torch.arange(ROWS)[:, None] * block.stride
        columns = block.k_offset + torch.arange(ROWS) * block.stride
        pairs[queries, keys] = ((columns <= rows) if block.causal else torch.ones_like(pairs))[queries, keys]
    return pairs


def check(layout: str) -> None:
    """All steps together are the causal mask of the whole sequence."""
    for rank in range(RANKS):
        for source in range(RANKS):
            queries, keys = (positions_of(r, RANKS, RANKS * ROWS, layout) for r in (rank, source))
            assert torch.equal(seen(layout, rank, source), keys <= queries[:, None]), (layout, rank, source)


def draw(layout: str, top: int) -> list[str]:
    """One panel: ranks downwards, steps to the right."""
    lines = [f'<text x="8" y="{top + 16}" class="t">{layout}</text>']
    for step in range(RANKS):
        x = LEFT + step * (CELL + 24)
        most = max(int(seen(layout, r, (r - step) % RANKS).sum()) for r in range(RANKS))
        lines.append(f'<text x="{x}" y="{top + 16}">step {step + 1}: {most}/{ROWS * ROWS}</text>')
        for rank in range(RANKS):
            source, y = (rank - step) % RANKS, top + TOP + rank * (CELL + 20)
            lines.append(f'<text x="{x}" y="{y - 4}">K, V of {source}</text>')
            lines.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" class="b"/>')
            path = ""
            for row, pairs in enumerate(seen(layout, rank, source).tolist()):
                if any(pairs):  # what a row sees begins with the first key
                    path += f"M{x} {y + row * UNIT}h{sum(pairs) * UNIT}v{UNIT}h-{sum(pairs) * UNIT}z"
            if path:
                lines.append(f'<path d="{path}"/>')
    for rank in range(RANKS):
        held = positions_of(rank, RANKS, RANKS * ROWS, layout).tolist()
        y = top + TOP + rank * (CELL + 20)
        lines.append(f'<text x="8" y="{y + 20}">rank {rank}</text>')
        lines.append(f'<text x="8" y="{y + 36}">tokens {held[0]}, {held[1]},</text>')
        lines.append(f'<text x="8" y="{y + 50}">... {held[-2]}, {held[-1]}</text>')
    return lines


def figure() -> str:
    """The whole figure as SVG."""
    panel = TOP + RANKS * (CELL + 20) + 16
    width, height = LEFT + RANKS * (CELL + 24), len(LAYOUTS) * panel
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        "<style>text{font:11px sans-serif;fill:#333}.t{font-weight:bold}.b{fill:#eee}path{fill:#2a78b5}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, layout in enumerate(LAYOUTS):
        check(layout)
        lines += draw(layout, number * panel)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(figure(), encoding="utf-8")
