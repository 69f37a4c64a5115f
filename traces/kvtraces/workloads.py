"""Seeded generator of realistic workloads: multi-turn chat, retrieval-augmented generation, agent loops, a mix.

What they imitate: system prompts, documents and tools are shared with Zipf popularity; a conversation's prompt is the
one before, its output and a new turn; retrieved documents come in varying order, which breaks the prefix; an agent's
context grows with each tool's output until it is compacted, and sub-agents share its tool definitions. Sessions arrive
by a Poisson process or in bursts. All randomness is `numpy.random.Generator(PCG64(seed))`.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.random import PCG64, Generator

from kvcore.policy.hashing import Namespace
from kvtraces.log import FloatArray, Log
from kvtraces.segments import Request, Segment, Workload

Session: TypeAlias = Callable[[float], list[Request]]
"""Makes the requests of one session that starts at a time in ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A log-normal distribution, clipped to [low, high]; in the unit of the field that holds it."""

    median: float
    sigma: float
    """Standard deviation of the logarithm; 0 for a constant."""
    low: float = 1
    high: float = 1e9

    def draw(self, rng: Generator) -> float:
        """Return one value."""
        return min(max(self.median * float(np.exp(self.sigma * rng.standard_normal())), self.low), self.high)

    def draw_int(self, rng: Generator) -> int:
        """Return one value, rounded."""
        return round(self.draw(rng))


@dataclass(frozen=True, slots=True, kw_only=True)
class Poisson:
    """Sessions arrive independently of one another."""

    sessions_per_s: float

    def times_ms(self, rng: Generator) -> Iterator[float]:
        """Yield arrival times without end."""
        time_ms = 0.0
        while True:
            time_ms += 1000 * rng.standard_exponential() / self.sessions_per_s
            yield time_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursty:
    """A Markov-modulated Poisson process: calm and burst take turns, each exponentially long."""

    sessions_per_s: float
    """Mean over calm and burst."""
    burst_factor: float = 10.0
    """Rate in a burst over the calm rate."""
    burst_s: float = 20.0
    """Mean length of a burst."""
    calm_s: float = 180.0
    """Mean length of a calm."""

    def times_ms(self, rng: Generator) -> Iterator[float]:
        """Yield arrival times without end."""
        share = self.burst_s / (self.burst_s + self.calm_s)
        calm_rate = self.sessions_per_s / (1 - share + share * self.burst_factor)
        start_ms, burst = 0.0, False
        while True:
            length_ms = 1000 * rng.standard_exponential() * (self.burst_s if burst else self.calm_s)
            rate = calm_rate * (self.burst_factor if burst else 1.0)
            time_ms = start_ms + 1000 * rng.standard_exponential() / rate
            while time_ms < start_ms + length_ms:
                yield time_ms
                time_ms += 1000 * rng.standard_exponential() / rate
            start_ms, burst = start_ms + length_ms, not burst


Arrivals: TypeAlias = Poisson | Bursty


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Conversations under shared system prompts."""

    requests: int = 10_000
    seed: int = 0
    arrivals: Arrivals = field(default_factory=lambda: Poisson(sessions_per_s=0.5))
    block_tokens: int = 64
    vocabulary: int = 100_000
    system_prompts: int = 40
    zipf: float = 1.0
    """Popularity of the system prompt of rank r is 1 / r**zipf."""
    system_tokens: Spread = Spread(median=800, sigma=0.8, high=8000)
    turns: float = 4.0
    """Mean of a conversation's turns, geometrically distributed."""
    user_tokens: Spread = Spread(median=80, sigma=1.2, high=8000)
    output_tokens: Spread = Spread(median=250, sigma=0.8, high=2000)
    think_s: Spread = Spread(median=30, sigma=1.0, low=1, high=1800)
    """From the end of an output to the next prompt."""
    decode_tokens_per_s: float = 50.0
    max_context_tokens: int = 32_768
    """A conversation ends before its prompt would be longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rag:
    """Single questions over retrieved documents, behind one of a few templates."""

    requests: int = 10_000
    seed: int = 0
    arrivals: Arrivals = field(default_factory=lambda: Poisson(sessions_per_s=2.0))
    block_tokens: int = 64
    vocabulary: int = 100_000
    templates: int = 5
    template_tokens: Spread = Spread(median=500, sigma=0.5, high=4000)
    documents: int = 2000
    zipf: float = 1.1
    """Popularity of the document (and the template) of rank r is 1 / r**zipf."""
    document_tokens: Spread = Spread(median=500, sigma=0.4, low=64, high=4000)
    documents_per_request: int = 4
    ordered: float = 0.5
    """Share of the requests whose documents stand in the order of popularity, the rest in any order."""
    question_tokens: Spread = Spread(median=40, sigma=0.7, high=1000)
    output_tokens: Spread = Spread(median=150, sigma=0.6, high=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """Agent loops: each step's prompt is the one before, its output, and what a tool returned."""

    requests: int = 10_000
    seed: int = 0
    arrivals: Arrivals = field(default_factory=lambda: Poisson(sessions_per_s=0.02))
    block_tokens: int = 64
    vocabulary: int = 100_000
    agents: int = 4
    """Kinds of agents, each with a system prompt of its own behind the tools' definitions, which all share."""
    zipf: float = 1.0
    tool_definition_tokens: int = 8000
    system_tokens: Spread = Spread(median=2500, sigma=0.3, high=8000)
    task_tokens: Spread = Spread(median=300, sigma=1.0, high=8000)
    steps: float = 25.0
    """Mean of an agent's steps, geometrically distributed."""
    tool_tokens: Spread = Spread(median=500, sigma=1.2, low=8, high=16_000)
    output_tokens: Spread = Spread(median=200, sigma=0.8, high=4000)
    tool_s: Spread = Spread(median=3, sigma=1.2, low=0.1, high=600)
    """From the end of an output to the next step."""
    decode_tokens_per_s: float = 50.0
    subagent_share: float = 0.04
    """Share of the steps at which the agent waits for a sub-agent, whose last output is the tool's."""
    subagent_steps: float = 8.0
    summary_tokens: Spread = Spread(median=2000, sigma=0.4, high=8000)
    max_context_tokens: int = 150_000
    """Before the prompt would be longer, all after the system prompt is replaced with a summary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Chat, RAG and agents on one server, merged by time; the shortest of the three ends the log.

    All three have to have the same block and vocabulary.
    """

    chat: Chat = Chat(seed=1)
    rag: Rag = Rag(seed=2)
    agent: Agent = Agent(seed=3)


Config: TypeAlias = Chat | Rag | Agent | Mixed


def generate(config: Config, *, output_hashes: bool = False, namespace: Namespace | None = None) -> Log:
    """Return a generated log, the same for the same configuration; see `workload` for its tokens."""
    return workload(config, namespace=namespace).log(output_hashes=output_hashes)


def workload(config: Config, *, namespace: Namespace | None = None) -> Workload:
    """Return generated requests with their content. No two of them arrive in the same millisecond.

    `namespace` is what the block hashes start from, a nameless model's if not given. Raises ValueError for a
    configuration that makes no sense.
    """
    if isinstance(config, Mixed):
        parts = [workload(part, namespace=namespace) for part in (config.chat, config.rag, config.agent)]
        if len({(part.block_tokens, part.vocabulary, part.root) for part in parts}) > 1:
            raise ValueError("the parts of a mix must have the same block_tokens and vocabulary")
        return Workload(
            requests=tuple(_spaced(_until_first_end([part.requests for part in parts]))),
            block_tokens=parts[0].block_tokens,
            vocabulary=parts[0].vocabulary,
            root=parts[0].root,
        )
    if config.requests < 1 or config.block_tokens < 1 or not 2 <= config.vocabulary <= 2**32:
        raise ValueError("requests and block_tokens must be at least 1, vocabulary from 2 to 2**32")
    rng = Generator(PCG64(config.seed))
    sessions = _SESSIONS[type(config)](config, rng)
    if namespace is None:
        namespace = Namespace(model="generated", kv_dtype="bfloat16", layout="LBNHC", block_tokens=config.block_tokens)
    return Workload(
        requests=tuple(_spaced(_in_order(config.requests, config.arrivals.times_ms(rng), sessions))),
        block_tokens=config.block_tokens,
        vocabulary=config.vocabulary,
        root=namespace.digest(),
    )


def _in_order(count: int, starts_ms: Iterator[float], sessions: Session) -> Iterator[Request]:
    """Yield the first `count` requests of overlapping sessions, by time."""
    waiting: list[tuple[float, int, Request]] = []
    next_start, made, yielded = next(starts_ms), 0, 0
    while yielded < count:
        if waiting and waiting[0][0] <= next_start:
            yield heapq.heappop(waiting)[2]
            yielded += 1
            continue
        for request in sessions(next_start):
            heapq.heappush(waiting, (request.time_ms, made, request))
            made += 1
        next_start = next(starts_ms)


def _until_first_end(parts: list[tuple[Request, ...]]) -> list[Request]:
    end_ms = min(requests[-1].time_ms for requests in parts)
    merged = heapq.merge(*parts, key=lambda request: request.time_ms)
    return [request for request in merged if request.time_ms <= end_ms]


def _spaced(requests: Iterator[Request] | list[Request]) -> Iterator[Request]:
    """Yield requests at whole milliseconds, no two at the same one: how ties are broken is then no question."""
    last_ms = -1
    for request in requests:
        last_ms = max(round(request.time_ms), last_ms + 1)
        yield Request(time_ms=float(last_ms), session=request.session, prompt=request.prompt, output=request.output)


class _Draw:
    """What all kinds draw: new segments, and ranks by Zipf's law."""

    def __init__(self, rng: Generator, prefix: str) -> None:
        self.rng = rng
        self.prefix = prefix
        self.sessions = 0

    def segment(self, length: Spread | int) -> Segment:
        tokens = length if isinstance(length, int) else length.draw_int(self.rng)
        return Segment(int(self.rng.integers(2**63)), tokens)

    def segments(self, count: int, length: Spread) -> list[Segment]:
        return [self.segment(length) for _ in range(count)]

    def rank(self, cumulative: FloatArray) -> int:
        return int(np.searchsorted(cumulative, self.rng.random() * cumulative[-1], side="right"))

    def count(self, mean: float) -> int:
        return int(self.rng.geometric(1 / mean))

    def session(self) -> str:
        self.sessions += 1
        return f"{self.prefix}{self.sessions - 1}"


def zipf_cumulative(count: int, exponent: float) -> FloatArray:
    """Return [count] cumulative weights of ranks 1 to count under Zipf's law."""
    return np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)


def _chat_sessions(config: Chat, rng: Generator) -> Session:
    draw = _Draw(rng, "chat-")
    systems = draw.segments(config.system_prompts, config.system_tokens)
    popularity = zipf_cumulative(len(systems), config.zipf)

    def session(start_ms: float) -> list[Request]:
        name, time_ms = draw.session(), start_ms
        requests: list[Request] = []
        prompt: tuple[Segment, ...] = (systems[draw.rank(popularity)], draw.segment(config.user_tokens))
        for _ in range(draw.count(config.turns)):
            output = draw.segment(config.output_tokens)
            request = Request(time_ms=time_ms, session=name, prompt=prompt, output=output)
            if requests and request.input_tokens > config.max_context_tokens:
                break
            requests.append(request)
            pause_s = output.length / config.decode_tokens_per_s + config.think_s.draw(rng)
            time_ms += 1000 * pause_s
            prompt = (*prompt, output, draw.segment(config.user_tokens))
        return requests

    return session


def _rag_sessions(config: Rag, rng: Generator) -> Session:
    if config.documents_per_request > config.documents:
        raise ValueError("documents_per_request cannot be more than documents")
    draw = _Draw(rng, "rag-")
    templates = draw.segments(config.templates, config.template_tokens)
    documents = draw.segments(config.documents, config.document_tokens)
    by_template = zipf_cumulative(len(templates), config.zipf)
    by_document = zipf_cumulative(len(documents), config.zipf)

    def session(start_ms: float) -> list[Request]:
        found: dict[int, None] = {}
        while len(found) < config.documents_per_request:
            found.setdefault(draw.rank(by_document))
        order = sorted(found) if rng.random() < config.ordered else list(found)
        prompt = (
            templates[draw.rank(by_template)],
            *(documents[rank] for rank in order),
            draw.segment(config.question_tokens),
        )
        output = draw.segment(config.output_tokens)
        return [Request(time_ms=start_ms, session=draw.session(), prompt=prompt, output=output)]

    return session


def _agent_sessions(config: Agent, rng: Generator) -> Session:
    draw = _Draw(rng, "agent-")
    tools = draw.segment(config.tool_definition_tokens)
    systems = draw.segments(config.agents, config.system_tokens)
    helper = draw.segment(config.system_tokens)
    popularity = zipf_cumulative(len(systems), config.zipf)

    def loop(name: str, start_ms: float, head: tuple[Segment, ...], steps: float, *, nests: bool) -> list[Request]:
        """Return an agent's requests, its sub-agents' included, which come before the step that waits for them."""
        prompt, time_ms = (*head, draw.segment(config.task_tokens)), start_ms
        requests: list[Request] = []
        for _ in range(draw.count(steps)):
            if sum(segment.length for segment in prompt) > config.max_context_tokens:
                prompt = (*head, draw.segment(config.summary_tokens))
            output = draw.segment(config.output_tokens)
            requests.append(Request(time_ms=time_ms, session=name, prompt=prompt, output=output))
            time_ms += 1000 * output.length / config.decode_tokens_per_s
            if nests and rng.random() < config.subagent_share:
                inner = loop(f"{name}.{len(requests)}", time_ms, (tools, helper), config.subagent_steps, nests=False)
                requests += inner
                result = inner[-1].output
                time_ms = inner[-1].time_ms + 1000 * result.length / config.decode_tokens_per_s
            else:
                result = draw.segment(config.tool_tokens)
                time_ms += 1000 * config.tool_s.draw(rng)
            prompt = (*prompt, output, result)
        return requests

    def session(start_ms: float) -> list[Request]:
        return loop(draw.session(), start_ms, (tools, systems[draw.rank(popularity)]), config.steps, nests=True)

    return session


_SESSIONS: dict[type[Chat | Rag | Agent], Callable[..., Session]] = {
    Chat: _chat_sessions,
    Rag: _rag_sessions,
    Agent: _agent_sessions,
}
