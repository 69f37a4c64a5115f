"""Which engine a request goes to."""

from collections.abc import Callable, Sequence

from kvsim.engine.engine import Engine
from kvsim.engine.job import Job
from kvsim.engine.settings import Routing, SettingsError
from kvtraces import Log


def router(routing: Routing, engines: Sequence[Engine], log: Log, block_tokens: int) -> Callable[[Job], Engine]:
    """Return the function that chooses a request's engine on its arrival.

    round-robin: in turn. least-loaded: the fewest unfinished requests. prefix-aware: the fewest prompt tokens to
    compute before this request's first token: those waiting there and its own beyond that engine's L0 hit. recorded:
    the log's `instance`. Ties go to the lowest number.

    Raises:
        SettingsError: `recorded` without that column, or with more instances than engines.
    """
    if routing == "recorded":
        places = _recorded(log, len(engines))
        return lambda job: engines[places[job.index]]
    if routing == "least-loaded":
        return lambda job: min(engines, key=lambda engine: engine.unfinished)
    if routing == "prefix-aware":
        return lambda job: min(
            engines, key=lambda engine: engine.pending_tokens - block_tokens * engine.cache.peek(job.path)
        )
    turn = iter(range(2**63))
    return lambda job: engines[next(turn) % len(engines)]


def _recorded(log: Log, engines: int) -> list[int]:
    column = log.extra.get("instance")
    if column is None:
        raise SettingsError("routing recorded: the log has no instance column")
    names = [str(name) for name in column.tolist()]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    if len(numbers) > engines:
        raise SettingsError(f"routing recorded: the log has {len(numbers)} instances, engines is {engines}")
    return [numbers[name] for name in names]
