"""What a `SchedulerOutput` of vLLM says of each request, read by its attributes only."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.vllm.requests import EngineRequest, Life


class Blocks:
    """Block ids that a step brings a request: all of them, or those that are new."""

    __slots__ = ("ids", "whole")

    def __init__(self, ids: Sequence[int], whole: bool) -> None:
        self.ids = ids
        self.whole = whole

    def written(self, computed: int) -> NDArray[np.int64]:
        """Return those that the step may write: of a request's whole table, those behind `computed` blocks."""
        return np.asarray(self.ids[computed:] if self.whole else self.ids, dtype=np.int64)

    def apply(self, life: Life) -> None:
        """Give them to the request's life at hand."""
        if self.whole:
            life.blocks = list(self.ids)
        else:
            life.blocks.extend(self.ids)


def scheduled(output: Any) -> Iterable[tuple[str, Blocks, int]]:
    """Yield every scheduled request, its blocks and how many tokens of it are computed before this step."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, Blocks(new.block_ids[0], whole=True), new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    for i, request_id in enumerate(cached.req_ids):
        ids = cached.new_block_ids[i]
        blocks = Blocks(ids[0] if ids else (), whole=request_id in cached.resumed_req_ids)
        yield request_id, blocks, cached.num_computed_tokens[i]


def last_step(request: EngineRequest) -> bool:
    """Return whether this step is the request's last, by the tokens that it may put out."""
    limit = getattr(request, "max_tokens", None)
    under_way = getattr(request, "num_output_placeholders", 0)  # tokens of steps that have not ended
    return limit is None or request.num_output_tokens + under_way + 1 >= limit
