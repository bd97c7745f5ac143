"""Log probabilities of one choice's tokens, on their way to the text that they belong to.

They leave with the text in which their token begins: text may be held back (a part of a character, or of a stop
string), and what a stop string cuts off must not be told through its tokens.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from nibble.service.gateway.errors import ServerFault

NO_TOKEN = 0xFFFFFFFF
_LOWEST = -9999.0  # OpenAI's stand-in for the logarithm of 0, which JSON has no number for


class TokenLogprob(NamedTuple):
    """start: where the token's text begins in the choice's, in characters. logprob: None for a prompt's first token."""

    token_id: int
    start: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]  # (token id, log probability), falling


class LogprobTrack:
    """`receive` what came, `show` token by token where each begins, `take` what can be sent."""

    def __init__(self, num_logprobs: int) -> None:
        self._record = struct.Struct("<f" + "If" * num_logprobs)
        self._received: deque[tuple[int, tuple[float, ...]]] = deque()  # of tokens that are not shown yet
        self._shown: list[TokenLogprob] = []

    def receive(self, token_ids: Sequence[int], records: bytes | None) -> None:
        """Raises ServerFault if the worker did not send one record for each token."""
        if len(records or b"") != len(token_ids) * self._record.size:
            raise ServerFault("the worker sent no log probabilities", code="generation_failed")
        self._received += zip(token_ids, self._record.iter_unpack(records or b""), strict=True)

    def show(self, start: int) -> None:
        """The next token received is part of the answer, and its text begins at `start`."""
        token_id, (logprob, *top) = self._received.popleft()
        pairs = zip(top[::2], top[1::2], strict=True)
        best = tuple((int(other), max(value, _LOWEST)) for other, value in pairs if other != NO_TOKEN)
        self._shown.append(TokenLogprob(token_id, start, max(logprob, _LOWEST), best))

    def show_first_of_prompt(self, token_id: int) -> None:
        """Nothing comes before it that could make it probable."""
        self._shown.append(TokenLogprob(token_id, 0, None, ()))

    def take(self, end: int | None) -> list[TokenLogprob]:
        """Shown tokens that begin before `end`, or all."""
        count = len(self._shown) if end is None else sum(token.start < end for token in self._shown)
        taken, self._shown = self._shown[:count], self._shown[count:]
        return taken
