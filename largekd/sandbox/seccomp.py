"""The system-call filter of a sandboxed program, as classic BPF for the kernel.

Made by hand rather than by bindings of libseccomp: forty lines of arithmetic against a package and a system library.
"""

import errno
import struct
from typing import NamedTuple

from largekd.sandbox.syscalls import ARCHITECTURES, allowed_calls

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _AND, _EQUAL, _AT_LEAST, _ABOVE, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x25, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits (little-endian)
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENT_AT = 0, 4, 16
_ALL_BITS = 0xFFFFFFFF
_NEW_NAMESPACES = 0x7E020000
_AF_UNIX = 1
_SHARED_AND_ANONYMOUS = 0x21


class _Rule(NamedTuple):
    """What an argument must be for a call to pass: `argument & mask` is `value`, or is not; else `refusal`."""

    call: str
    argument: int
    mask: int
    value: int
    is_value: bool
    refusal: int


_RULES = (
    _Rule("clone", 0, _NEW_NAMESPACES, 0, True, errno.EPERM),
    # A network namespace does not hold back all families, such as AF_VSOCK to a virtual machine's host.
    _Rule("socket", 0, _ALL_BITS, _AF_UNIX, True, errno.EAFNOSUPPORT),
    _Rule("socketpair", 0, _ALL_BITS, _AF_UNIX, True, errno.EAFNOSUPPORT),
    # Such pages stay when nobody maps them any more, so that they are in no process's memory.
    _Rule("mmap", 3, _SHARED_AND_ANONYMOUS, _SHARED_AND_ANONYMOUS, False, errno.EPERM),
    # Limits of oneself alone: process 1 has the same user.
    _Rule("prlimit64", 0, _ALL_BITS, 0, True, errno.EPERM),
)


def seccomp_program(machine: str) -> bytes:
    """An array of struct sock_filter that allows the calls of `syscalls.py` and answers every other with ENOSYS.

    Refused by argument: clone with a flag for a new namespace, mmap of shared anonymous memory, prlimit64 of another
    process (EPERM), a socket of any family but AF_UNIX (EAFNOSUPPORT). Calls of another processor's or the x32
    interface kill.
    """
    calls = allowed_calls(machine)
    filters = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for rule in _RULES:
        filters += _by_argument(rule, number=calls.pop(rule.call))
    for first, last in _ranges(sorted(calls.values())):
        filters += [
            (_AT_LEAST, 1, 0, first),
            (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
            (_ABOVE, 1, 0, last),
            (_RETURN, 0, 0, _ALLOW),
        ]
    # Numbers of the x32 interface have bit 30 set.
    filters += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    return b"".join(struct.pack("<HBBI", *one) for one in filters)


def _by_argument(rule: _Rule, *, number: int) -> list[tuple[int, int, int, int]]:
    """If the call is `number`: allow or refuse by the low half of an argument, which is all that these calls read."""
    return [
        (_EQUAL, 0, 5, number),
        (_LOAD, 0, 0, _ARGUMENT_AT + 8 * rule.argument),
        (_AND, 0, 0, rule.mask),
        (_EQUAL, int(not rule.is_value), int(rule.is_value), rule.value),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | rule.refusal),
    ]


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, last) of their runs."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
