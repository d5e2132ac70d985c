"""Files of other programs that data sets come with, read as plain data: no code in them runs."""

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tnt_lightning.errors import UserError

_ALLOWED = {  # all that a pickled array is made of
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and such code is not run")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _has_private_core() else module, name)


def _has_private_core() -> bool:
    return int(np.__version__.split(".")[0]) >= 2


def read_pickle(file: Path) -> dict[str, Any]:
    """A pickled dictionary of arrays, lists and texts (CIFAR's batches); anything else in it is refused."""
    try:
        content = _Plain(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:  # whatever bytes a damaged pickle leads to
        raise UserError(f"{file}: not a batch of arrays ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a batch of arrays (it holds a {type(content).__name__})")
    return content


def read_mat(file: Path) -> dict[str, Any]:
    """The variables of a MATLAB file (format 5, as all since version 5 by default): numbers as arrays of their MATLAB shape, texts as
    str, an array of structs as a list of dictionaries. Other kinds are left out.
    """
    try:
        content = file.read_bytes()
        if content[126:128] != b"IM":
            raise ValueError("not of MATLAB's format 5, little-endian")
        return dict(variable for variable in map(_array, _elements(content[128:])) if variable is not None)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (ValueError, IndexError, KeyError, TypeError, struct.error, zlib.error) as error:
        raise UserError(f"{file}: not a readable MATLAB file ({error})") from None


# "MAT-File Level 5 File Format" by The MathWorks: an element is a type, a size and so many bytes, filled up to a multiple of eight.
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _TEXT = 2, 4
_NUMERIC = range(6, 16)


def _elements(content: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<II", content, at)
        if kind >> 16:  # a small one: both in the first four bytes, its data in the next
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            end = start + size if kind == _COMPRESSED else start + (size + 7) // 8 * 8
        if start + size > len(content):
            raise ValueError("truncated")
        data = content[start : start + size]
        found += _elements(zlib.decompress(data)) if kind == _COMPRESSED else [(kind, data)]
        at = end
    if at < len(content):
        raise ValueError("truncated")
    return found


def _array(element: tuple[int, bytes]) -> tuple[str, Any] | None:
    """(name, value) of a matrix."""
    kind, data = element
    if kind != _MATRIX or not data:
        return None
    (_, flags), (_, shape_data), (_, name), *values = _elements(data)
    matrix, shape = flags[0], np.frombuffer(shape_data, "<i4").tolist()
    if matrix == _STRUCT:
        width = int(np.frombuffer(values[0][1], "<i4")[0])
        fields = [values[1][1][i : i + width].split(b"\0")[0].decode() for i in range(0, len(values[1][1]), width)]
        cells = [variable[1] if (variable := _array(cell)) else None for cell in values[2:]]
        return name.decode(), [
            dict(zip(fields, cells[i : i + len(fields)], strict=True)) for i in range(0, len(cells), max(1, len(fields)))
        ]
    if matrix == _TEXT:
        stored, text = values[0]
        return name.decode(), text.decode({16: "utf-8", 17: "utf-16-le", 18: "utf-32-le", 4: "utf-16-le"}.get(stored, "latin1"))
    if matrix in _NUMERIC:
        stored, numbers = values[0]
        return name.decode(), np.frombuffer(numbers, _NUMBERS[stored]).reshape(shape, order="F")
    return None
