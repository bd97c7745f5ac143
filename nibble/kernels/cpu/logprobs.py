"""Log probabilities of given and of the most probable tokens. Sums in fp64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nibble.kernels.sampling import MAX_LOGPROBS

Ints = npt.NDArray[np.int32]


def logprobs(logits: npt.NDArray[np.float32], ids: Ints, num_logprobs: Ints, out: Ints, out_rows: Ints) -> None:
    for row in np.flatnonzero((num_logprobs >= 0) & (out_rows >= 0) & (ids >= 0)):
        count = int(num_logprobs[row])
        assert count <= MAX_LOGPROBS, f"{count} log probabilities are asked for, the limit is {MAX_LOGPROBS}"
        values = logits[row].astype(np.float64)
        largest = values.max()
        if not np.isfinite(largest):
            continue
        normalizer = largest + np.log(np.exp(values - largest).sum())
        words = out[out_rows[row]]
        words[0] = np.float32(values[ids[row]] - normalizer).view(np.int32)
        best = _most_probable(logits[row], count)
        words[1 : 1 + 2 * count : 2], words[2 : 2 + 2 * count : 2] = -1, np.float32(-np.inf).view(np.int32)
        words[1 : 1 + 2 * len(best) : 2] = best
        words[2 : 2 + 2 * len(best) : 2] = (values[best] - normalizer).astype(np.float32).view(np.int32)


def _most_probable(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Ids of the largest logits, falling; of equal ones the smaller ids first."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, np.int64)
    bound = np.partition(logits, len(logits) - count)[len(logits) - count]
    above, equal = np.flatnonzero(logits > bound), np.flatnonzero(logits == bound)
    ids = np.concatenate([above, equal[: count - len(above)]])
    return ids[np.lexsort((ids, -logits[ids]))]
