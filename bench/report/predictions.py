"""Predictions for a GPU, made before a kernel ran on one, and the limits that a GPU is said to have.

Predictions are for an H100 in bfloat16, from the instructions that were compiled. docs/hardware.md sets the measured
numbers beside them; tools/adopt_gpu_results.py writes that.
"""

from __future__ import annotations

from dataclasses import dataclass

# A prediction is missed where what was measured is this part off the nearer end of its range, either way.
MISS = 0.3

# Nominal, from the H100 SXM datasheet: dense bfloat16, HBM3. They serve until a machine's own are measured.
NOMINAL = "an H100 SXM's datasheet"
NOMINAL_TFLOPS = 989.0
NOMINAL_GBS = 3350.0

RATE, TIME, COPY = "TFLOP/s", "ms", "of the copy bandwidth"


@dataclass(frozen=True)
class Prediction:
    """From `low` to `high`, in `unit`: RATE, TIME, or COPY, a part of what a large copy moves in a second."""

    low: float
    high: float
    unit: str

    def __str__(self) -> str:
        if self.unit == COPY:
            return f"{self.low:.0%} to {self.high:.0%} {self.unit}"
        return f"{self.low:g} to {self.high:g} {self.unit}"

    def missed(self, value: float) -> bool:
        """Tells whether `value`, in the same unit, misses the range by more than MISS."""
        return value < (1 - MISS) * self.low or value > (1 + MISS) * self.high


# By workload, as bench/suites names it: kernel, direction and sizes are in the name.
PREDICTIONS = {
    "varlen_attention-forward-B1-S16384-T16384-H16-16-D128": Prediction(340, 380, RATE),
    "varlen_attention-forward-B8-S2048-T16384-H32-32-D64": Prediction(290, 330, RATE),
    "varlen_attention-backward-B1-S16384-T16384-H16-16-D128": Prediction(220, 270, RATE),
    "varlen_attention-backward-B8-S2048-T16384-H32-32-D64": Prediction(200, 230, RATE),
    "blockdiag_multiply-forward-T16384-4x1024x1024": Prediction(350, 450, RATE),
    "monarch_multiply-forward-T16384-4x192x192-4x768x192": Prediction(150, 220, RATE),
    "window_attention-forward-B128-56x56-W7x7-S3x3-H3-D32": Prediction(0.5, 0.6, COPY),
    # The shape of the FlashFFTConv paper's table: 64 rows of 768 channels, gated.
    "gated_fft_conv-forward-batch64-seqlen4096-tokens262144-hidden768": Prediction(1.0, 1.3, TIME),
}
