"""Tells whether a file can be mapped as a shared library here, from its ELF header.

The dynamic loader maps a file of any length, and Python ends with SIGBUS where it then reads past the end of one that
was cut off. So the lengths that the header names are compared with the file's before.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_LOADED = 1  # PT_LOAD
_MACHINES = {62: "x86-64", 183: "aarch64"}
_THIS = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183}


def fault(path: Path) -> str | None:
    """Returns the file's fault as the end of a sentence that begins with its name; None where it has none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADER.size)
        if size == 0:
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a pointer of Git LFS, which git lfs pull replaces by the library"
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            return "is a web page and not the library"
        if not start.startswith(b"\x7fELF"[:size]):
            return f"is no shared library (it begins with {start[:8]!r})"
        if len(start) < _HEADER.size:
            return _cut_off(size, _HEADER.size)
        ident, _, machine, _, _, segments, sections, *sizes = _HEADER.unpack(start)
        _, _, segment_size, segment_count, section_size, section_count, _ = sizes
        if ident[4:6] != b"\x02\x01":
            return "is no shared library of a 64-bit little-endian machine"
        here = _THIS.get(platform.machine().lower())
        if here is not None and machine != here:
            return f"is for {_MACHINES.get(machine, f'ELF machine {machine}')}, this machine is {_MACHINES[here]}"
        # The end of the last part of the file that its headers name; the table of sections is the last as a rule.
        end = max(segments + segment_size * segment_count, sections + section_size * section_count)
        if size < end or segment_size != _SEGMENT.size:
            return _cut_off(size, end) if size < end else "has a table of segments that is none"
        file.seek(segments)
        table = file.read(segment_size * segment_count)
    for kind, _, offset, _, _, length, _, _ in _SEGMENT.iter_unpack(table):
        if kind == _LOADED:
            end = max(end, offset + length)
    return _cut_off(size, end) if size < end else None


def _cut_off(size: int, end: int) -> str:
    return f"is cut off: it has {size} of {end} bytes"
