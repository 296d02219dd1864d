"""The network interface by which this host reaches another."""

import socket
from dataclasses import dataclass
from ipaddress import ip_address

import psutil


@dataclass(frozen=True)
class Interface:
    """A network interface of this host. name: None where the system does not tell it."""

    name: str | None
    address: str

    @property
    def is_loopback(self) -> bool:
        return ip_address(self.address).is_loopback


def interface_towards(host: str) -> Interface:
    """The interface whose address a connection from here to `host` would have; nothing is sent.

    Raises:
        OSError: the name is not known here, or no route leads there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own = probe.getsockname()[0]
    names = (name for name, entries in psutil.net_if_addrs().items() if own in (entry.address for entry in entries))
    return Interface(next(names, None), own)
