"""What the connectors need of `kvcore.live.client`: its two clients fit, and so do the tests' stand-ins."""

from collections.abc import Sequence
from typing import Protocol

from kvcore.live.client import NotYet
from kvcore.live.wire import Found, Granted, Registered


class SchedulerLink(Protocol):
    """The scheduler's line to the server (`kvcore.live.client.SchedulerClient`)."""

    @property
    def registered(self) -> Registered | None:
        """What the server said, None while it is away; a new object after each registration."""

    def lookup(  # noqa: PLR0913 - one a field of the message
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        computed_chunks: int = 0,
        salt: str = "",
        input_tokens: int = 0,
        resumed: bool = False,
        queued_bytes: int = 0,
        probe: bytes = b"",
        waited_ms: float = 0.0,
        patient: bool = False,
        wait: bool = True,
    ) -> Found | NotYet:
        """Return what is cached, or NOT_YET: ask again in the next step."""

    def held(self, chunk: bytes, *, patient: bool = False) -> bool | NotYet:
        """Return whether a chunk can be matched, in any tier, or NOT_YET, and then no answer will come."""

    def ask(self, request: str, chunks: Sequence[bytes]) -> None:
        """Ask room; answered through `granted`."""

    def granted(self) -> list[tuple[str, Granted]]:
        """Return the answers that have come, in the order of the asks."""

    def drop_load(self, request: str, chunks: Sequence[bytes]) -> None:
        """Say that no worker loads chunks of a hit."""

    def drop_store(self, request: str, chunks: Sequence[bytes]) -> None:
        """Say that no worker writes to granted chunks."""

    def end(self, request: str) -> None:
        """Say that the request asks for no more room."""

    def record(self, request: str, *, input_length: int, **fields: object) -> None:
        """Tell the recorder of a finished request."""

    def leave(self) -> None:
        """Leave the server."""


class WorkerLink(Protocol):
    """A worker's line to the server (`kvcore.live.client.WorkerClient`)."""

    @property
    def registered(self) -> Registered | None:
        """What the server said, None while it is away; a new object after each registration."""

    def committed(
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        tokens: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """Say that this rank's shards of granted chunks are written."""

    def aborted(self, request: str, chunks: Sequence[bytes], *, epoch: int = 0) -> None:
        """Say that this rank writes no more to granted chunks."""

    def loaded(
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        tokens: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """Say that this rank has loaded chunks of a hit."""

    def load_failed(self, request: str, chunks: Sequence[bytes], *, epoch: int = 0) -> None:
        """Say that this rank does not load chunks of a hit."""

    def register_again(self, after_s: float = 0.0) -> None:
        """Give back what was granted and is not being written: register anew, in the background."""

    def leave(self) -> None:
        """Leave the server."""
