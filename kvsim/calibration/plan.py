"""What a calibration measures: a grid of prefills and a grid of decodes."""

from dataclasses import dataclass

NEW = (1, 64, 256, 512, 520, 1024, 2048, 4096, 8192)
"""vLLM captures CUDA graphs of up to 512 tokens by default; a step of more is launched kernel by kernel."""
CACHED = (0, 1024, 4096, 16_384, 32_768, 65_536)
BATCH = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = (16, 1024, 4096, 16_384, 32_768)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The points of a calibration.

    Attributes:
        prefill: (new, cached) tokens; cached ones are multiples of every engine block up to 256.
        decode: (batch, context tokens of each).
        repeats: Measurements of each point; the median counts. Prefills are measured in so many rounds over all points,
            for what disturbs a host often lasts for seconds.
        least_s: Where points are repeated at all, a prefill point is until that took so long, 4 x `repeats` times at
            most: a short step is disturbed more easily, and costs less to repeat.
        rest: The pause behind each prefill, as a share of what it took, a second at most: a GPU that computes without
            rest soon lowers its clock. How much longer prefills take then (`Profile.sustained`) is measured by itself.
        sustained_s: For how long prompts are computed without rest for that; 0: it is not measured.
        decode_steps: Tokens that each request of a decode point puts out.
        vocabulary: Prompts are drawn from token ids below it, the lowest 100 left out (special ones, mostly).
        seed: Of the prompts.
    """

    prefill: tuple[tuple[int, int], ...]
    decode: tuple[tuple[int, int], ...]
    repeats: int = 3
    least_s: float = 0.25
    rest: float = 0.25
    sustained_s: float = 5.0
    decode_steps: int = 32
    vocabulary: int = 30_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a plan from which no profile can be made."""
        for name, points in (("prefill", self.prefill), ("decode", self.decode)):
            if any(len({point[axis] for point in points}) < 2 for axis in (0, 1)):
                raise ValueError(f"a calibration needs two values on each axis of {name}")
        if min(self.rest, self.sustained_s) < 0:
            raise ValueError("a calibration rests, and computes without rest, for no less than no time")
        if self.repeats < 1 or self.decode_steps < 4 or self.vocabulary < 200:
            raise ValueError("a calibration needs 1 repeat, 4 decode steps and 200 token ids at least")


def make_plan(
    *,
    max_model_len: int,
    max_num_batched_tokens: int = 8192,
    max_num_seqs: int = 64,
    kv_tokens: int = 200_000,
    vocabulary: int = 30_000,
    repeats: int = 3,
) -> Plan:
    """Return the points that an engine of these limits can be measured at.

    Args:
        max_model_len: Longest prompt and output.
        max_num_batched_tokens: The engine's token budget: a longer prompt would be measured over several steps.
        max_num_seqs: Largest batch.
        kv_tokens: Tokens that fit into its KV cache; more at once would be preempted.
        vocabulary: Token ids to draw from.
        repeats: Measurements of each point.
    """
    steps = 32
    longest = min(max_model_len, kv_tokens) - steps - 1
    new = [n for n in NEW if n <= min(max_num_batched_tokens, longest)]
    cached = [c for c in CACHED if c + new[0] <= longest]
    contexts = [c for c in CONTEXT if c <= longest]
    return Plan(
        prefill=tuple((n, c) for c in cached for n in new if n + c <= longest),
        decode=tuple((b, c) for c in contexts for b in BATCH if b <= max_num_seqs and b * (c + steps) <= kv_tokens),
        repeats=repeats,
        decode_steps=steps,
        vocabulary=vocabulary,
    )
