"""What is asked of every engine: cold prompts, hits in its own cache, hits in L1 and L2, and decoding."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from kvcore.vllm.ttft.engine import Answer, Engine, EngineError
from kvcore.vllm.ttft.systems import Running

Situation: TypeAlias = Literal["cold", "gpu", "l1", "l2", "decode"]
Say: TypeAlias = Callable[[str], None]
_LOWEST_ID = 100
"""Ids below are special ones, mostly."""
_ARRIVE_S = 5.0
"""How long counts may take from where they are counted to where they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure in one engine.

    Attributes:
        lengths: Prompt lengths, in tokens.
        repeats: Prompts of each length that are answered cold and then from every cache.
        hits: Hits of each such prompt in each cache.
        cold: Further prompts of each length that are answered cold only.
        output_tokens: Tokens of each answer; they are compared, TTFT is the first one's.
        decode_batch: Requests that decode together.
        decode_context: Their prompts' length.
        decode_tokens: Tokens that each puts out; 0 leaves decoding out.
        decode_repeats: How often.
        settle_s: Pause after a cold prompt, in which it is stored.
        fastest_processor: Whether each request's engine is put on the processor that is the fastest right before.
        seed: Of the prompts.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32_000)
    repeats: int = 3
    hits: int = 3
    cold: int = 4
    output_tokens: int = 8
    decode_batch: int = 8
    decode_context: int = 512
    decode_tokens: int = 256
    decode_repeats: int = 4
    settle_s: float = 1.0
    fastest_processor: bool = False
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer together."""
        return max(max(self.lengths) + self.output_tokens, self.decode_context + self.decode_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement.

    Attributes:
        system: Of `systems.SYSTEMS`.
        run: Number of the engine's run, from 0.
        situation: What the request met.
        tokens: Of the prompt; of all prompts together for decoding.
        prompt: Its name: equal names are equal prompts, in every engine.
        seconds: TTFT; for decoding the seconds of one token of one request.
        output: The answer's token ids.
        looks_s: How fast the engine's processor was, before and behind (`kvcore.vllm.ttft.look`).
        fault: Why it is not what it is called; such a sample counts nowhere.
    """

    system: str
    run: int
    situation: Situation
    tokens: int
    prompt: str
    seconds: float
    output: tuple[int, ...] = ()
    looks_s: tuple[float, ...] = ()
    fault: str = ""


class Measurement:
    """Measures one engine under one system.

    Args:
        engine: A fresh one.
        running: The system.
        plan: What to measure.
        name: The system's.
        run: The run's number.
        say: Takes progress lines.
    """

    def __init__(self, engine: Engine, running: Running, plan: Plan, name: str, run: int, say: Say) -> None:
        self._engine = engine
        self._running = running
        self._plan = plan
        self._name = name
        self._run = run
        self._say = say
        self._fastest = False
        self.samples: list[Sample] = []

    def turns(self) -> Iterator[None]:
        """Fill `samples`, a little at each turn, so that engines can take turns: the same prompts one after another.

        Raises EngineError where the engine ends, or holds on to its blocks.
        """
        self._running.ready()
        self._warm_up()
        yield
        if self._name == "kvcore-l2":
            self._lower_tier()
            return
        for repeat in range(self._plan.repeats):
            for tokens in self._plan.lengths:
                self._caches(f"{repeat} {tokens}", tokens)
                yield
        for repeat in range(self._plan.cold):
            for tokens in self._plan.lengths:
                self._cold(f"cold {repeat} {tokens}", tokens)
                yield
        for repeat in range(self._plan.decode_repeats if self._plan.decode_tokens else 0):
            self._decode(repeat)
            yield

    def _warm_up(self) -> None:
        """Do everything once: what is compiled, allocated or pinned on first use is not measured."""
        for tokens in self._plan.lengths:
            self._caches(f"warm {tokens}", tokens)
        if self._plan.decode_tokens:
            self._decode(-1)
        self.samples.clear()
        self._fastest = self._plan.fastest_processor  # not before: threads that start on first use go where they like

    def _caches(self, name: str, tokens: int) -> None:
        """Measure one prompt cold, then in the engine's cache, then in L1."""
        self._cold(name, tokens)
        for _ in range(self._plan.hits):
            self._hit(name, tokens, "gpu")
        for _ in range(self._plan.hits if self._running.chunk_tokens else 0):
            self._engine.reset()
            self._hit(name, tokens, "l1")

    def _cold(self, name: str, tokens: int) -> None:
        self._hit(name, tokens, "cold")
        time.sleep(self._plan.settle_s)

    def _hit(self, name: str, tokens: int, situation: Situation) -> None:
        """Measure one prompt, and check by every counter that it met what it should."""
        before = self._counts()
        answer = self._ask([self._prompt(name, tokens)], self._plan.output_tokens)[0]
        until = time.monotonic() + _ARRIVE_S
        while fault := self._fault(before, tokens, situation):
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        self._add(situation, tokens, name, answer.ttft_s, answer.looks_s, output=answer.tokens, fault=fault)

    def _counts(self) -> dict[str, float]:
        """Return the engine's hits in tokens, and what the system says it has loaded."""
        counters = self._engine.counters()
        loaded = self._running.loaded(counters, int(self._engine.facts["kv_bytes_per_token"]))
        return {
            "gpu": counters.get("vllm:prefix_cache_hits", 0.0),
            "external": counters.get("vllm:external_prefix_cache_hits", 0.0),
            **loaded,
        }

    def _fault(self, before: dict[str, float], tokens: int, situation: Situation) -> str:
        """Say what is wrong with what was counted for a request; nothing if it is as it should be."""
        after = self._counts()
        grown = {name: after[name] - before.get(name, 0.0) for name in after}
        block, chunk = int(self._engine.facts["block_tokens"]), self._running.chunk_tokens
        own = 0 if situation != "gpu" else (tokens - 1) // block * block
        least = 0 if situation in ("cold", "gpu") else (tokens - 1) // chunk * chunk - block
        tiers = {tier: least if tier == situation else 0 for tier in ("external", "l1", "l2") if tier in after}
        if least:
            tiers["external"] = least
        if grown["gpu"] != own:
            return f"{grown['gpu']:.0f} tokens of {tokens} hit in the engine's own cache, not {own}"
        most = max(block, chunk) if situation == "gpu" else 0  # one that loads the last block too, to compute less
        for tier, wanted in tiers.items():
            if grown[tier] < wanted or (not wanted and grown[tier] > most):
                return f"{grown[tier]:.0f} tokens of {tokens} loaded ({tier}), not {wanted or 'none'}"
        return ""

    def _decode(self, repeat: int) -> None:
        """Measure a batch that decodes together; its prompts are new, so a connector stores them meanwhile."""
        plan = self._plan
        names = [f"decode {repeat} {place}" for place in range(plan.decode_batch)]
        prompts = [self._prompt(name, plan.decode_context) for name in names]
        answers = self._ask(prompts, plan.decode_tokens)
        looks_s = answers[0].looks_s
        self._add("decode", plan.decode_batch * plan.decode_context, f"decode {repeat}", token_s(answers), looks_s)

    def _lower_tier(self) -> None:
        """Measure hits in L2: every prompt is driven out of L1 by longest prompts that L2 holds as well."""
        longest = max(self._plan.lengths)
        for tokens in self._plan.lengths:
            for repeat in range(self._plan.repeats):
                self._cold(f"{repeat} {tokens}", tokens)
                self._written_through()
        for _ in range(self._plan.hits):
            for tokens in self._plan.lengths:
                for repeat in range(self._plan.repeats):
                    for filler in range(2):
                        self._engine.reset()
                        self._engine.generate([self._prompt(f"filler {filler}", longest)], 1)
                        self._written_through()
                    self._engine.reset()
                    self._hit(f"{repeat} {tokens}", tokens, "l2")

    def _written_through(self) -> None:
        """Wait until copies to L2 have ended: no more chunks come for a while."""
        if self._running.resident is None:
            raise EngineError(f"{self._name} does not say what it holds")
        seen, quiet_since = -1, time.monotonic()
        while time.monotonic() - quiet_since < max(0.3, self._plan.settle_s):
            held = self._running.resident()["l2"]
            if held != seen:
                seen, quiet_since = held, time.monotonic()
            time.sleep(0.05)

    def _ask(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        return self._engine.generate(prompts, tokens, fastest=self._fastest)

    def _prompt(self, name: str, tokens: int) -> list[int]:
        return prompt(f"{self._plan.seed} {name}", tokens, int(self._engine.facts["vocabulary"]))

    def _add(
        self,
        situation: Situation,
        tokens: int,
        name: str,
        seconds: float,
        looks_s: tuple[float, ...],
        *,
        output: tuple[int, ...] = (),
        fault: str = "",
    ) -> None:
        what = f"{tokens:,} tokens" if situation != "decode" else f"{self._plan.decode_batch} requests"
        self._say(f"{self._name} {situation:<6} {what}: {seconds:.5f} s{f'  FAULT: {fault}' if fault else ''}")
        self.samples.append(
            Sample(
                system=self._name,
                run=self._run,
                situation=situation,
                tokens=tokens,
                prompt=name,
                seconds=seconds,
                output=output,
                looks_s=looks_s,
                fault=fault,
            )
        )


def prompt(name: str, tokens: int, vocabulary: int) -> list[int]:
    """Return token ids that follow from the name alone."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    words: list[int] = rng.integers(min(_LOWEST_ID, vocabulary // 2), vocabulary, tokens).tolist()
    return words


def token_s(answers: Sequence[Answer]) -> float:
    """Return the seconds that a token of one request took while all of them were decoding.

    Raises EngineError where they hardly were.
    """
    begin = max(answer.arrivals_s[0] for answer in answers)
    end = min(answer.arrivals_s[-1] for answer in answers)
    inside = sum(sum(begin < at <= end for at in answer.arrivals_s) for answer in answers)
    if inside < len(answers):
        raise EngineError(f"{len(answers)} requests never decoded together: ask for more decode tokens")
    return (end - begin) * len(answers) / inside
