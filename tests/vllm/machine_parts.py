"""What the small engine of `engine_machine.py` is made of: requests, blocks, its way to the server, an L2."""

import random
from collections import deque
from dataclasses import dataclass, field

from engine_double import EngineRequest, engine_hashes

from kvcore.live import wire
from kvcore.live.stores.pool import Completion, Outcome
from kvcore.policy.hashing import Namespace

BLOCK, CHUNK = 4, 16
PAGE, PAGES = 4096, 16
BLOCKS = 32
MOST_RUNNING = 8
NAMESPACE = Namespace(model="m", kv_dtype="float32", layout="x", block_tokens=BLOCK)
BAD, MIXED = "bad", "mixed"
"""What a block holds that was not loaded or rests on such, and one that rests on blocks of earlier weights."""


def prompts():
    """Of a tree of prefixes, some long enough for their lookup to be put off."""
    tokens = random.Random(1).choices(range(1000), k=400)
    stems = [tokens[at : at + 80] for at in (0, 80)]
    return [
        stem[:shared] + tokens[200 + 20 * at : 200 + 20 * at + more]
        for stem in stems
        for shared in (6, 16, 31, 32, 48, 80)
        for at, more in enumerate((0, 1, 4, 19))
    ]


PROMPTS = prompts()


@dataclass(eq=False)
class Request(EngineRequest):
    """A request in the engine. `done` counts its tokens that are computed when all steps planned have run."""

    table: list = field(default_factory=list)
    done: int = 0
    state: str = "waiting"
    num_output_placeholders: int = 0
    lives: int = 0

    @property
    def block_hashes(self):
        return engine_hashes(self.prompt_token_ids + [0] * self.num_output_tokens, block=BLOCK)

    @property
    def hashes(self):
        """Of the prompt's full blocks: what they hold when they are right."""
        return self.block_hashes[: self.num_prompt_tokens // BLOCK]


class Connection:
    """A client's connection: what is sent arrives in order and some time, and so do the answers."""

    def __init__(self, engine):
        self.engine, self.count, self.replies, self.closed = engine, 0, deque(), False

    def send(self, message):
        self.count += 1
        self.engine.sent.append((self, self.count, message))
        return self.count

    def receive(self, _):
        here = self.engine.rng.randint(0, len(self.replies))
        return [self.replies.popleft() for _ in range(here)]

    def close(self):
        self.closed = True


class Presence:
    session = None

    def lost(self, *_):
        self.session = None


@dataclass(eq=False)
class Session:
    registered: wire.Registered


def loaded(table, invalid):
    """How many blocks lie in front of the first that was not loaded."""
    return next((i for i, block in enumerate(table) if block in invalid), len(table))


class L2:
    """A store below L1, in the place of `StorePool`: it does what it is asked when it is let, or fails to."""

    def __init__(self, rng):
        self.rng, self.held = rng, {}
        self.writes, self.reads, self.done = deque(), [], []

    def submit_put(self, token, chunk, parts):
        self.writes.append((token, chunk, parts))
        return True

    def submit_delete(self, chunks):
        self.writes.extend((None, chunk, None) for chunk in chunks)

    def submit_get(self, token, chunk, parts):
        self.reads.append((token, chunk, parts))
        return True

    def work(self):
        """Writes keep their order, and reads none."""
        if self.writes and self.rng.random() < 0.5:
            token, chunk, parts = self.writes.popleft()
            if parts is None:
                self.held.pop(chunk, None)
            else:
                well = self.rng.random() > 0.1
                if well:
                    self.held[chunk] = b"".join(parts)
                self.end(token, "put", Outcome.DONE if well else Outcome.FAILED)
        elif self.reads:
            token, chunk, (part,) = self.reads.pop(self.rng.randrange(len(self.reads)))
            outcome = Outcome.DONE if chunk in self.held else Outcome.MISS
            if self.rng.random() < 0.1:
                outcome = Outcome.FAILED
            if outcome is Outcome.DONE:
                part[:] = self.held[chunk]
            self.end(token, "get", outcome)

    def end(self, token, operation, outcome):
        self.done.append(Completion(token=token, operation=operation, outcome=outcome, size_bytes=PAGE, duration_ns=1))

    def drain(self):
        done, self.done = self.done, []
        return done


class Pool:
    """The engine's blocks, which keep what they hold until they are handed out again."""

    def __init__(self):
        self.refs = [0] * BLOCKS
        self.free = list(range(BLOCKS))
        self.cached = {}

    def hits(self, request):
        """The blocks of its head that are cached, but for the last token's."""
        found = []
        for name in request.hashes[: (request.num_tokens - 1) // BLOCK]:
            if name not in self.cached:
                break
            found.append(self.cached[name])
        return found

    def room(self, hits=()):
        return len(self.free) - sum(self.refs[block] == 0 for block in hits)

    def take(self, count, hits=()):
        for block in hits:
            if self.refs[block] == 0:
                self.free.remove(block)
            self.refs[block] += 1
        new = [self.free.pop(0) for _ in range(count)]
        for block in new:
            self.refs[block] = 1
            self.evict([block])
        return [*hits, *new]

    def release(self, table):
        for block in reversed(table):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.free.append(block)

    def cache(self, request, upto):
        for name, block in zip(request.hashes[: upto // BLOCK], request.table, strict=False):
            self.cached.setdefault(name, block)

    def evict(self, blocks):
        self.cached = {name: block for name, block in self.cached.items() if block not in blocks}
