"""The suite runs without network (only this machine may be reached), and real data are optional."""

import os
import socket
from pathlib import Path

import pytest

LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "::", "", None, socket.gethostname()}
DATA = Path(__file__).parents[2] / "shared" / "data"

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class NetworkForbidden(OSError):
    """A test tried to reach another machine."""


def _check(host) -> None:
    host = host.decode() if isinstance(host, bytes) else host
    if host not in LOCAL and not str(host).startswith("127."):
        raise NetworkForbidden(f"tests must not use the network: {host}")


def pytest_configure(config) -> None:
    """Guard name lookups and connections for the whole session, imports of test modules included."""
    if config.option.markexpr == "network":
        return
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(original):
        def call(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _check(address[0])
            return original(self, address)

        return call

    def guarded_lookup(host, *args, **kwargs):
        _check(host)
        return lookup(host, *args, **kwargs)

    socket.socket.connect, socket.socket.connect_ex = guarded(connect), guarded(connect_ex)
    socket.getaddrinfo = guarded_lookup


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets beside the checkout."""
    if not DATA.is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return DATA
