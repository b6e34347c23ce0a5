"""The hash of a library's sources: the build writes it into the library, and a checkout compares it with its own."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

__all__ = ["sources_hash"]

_EMULATOR = "simt"  # a test tool that is never in the library


def sources_hash(csrc: Path) -> str:
    """SHA-256, in hexadecimal, of all files under `csrc` but those of its folder simt.

    The files come in the order of the bytes of their paths, relative to `csrc` and with slashes; of each the hash takes
    the path in UTF-8, a zero byte, the content and a zero byte.
    """
    files = {
        path.relative_to(csrc).as_posix().encode(): path
        for path in csrc.rglob("*")
        if path.is_file() and path.relative_to(csrc).parts[0] != _EMULATOR
    }
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name + b"\0" + files[name].read_bytes() + b"\0")
    return digest.hexdigest()


def _write_header(csrc: Path, header: Path) -> None:
    """For the build. An unchanged header keeps its time, so that nothing is compiled again."""
    text = f'#define WARPFORM_SOURCES "{sources_hash(csrc)}"\n'
    if not header.is_file() or header.read_text() != text:
        header.write_text(text)


if __name__ == "__main__":
    _write_header(Path(sys.argv[1]), Path(sys.argv[2]))
