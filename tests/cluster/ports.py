"""What a host listens on, and what of it others than the cluster's own hosts can reach."""

from __future__ import annotations

import ipaddress
import json
import sys
from dataclasses import dataclass

from hosts import NETWORK, Host, address6

SSH = 22
_KNOCK = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def answers(door):
    try:
        socket.create_connection(door, timeout=2).close()
    except OSError:
        return False
    return True

doors = [tuple(door) for door in json.loads(sys.argv[1])]
with ThreadPoolExecutor(64) as pool:
    print(json.dumps([door for door, open in zip(doors, pool.map(answers, doors)) if open]))
"""


@dataclass(frozen=True, order=True)
class Listener:
    """A listening TCP socket; an `address` of 0.0.0.0 or :: is all of the host's."""

    port: int
    address: str
    program: str

    @property
    def ip(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The address; that of IPv4 where it stands in one of IPv6."""
        ip = ipaddress.ip_address(self.address)
        return getattr(ip, "ipv4_mapped", None) or ip

    @property
    def everywhere(self) -> bool:
        """Whether it is bound to every address of the host."""
        return self.ip.is_unspecified


def listeners(host: Host) -> list[Listener]:
    """All listening TCP sockets of a host but those of loopback."""
    found = []
    for line in host.run(
        "ss", "--listening", "--tcp", "--numeric", "--processes", "--no-header"
    ).splitlines():
        words = line.split()
        address, _, port = words[3].rpartition(":")
        program = words[5].split('"')[1] if len(words) > 5 else "?"
        address = address.strip("[]").partition("%")[0]
        found.append(Listener(int(port), "::" if address == "*" else address, program))
    return sorted(one for one in found if not one.ip.is_loopback)


def open_beyond(host: Host, desk: Host) -> list[Listener]:
    """Sockets that are open beyond loopback and the cluster's network, ssh aside.

    Those bound to an address outside of it, and those that answer `desk`, which is outside, at any address.
    """
    all_of_them = [one for one in listeners(host) if one.port != SSH]
    doors = [(address, one.port) for one in all_of_them for address in (host.address, address6(host.address))]
    answered = {port for _, port in json.loads(desk.run(sys.executable, "-c", _KNOCK, json.dumps(doors)))}
    network = ipaddress.ip_network(NETWORK)
    strangers = {one for one in all_of_them if not (one.everywhere or one.ip in network)}
    return sorted(strangers | {one for one in all_of_them if one.port in answered})
