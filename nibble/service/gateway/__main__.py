"""The gateway process: `python -m nibble.service.gateway`. Settings come from NIBBLE_ variables (settings.py).

SIGTERM: no new connections; running answers may end within drain_s, then they end with an error event.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
import sys
from typing import NoReturn

import uvicorn

from nibble.service.gateway.api_keys import KeyFileError
from nibble.service.gateway.app import create_app, create_gateway
from nibble.service.gateway.detokenizer import UnsupportedDecoder
from nibble.service.gateway.errors import Unavailable
from nibble.service.gateway.gateway import Gateway
from nibble.service.gateway.http_protocol import GatewayProtocol
from nibble.service.gateway.served_model import ModelFilesError
from nibble.service.gateway.settings import GatewaySettings
from nibble.service.settings import SettingsError

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_IDLE_CONNECTION_S = 75  # longer than client pools and proxies keep theirs, so that it is not we who close one in use
_GC_OBJECTS = 10_000  # new ones until a young collection, and 100 times as many until a full one; requests leave few
_CLOSING_S = 5  # for the last events to be written after drain_s


class GatewayServer(uvicorn.Server):
    """uvicorn, with our drain before its own shutdown."""

    def __init__(self, config: uvicorn.Config, gateway: Gateway) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        gateway = self._gateway
        gateway.is_draining = True
        logger.info("draining num_requests=%d drain_s=%g", len(gateway.in_flight), gateway.settings.drain_s)
        error = Unavailable("the gateway is shutting down", code="shutting_down", retry_after_s=1.0)
        timer = asyncio.get_running_loop().call_later(gateway.settings.drain_s, gateway.interrupt_all, error)
        await super().shutdown(sockets)
        timer.cancel()


def main() -> int:
    # As process 1 of a container there is no default that would end it while it loads.
    signal.signal(signal.SIGTERM, _end_while_loading)
    try:
        settings = GatewaySettings.from_environment()
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
        gateway = create_gateway(settings)
        gateway.model.grammars.warm_up()
        listener = _listen(settings.host, settings.port)
    except (SettingsError, KeyFileError, ModelFilesError, UnsupportedDecoder, OSError) as error:
        sys.stderr.write(f"nibble gateway: {error}\n")
        return 1
    app = create_app(gateway)
    # A full collection looks through all objects that it knows: those of the code, which stay, and some 200 for each
    # stream. All tokens wait for it, a tenth of a second where there are 1,000 streams.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_OBJECTS)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=GatewayProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_IDLE_CONNECTION_S,
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + _CLOSING_S,
    )
    with listener:
        host, port = listener.getsockname()[:2]
        logger.info("listening on http://%s:%d model=%s", host, port, gateway.model.name)
        server = GatewayServer(config, gateway)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)  # uvicorn raises the signal again in the end: it must not kill us
        server.run(sockets=[listener])
    return 0


def _end_while_loading(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError whose message names the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
