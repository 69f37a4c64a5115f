"""What the core remembers of a request from its lookup until its loads and stores have ended."""

from kvcore.policy.decisions import Matched
from kvcore.policy.tier import Entry
from kvcore.policy.types import Chunk


class Request:
    """A request at work. It holds a pin on every entry named here."""

    __slots__ = (
        "awaited",
        "chunks",
        "ended",
        "fetching",
        "found",
        "held",
        "instance",
        "loading",
        "matched",
        "name",
        "new",
        "passing",
        "resumed",
        "run",
        "salt",
        "writing",
    )

    def __init__(self, *, name: str, instance: str, salt: str, chunks: tuple[Chunk, ...], resumed: bool) -> None:
        self.name = name
        self.instance = instance
        self.salt = salt
        self.chunks = chunks
        self.resumed = resumed
        self.matched = Matched(request=name, hits=())
        self.found: list[list[Entry]] = []
        """By tier, the entries that were resident at the lookup, head first."""
        self.held: list[Entry] = []
        """Entries of tier 0 that became resident for this request afterwards."""
        self.new: dict[Chunk, Entry] = {}
        """Of those, the ones that the policy is to learn of."""
        self.passing: dict[Chunk, Entry] = {}
        """Of those, the ones that leave with the request."""
        self.run: tuple[Chunk, ...] = ()
        """What is to be loaded into the engine."""
        self.loading = 0
        """Chunks on their way into the engine."""
        self.fetching: dict[Chunk, Entry] = {}
        """Entries of tier 0 being filled from a lower tier."""
        self.awaited: dict[Chunk, None] = {}
        """Chunks that another request fetches from a lower tier."""
        self.writing: dict[Chunk, Entry] = {}
        """Entries of tier 0 that the engine writes."""
        self.ended = False

    @property
    def busy(self) -> bool:
        """Whether something of the request's is still being copied."""
        return bool(self.loading or self.fetching or self.awaited or self.writing)
