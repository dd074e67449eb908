"""Rules about addresses of servers that texts are sent to."""

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit


def address_problems(address: str, *, place: str, allow_remote: bool, allow_key: str, token_key: str) -> Iterator[str]:
    """What is wrong with an address: https unless it is this machine's own, and only where sending texts is allowed.

    place, allow_key, token_key: the keys that hold the address, the permission and the token's variable.
    """
    problem = _form(address, token_key=token_key)
    if problem is not None:
        yield f"{place}: {problem}"
    elif not is_loopback(address):
        if not allow_remote:
            yield (
                f"{place} = {address!r} is not on this machine, and the texts of the data would be sent there; "
                f"set {allow_key}: true if that is meant"
            )
        if urlsplit(address).scheme != "https":
            yield f"{place} = {address!r}: must be https, because texts and the token leave this machine"


def is_loopback(address: str) -> bool:
    """Whether the address is this machine's own."""
    return is_loopback_host(urlsplit(address).hostname or "")


def is_loopback_host(host: str) -> bool:
    """Whether the name or number is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _form(address: str, *, token_key: str) -> str | None:
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - parsing it is the test
    except ValueError as error:
        return f"{address!r} is no address ({error})"
    if parts.username is not None or parts.password is not None:
        return f"an address must not hold a password; use {token_key}"
    if parts.query or parts.fragment:
        # Not shown: keys are put there.
        return f"an address must end before '?' and '#'; a key belongs into {token_key}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return f"{address!r} must look like https://host:port"
    return None
