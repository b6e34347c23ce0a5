"""`python -m warpform ring-model`: what ring attention would take over N ranks, modelled from measured numbers."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cost_model import (
    DIRECTIONS,
    LAYOUTS,
    Cluster,
    Link,
    Prediction,
    StepTime,
    Workload,
    overlap_chunk,
    predict,
)

DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
MOST_RANKS = 4096
LABEL = "modelled, not measured"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m warpform ring-model",
        description="Time, overlap and memory a rank of ring attention over N ranks: modelled, from numbers that you "
        "measured (--tflops or --t-attn, and --alpha-us and --gbs), or that --measure takes on this machine over gloo.",
    )
    work = made.add_argument_group("the attention")
    work.add_argument(
        "--seqlen", type=_count, default=131072, help="tokens of all ranks together (default %(default)s)"
    )
    work.add_argument("--heads", type=_count, default=32)
    work.add_argument("--kv-heads", type=_count, help="default: as many as heads")
    work.add_argument("--head-dim", type=_count, default=128)
    work.add_argument("--batch", type=_count, default=1)
    work.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    work.add_argument("--full", action="store_true", help="not causal")
    work.add_argument("--layout", choices=LAYOUTS, default="zigzag")
    work.add_argument("--direction", choices=DIRECTIONS, default="forward+backward")
    work.add_argument("--ranks", type=_ranks, help="such as 2,4,8; default: powers of two that divide the sequence")
    device = made.add_argument_group("one device, measured")
    device.add_argument("--tflops", type=_positive, help="of attention forward, in 10^12 FLOP/s")
    device.add_argument("--tflops-backward", type=_positive, help="default: as forward")
    device.add_argument(
        "--t-attn", type=_positive, help="instead: seconds of a step of all --at-chunk x --at-chunk pairs"
    )
    device.add_argument("--t-attn-backward", type=_positive, help="default: 2.5 times --t-attn")
    device.add_argument("--at-chunk", type=_count, help="rows of that step")
    device.add_argument("--overhead-us", type=_time, default=0.0, help="of a step, whatever its size")
    device.add_argument("--memory-gbs", type=_rate, default=math.inf, help="10^9 bytes/s at which the state is carried")
    link = made.add_argument_group("a hop, measured: alpha + bytes / beta, each way at once")
    link.add_argument("--alpha-us", type=_time)
    link.add_argument("--gbs", type=_positive, help="beta in 10^9 bytes/s")
    link.add_argument("--between-alpha-us", type=_time, help="between nodes")
    link.add_argument("--between-gbs", type=_positive, help="between nodes")
    link.add_argument("--ranks-per-node", type=_count)
    link.add_argument("--processors", type=_count, help="devices, where several ranks take turns on one")
    out = made.add_argument_group("what comes out")
    out.add_argument("--measure", action="store_true", help="measure a device and a hop here: two processes over gloo")
    out.add_argument("--json", action="store_true", help="instead of the table")
    out.add_argument("--plot", type=Path, metavar="FILE.svg", help="throughput kept over N, for each layout")
    return made


def _number(text: str, kind: Callable[[str], float], fits: Callable[[float], bool], what: str) -> Any:
    try:
        value = kind(text)
        if fits(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")


def _count(text: str) -> int:
    return int(_number(text, int, lambda x: x >= 1, "a whole number from 1"))


def _positive(text: str) -> float:
    return float(_number(text, float, lambda x: 0 < x < math.inf, "a number above 0"))


def _time(text: str) -> float:
    return float(_number(text, float, lambda x: 0 <= x < math.inf, "a number from 0"))


def _rate(text: str) -> float:
    return float(_number(text, float, lambda x: x > 0, "a number above 0, or inf"))


def _ranks(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1 with commas between, got {text!r}")
    return found


def main(argv: Sequence[str]) -> int:
    """Prints the table or the JSON; exit status 0, or 2 where the arguments do not fit together."""
    options = parser().parse_args(argv)
    try:
        work = Workload(
            options.seqlen,
            options.heads,
            options.head_dim,
            options.kv_heads,
            options.batch,
            DTYPES[options.dtype],
            not options.full,
            options.layout,
        )
        cluster = cluster_from(options, work)
        ranks = options.ranks or default_ranks(work)
        predictions = [predict(work, cluster, n, options.direction) for n in ranks]
        if options.plot is not None:
            plot(options.plot, work, cluster, ranks, options.direction)
    except (ValueError, ImportError) as error:
        print(f"ring-model: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(report(work, cluster, predictions, options.direction), indent=2))
    else:
        print("\n".join(table(work, cluster, predictions, options.direction)))
        if options.plot is not None:
            print(f"plot: {options.plot}")
    return 0


def cluster_from(options: argparse.Namespace, work: Workload) -> Cluster:
    """Makes the cluster of the measurements that the options give.

    Raises:
        ValueError: a number that is needed is missing.
    """
    if options.measure:
        from .measure import measure_here

        return measure_here(work, options.dtype)
    if options.alpha_us is None or options.gbs is None:
        raise ValueError("--alpha-us and --gbs are needed, or --measure")
    overhead, memory = options.overhead_us * 1e-6, options.memory_gbs * 1e9
    if options.t_attn is not None:
        if options.at_chunk is None:
            raise ValueError("--t-attn needs --at-chunk")
        rows = float(options.at_chunk * work.batch * work.heads)
        forward = options.t_attn
        backward = options.t_attn_backward or 2.5 * forward
        steps = [StepTime(0.0, 0.0, seconds / (rows * options.at_chunk)) for seconds in (forward, backward)]
    elif options.tflops is not None:
        rates = options.tflops * 1e12, (options.tflops_backward or options.tflops) * 1e12
        steps = [
            StepTime.from_flops(rate, work.head_dim, backward=bool(i), overhead=overhead, memory=memory)
            for i, rate in enumerate(rates)
        ]
    else:
        raise ValueError("--tflops is needed, or --t-attn with --at-chunk, or --measure")
    link = Link(options.alpha_us * 1e-6, options.gbs * 1e9)
    between = None
    if options.between_gbs is not None:
        alpha = options.alpha_us if options.between_alpha_us is None else options.between_alpha_us
        between = Link(alpha * 1e-6, options.between_gbs * 1e9)
        if options.ranks_per_node is None:
            raise ValueError("--between-gbs needs --ranks-per-node")
    return Cluster(steps[0], steps[1], link, between, options.ranks_per_node, options.processors)


def default_ranks(work: Workload) -> list[int]:
    """1, 2, 4, ... as far as the sequence divides."""
    found, n = [], 1
    while n <= MOST_RANKS and work.seqlen % (2 * n) == 0:
        found.append(n)
        n *= 2
    return found or [1]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size_of(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def table(work: Workload, cluster: Cluster, predictions: Sequence[Prediction], direction: str) -> list[str]:
    """Text, a line for each N."""
    kv = "" if work.hkv == work.heads else f"/{work.hkv}"
    kind = f"causal, {work.layout}" if work.causal else "not causal"
    lines = [
        f"Ring attention, {direction}, {kind}: {work.batch} x {work.seqlen} tokens, {work.heads}{kv} heads of "
        f"{work.head_dim}, {work.itemsize} bytes an element",
        f"{LABEL}: alpha {duration(cluster.link.alpha)}, beta {cluster.link.beta / 1e9:.4g} GB/s, a pair and head "
        f"{cluster.forward.per_pair * 1e12:.4g} ps forward, {cluster.backward.per_pair * 1e12:.4g} ps backward",
    ]
    if cluster.between is not None:
        between = cluster.between
        lines.append(
            f"between nodes of {cluster.ranks_per_node}: alpha {duration(between.alpha)}, "
            f"beta {between.beta / 1e9:.4g} GB/s"
        )
    chunks = {one: overlap_chunk(work, cluster, one) for one in DIRECTIONS[:2]}
    lines += [
        f"a step hides its messages from {chunks['forward']} rows a rank forward, {chunks['backward']} backward",
        "",
        f"{'ranks':>6} {'rows':>8} {'time':>9} {'ideal':>9} {'kept':>6} {'hidden':>6} {'sent':>9} {'saved':>9} "
        f"{'working':>9}",
    ]
    for p in predictions:
        lines.append(
            f"{p.ranks:6} {p.chunk:8} {duration(p.seconds):>9} {duration(p.ideal_seconds):>9} {p.efficiency:6.1%} "
            f"{p.hidden:6.1%} {size_of(p.bytes_sent):>9} {size_of(p.saved_bytes):>9} {size_of(p.working_bytes):>9}"
        )
    lines += [
        "",
        "kept: share of one device's throughput. hidden: share of the messages' time that a rank computes through.",
        "sent, saved (for the backward), working (beside it, at the most): of a rank, one layer.",
    ]
    return lines


def report(work: Workload, cluster: Cluster, predictions: Sequence[Prediction], direction: str) -> dict[str, Any]:
    """Returns the numbers of the table for programs."""
    found = [{**dataclasses.asdict(p), "efficiency": p.efficiency} for p in predictions]
    facts = {"kind": LABEL, "direction": direction, "workload": dataclasses.asdict(work)}
    return _finite({**facts, "cluster": dataclasses.asdict(cluster), "predictions": found})


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot(path: Path, work: Workload, cluster: Cluster, ranks: Sequence[int], direction: str) -> None:
    """The share of one device's throughput over N, a line for each layout where causal.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot needs matplotlib") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "warpform", "svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"]}
    colours = ("#d55e00", "#0072b2", "#009e73")
    with pyplot.rc_context(style):
        canvas, axes = pyplot.subplots(figsize=(7, 4), facecolor="#ffffff")
        for layout, colour in zip(LAYOUTS, colours, strict=True):
            if not work.causal and layout != work.layout:
                continue
            one = dataclasses.replace(work, layout=layout)
            kept = [100 * predict(one, cluster, n, direction).efficiency for n in ranks]
            axes.plot(ranks, kept, marker="o", color=colour, label=layout if work.causal else "not causal")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ranks), [str(n) for n in ranks], rotation=45)
        axes.set_ylim(0, 105)
        axes.set_xlabel("ranks")
        axes.set_ylabel("% of one device's throughput a rank")
        axes.set_title(f"Ring attention, {direction}, {work.seqlen} tokens ({LABEL})", fontsize=10, loc="left")
        axes.grid(color="#d8dee4", linewidth=0.6)
        axes.legend(frameon=False)
        canvas.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, metadata={"Date": None}, facecolor="#ffffff")
        pyplot.close(canvas)
