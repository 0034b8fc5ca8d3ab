"""Who asks, where a proxy stands between: only a proxy that is trusted is believed.

Each proxy writes the address that it was asked from at the end of X-Forwarded-For. What stands
further left came with the request: anybody can write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from jlayer.serving.wire.errors import Refused

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

HEADER = b"x-forwarded-for"
MOST_PROXIES = 16  # parts that are looked at: more are a loop, or an attempt to cost us time
_LONGEST = 64  # characters of an address with brackets and a port


def client_behind(
    peer: str, headers: Sequence[tuple[bytes, bytes]], trusted: Sequence[Network]
) -> str:
    """The client's address: the right-most one that no trusted proxy has, and `peer` where that is
    no trusted proxy itself or names nobody. `headers`: all of a request, names in lower case.

    Raises Refused (400) where that place holds no address. A proxy that is trusted wrote it, or let
    a client write it, so its configuration is wrong. To go on with the proxy's own address would
    count all people as one again, and nobody would notice. What stands left of the client's address
    is not looked at: whatever it holds harms nobody.
    """
    address = _address_of(peer)
    if address is None or not _is_in(address, trusted):
        return peer
    # A proxy may add a line of its own (HAProxy does): the last line is the right-most part.
    line = b",".join(value for name, value in headers if name == HEADER).decode("latin-1")
    found = peer
    for number, part in enumerate(reversed(line.rsplit(",", MOST_PROXIES))):
        word = part.strip()
        if not word and number < MOST_PROXIES:  # empty parts count for nothing (RFC 9110, 5.6.1)
            continue
        address = _address_of(word)
        if address is None or number == MOST_PROXIES:
            raise _no_address(word, number)
        found = str(address)
        if not _is_in(address, trusted):
            break
    return found


def _address_of(word) -> Address | None:
    """With or without a port; None where it is none. IPv4 written as IPv6, and zones of this
    machine's own network cards, do not make another client."""
    if len(word) > _LONGEST:
        return None
    if word.startswith("["):
        word, _, port = word[1:].partition("]")
        port = port.removeprefix(":")
    elif word.count(":") == 1:
        word, _, port = word.partition(":")
    else:
        port = ""
    try:
        found = ip_address(word)
    except ValueError:
        return None
    if port and not (port.isascii() and port.isdecimal()):
        return None
    if isinstance(found, IPv6Address):
        return found.ipv4_mapped or IPv6Address(int(found))
    return found


def _is_in(address, networks):
    return any(address in network for network in networks)


def _no_address(word, number):
    if number == MOST_PROXIES:
        found = f"more than {MOST_PROXIES - 1} trusted proxies in a row"
    else:
        found = f"{word[:_LONGEST]!r}, which is no address"
    return Refused(
        400,
        f"X-Forwarded-For: found {found}; have the proxy write the address of who asks it, or take "
        "--trusted-proxy away",
        code="invalid_forwarded_for",
    )
