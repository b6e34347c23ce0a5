"""Reads what the loader reads of a shared library: DT_NEEDED, search paths and dynamic symbols."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

SHT_DYNAMIC, SHT_DYNSYM = 6, 11
DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29
STB_WEAK = 2


@dataclass(frozen=True)
class Symbol:
    name: str
    defined: bool
    weak: bool


@dataclass(frozen=True)
class SharedLibrary:
    needed: list[str]
    search_paths: list[str]
    symbols: list[Symbol]


def read(path: Path) -> SharedLibrary:
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF file"
    table, entry, count = (struct.unpack_from(f, data, at)[0] for f, at in (("<Q", 40), ("<H", 58), ("<H", 60)))
    # Each section: name, type, flags, address, offset, size, link, info, alignment, size of an entry.
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry) for i in range(count)]

    def text(section: int, offset: int) -> str:
        start = sections[section][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    needed, search_paths, symbols = [], [], []
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind == SHT_DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", data[offset : offset + size]):
                if tag == DT_NEEDED:
                    needed.append(text(link, value))
                elif tag in (DT_RPATH, DT_RUNPATH):
                    search_paths.append(text(link, value))
        elif kind == SHT_DYNSYM:
            for name, info, _, index, _, _ in struct.iter_unpack("<IBBHQQ", data[offset : offset + size]):
                if name:
                    symbols.append(Symbol(text(link, name), index != 0, info >> 4 == STB_WEAK))
    return SharedLibrary(needed, search_paths, symbols)
