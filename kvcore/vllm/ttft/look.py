"""How fast the engine's processor is at the moment: a shared host's halves and doubles within tenths of a second."""

import time

LOOK = "kvcore_look"
_ADDITIONS = 100_000


class Look:
    """What vLLM adds to its workers (`worker_extension_cls`); an engine on one GPU runs them in its own thread."""

    def kvcore_look(self) -> float:
        """Return the seconds of a fixed loop: a millisecond or two."""
        began = time.perf_counter()
        sum(range(_ADDITIONS))
        return time.perf_counter() - began
