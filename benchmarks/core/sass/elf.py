"""Sections of a cubin, an ELF file of 64 bits, and what ptxas noted there of its kernels."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_REGISTER_COUNT = 0x2F  # EIATTR_REGCOUNT
_WITH_BYTES = 4  # EIFMT_SVAL: the attribute's value follows, of this many bytes
_SYMBOL_TABLE = 2  # SHT_SYMTAB


def sections(cubin: bytes) -> Iterator[tuple[str, int, bytes]]:
    """Yield name, type and content of each section. Raises ValueError for no ELF file."""
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"cubin: expected an ELF file of 64 bits, got {cubin[:5]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, kind, _, _, offset, length in headers:
        begin = headers[names][4] + name
        text = cubin[begin : cubin.index(b"\0", begin)].decode()
        yield text, kind, cubin[offset : offset + length]


def registers(cubin: bytes) -> dict[str, int]:
    """Return the registers of a thread by the mangled name of the kernel."""
    found = list(sections(cubin))
    of_name = {name: content for name, _, content in found}
    symbols = next((content for _, kind, content in found if kind == _SYMBOL_TABLE), b"")
    names, notes = of_name.get(".strtab", b""), of_name.get(".nv.info", b"")
    counts, at = {}, 0
    while at + 4 <= len(notes):
        form, attribute, length = struct.unpack_from("<BBH", notes, at)
        at += 4
        if form != _WITH_BYTES:
            continue
        if attribute == _REGISTER_COUNT:
            symbol, count = struct.unpack_from("<II", notes, at)
            (begin,) = struct.unpack_from("<I", symbols, symbol * 24)
            counts[names[begin : names.index(b"\0", begin)].decode()] = count
        at += length
    return counts
