"""The benchmarks: a file for each family, with `specs(session)` and a test that measures one spec.

A new family is a file here, a row in `FAMILIES` and a row in docs/benchmarks.md. Files that are not in `FAMILIES` hold
peers and parts that several families use.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Family:
    """Attributes:
    share: the part of a run's time that the family may take; time that one leaves over goes to the next.
    title: of its plot. A family that is no race between providers has none.
    """

    share: float
    title: str = ""


# By file, in the order in which pytest runs them.
FAMILIES = {
    "attention": Family(0.11, "Attention"),
    "decoders": Family(0.10, "Decoders end to end"),
    "disentangled_attention": Family(0.04, "Disentangled attention (DeBERTa)"),
    "encoder": Family(0.03, "Encoder ops"),
    "fft_conv": Family(0.08, "Long convolutions"),
    "hidden": Family(0.07, "Sparse hidden dimensions"),
    "host": Family(0.03),
    "m2": Family(0.11, "M2-BERT beside BERT"),
    "models": Family(0.10, "Models end to end"),
    "monarch": Family(0.08, "Monarch products"),
    "norm": Family(0.02, "RMSNorm"),
    "ring": Family(0.07, "Ring attention over N ranks"),
    "short_conv": Family(0.01, "Short convolutions with a gate"),
    "swin": Family(0.09, "Swin end to end"),
    "window": Family(0.05, "Window attention"),
    "window_mix": Family(0.01, "Mixing in windows"),
}
# By which part of a run each family has to be done.
DEADLINES = dict(zip(FAMILIES, accumulate(family.share for family in FAMILIES.values()), strict=True))
