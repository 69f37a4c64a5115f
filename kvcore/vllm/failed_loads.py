"""A load that fails in a step: nothing that rests on it is given out, or matched by a later request.

vLLM's scheduler takes back the count of computed tokens of the requests that run, and computes in the same blocks. That
leaves four things to be had wrong:

- Steps that are planned ahead do not follow the count. Their tokens, which rest on the failed load, are given out, and
  vLLM's second model runner keeps the positions on the GPU. So the request is preempted and starts anew.
- A request that was preempted after its load began is not looked at, and the token of its step is given out.
- The blocks of one that was preempted, or aborted, stay in the engine's prefix cache as they are.
- Of requests that wait for loads of their own behind a block that was not loaded and that they share, the first alone
  is told, and the others go on as if it computed that block.

This wraps methods of vLLM's that are not public; `tests/vllm/test_ahead.py` and `test_random.py` run them.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence, Set
from inspect import signature
from typing import Any, NamedTuple

from kvcore.vllm import compat

__all__ = ["recompute_by_preemption"]


class _Freed(NamedTuple):
    """Blocks of a request that was aborted or preempted while a step of it was under way."""

    request_id: str
    blocks: list[int]
    computed: int
    """Its tokens that were computed with all steps under way."""
    preemptions: int
    """How often it had been preempted before."""


def recompute_by_preemption() -> None:
    """Have vLLM's scheduler do so in this process; once is enough.

    Raises RuntimeError where it has other methods than those that are wrapped, as a version that was not tested may.
    """
    import vllm  # noqa: PLC0415 - the scheduler's process alone needs it
    from vllm.v1.core.sched.scheduler import Scheduler  # noqa: PLC0415

    wrapped = ("_handle_invalid_blocks", "_free_request_blocks", "_preempt_request")
    missing = [name for name in wrapped if not hasattr(Scheduler, name)]
    if missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has no Scheduler.{missing[0]}: kvcore cannot keep tokens that rest on "
            "a failed load from being given out; use a version that it was tested with"
        )
    rewind: Any = Scheduler._handle_invalid_blocks
    free: Any = Scheduler._free_request_blocks
    if hasattr(rewind, "rewinds"):
        return
    drops = "drop_stale_output" in signature(Scheduler._preempt_request).parameters

    def handle(self: Any, late: Set[int], scheduled: Mapping[str, int]) -> set[str]:
        invalid = set(late)
        if not invalid:  # known now
            return set()
        if any(getattr(one, "recomputes_failed_loads", False) for one in compat.connectors(self.connector)):
            self.recompute_kv_load_failures = True
        computed = {request.request_id: request.num_computed_tokens for request in self.running}
        failed: set[str] = rewind(self, invalid, scheduled)
        if self.recompute_kv_load_failures:
            _rewind_loading(self, invalid)
            for request in [one for one in self.running if one.request_id in failed]:
                done = _done(request, computed[request.request_id], scheduled)
                _start_anew(self, request, invalid, done, drops=drops)
        return failed | _settle_freed(self, invalid, scheduled, drops=drops)

    def remember(self: Any, request: Any) -> None:
        if getattr(request, "num_in_flight_tokens", 0):
            groups = self.kv_cache_manager.get_block_ids(request.request_id)
            if len(groups) == 1:
                counts = request.num_computed_tokens, request.num_preemptions
                _freed(self).append(_Freed(request.request_id, list(groups[0]), *counts))
        free(self, request)

    handle.rewinds = rewind  # type: ignore[attr-defined]
    Scheduler._handle_invalid_blocks = handle
    Scheduler._free_request_blocks = remember


def _freed(scheduler: Any) -> deque[_Freed]:
    """What was freed lately, at least since the oldest step under way: to evict more than that does no harm."""
    if not hasattr(scheduler, "kvcore_freed"):
        scheduler.kvcore_freed = deque(maxlen=4 * scheduler.max_num_running_reqs)
    found: deque[_Freed] = scheduler.kvcore_freed
    return found


def _done(request: Any, computed: int, scheduled: Mapping[str, int]) -> int:
    """Return its tokens that are computed with the step at hand, of those computed with all steps under way."""
    return int(computed - request.num_in_flight_tokens + scheduled.get(request.request_id, 0))


def _start_anew(scheduler: Any, request: Any, invalid: Set[int], done: int, *, drops: bool) -> None:
    """Preempt a running request, and have the tokens of its steps under way left out."""
    (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    _evict(scheduler, blocks, invalid)
    scheduler.running.remove(request)
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
    scheduler._preempt_request(request, time.monotonic())
    if request.num_in_flight_tokens:
        _freed(scheduler).pop()  # that is seen to here
    _leave_out(request, done, drops=drops)


def _rewind_loading(scheduler: Any, invalid: Set[int]) -> None:
    """Have every request that waits for a load go on in front of its first block that was not loaded."""
    for request in scheduler.requests.values():
        if request.status.name != "WAITING_FOR_REMOTE_KVS":
            continue
        (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        right = _right(blocks, invalid) * scheduler.block_size
        if right < request.num_computed_tokens:
            request.num_computed_tokens = right
            scheduler.failed_recving_kv_req_ids.add(request.request_id)


def _settle_freed(scheduler: Any, invalid: Set[int], scheduled: Mapping[str, int], *, drops: bool) -> set[str]:
    """Evict what rests on the load of requests that run no more; return those of them that may run again."""
    failed = set()
    for freed in [one for one in _freed(scheduler) if not invalid.isdisjoint(one.blocks)]:
        _evict(scheduler, freed.blocks, invalid)
        request = scheduler.requests.get(freed.request_id)
        waits = request is not None and request.num_in_flight_tokens and _waits_since(request, freed)
        # 0.26 counts none of one whose tokens are left out already, as those of a reset are, and expects their output.
        if waits and (drops or request.num_output_placeholders):
            _leave_out(request, _done(request, freed.computed, scheduled), drops=drops)
            failed.add(freed.request_id)
        _freed(scheduler).remove(freed)
    return failed


def _waits_since(request: Any, freed: _Freed) -> bool:
    """Whether it was preempted then, and not taken up since."""
    return bool(request.status.name == "PREEMPTED" and request.num_preemptions == freed.preemptions + 1)


def _evict(scheduler: Any, blocks: list[int], invalid: Set[int]) -> None:
    """Take the first block that was not loaded and all behind it from the prefix cache: they would be matched."""
    scheduler.kv_cache_manager.evict_blocks(set(blocks[_right(blocks, invalid) :]))


def _right(blocks: Sequence[int], invalid: Set[int]) -> int:
    """Return how many blocks lie in front of the first that was not loaded."""
    return next((i for i, block in enumerate(blocks) if block in invalid), len(blocks))


def _leave_out(request: Any, done: int, *, drops: bool) -> None:
    """Have the tokens of a preempted request's steps under way left out.

    `done` are its tokens that are computed with the step at hand, whose output is left out anyway; `drops` says whether
    vLLM counts the others itself, as 0.32 does and 0.26 does not.
    """
    if drops:
        request.drop_stale_output = True
        return
    ahead = request.num_output_placeholders
    request.async_tokens_to_discard = ahead - (ahead > 0 and done >= request.num_tokens)
    request.num_output_placeholders = 0
