"""Hypothesis strategies for Protobuf messages, generated from their descriptors, with all kinds of fields."""

import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_DEPTH = 4  # of nested messages; `deep` nests deeper
_FEW = 3  # elements of most repeated fields
_LONG = (65, 1000, 20_000)  # repetitions in long strings and lists

_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


@cache
def messages(descriptor: Descriptor, words: tuple[str, ...], depth: int = 0) -> st.SearchStrategy[Message]:
    """Return messages of this type, from empty to every field set. Strings are often one of `words`."""
    kind = GetMessageClass(descriptor)
    fields = [field for field in descriptor.fields if depth < _DEPTH or field.message_type is None]
    # One integer with a bit for each field: hypothesis draws it far faster than a boolean for each.
    chosen = st.integers(0, 2 ** len(fields) - 1)

    @st.composite
    def generated(draw: st.DrawFn) -> Message:
        message = kind()
        bits = draw(chosen) if fields else 0
        for index, field in enumerate(fields):
            if bits >> index & 1:
                _set(message, field, draw(_values(field, words, depth)))
        return message

    return generated()


@cache
def _values(field: FieldDescriptor, words: tuple[str, ...], depth: int) -> st.SearchStrategy[Any]:
    """Return values of the field: a scalar, a message, a list of either, or the entries of a map."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return st.dictionaries(_scalars(key, words), _values(value, words, depth), max_size=_FEW)
    one = _scalars(field, words) if field.message_type is None else messages(field.message_type, words, depth + 1)
    if not field.is_repeated:
        return one
    few = st.lists(one, max_size=_FEW)
    if field.message_type is not None:
        return few
    many = st.builds(lambda elements, count: elements * count, st.lists(one, max_size=2), st.sampled_from(_LONG))
    return st.one_of([few] * 15 + [many])


def _set(message: Any, field: FieldDescriptor, values: Any) -> None:
    """Set the field. In a oneof, the last field that is set stays."""
    if isinstance(values, dict):
        entries = getattr(message, field.name)
        for key, value in values.items():
            if isinstance(value, Message):
                entries[key].CopyFrom(value)
            else:
                entries[key] = value
    elif field.is_repeated:
        getattr(message, field.name).extend(values)
    elif field.message_type is None:
        setattr(message, field.name, values)
    else:
        getattr(message, field.name).CopyFrom(values)


@cache
def _scalars(field: FieldDescriptor, words: tuple[str, ...]) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _RANGES:
        least, most = _RANGES[kind]
        edges = [each for each in (-1, 0, 1, 2, 8, 64, 255, 2**31, 2**32, least, most) if least <= each <= most]
        return st.sampled_from(edges) | st.integers(max(least, -8), 80) | st.integers(least, most)
    if kind == FieldDescriptor.CPPTYPE_DOUBLE:
        return st.sampled_from([0.5, 1.0, 3.0]) | st.floats()
    if kind == FieldDescriptor.CPPTYPE_FLOAT:
        return st.sampled_from([0.5, 1.0, 3.0]) | st.floats(width=32)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        assert field.enum_type is not None
        return _numbers(field.enum_type)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return (
            st.binary(max_size=40)
            | st.sampled_from(words).map(str.encode)
            | st.sampled_from(words).map(encoded_element)
        )
    return st.sampled_from(words) | st.text(max_size=30) | _long_texts()


def _numbers(enum: EnumDescriptor) -> st.SearchStrategy[int]:
    """Return the numbers of the enum, and some that it does not have."""
    return st.sampled_from([value.number for value in enum.values]) | st.integers(-(2**31), 2**31 - 1)


def _long_texts() -> st.SearchStrategy[str]:
    return st.builds(lambda text, count: text * count, st.text(min_size=1, max_size=2), st.sampled_from(_LONG))


def encoded_element(word: str) -> bytes:
    """Return an element of BYTES in the Open Inference Protocol: its length, and its UTF-8."""
    return struct.pack("<I", len(word.encode())) + word.encode()


def corrupted(encoded: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Return encoded messages that are truncated, extended, or have a changed byte."""

    def cut(message: bytes, position: int) -> bytes:
        return message[: position % (len(message) + 1)]

    def changed(message: bytes, position: int, value: int) -> bytes:
        if not message:
            return bytes([value])
        position %= len(message)
        return message[:position] + bytes([value]) + message[position + 1 :]

    positions = st.integers(0, 10_000)
    corruptions: list[Callable[..., Any]] = [
        lambda: st.builds(cut, encoded, positions),
        lambda: st.builds(changed, encoded, positions, st.integers(0, 255)),
        lambda: st.builds(bytes.__add__, encoded, st.binary(max_size=20)),
        lambda: st.builds(bytes.__add__, encoded, encoded),
    ]
    return st.one_of([each() for each in corruptions])


def deep(descriptor: Descriptor) -> st.SearchStrategy[bytes]:
    """Return bytes that nest messages 50 to 5,000 deep in a message field of this type, if it has one."""
    fields = [field.number for field in descriptor.fields if field.message_type is not None]
    # Struct.fields, the value of its map, Value.struct_value or .list_value, and ListValue.values nest in each other.
    return st.builds(_nested, st.sampled_from(fields or [1]), st.integers(50, 5000))


def _nested(field: int, depth: int) -> bytes:
    numbers = (1, 2, 5)  # Struct.fields; the entry's value; Value.struct_value
    message = b""
    for level in range(depth):
        message = _field(numbers[(depth - level) % len(numbers)], message)
    return _field(field, message)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
