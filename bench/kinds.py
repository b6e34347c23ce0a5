"""The columns `kind` and `provider` of results: what a row was measured on, and what sets it apart from the rows that
pages quote; and which of warpform's own rows are ways of a user's call."""

from __future__ import annotations

OWN_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # of a device's rows, unless `kind` says another
# Calls of warpform that its plain one is held against: one that computes more, and one without kernels for Hopper.
COMPARED = ("warpform_all_on", "warpform_mma_sync")


def kind(device: str, dtype: str, busy: int) -> str:
    """ "cpu"; in another dtype than the device's own "cpu in bfloat16"; beside a busy process "cpu beside 1 busy"."""
    return device + ("" if dtype == OWN_DTYPES[device] else f" in {dtype}") + (f" beside {busy} busy" if busy else "")


def is_mode(provider: str) -> bool:
    """Tells whether a provider is a way of warpform's to make a call, of which the fastest stands for it."""
    return provider.startswith("warpform") and provider not in COMPARED


def is_quiet(kind: str) -> bool:
    """Tells whether a row was measured beside no busy process."""
    return not kind.endswith(" busy")


def in_own_dtype(kind: str) -> bool:
    """Tells whether a row was measured in the dtype that its device has by default."""
    return " in " not in kind
