"""Protobuf's wire format: walks the fields of a mapped file, and encodes the few fields a caffemodel needs.

It knows no message: what field 7 means is for `caffemodel` to say. It is not protobuf's own parser, which is used for
text definitions only, because a file of weights comes from a stranger: that parser does not say at which byte a file is
broken, copies every weight, and makes objects of hundreds of bytes from messages of two, so that a small file can fill
the memory. Here a message is a range of bytes, every length is checked before it is used, and runs of 4- and 8-byte
fields (weights that are not packed) are found by numpy and handed on as one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

VARINT, FIXED64, BYTES, START_GROUP, END_GROUP, FIXED32 = range(6)

MAX_FIELDS = 1_000_000
"""Fields walked in one file; a run of 4- or 8-byte fields counts as a few. ResNet-152 has about 15 000; a million take
one to three seconds, so a file made of empty fields is refused by then."""

MAX_DEPTH = 100
"""Groups within groups, as in protobuf's own parsers. Caffe has no groups, so they are only ever skipped."""

_RUN_COST = 8  # of a run in fields: what the first call of numpy takes
_FIRST_BLOCK, _LAST_BLOCK = 64, 1 << 13  # elements compared at a time: short runs stay cheap, long ones take few calls
_WIRE_TYPES = ("a varint", "an 8-byte number", "bytes", "a group", "the end of a group", "a 4-byte number")


class WireError(ValueError):
    """Bytes that are no protobuf message, or of a message that is not the expected one. Says at which byte."""


class Field(NamedTuple):
    """One field, or a run of `repeats` consecutive 4- or 8-byte fields with the same tag."""

    number: int
    wire_type: int
    offset: int
    """Of its tag, in bytes from the start of the file."""
    start: int
    """Of what follows the tag (and the length); of the first one's in a run."""
    stop: int
    """One past its last byte; past the last one's in a run."""
    value: int
    """Of a varint, unsigned and with all its bits (`signed` cuts them); otherwise 0."""
    repeats: int
    stride: int
    """Bytes from one element of a run to the next."""

    def describe(self) -> str:
        return f"field {self.number} at byte {self.offset}"

    def expect(self, meaning: str, *wire_types: int) -> None:
        """Raises `WireError` unless the field is encoded in one of `wire_types`."""
        if self.wire_type not in wire_types:
            right = " or ".join(_WIRE_TYPES[wire_type] for wire_type in wire_types)
            raise WireError(f"{self.describe()} is {_WIRE_TYPES[self.wire_type]}; {meaning} is {right}")


class Reader:
    """Walks the messages in `data`, which is not copied. One reader per file: it counts the fields of all its messages.

    Args:
        data: a file mapped for reading, or bytes.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self._left = MAX_FIELDS

    def spend(self, fields: int, offset: int) -> None:
        """Counts `fields` more. Raises `WireError` when that is more than the file may have."""
        self._left -= fields
        if self._left < 0:
            raise WireError(f"more than {MAX_FIELDS:,} fields until byte {offset}, no file of weights has so many")

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message in bytes `start` to `stop`, in their order. A group is one field of its own.

        Raises:
            WireError: for anything that is no field, or that reaches beyond `stop`.
        """
        position = start
        while position < stop:
            field = self._field(position, stop)
            if field.wire_type == START_GROUP:
                field = field._replace(stop=self._end_of_group(field, stop))
            elif field.wire_type == END_GROUP:
                raise WireError(f"{field.describe()} ends a group that never began")
            elif field.wire_type in (FIXED32, FIXED64):
                field = self._run(field, stop)
            yield field
            position = field.stop

    def varint(self, position: int, stop: int) -> tuple[int, int]:
        """The number at byte `position`, and the byte after it. Bits past the 64th are kept: no length is so large."""
        data = self.data
        value = shift = 0
        for at in range(position, min(position + 10, stop)):
            byte = data[at]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at + 1
            shift += 7
        if stop - position >= 10:
            raise WireError(f"the number at byte {position} has more than the 10 bytes of a varint")
        raise WireError(f"the number at byte {position} is cut off at byte {stop}: truncated or damaged")

    def numbers(self, start: int, count: int, stride: int, dtype: str) -> np.ndarray[Any, Any]:
        """Return a read-only view, perhaps not aligned, of `count` numbers, `stride` bytes apart; nothing is copied."""
        if count == 0:
            return np.frombuffer(b"", dtype)
        return np.ndarray((count,), dtype, buffer=self.data, offset=start, strides=(stride,))

    def _field(self, offset: int, stop: int) -> Field:
        self.spend(1, offset)
        first = self.data[offset]
        if first < 0x80:
            number, wire_type, position = first >> 3, first & 7, offset + 1
        else:
            key, position = self.varint(offset, stop)
            number, wire_type = key >> 3, key & 7
        if number == 0 or number >= 1 << 29 or wire_type > FIXED32:
            raise WireError(f"no field begins at byte {offset}: damaged, or no protobuf message")
        value = size = 0
        end = start = position
        if wire_type == VARINT:
            value, end = self.varint(position, stop)
        elif wire_type == BYTES:
            size, start = self.varint(position, stop)
            end = start + size
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
            end = start + size
        if end > stop:
            raise WireError(
                f"field {number} at byte {offset} has {size} bytes, and {stop - start} are left of its message: "
                "truncated or damaged"
            )
        return Field(number, wire_type, offset, start, end, value, 1, 0)

    def _end_of_group(self, field: Field, stop: int) -> int:
        # Without recursion: nesting costs the sender one byte a level.
        position, open_groups = field.start, [field.number]
        while open_groups:
            if position >= stop:
                raise WireError(f"the group {field.number} at byte {field.offset} never ends: truncated or damaged")
            inner = self._field(position, stop)
            position = inner.stop
            if inner.wire_type == START_GROUP:
                open_groups.append(inner.number)
                if len(open_groups) > MAX_DEPTH:
                    raise WireError(f"groups nested more than {MAX_DEPTH} deep at byte {inner.offset}")
            elif inner.wire_type == END_GROUP and inner.number != open_groups.pop():
                raise WireError(f"{inner.describe()} ends a group that never began")
        return position

    def _run(self, field: Field, stop: int) -> Field:
        """`field` widened to all that follow it directly with the same tag bytes."""
        key = bytes(self.data[field.offset : field.start])
        stride = field.stop - field.offset
        if self.data[field.stop : field.stop + len(key)] != key:
            return field._replace(stride=stride)
        self.spend(_RUN_COST, field.offset)
        most = (stop - field.offset) // stride
        expected = np.frombuffer(key, np.uint8)
        count, block = 1, _FIRST_BLOCK
        while count < most:
            n = min(block, most - count)
            begin = field.offset + count * stride
            keys = np.ndarray((n, len(key)), np.uint8, buffer=self.data, offset=begin, strides=(stride, 1))
            same = (keys == expected).all(axis=1)
            if not same.all():
                count += int(same.argmin())
                break
            count += n
            block = min(2 * block, _LAST_BLOCK)
        return field._replace(stop=field.offset + count * stride, repeats=count, stride=stride)


def signed(value: int, bits: int = 64) -> int:
    """Return a varint's value as a signed number of `bits` bits, the upper bits cut off as protobuf does for int32."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def varint(value: int) -> bytes:
    """`value`, from 0 to 2**64 - 1, as a varint."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def tag(number: int, wire_type: int) -> bytes:
    """Return what a field begins with."""
    return varint(number << 3 | wire_type)


def bytes_header(number: int, size: int) -> bytes:
    """Return what stands before the `size` bytes of a string, a message or packed numbers."""
    return tag(number, BYTES) + varint(size)
