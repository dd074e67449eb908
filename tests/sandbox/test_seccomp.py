"""The system-call filter, executed by an interpreter of its own, and its table against the kernel's headers."""

import errno
import re
import struct
from pathlib import Path

import pytest

from largekd.sandbox.seccomp import seccomp_program
from largekd.sandbox.syscalls import ARCHITECTURES, allowed_calls

ALLOW, KILL = 0x7FFF0000, 0x80000000
HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"),),
}


def run_filter(
    machine: str, *, number: int, first_argument: int = 0, flags: int = 0, architecture: int | None = None
) -> int:
    """What the filter returns for a call: classic BPF as of the kernel's documentation."""
    filters = list(struct.iter_unpack("<HBBI", seccomp_program(machine)))
    arguments = (first_argument, 0, 0, flags, 0, 0)
    data = struct.pack("<IIQ6Q", number, architecture or ARCHITECTURES[machine], 0, *arguments)
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, constant = filters[position]
        position += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            accumulator &= constant
        else:
            compare = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x25: accumulator > constant}
            position += if_true if compare[code] else if_false


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_exactly_the_listed_calls_pass(machine: str) -> None:
    by_argument = {"clone", "socket", "socketpair", "mmap", "prlimit64"}
    listed = {number for name, number in allowed_calls(machine).items() if name not in by_argument}
    special = {allowed_calls(machine)[name] for name in by_argument}
    for number in range(600):
        if number not in special:
            wanted = ALLOW if number in listed else 0x50000 | errno.ENOSYS
            assert run_filter(machine, number=number) == wanted, number
    assert len(listed) > 120


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_that_depend_on_their_argument(machine: str) -> None:
    calls = allowed_calls(machine)
    assert run_filter(machine, number=calls["clone"], first_argument=0x3D0F00) == ALLOW
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert run_filter(machine, number=calls["clone"], first_argument=0x11 | 1 << bit) == 0x50000 | errno.EPERM
    for family in range(50):
        wanted = ALLOW if family == 1 else 0x50000 | errno.EAFNOSUPPORT
        assert run_filter(machine, number=calls["socket"], first_argument=family) == wanted
        assert run_filter(machine, number=calls["socketpair"], first_argument=family) == wanted
    for flags, wanted in (
        (0x22, ALLOW),
        (0x01, ALLOW),
        (0x03, ALLOW),
        (0x21, 0x50001),
        (0x23, 0x50001),
        (0x8021, 0x50001),
    ):
        assert run_filter(machine, number=calls["mmap"], flags=flags) == wanted, hex(flags)
    assert run_filter(machine, number=calls["prlimit64"], first_argument=0) == ALLOW
    assert run_filter(machine, number=calls["prlimit64"], first_argument=1) == 0x50000 | errno.EPERM


def test_calls_of_other_interfaces_kill() -> None:
    assert run_filter("x86_64", number=0, architecture=0x40000003) == KILL
    assert run_filter("x86_64", number=0x40000000) == KILL
    assert run_filter("aarch64", number=63, architecture=ARCHITECTURES["x86_64"]) == KILL


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_numbers_are_the_kernels(machine: str) -> None:
    text = "".join(path.read_text() for path in HEADERS[machine] if path.exists())
    if not text:
        pytest.skip(f"no kernel headers with the calls of {machine}")
    known: dict[str, int] = {}
    for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text):
        known.setdefault(name, int(number))
    known.setdefault("newfstatat", known.get("fstatat", -1))
    assert {
        name: (number, known[name]) for name, number in allowed_calls(machine).items() if known[name] != number
    } == {}
