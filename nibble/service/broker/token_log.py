"""What a gateway knows of a request's token log: the tokens, and beside them their log probabilities, if asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from nibble.engine.protocol import TokenEvent


@dataclass(slots=True)
class TokenLog:
    """Grows at its end alone. logprobs: a record for each token, all of one length, or nothing."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: bytearray = field(default_factory=bytearray)
    prompt_logprobs: bytes | None = None

    def append(self, event: TokenEvent) -> None:
        """Take what is new in an event that leaves no gap."""
        num_known, token_ids, logprobs = len(self.token_ids) - event.index, event.token_ids, event.logprobs
        self.token_ids += token_ids[num_known:] if num_known else token_ids
        if logprobs is not None and token_ids:
            self.logprobs += logprobs[num_known * (len(logprobs) // len(token_ids)) :]
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs

    def logprobs_from(self, index: int) -> bytes | None:
        """Records of the tokens from this index on."""
        if not self.logprobs or index >= len(self.token_ids):
            return None
        return bytes(self.logprobs[index * (len(self.logprobs) // len(self.token_ids)) :])
