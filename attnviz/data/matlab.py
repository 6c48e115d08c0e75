"""Files of MATLAB 5: a matrix of whole numbers, or a table.

Own code, as scipy.io.loadmat, which runs nothing from a file either, can end the process where a
file is damaged.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from ..images import MAX_PIXELS

__all__ = ["read_matrix", "read_table"]

_TYPES = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHARACTERS = 2, 4
_DAMAGED = (ValueError, LookupError, StopIteration, struct.error, zlib.error)
Element = tuple[int, bytes]


def read_matrix(path: Path, name: str) -> Int[np.ndarray, "h w"]:
    """Reads a matrix of whole numbers.

    Raises:
        ValueError: The file is damaged, or has no such matrix.
    """
    try:
        data = path.read_bytes()
        _, size, (kind, body) = _find(data, name)
        if kind not in _TYPES or len(size) != 2 or min(size) < 1:
            raise ValueError("no matrix of numbers")
        values = np.frombuffer(body, _order(data) + _TYPES[kind])
        if len(values) != size[0] * size[1]:
            raise ValueError(f"{len(values)} values for {size[0]} x {size[1]}")
        whole = values.dtype.kind != "f" or (abs(values) < 2**31) & (values == values.round())
        if not np.all(whole):
            raise ValueError("values that are no whole numbers")
    except _DAMAGED as error:
        raise ValueError(
            f"expected the matrix {name} in {str(path)!r}, got a file without or a damaged one "
            f"({error}); unpack the archive again"
        ) from error
    return values.reshape(size, order="F").astype(np.int64)


def read_table(path: Path, name: str) -> list[tuple[str | float | None, ...]]:
    """Reads the rows of a table, a structure array, with their fields in order.

    A field is text or a number, None where it is neither.

    Raises:
        ValueError: The file is damaged, or has no such table.
    """
    try:
        data = path.read_bytes()
        order = _order(data)
        kind, _, length, names, *cells = _find(data, name)
        if kind != _STRUCT:
            raise ValueError("no table")
        count = len(names[1]) // max(1, int(np.frombuffer(length[1], f"{order}i4")[0]))
        if count < 1 or len(cells) % count:
            raise ValueError("a table that ends early")
        values = [_cell(body, order) for _, body in cells]
    except _DAMAGED as error:
        raise ValueError(
            f"expected the table {name} in {str(path)!r}, got a file without or a damaged one "
            f"({error}); unpack the archive again"
        ) from error
    return [tuple(values[at : at + count]) for at in range(0, len(values), count)]


def _cell(body: bytes, order: str) -> str | float | None:
    kind, _, *parts = _parts(body, order)
    if not parts:
        return None
    written, content = parts[0]
    if kind == _CHARACTERS and written in _TEXTS:
        text = _TEXTS[written]
        return content.decode(text if text != "utf-16" else f"utf-16-{'lb'[order == '>']}e")
    if written not in _TYPES:
        return None
    values = np.frombuffer(content, order + _TYPES[written])
    return float(values[0]) if len(values) == 1 else None


def _find(data: bytes, name: str) -> list:
    # The kind, the size and the further elements of what has the name.
    order = _order(data)
    for kind, body in _elements(data[128:], order):
        if kind == _COMPRESSED:
            unpacked = zlib.decompressobj().decompress(body, 8 * MAX_PIXELS)
            kind, body = next(_elements(unpacked, order), (0, b""))
        if kind == _MATRIX and (parts := _parts(body, order, name)) is not None:
            return parts
    raise ValueError("no such matrix")


def _order(data: bytes) -> str:
    if data[126:128] not in (b"IM", b"MI"):
        raise ValueError("no header of MATLAB 5")
    return "<" if data[126:128] == b"IM" else ">"


def _parts(body: bytes, order: str, name: str | None = None) -> list | None:
    # None where it has another name.
    elements = _elements(body, order)
    flags, size, named = (next(elements, (0, b""))[1] for _ in range(3))
    if name is not None and named != name.encode():
        return None
    kind = struct.unpack_from(f"{order}I", flags)[0] & 255
    rest = list(elements)
    if name is not None and not rest:
        raise ValueError("it ends early")
    return [kind, np.frombuffer(size, f"{order}i4").tolist(), *rest]


def _elements(data: bytes, order: str) -> Iterator[Element]:
    # Type and bytes of each element; short ones have both in eight bytes.
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("it ends early")
        yield kind, data[start : start + size]
        at = start + size
        if kind != _COMPRESSED:
            at += -at % 8
