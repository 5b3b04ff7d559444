"""Firewall rules for hosts of one's own.

Ray binds most of its ports to every address, and cannot be told not to. In a cloud the security group does
the same.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from tt_ray.errors import UserError

_RULES = """\
# For every host of the cluster, as root:  nft -f FILE.  They last until the next start of the host, unless
# /etc/nftables.conf includes them. Ports below 1024, such as that of ssh, are left as they are.
table inet tt-ray
delete table inet tt-ray
table inet tt-ray {{
    chain input {{
        type filter hook input priority filter;
        iif lo accept
        ct state established,related accept
{accepted}
        tcp dport >= 1024 drop
    }}
}}
"""


def rules(hosts: Iterable[str]) -> str:
    """nftables rules that open what users' programs listen on (ports from 1024 up) to `hosts` alone.

    hosts: addresses, or names that are looked up. Loading the rules again replaces them. `UserError` where a
    name is not known.
    """
    addresses = {address for host in hosts for address in _addresses(host)}
    accepted = []
    for family, version in (("ip", 4), ("ip6", 6)):
        if members := sorted(address for address in addresses if address.version == version):
            accepted.append(f"        {family} saddr {{ {', '.join(map(str, members))} }} accept")
    return _RULES.format(accepted="\n".join(accepted))


def _addresses(host: str) -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"host {host!r} is not known here: {error}") from None
    return {ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found}
