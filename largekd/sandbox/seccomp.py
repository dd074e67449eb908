"""The system-call filter of a sandboxed program, as classic BPF for the kernel.

Made by hand rather than by bindings of libseccomp: forty lines of arithmetic against a package and a system library.
"""

import errno
import struct

from largekd.sandbox.syscalls import ARCHITECTURES, allowed_calls

# linux/bpf_common.h and linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x25, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
# struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits (little-endian)
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENT_AT = 0, 4, 16
_NEW_NAMESPACES = 0x7E020000
_AF_UNIX = 1


def seccomp_program(machine: str) -> bytes:
    """An array of struct sock_filter that allows the calls of `syscalls.py` and answers every other with ENOSYS.

    clone with a flag for a new namespace is refused with EPERM, a socket of any family but AF_UNIX with EAFNOSUPPORT: a
    network namespace does not hold back all of them, such as AF_VSOCK to a virtual machine's host. Calls of another
    processor's or the x32 interface kill.
    """
    calls = allowed_calls(machine)
    filters = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    filters += _argument_rule(calls.pop("clone"), test=(_ANY_BIT, 1, 0, _NEW_NAMESPACES), refusal=errno.EPERM)
    for name in ("socket", "socketpair"):
        filters += _argument_rule(calls.pop(name), test=(_EQUAL, 0, 1, _AF_UNIX), refusal=errno.EAFNOSUPPORT)
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


def _argument_rule(number: int, *, test: tuple[int, int, int, int], refusal: int) -> list[tuple[int, int, int, int]]:
    """If the call is `number`: allow or refuse by the low half of its first argument; `test` jumps by 1 to refuse."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENT_AT),
        test,
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | refusal),
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
