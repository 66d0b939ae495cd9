"""Read protobuf messages field by field, without their schema.

The encoding is described at protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator
from typing import Any

# Wire types, and the bytes of those with a fixed size.
VARINT = 0
FIXED_SIZES = {1: 8, 5: 4}


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field.

    A value is an int, or the bytes of a string, of a message, of packed numbers or of a number of
    fixed size. Raises IndexError if the message is cut off inside a number.
    """
    position = 0
    while position < len(message):
        key, position = varint(message, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = varint(message, position)
        else:
            if wire_type in FIXED_SIZES:
                size = FIXED_SIZES[wire_type]
            else:
                size, position = varint(message, position)
            value = message[position : position + size]
            position += size
        yield key >> 3, value


def varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the varint at `position` and the position after it.

    A varint has seven bits in each byte, lowest first. The high bit says whether another byte
    follows.
    """
    value = 0
    shift = 0
    while message[position] > 127:
        value |= (message[position] & 127) << shift
        shift += 7
        position += 1
    value |= message[position] << shift
    return value, position + 1


def packed_varints(packed: bytes) -> list[int]:
    """Return all varints of a packed field."""
    numbers = []
    position = 0
    while position < len(packed):
        number, position = varint(packed, position)
        numbers.append(number)
    return numbers


def values(message: bytes, number: int) -> list[Any]:
    """Return all values of one field; more than one if it is repeated."""
    return [value for field, value in fields(message) if field == number]


def text(message: bytes, number: int) -> str:
    """Return the first value of a string field, or "" if it is absent."""
    for value in values(message, number):
        return value.decode()
    return ""
