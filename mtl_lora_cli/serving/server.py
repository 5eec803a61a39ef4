"""uvicorn around a service: a socket, signals, and an end that loses nothing."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.serving.service import Service

TOKEN = "MTL_LORA_TOKEN"  # the environment variable


def read_token(file: Path | None) -> str | None:
    """The token of a file, or of the environment; None: there is none.

    Raises:
        UsageError: the file cannot be read, or the token is empty or has white space in it.
    """
    if file is None:
        token = os.environ.get(TOKEN)
        where = TOKEN
    else:
        where = f"--token-file {file}"
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if token is not None and (not token or token.split() != [token] or not token.isascii()):
        raise UsageError(f"{where}: expected one word of ASCII characters")
    return token


def require_private(host: str, token: str | None) -> None:
    """Refuse to answer the whole network without a token.

    Raises:
        UsageError: the address is not this machine's own, and there is no token.
    """
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    if not own and token is None:
        raise UsageError(
            f"--host {host} can be reached from elsewhere: give a token with --token-file or {TOKEN}"
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is a free one.

    Raises:
        UsageError: it is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return made


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT when what it has taken is answered, and then returns.

    Args:
        service: what answers.

    Attributes:
        stopped_by: the signal; None: none.
    """

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            service.app, log_level="warning", access_log=False, lifespan="off", server_header=False
        )
        super().__init__(config)
        self._service = service
        self.stopped_by: int | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does it, but the signal is not raised again in the end."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See the class."""
        self.stopped_by = sig
        self._service.end()
        self.should_exit = True
