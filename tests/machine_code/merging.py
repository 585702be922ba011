"""Joins cubins into one, for nvdisasm alone: it takes a third of a second to start, and one file.

The joined file has the code and the line numbers of each, and nothing that would run it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATIONS = {".rel.debug_line": "<QQ", ".rela.debug_line": "<QQq"}
_ABOUT_THE_TARGET = (".note.nv.cuinfo", ".nv.compat")
_PROGRAM, _SYMBOLS, _STRINGS, _WITHOUT_BYTES = 1, 2, 3, 8  # types of sections
_LOCAL_SECTION, _GLOBAL_FUNCTION = 0x03, 0x12  # bindings and types of symbols
_ENTRY = 0x10  # NVIDIA's mark of a kernel


class _Section(NamedTuple):
    name: str
    kind: int
    flags: int
    data: bytes
    link: int = 0
    info: int = 0
    alignment: int = 1
    entry_size: int = 0


def merged(cubins: Sequence[bytes]) -> bytes:
    """A cubin with the kernels of ``cubins``, as ``kernel0``, ``kernel1``, ...

    Args:
        cubins: cubins of one kernel each, all for one architecture.

    Raises:
        ValueError: one of them is not of that form.
    """
    codes, lines, relocations, relocated = [], b"", b"", None
    for number, cubin in enumerate(cubins):
        sections = {section.name: section for section in _sections(cubin)}
        (code,) = (section for name, section in sections.items() if name.startswith(".text."))
        (relocated,) = (section for name, section in sections.items() if name in _RELOCATIONS)
        codes.append(code)
        for offset, info, *addend in struct.iter_unpack(
            _RELOCATIONS[relocated.name], relocated.data
        ):
            # The low half is the type; the high half, the symbol, is the kernel's.
            info = (1 + len(cubins) + number) << 32 | (info & 0xFFFFFFFF)
            entry = (offset + len(lines), info, *addend)
            relocations += struct.pack(_RELOCATIONS[relocated.name], *entry)
        lines += sections[".debug_line"].data
    if relocated is None:
        raise ValueError("no cubins")
    first = 6  # sections before those of code
    # The sections, whose names label the code, come first, as symbols of the file alone must.
    names, symbols = b"\0", _SYMBOL.pack(0, 0, 0, 0, 0, 0)
    for number in range(len(codes)):
        symbols += _SYMBOL.pack(len(names), _LOCAL_SECTION, 0, first + number, 0, 0)
        names += b".text.kernel%d\0" % number
    for number, code in enumerate(codes):
        where = (first + number, 0, len(code.data))
        symbols += _SYMBOL.pack(len(names), _GLOBAL_FUNCTION, _ENTRY, *where)
        names += b"kernel%d\0" % number
    made = [
        _Section("", 0, 0, b"", alignment=0),
        _Section(".strtab", _STRINGS, 0, names),
        _Section(".symtab", _SYMBOLS, 0, symbols, 1, 1 + len(codes), 8, _SYMBOL.size),
        _Section(".debug_line", _PROGRAM, 0, lines),
        relocated._replace(data=relocations, link=2, info=3),
    ]
    for number, code in enumerate(codes):
        # The low bytes are the kernel's symbol; older code has its registers in the highest.
        info = code.info & 0xFF000000 | (1 + len(codes) + number)
        made.append(code._replace(name=f".text.kernel{number}", link=2, info=info))
    # Where the newest architectures are named in full, as sm_100a.
    notes = (part for part in _sections(cubins[0]) if part.name in _ABOUT_THE_TARGET)
    made += (note._replace(link=0, info=0) for note in notes)
    text = b"".join(section.name.encode() + b"\0" for section in (*made, _NAMES))
    made.insert(first - 1, _NAMES._replace(data=text))
    return _file(cubins[0], made, first - 1)


_NAMES = _Section(".shstrtab", _STRINGS, 0, b"")


def _sections(cubin: bytes) -> list[_Section]:
    header = _HEADER.unpack_from(cubin)
    table, count, names = header[6], header[12], header[13]
    raw = [_SECTION.unpack_from(cubin, table + _SECTION.size * at) for at in range(count)]
    sections = []
    for name, kind, flags, _, offset, size, link, info, alignment, entry_size in raw:
        start = raw[names][4] + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        data = b"" if kind == _WITHOUT_BYTES else cubin[offset : offset + size]
        sections.append(_Section(text, kind, flags, data, link, info, alignment, entry_size))
    return sections


def _file(model: bytes, sections: Sequence[_Section], names: int) -> bytes:
    """An ELF file of these sections with the architecture of ``model``."""
    made, table = bytearray(_HEADER.size), b""
    text = sections[names].data
    for section in sections:
        made += b"\0" * (-len(made) % max(section.alignment, 1))
        name = text.index(section.name.encode() + b"\0") if section.name else 0
        table += _SECTION.pack(
            name,
            section.kind,
            section.flags,
            0,
            len(made),
            len(section.data),
            section.link,
            section.info,
            section.alignment,
            section.entry_size,
        )
        made += section.data
    made += b"\0" * (-len(made) % 8)
    header = list(_HEADER.unpack_from(model))
    header[4:7] = 0, 0, len(made)  # entry point, program headers, section headers
    header[10], header[12:14] = 0, (len(sections), names)
    made[: _HEADER.size] = _HEADER.pack(*header)
    return bytes(made) + table
