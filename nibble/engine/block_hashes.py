"""Names for what full KV blocks hold: equal names, equal keys and values, bit for bit where the arithmetic is.

The keys and values of a token follow from its own id, from all tokens before it, and from the arithmetic that computed
each of them: prompts, but for their last few tokens on some backends, are computed in another `Mode` than generated
tokens, and these round differently. So a block's name is chained to the one before it and says how many of its tokens
are computed in PREFILL mode: a prompt never continues from what another request generated, but computes it once in its
own arithmetic. A request thus gets the same tokens with the cache, without it, and when another worker goes on with it.
What a request generated is found again by itself after a preemption, and by whoever has the same prompt and tokens.

The chain begins with the request's cache_salt: those with different salts share nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from nibble.kernels.layout import BLOCK_SIZE

_DIGEST_BYTES = 32  # nobody finds two contents with one name, so names are not checked against contents
_NUM_PREFILL_BYTES = 2
assert BLOCK_SIZE < 1 << 8 * _NUM_PREFILL_BYTES


def extend_hashes(
    hashes: list[bytes], num_blocks: int, token_ids: Sequence[int], num_prefill_tokens: int, cache_salt: str
) -> None:
    """Append the names of a sequence's blocks until there are num_blocks.

    token_ids: the sequence's, at least that many blocks; the first num_prefill_tokens of them are computed in PREFILL
    mode, with other rounding than the rest.
    """
    for start in range(len(hashes) * BLOCK_SIZE, num_blocks * BLOCK_SIZE, BLOCK_SIZE):
        before = hashes[-1] if hashes else _digest(cache_salt.encode())
        num_prefill = min(max(num_prefill_tokens - start, 0), BLOCK_SIZE).to_bytes(_NUM_PREFILL_BYTES, "little")
        content = array("I", token_ids[start : start + BLOCK_SIZE]).tobytes()
        hashes.append(_digest(before + num_prefill + content))


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=_DIGEST_BYTES).digest()
