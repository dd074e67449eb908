"""Rules about the addresses of a remote teacher."""

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from largekd.config.teacher import RemoteTeacherConfig, TeacherConfig


def check_remote(teacher: TeacherConfig) -> Iterator[str]:
    """What is wrong with the servers of a remote teacher."""
    if not isinstance(teacher, RemoteTeacherConfig):
        return
    for index, server in enumerate(teacher.servers):
        place = f"teacher.servers.{index}"
        problem = _problem(server)
        if problem is not None:
            yield f"{place}: {problem}"
        elif not is_loopback(server):
            if not teacher.allow_remote:
                yield (
                    f"{place} = {server!r} is not on this machine, and the texts of the data would be sent there; "
                    "set teacher.allow_remote: true if that is meant"
                )
            if urlsplit(server).scheme != "https":
                yield f"{place} = {server!r}: must be https, because texts and the token leave this machine"
    if teacher.protocol == "vllm" and teacher.served_model is None:
        yield "teacher.served_model: an OpenAI-compatible server expects its model's name; set it"


def _problem(server: str) -> str | None:
    try:
        address = urlsplit(server)
        address.port  # noqa: B018 - parsing it is the test
    except ValueError as error:
        return f"{server!r} is no address ({error})"
    if address.username is not None or address.password is not None:
        return "an address must not hold a password; use token_variable"
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        return f"{server!r} must look like https://host:port"
    return None


def is_loopback(server: str) -> bool:
    """Whether the address is this machine's own."""
    host = urlsplit(server).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
