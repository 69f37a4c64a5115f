"""A request log in memory: one row a request, as columns."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """A recorded request log in the order in which the cache saw its requests.

    Shapes: n requests, m full blocks in all of them together.
    """

    block_tokens: int | None
    """Tokens in a block; None for a log of lengths alone, which drives load but has no hit ratio."""
    timestamp_ms: FloatArray
    """[n] arrival times."""
    input_tokens: IntArray
    """[n] prompt lengths, the trailing partial block included."""
    output_tokens: IntArray
    """[n] output lengths."""
    starts: IntArray
    """[n + 1]; the full blocks of request i are `blocks[starts[i]:starts[i + 1]]`."""
    blocks: IntArray
    """[m] names of the full prompt blocks: a name stands for the block and everything before it."""
    extra: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    """Optional columns by schema name, [n] each: NaN or an empty string where a row lacks the field."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.timestamp_ms)
