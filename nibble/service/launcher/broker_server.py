"""The broker's server: an embedded Valkey, started again should it die, or one that the user named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from nibble.service.broker.embedded import EmbeddedServerError, EmbeddedValkey
from nibble.service.launcher.errors import LaunchError
from nibble.service.launcher.plan import Plan


class BrokerServer:
    """`embedded` is None where NIBBLE_REDIS_URL names a server."""

    def __init__(self, url: str, embedded: EmbeddedValkey | None, log: Callable[[str, str], None]) -> None:
        self.url = url
        self._embedded = embedded
        self._log = log

    @property
    def pid(self) -> int | None:
        return self._embedded.pid if self._embedded else None

    @property
    def where(self) -> str:
        """Its address, without the password."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def keep_running(self) -> None:
        """Start an embedded server that died again, at the same address; gateways give it back what they hold."""
        if self._embedded is None or self._embedded.is_running:
            return
        self._log("nibble", "valkey ended; it starts again")
        self._embedded.stop()
        try:
            self._embedded.start()
        except EmbeddedServerError as error:
            raise LaunchError(str(error)) from error


@contextmanager
def running_broker(plan: Plan, log: Callable[[str, str], None]) -> Iterator[BrokerServer]:
    """The server for as long as the context lasts. Its log is `valkey.log` in the cache directory's run/<port>."""
    settings = plan.settings
    if not settings.has_own_broker:
        yield BrokerServer(settings.redis_url, None, log)
        return
    embedded = EmbeddedValkey(settings.cache_dir / "run" / str(plan.address.port))
    try:
        embedded.start()
    except (EmbeddedServerError, OSError) as error:
        raise LaunchError(str(error)) from error
    try:
        yield BrokerServer(embedded.url, embedded, log)
    finally:
        embedded.stop()
