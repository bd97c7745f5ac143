"""API keys: who they are, and the file that lists them.

The file has a JSON object on each line (blank lines and those that begin with # are skipped), as `nibble key` prints
it. It holds SHA-256 digests: keys are 256 random bits, so nothing slower is needed. Keys with one name are one client,
so that a key can be replaced while the old one is still in use.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from nibble.service.broker.terms import Limit, Quota

logger = logging.getLogger(__name__)

MAX_PRIORITY = 50  # with a request's own and its tier's, within what the queue takes
_KEY_BYTES = 32
_NAME_CHARS = 12  # of the digest, for keys without a name
_RELOAD_S = 1.0

Amount = Annotated[int, msgspec.Meta(ge=1, le=10**12)]


class KeyFileError(ValueError):
    """The file of keys is not what it should be. The message names it and the line."""


class ApiKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """name: of the client, for logs and as the tenant of its requests. priority: added to theirs; lower goes first."""

    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._@-]{1,64}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Amount | None = None
    tokens_per_minute: Amount | None = None
    tokens_per_day: Amount | None = None
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0

    @property
    def quota(self) -> Quota | None:
        limits = [
            Limit("requests", self.requests_per_minute or 0, 60),
            Limit("tokens", self.tokens_per_minute or 0, 60),
            Limit("tokens", self.tokens_per_day or 0, 24 * 3600),
        ]
        set_limits = tuple(limit for limit in limits if limit.amount)
        return Quota(self.name, set_limits) if set_limits else None


class KeyRing:
    """The keys that are valid now: those given, and those of the file, which is looked at again when it changes.

    A file that became unreadable or wrong changes nothing. Raises KeyFileError where it is so from the beginning.
    """

    def __init__(self, keys: Sequence[str], path: Path | None) -> None:
        self._given = [ApiKey(name=digest_of(key)[:_NAME_CHARS], sha256=digest_of(key)) for key in keys]
        self._path = path
        self._signature = _signature(path)
        self._checked_s = time.monotonic()
        self._keys = self._indexed([] if path is None else read_keys(path))

    @property
    def is_empty(self) -> bool:
        """No key is asked for. A file without keys lets nobody in."""
        return self._path is None and not self._given

    def find(self, key: str) -> ApiKey | None:
        """Looked up by digest, whose bytes tell nothing of the key; compared in constant time all the same."""
        self._reload()
        digest = digest_of(key)
        found = self._keys.get(digest)
        return found if found is not None and hmac.compare_digest(found.sha256, digest) else None

    def _reload(self) -> None:
        now_s = time.monotonic()
        if self._path is None or now_s - self._checked_s < _RELOAD_S:
            return
        self._checked_s = now_s
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._keys = self._indexed(read_keys(self._path))
        except KeyFileError as error:
            logger.error("event=api_keys_kept reason=%r", str(error))
        else:
            logger.info("event=api_keys_reloaded num_keys=%d", len(self._keys))

    def _indexed(self, keys: Iterable[ApiKey]) -> dict[str, ApiKey]:
        return {key.sha256: key for key in [*self._given, *keys]}


def read_keys(path: Path) -> list[ApiKey]:
    """Raises KeyFileError."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: {error}") from error
    keys: list[ApiKey] = []
    clients: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = msgspec.json.decode(line, type=ApiKey)
        except msgspec.MsgspecError as error:
            raise KeyFileError(f"{path}: line {number}: {error}") from error
        if clients.setdefault(key.name, key).quota != key.quota:
            raise KeyFileError(f"{path}: line {number}: {key.name} has other limits on an earlier line")
        keys.append(key)
    return keys


def make_key() -> str:
    """A new key."""
    return f"nbl-{secrets.token_urlsafe(_KEY_BYTES)}"


def key_line(key: str, **fields: str | int | None) -> str:
    """What the file has of a key; the fields are those of ApiKey. Raises KeyFileError."""
    try:
        entry = msgspec.convert({**fields, "sha256": digest_of(key)}, ApiKey)
    except msgspec.ValidationError as error:
        raise KeyFileError(str(error)) from error
    return msgspec.json.encode(entry).decode()


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def _signature(path: Path | None) -> tuple[int, int, int] | None:
    """Changes when the file does, or is replaced by another one."""
    try:
        status = path.stat() if path is not None else None
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else None
