"""Protocol buffers' wire format, as far as files of tokenizers have it."""

from __future__ import annotations

import struct
from typing import NamedTuple


class Field(NamedTuple):
    """A field of a message: a number, and an integer or bytes."""

    number: int
    value: int | bytes


def read_message(data: bytes) -> list[Field]:
    """The fields of a message, in order: integers, and bytes of what has a length or is four or eight bytes long.

    Raises:
        ValueError: it breaks off, or has what is no field.
    """
    fields, at = [], 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            fields.append(Field(number, value))
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {at} begins no field")
        if at + size > len(data):
            raise ValueError("it breaks off")
        fields.append(Field(number, data[at : at + size]))
        at += size
    return fields


def field(number: int, value: int | float | bytes) -> bytes:
    """A field as it is written: an integer from 0 on, four bytes of a number, or bytes with their length."""
    if isinstance(value, float):
        return _written_varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _written_varint(number << 3) + _written_varint(value)
    return _written_varint(number << 3 | 2) + _written_varint(len(value)) + value


def _written_varint(value: int) -> bytes:
    data = bytearray()
    while value >= 0x80:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def floating(data: bytes) -> float:
    """Four bytes as a number.

    Raises:
        ValueError: there are not four.
    """
    if len(data) != 4:
        raise ValueError("a number of another size")
    value: float = struct.unpack("<f", data)[0]
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError("it breaks off")
