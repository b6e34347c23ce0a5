"""The column `kind` of results: what a row was measured on, and what sets it apart from the rows that pages quote."""

from __future__ import annotations

OWN_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # of a device's rows, unless `kind` says another


def kind(device: str, dtype: str, busy: int) -> str:
    """ "cpu"; in another dtype than the device's own "cpu in bfloat16"; beside a busy process "cpu beside 1 busy"."""
    return device + ("" if dtype == OWN_DTYPES[device] else f" in {dtype}") + (f" beside {busy} busy" if busy else "")


def is_quiet(kind: str) -> bool:
    """Tells whether a row was measured beside no busy process."""
    return not kind.endswith(" busy")


def in_own_dtype(kind: str) -> bool:
    """Tells whether a row was measured in the dtype that its device has by default."""
    return " in " not in kind
