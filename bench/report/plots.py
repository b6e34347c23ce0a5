"""Plots (SVG) of a family of workloads on one device: how long each peer takes, in times of warpform's time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

# Apart for eyes that see fewer colours too (Okabe and Ito); greys are warpform's own other modes.
PEER_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")
OWN_COLOURS = ("#4d4d4d", "#9a9a9a")
INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"
BAR = 0.12  # inches
LINE = 0.14  # inches of a line of a row's label


@dataclass
class Cell:
    """One workload in one direction."""

    own_us: float  # warpform's median
    times_us: dict[str, float] = field(default_factory=dict)  # of every other provider that was timed


@dataclass
class Figure:
    """Cells by row (what is computed, at which sizes) and direction, a column each."""

    title: str  # what, and on which machine
    source: str  # dtype, versions, date, commit
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)

    @property
    def directions(self) -> list[str]:
        return list(dict.fromkeys(d for cells in self.rows.values() for d in cells))

    def providers(self) -> list[str]:
        """The peers that come closest to warpform or pass it, fastest first, and then warpform's own other modes."""
        ratios: dict[str, list[float]] = {}
        for cells in self.rows.values():
            for cell in cells.values():
                for provider, time in cell.times_us.items():
                    ratios.setdefault(provider, []).append(time / cell.own_us)
        order = sorted(ratios, key=lambda provider: statistics.median(ratios[provider]))
        own = [provider for provider in order if provider.startswith("warpform")]
        return [p for p in order if p not in own][: len(PEER_COLOURS)] + own[: len(OWN_COLOURS)]

    def extent(self, providers: list[str]) -> tuple[float, float]:
        """The logarithms to base 2 of the least and the largest ratio; 1 is among them."""
        ratios = [1.0]
        for cells in self.rows.values():
            for cell in cells.values():
                ratios += [cell.times_us[p] / cell.own_us for p in providers if p in cell.times_us]
        return math.log2(min(ratios)), math.log2(max(ratios))


def _powers_of_two(low: float, high: float) -> list[float]:
    """Ticks between two logarithms: 1 and every power, or every second, third, ... so that they stay few."""
    step = math.ceil((high - low + 1) / 6)
    return [2.0**i for i in range(math.floor(low) - 1, math.ceil(high) + 2) if i % step == 0]


def duration(us: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def draw(path: Path, figure: Figure) -> bool:
    """Writes the figure; False where there is nothing to compare with."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    providers, directions = figure.providers(), figure.directions
    if not providers:
        return False
    style = {
        "svg.hashsalt": "warpform",  # the same picture from the same rows, byte for byte
        "svg.fonttype": "none",  # text stays text: smaller, and can be searched
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 8,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    lines = max(label.count("\n") + 1 for label in figure.rows)
    slot = max(BAR * (len(providers) + 1.2), LINE * (lines + 0.6))  # inches of one row
    top = slot * len(figure.rows) + 1.2  # inches of the whole
    with pyplot.rc_context(style):
        # A paper of its own, so that dark pages show it as light ones do.
        canvas, panels = pyplot.subplots(
            1, len(directions), figsize=(10, top), sharex=True, sharey=True, squeeze=False, facecolor=PAPER
        )
        low, high = figure.extent(providers)
        room = 0.1 * (high - low) + 0.15  # for the numbers beside the longest bars
        panels[0][0].set_xscale("log", base=2)
        panels[0][0].set_xlim(2 ** (low - room), 2 ** (high + room))
        panels[0][0].xaxis.set_major_locator(ticker.FixedLocator(_powers_of_two(low, high)))
        for axes, direction in zip(panels[0], directions, strict=True):
            _panel(axes, figure, direction, providers, slot)
        handles, names = panels[0][0].get_legend_handles_labels()
        canvas.suptitle(figure.title, x=0.01, y=1 - 0.12 / top, ha="left", va="top", fontsize=11, fontweight="bold")
        canvas.text(0.01, 1 - 0.36 / top, figure.source, ha="left", va="top", fontsize=7, color=FAINT)
        canvas.legend(
            handles, names, loc="upper left", bbox_to_anchor=(0.005, 1 - 0.5 / top), ncols=len(names), frameon=False,
            fontsize=8, handlelength=1, columnspacing=1.4,
        )  # fmt: skip
        canvas.tight_layout(rect=(0.01, 0, 0.95, 1 - 0.52 / top), w_pad=5)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, metadata={"Date": None}, facecolor=PAPER)
        pyplot.close(canvas)
    return True


def _panel(axes: object, figure: Figure, direction: str, providers: list[str], slot: float) -> None:
    """Bars from 1, which is warpform, to a peer's ratio, on a scale where twice and half are as far."""
    from matplotlib import ticker
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    thick = BAR / slot
    colours = {
        **dict(zip((p for p in providers if not p.startswith("warpform")), PEER_COLOURS, strict=False)),
        **dict(zip((p for p in providers if p.startswith("warpform")), OWN_COLOURS, strict=False)),
    }
    for i, provider in enumerate(providers):
        places, widths = [], []
        for j, cells in enumerate(figure.rows.values()):
            cell = cells.get(direction)
            if cell is not None and provider in cell.times_us:
                places.append(j + (i - (len(providers) - 1) / 2) * thick)
                widths.append(cell.times_us[provider] / cell.own_us)
        label = provider.replace("_", " ")
        axes.barh(places, [w - 1 for w in widths], 0.86 * thick, left=1, color=colours[provider], label=label)
        for place, ratio in zip(places, widths, strict=True):
            right = ratio >= 1
            axes.annotate(
                f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×", (ratio, place), (2 if right else -2, 0),
                textcoords="offset points", ha="left" if right else "right", va="center", fontsize=6,
            )  # fmt: skip
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:.2g}×" if x < 1 else f"{x:g}×"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_yticks(range(len(figure.rows)), list(figure.rows), fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(figure.rows) - 0.5, -0.5)
    for j in range(1, len(figure.rows)):
        axes.axhline(j - 0.5, color="#eaeef2", linewidth=0.6)
    axes.set_title(direction, fontsize=9, loc="left")
    axes.text(1.02, 1.0, "warpform", transform=axes.transAxes, ha="left", va="bottom", fontsize=7, color=FAINT)
    for j, cells in enumerate(figure.rows.values()):
        cell = cells.get(direction)
        axes.text(
            1.02, j, "not run" if cell is None else duration(cell.own_us), transform=axes.get_yaxis_transform(),
            ha="left", va="center", fontsize=7, color=FAINT,
        )  # fmt: skip
    axes.set_xlabel("peer's time / warpform's; right of 1×: warpform is faster", fontsize=7)
