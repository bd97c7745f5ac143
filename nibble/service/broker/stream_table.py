"""The unfinished TokenStreams of one gateway process, by request id. In memory only: no Redis, no tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence

from nibble.engine.protocol import TokenEvent
from nibble.service.broker.token_stream import NEVER_S, TokenStream
from nibble.service.broker.wire import decode_events


class StreamTable:
    """A stream leaves the table when its final event is in its mailbox, or when it is closed.

    Consumers are told in the event loop's next turn: where several messages wait to be read, of all their tokens at
    once, which then cost no more than one.
    """

    def __init__(self) -> None:
        self._streams: dict[str, list[TokenStream]] = {}
        self._untold: dict[TokenStream, None] = {}  # a set in order
        self._telling: asyncio.Handle | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._streams

    def __iter__(self) -> Iterator[TokenStream]:
        return iter([stream for streams in self._streams.values() for stream in streams])

    def add(self, stream: TokenStream) -> None:
        self._streams.setdefault(stream.request_id, []).append(stream)
        stream.on_close = self.remove

    def remove(self, stream: TokenStream) -> None:
        """Idempotent."""
        streams = self._streams.get(stream.request_id, [])
        if stream in streams:
            streams.remove(stream)
            if not streams:
                del self._streams[stream.request_id]

    def of(self, request_id: str) -> list[TokenStream]:
        return list(self._streams.get(request_id, ()))

    def dispatch(self, message: bytes) -> bool:
        """Deliver a published message. False if some stream found a gap and wants the log."""
        return self._offer(decode_events(message))

    def offer(self, event: TokenEvent) -> None:
        """Deliver one event from the log."""
        self._offer((event,))

    def _offer(self, events: Sequence[TokenEvent]) -> bool:
        now_s, are_contiguous = time.monotonic(), True
        for event in events:
            is_contiguous = True
            for stream in self._streams.get(event.request_id, ()):
                if stream.offer(event):
                    stream.heard_s = now_s
                else:
                    is_contiguous = are_contiguous = False
                self._untold[stream] = None
            if event.finish_reason is not None and is_contiguous:
                self._streams.pop(event.request_id, None)
        self._tell_soon()
        return are_contiguous

    def _tell_soon(self) -> None:
        if self._untold and self._telling is None:
            self._telling = asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._telling = None
        untold, self._untold = self._untold, {}
        for stream in untold:
            stream.tell()

    def fail(self, streams: Iterable[TokenStream], message: str) -> None:
        for stream in streams:
            stream.fail(message)
            self.remove(stream)

    def mark_all_silent(self) -> None:
        """Ask for a read of every log: live events may have been lost."""
        for stream in self:
            stream.heard_s = NEVER_S

    def silent(self, silence_s: float) -> list[str]:
        """Ids of the streams that heard nothing for silence_s, longest silence first."""
        since_s = time.monotonic() - silence_s
        heard = {stream.request_id: stream.heard_s for stream in self if stream.heard_s < since_s}
        return sorted(heard, key=heard.__getitem__)
