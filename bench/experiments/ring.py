"""Two experiments on ring attention over gloo, printed, and as JSON with --out FILE.

    python bench/experiments/ring.py model       the cost model's prediction beside what was measured
    python bench/experiments/ring.py longest     the longest sequence that fits, as in arXiv 2105.13120, section 5.3

`model` measures ring attention of 1 and 2 ranks in one process on one thread, layout by layout, and hops between two
processes. From these alone it predicts, and then times, ring attention over 2, 4 and 8 processes, and over 4, 8 and 16
ranks in one process. Close other programs first.

`longest` gives every process the same allowance of memory and looks for the longest sequence that a forward and a
backward of one attention layer go through: full attention and Linformer's in one process, then the paper's ring
self-attention, ring attention without scores, and Linformer's on the ring, over 2 and 4 of them. The paper went from
one GPU to 32; here the point is which of them grow with the number of processes, and which with its root.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [str(ROOT / folder) for folder in ("bench", "tests", "python")]
sys.path[:0] = FOLDERS
# The processes of the pools are forked from a server that begins with what is in here.
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])

import harness  # noqa: E402
from suites import ring_ranks  # noqa: E402

from warpform.cli.ring_model.cost_model import LAYOUTS, Cluster, Link, Workload, predict  # noqa: E402
from warpform.cli.ring_model.measure import measure_steps, median_seconds  # noqa: E402
from warpform.distributed import LocalGroup, ring_attention, shard_sequence  # noqa: E402  # noqa: E402

# ---- predicted against measured ----

SIZES = (8192, 4, 2, 64)  # tokens, heads, key heads, head_dim
CHUNKS = (512, 1024, 2048)  # rows of a rank that steps are measured with
TINY = ((128, 2, 1, 16), (16, 32))
RANKS = {"gloo": (2, 4, 8), "local": (4, 8, 16)}
DIRECTIONS = ("forward", "forward+backward")


def in_processes(sizes: tuple[int, int, int, int], layout: str, ranks: int, backward: bool, repeats: int) -> float:
    ring_ranks.run(ranks, "", ring_ranks.prepare, "warpform", layout, sizes, backward)
    return median_seconds(lambda: ring_ranks.run(ranks, "", ring_ranks.call, False), repeats)


def in_one_process(sizes: tuple[int, int, int, int], layout: str, ranks: int, backward: bool, repeats: int) -> float:
    group = LocalGroup(ranks)
    *inputs, dout = (
        shard_sequence(t, group=group, dim=1, layout=layout) for t in ring_ranks.draw(*sizes, torch.float32, "cpu")
    )
    inputs = [t.requires_grad_(backward) for t in inputs]
    attention = functools.partial(ring_attention, group=group, causal=True, layout=layout)
    return median_seconds(lambda: ring_ranks.step(attention, inputs, dout, backward), repeats)


def model(repeats: int, tiny: bool) -> dict[str, Any]:
    """Rows of predicted and measured seconds."""
    torch.set_num_threads(1)
    all_sizes, chunks = TINY if tiny else (SIZES, CHUNKS)
    length, heads, kv_heads, head_dim = all_sizes
    alpha, beta = ring_ranks.run(2, "", ring_ranks.measured_link)[0]
    cores = len(os.sched_getaffinity(0))
    rows, found = [], {"alpha_s": alpha, "beta": beta, "cores": cores, "chunks": chunks}
    for layout in LAYOUTS[1:2] if tiny else LAYOUTS:
        work = Workload(length, heads, head_dim, kv_heads, itemsize=4, layout=layout)
        steps = [measure_steps(work, chunks, backward=backward, repeats=repeats) for backward in (False, True)]
        found[layout] = {
            name: dataclasses.asdict(step) for name, step in zip(("forward", "backward"), steps, strict=True)
        }
        # Between ranks of one process hops are copies, which the steps were measured with.
        clusters = {
            "gloo": Cluster(*steps, Link(alpha, beta), processors=cores, checked=True),
            "local": Cluster(*steps, Link(0.0, math.inf), processors=1),
        }
        for transport, cluster in clusters.items():
            run = in_processes if transport == "gloo" else in_one_process
            for ranks, direction in itertools.product(RANKS[transport][: 1 if tiny else None], DIRECTIONS):
                predicted = predict(work, cluster, ranks, direction).seconds
                measured = run(all_sizes, layout, ranks, direction != "forward", repeats)
                row = {"transport": transport, "layout": layout, "ranks": ranks, "direction": direction}
                rows.append(row | {"predicted_s": predicted, "measured_s": measured, "ratio": predicted / measured})
                print(
                    f"{transport:6} {layout:10} {ranks:2} ranks, {direction:16} predicted {predicted * 1e3:8.1f} ms "
                    f"(modelled), measured {measured * 1e3:8.1f} ms, ratio {predicted / measured:.2f}",
                    flush=True,
                )
    off = [abs(row["ratio"] - 1) for row in rows]
    within = sum(error <= 0.15 for error in off)
    print(f"within 15 %: {within} of {len(rows)}; median error {statistics.median(off):.1%}")
    return {"sizes": all_sizes, "measured_from": found, "rows": rows}


# ---- the longest sequence ----

LAYER = (256, 4, 256)  # hidden size, heads, rows of Linformer's projections
LENGTH_STEP = 128  # lengths are multiples of it, times the number of ranks
KINDS = (  # what, attention of the layer, processes
    ("full attention, 1 process", "rsa", 1),
    ("Linformer, 1 process", "linformer", 1),
    *((f"ring self-attention (RSA), {n} processes", "rsa", n) for n in (2, 4)),
    *((f"ring attention without scores, {n} processes", "ring", n) for n in (2, 4)),
    *((f"Linformer on a ring, {n} processes", "linformer", n) for n in (2, 4)),
)


def fits(attention: str, ranks: int, length: int, allowance: int) -> bool:
    try:
        return all(ring_ranks.run(ranks, "longest", ring_ranks.attempt, attention, LAYER, length, allowance))
    except RuntimeError as error:
        # One rank ran out of memory, and another waited for it in vain.
        if "RingError" in str(error) or "RingTimeoutError" in str(error) or "Connection" in str(error):
            return False
        raise
    finally:
        ring_ranks.drop(ranks, "longest")  # each attempt from the same start: freed memory stays with a process


def longest(allowance: int, tiny: bool) -> dict[str, Any]:
    """Rows of the longest sequence of each kind, to within a sixteenth; tiny: whether a short one fits."""
    rows = []
    for name, attention, ranks in KINDS[1::5] if tiny else KINDS:
        start = time.perf_counter()
        unit = LENGTH_STEP * ranks
        low, high = 0, 4
        if tiny:
            low = high = int(fits(attention, ranks, unit, allowance))
        while not tiny and fits(attention, ranks, high * unit, allowance):
            low, high = high, 2 * high
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(attention, ranks, middle * unit, allowance) else (low, middle)
        rows.append({"kind": name, "attention": attention, "ranks": ranks, "longest": low * unit})
        print(f"{name:45} {low * unit:8} tokens  ({time.perf_counter() - start:.0f} s)", flush=True)
    hidden, heads, projected = LAYER
    sizes = {"hidden": hidden, "heads": heads, "projected_rows": projected}
    return {"allowance_bytes": allowance, **sizes, "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="Experiments on ring attention over gloo.")
    parser.add_argument("experiment", choices=("model", "longest"))
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--repeats", type=int, default=5, help="of each time, of which the median counts")
    parser.add_argument("--allowance-mib", type=int, default=192, help="memory of each process beyond an idle one's")
    parser.add_argument("--tiny", action="store_true", help="at sizes that say nothing: does it still work?")
    options = parser.parse_args()
    facts = harness.machine("cpu")
    print(f"{facts['device']}, torch {facts['torch']}, {facts['date']}, commit {facts['commit']}")
    if options.experiment == "model":
        found = model(options.repeats, options.tiny)
    else:
        found = longest(options.allowance_mib << 20, options.tiny)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"experiment": options.experiment, **facts, **found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
