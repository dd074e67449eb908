"""Values between a program and its judge: JSON with types, which nothing but plain built-in values come out of.

Like `inside.py` this is text for an interpreter that knows no package: standard library alone.
"""

import builtins
import json
import os
from collections.abc import Callable
from typing import Any

_MOST_BYTES = 1 << 24


def send(descriptor: int, message: Any) -> None:
    """One message: 8 bytes length, JSON."""
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(8, "little") + data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """The next message. EOFError: the other side has ended. ValueError: what came is no message."""
    length = int.from_bytes(_exactly(descriptor, count=8), "little")
    if length > _MOST_BYTES:
        raise ValueError(f"a value of {length} bytes, more than {_MOST_BYTES}")
    return json.loads(_exactly(descriptor, count=length))


def _exactly(descriptor: int, *, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def encode(value: Any, *, keep: Callable[[Any], Any]) -> Any:
    """A value as JSON with its type; `keep` says what stands for a value that is none of the plain ones."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        # Hexadecimal has no limit on digits and takes linear time.
        return {"int": hex(value)}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep=keep), encode(one, keep=keep)] for key, one in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(one, keep=keep) for one in value]}
    return keep(value)


def decode(coded: Any, *, kept: Callable[[Any], Any]) -> Any:
    """The reverse: nothing but plain built-in values, and what `kept` makes of the others. ValueError: neither."""
    if coded is None or isinstance(coded, bool | str):
        return coded
    if not isinstance(coded, dict) or len(coded) != 1:
        raise ValueError("no value")
    ((kind, content),) = coded.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "complex":
        return complex(*map(float.fromhex, content))
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key, kept=kept): decode(one, kept=kept) for key, one in content}
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(one, kept=kept) for one in content)
    return kept(coded)
