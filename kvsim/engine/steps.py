"""What a step of the engine takes: prompts' parts and decodes in one batch."""

from collections.abc import Callable, Sequence

from kvsim.profiles import Profile


class StepCosts:
    """Step times from a profile, remembering the largest that were asked for.

    A step with several parts is priced as one prefill with the same number of tokens and the same attention work
    (n (n + 2 c) summed over the parts), plus the decodes' own attention: their step beyond that of an empty context.
    For the fitted form the first half is exact; against aiconfigurator-core's mixed steps both are within 7%.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._prefill = profile.prefill_s
        self.floor = profile.prefill_s(1)
        """Time of a step that computes hardly anything, in seconds."""
        self._shortest = profile.decode.y[0]
        self._rows: dict[int, Callable[[float], float]] = {}
        """By batch, the time of a decode step as a function of the context."""
        self.most_new = 0
        self.most_cached: float = 0
        self.most_batch = 0
        self.longest = 0.0

    def decode(self, batch: int, context: float) -> float:
        """Return the time in which `batch` requests of `context` tokens on average get a token each, in seconds."""
        self.most_batch = max(self.most_batch, batch)
        self.longest = max(self.longest, context)
        return self._row(batch)(context)

    def _row(self, batch: int) -> Callable[[float], float]:
        row = self._rows.get(batch)
        if row is None:
            row = self._rows[batch] = self._profile.decode.row(batch)
        return row

    def mixed(self, parts: Sequence[tuple[int, int]], batch: int, context: float) -> float:
        """Return the time of a step, in seconds.

        Args:
            parts: New tokens and the tokens in front of them, for each prompt in the step; at least one.
            batch: Requests that decode beside them.
            context: Their average context, in tokens.
        """
        behind: float
        tokens, behind = parts[0]
        if len(parts) > 1:
            tokens, behind = self._as_one(parts)
        self.most_cached = max(self.most_cached, behind)
        together = tokens + batch
        self.most_new = max(self.most_new, together)
        took = self._prefill(together, abs(behind))
        if behind < 0:  # several short prompts attend to less than one long one does
            alone = self._prefill(together, 0)
            took = max(self._prefill(1, 0), 2 * alone - took)
        if batch:
            took += max(0.0, self.decode(batch, context) - self._row(batch)(self._shortest))
        return took

    @staticmethod
    def _as_one(parts: Sequence[tuple[int, int]]) -> tuple[int, float]:
        """Return the tokens of the parts, and the context behind which one prefill of them attends to as much."""
        tokens = work = 0
        for new, cached in parts:
            tokens += new
            work += new * (new + 2 * cached)
        return tokens, (work - tokens * tokens) / (2 * tokens)

    def warnings(self) -> list[str]:
        """Return a line for each grid that was left, with its range and what was asked of it."""
        found = []
        prefill = self._profile.extrapolation(self.most_new, round(self.most_cached))
        if prefill is not None:
            found.append(prefill)
        grid = self._profile.decode
        if grid.beyond(self.most_batch, self.longest):
            found.append(
                f"profile {self._profile.name}: decode of up to {self.most_batch:,} requests of {self.longest:,.0f} "
                f"tokens was asked for, measured are {grid.x[0]:,} to {grid.x[-1]:,} requests of {grid.y[0]:,} to "
                f"{grid.y[-1]:,} tokens: extrapolated"
            )
        return found
