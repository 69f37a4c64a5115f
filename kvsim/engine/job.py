"""A request on its way through the simulation."""

from kvcore.policy import Chunk
from kvsim.engine.gpu_cache import Holding


class Job:
    """One request: what it asks for, how far it is, and when each thing happened (seconds of simulated time)."""

    __slots__ = (
        "arrived",
        "asked",
        "came",
        "chain",
        "computed",
        "decoded",
        "ended",
        "engine",
        "enqueued",
        "exposed_load",
        "findable",
        "finish_step",
        "finished",
        "first_scheduled",
        "first_token",
        "found",
        "holding",
        "index",
        "joined_step",
        "l0_tokens",
        "life",
        "load_began",
        "loaded",
        "looked_up",
        "matched",
        "name",
        "output",
        "output_chain",
        "path",
        "preemptions",
        "produced",
        "prompt",
        "run",
        "run_start",
        "salt",
        "step_load",
        "stores",
        "target",
        "waits",
        "whole_findable",
        "whole_path",
    )

    def __init__(
        self,
        index: int,
        prompt: int,
        output: int,
        chain: tuple[Chunk, ...],
        path: tuple[int, ...],
        findable: int,
        salt: str,
    ) -> None:
        self.index = index
        self.name = str(index)
        self.prompt = prompt
        self.output = output
        self.chain = chain
        """Chunks of the prompt, head first."""
        self.path = path
        """Prefix nodes of the prompt."""
        self.findable = findable
        """Leading engine blocks that a later request could hit."""
        self.salt = salt
        self.whole_path = path
        """Those of prompt and output, where the log has the output's."""
        self.whole_findable = findable
        self.output_chain: tuple[Chunk, ...] = ()
        """Chunks that follow the prompt's once the output is appended, where they are to be stored."""
        self.arrived = self.enqueued = self.came = 0.0
        """Came to the server, to the queue, and to the queue again when what it waited for was there."""
        self.first_scheduled = -1.0
        self.first_token = -1.0
        self.finished = -1.0
        self.engine = -1
        # Progress
        self.target = prompt
        """Tokens to compute before the next one comes out: the prompt, and after a preemption what was put out too."""
        self.computed = 0
        self.produced = 0
        """Tokens put out."""
        self.decoded = 0
        """Decode steps since the prompt was computed last; known when they are over."""
        self.joined_step = 0
        self.finish_step = 0
        self.life = 0
        """Counts preemptions, so that an older life's place among the decodes is known as stale."""
        self.holding = Holding()
        self.preemptions = 0
        # L1
        self.looked_up = False
        self.matched: tuple[int, ...] = ()
        """Leading chunks found in each tier when it was first looked up."""
        self.found = 0
        """Leading chunks found in any tier when it was looked up last."""
        self.run: tuple[Chunk, ...] = ()
        """Chunks that the core wants loaded, once it has said so."""
        self.run_start = 0
        """The first of them would be this one of the chain."""
        self.waits = False
        """Whether it waits, outside the queue, for copies from a lower tier, its own or another request's."""
        self.load_began = 0.0
        self.exposed_load = 0.0
        """What loads cost until the first token beyond compute, in seconds."""
        self.step_load = 0.0
        """The part of that within steps."""
        self.l0_tokens = 0
        self.loaded = 0
        """Tokens copied beyond L0."""
        self.asked = 0
        """Leading chunks that room was asked for, or that need none."""
        self.stores = 0
        """Stores under way: they read the request's blocks."""
        self.ended = False
        """Whether the core was told that the prompt is computed."""
