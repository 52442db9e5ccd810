"""A UEFI program in C as a disk that any UEFI firmware starts: one FAT volume, no partitions.

The program is compiled to flat code whose references are all relative, so it needs no relocation;
the headers of its PE file and the FAT file system are written here.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("uefi_guest.c")
_OPTIONS = (
    *("-Os", "-ffreestanding", "-mabi=ms", "-mno-red-zone", "-mno-sse", "-fpie"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"),
    *("-Wall", "-Wextra", "-Werror"),
)
_PLACES = ".text : { *(.entry) *(.text*) *(.rodata*) } /DISCARD/ : { *(*) }"
_TEXT = 0x1000
_SECTOR = 512
_SECTORS = 2880 * 2


def uefi_program(scratch: Path) -> bytes:
    """The guest as a PE file; needs gcc and its linker."""
    flat, part = scratch / "uefi.bin", scratch / "uefi.o"
    subprocess.run(["gcc", *_OPTIONS, "-c", str(SOURCE), "-o", str(part)], check=True)
    script = scratch / "flat.ld"
    script.write_text(f"SECTIONS {{ . = {_TEXT:#x}; {_PLACES} }}")
    words = ["--oformat", "binary", "-e", "start", "-T", str(script), str(part), "-o", str(flat)]
    subprocess.run(["ld", *words], check=True)
    return pe_file(flat.read_bytes())


def pe_file(code: bytes) -> bytes:
    """An x86-64 UEFI application of one section whose first byte is where it starts."""
    size = -(-len(code) // 0x200) * 0x200
    dos = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 0xF0, 0x22E)
    optional = struct.pack("<HBBIIIII", 0x20B, 2, 0, size, 0, 0, _TEXT, _TEXT)
    optional += struct.pack("<QII", 0, 0x1000, 0x200)  # where it wants to be: nowhere
    optional += struct.pack("<HHHHHHI", 0, 0, 0, 0, 0, 0, 0)
    optional += struct.pack("<IIIHH", _TEXT + max(size, 0x1000), 0x200, 0, 10, 0)
    optional += struct.pack("<QQQQII", 0, 0, 0, 0, 0, 16) + bytes(16 * 8)
    section = b".text".ljust(8, b"\0") + struct.pack("<IIII", len(code), _TEXT, size, 0x200)
    section += struct.pack("<IIHHI", 0, 0, 0, 0, 0xE0000020)
    return (dos + coff + optional + section).ljust(0x200, b"\0") + code.ljust(size, b"\0")


def fat_volume(program: bytes) -> bytes:
    """A FAT12 volume with the program where firmware looks on removable media."""
    boot = b"\xeb\x3c\x90GODWIT  " + struct.pack(
        "<HBHBHHBHHHII", _SECTOR, 2, 1, 2, 32, _SECTORS, 0xF0, 9, 18, 2, 0, 0
    )
    boot += struct.pack("<BBBI", 0, 0, 0x29, 0) + b"GODWIT     " + b"FAT12   "
    boot = boot.ljust(510, b"\0") + b"\x55\xaa"
    clusters = -(-len(program) // 1024)
    links = [0xFF0, 0xFFF, 0xFFF, 0xFFF, *range(5, 4 + clusters), 0xFFF]
    links += [0] * (len(links) % 2)
    pairs = zip(links[::2], links[1::2], strict=True)
    table = b"".join((low | high << 12).to_bytes(3, "little") for low, high in pairs)
    table = table.ljust(9 * _SECTOR, b"\0")
    root = _entry("EFI", 2).ljust(2 * _SECTOR, b"\0")
    efi = _entry(".", 2) + _entry("..", 0) + _entry("BOOT", 3)
    folder = _entry(".", 3) + _entry("..", 2) + _entry("BOOTX64 EFI", 4, len(program))
    parts = (boot, table, table, root, efi.ljust(1024, b"\0"), folder.ljust(1024, b"\0"), program)
    return b"".join(parts).ljust(_SECTORS * _SECTOR, b"\0")


def _entry(name: str, cluster: int, size: int | None = None) -> bytes:
    kind = 0x10 if size is None else 0x20
    return name.ljust(11).encode() + struct.pack(
        "<BBBHHHHHHHI", kind, 0, 0, 0, 0, 0, 0, 0, 0, cluster, size or 0
    )
