"""Who is connected: engine instances, their members, and when each was heard of last."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field

from kvcore.live.wire import Register, Role
from kvcore.policy import Chunk

_HELLO_NS = 10_000_000_000
"""How long a member may take from its registration to its liveness connection."""


class RefusedError(Exception):
    """Something cannot be had as asked; the message goes to who asked."""


class UnknownMemberError(Exception):
    """A message of a member that is not registered (any more)."""


@dataclass(slots=True, eq=False)
class Work:
    """A request of an engine, from its lookup until nothing of it is under way."""

    name: str
    instance: "Instance"
    chunks: tuple[Chunk, ...]
    salt: str
    start: int
    """Index of the first chunk that the engine had not computed at its lookup: the first of the run."""
    hits: tuple[int, ...] = (0,)
    run: tuple[Chunk, ...] = ()
    """What the engine is to load."""
    ended: bool = False


@dataclass(slots=True, eq=False)
class Member:
    """One process of an instance: its scheduler, or a rank's worker."""

    token: int
    instance: "Instance"
    role: Role
    rank: int
    claimed_pid: int
    drained_epoch: int
    registered_ns: int
    heard_ns: int
    pid: int = 0
    """As this process sees it; 0 until its liveness connection, or where it is not visible."""
    here: bool = False
    """Whether its liveness connection stands."""

    @property
    def name(self) -> str:
        """What tells it apart in the arena's table of writers."""
        return f"{self.instance.name}/{self.role}/{self.rank}"


@dataclass(slots=True, eq=False)
class Instance:
    """An engine: the sizes of its chunks, its members, its requests at work."""

    name: str
    register: Register
    chunk_tokens: int
    shard_bytes: int
    chunk_pages: int
    writer: int = 0
    silent: bool = False
    members: dict[tuple[Role, int], Member] = field(default_factory=dict)
    works: dict[str, Work] = field(default_factory=dict)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk, all shards together."""
        return self.shard_bytes * self.register.shards

    @property
    def prefix(self) -> str:
        """What its requests' names begin with in the core, where those of all instances meet."""
        return f"{self.name}/"

    @property
    def ready(self) -> bool:
        """Whether its scheduler and every worker are here and heard of, so that what is matched can be loaded."""
        here = [member.role for member in self.members.values() if member.here]
        return not self.silent and "scheduler" in here and here.count("worker") == self.register.world


class Members:
    """The registry of instances and members, and their leases."""

    def __init__(self, *, chunk_tokens: int, page_bytes: int, l1_pages: int, lease_ns: int) -> None:
        self.instances: dict[str, Instance] = {}
        self.lease_ns = lease_ns
        self._chunk_tokens = chunk_tokens
        self._page_bytes = page_bytes
        self._l1_pages = l1_pages
        self._by_token: dict[int, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        """Yield every member."""
        return iter(tuple(self._by_token.values()))

    def heard(self, token: int, now_ns: int) -> Member:
        """Return the member that a message is from, and renew its lease. Raises UnknownMemberError."""
        member = self._by_token.get(token)
        if member is None:
            raise UnknownMemberError("not registered with this server, or no longer: register again")
        member.heard_ns = now_ns
        return member

    def size(self, register: Register) -> Instance:
        """Return a new instance of the sizes that a registration gives. Raises RefusedError where they do not fit."""
        if "/" in register.instance:  # which ends it in the names of its requests
            raise RefusedError(f"instance {register.instance!r}: a name has no slash")
        blocks, rest = divmod(self._chunk_tokens, register.block_tokens)
        if rest:
            raise RefusedError(
                f"the server's chunk of {self._chunk_tokens} tokens is no multiple of the engine's block of "
                f"{register.block_tokens}: start one of them with another size"
            )
        if register.shards not in (1, register.world):
            raise RefusedError(f"{register.shards} shards for {register.world} ranks: one a rank, or one in all")
        if register.rank >= register.world:
            raise RefusedError(f"rank {register.rank} of {register.world} ranks")
        shard_bytes = blocks * register.block_bytes
        pages = -(-shard_bytes * register.shards // self._page_bytes)
        if pages > self._l1_pages:
            raise RefusedError(
                f"a chunk of {shard_bytes * register.shards} bytes takes {pages} pages of {self._page_bytes} bytes, "
                f"and L1 has {self._l1_pages}"
            )
        return Instance(register.instance, register, self._chunk_tokens, shard_bytes, pages)

    def holder(self, register: Register) -> Member | None:
        """Return the member that holds the place for which a registration asks, if there is one."""
        instance = self.instances.get(register.instance)
        return None if instance is None else instance.members.get((register.role, register.rank))

    def find(self, register: Register) -> tuple[Instance | None, Member | None]:
        """Return the instance that a registration is for, and the member whose place it takes, where there are any.

        Raises RefusedError where the instance has other sizes, or whoever holds the place is here: a process id is
        claimed, and may be anybody's, so a process that registers again closes its liveness connection first.
        """
        instance, old = self.instances.get(register.instance), self.holder(register)
        if instance is None:
            return None, None
        if old is not None and old.here:
            raise RefusedError(
                f"{register.role} {register.rank} of instance {register.instance!r} is registered by process "
                f"{old.claimed_pid}, which is still here: end that one, or take another name"
            )
        if _sizes(instance.register) != _sizes(register) and [*instance.members.values()] not in ([], [old]):
            raise RefusedError(
                f"instance {register.instance!r} is registered with (block_tokens, block_bytes, shards, world) = "
                f"{_sizes(instance.register)}, not {_sizes(register)}"
            )
        return instance, old

    def enter(self, register: Register, instance: Instance, now_ns: int) -> Member:
        """Add a member to an instance."""
        token = secrets.randbits(62) + 1
        member = Member(
            token, instance, register.role, register.rank, register.pid, register.drained_epoch, now_ns, now_ns
        )
        self._by_token[token] = member
        instance.members[register.role, register.rank] = member
        self.instances[instance.name] = instance
        return member

    def remove(self, member: Member) -> None:
        """Take a member out, and its instance with the last one."""
        del self._by_token[member.token]
        instance = member.instance
        if instance.members.get((member.role, member.rank)) is member:
            del instance.members[member.role, member.rank]
        if not instance.members:
            self.instances.pop(instance.name, None)

    def find_token(self, token: int) -> Member | None:
        """Return the member of a token."""
        return self._by_token.get(token)

    def forgive(self, gap_ns: int) -> None:
        """Extend every lease by the time during which this process did not run, and so could hear nobody."""
        for member in self._by_token.values():
            member.heard_ns += gap_ns
            member.registered_ns += gap_ns

    def silent(self, now_ns: int) -> list[Instance]:
        """Return the instances with a member whose lease has run out, and note it in each."""
        found = []
        for instance in self.instances.values():
            instance.silent = any(now_ns - member.heard_ns > self.lease_ns for member in instance.members.values())
            if instance.silent:
                found.append(instance)
        return found

    def never_here(self, now_ns: int) -> list[Member]:
        """Return the members that registered and did not connect."""
        return [m for m in self._by_token.values() if not m.here and now_ns - m.registered_ns > _HELLO_NS]


def _sizes(register: Register) -> tuple[int, int, int, int]:
    return register.block_tokens, register.block_bytes, register.shards, register.world
