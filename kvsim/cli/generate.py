"""`kvsim generate`: a log made up."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from kvsim.errors import UsageError

if TYPE_CHECKING:
    from kvtraces import Agent, Chat, Mixed, Rag

Kind: TypeAlias = Literal["chat", "rag", "agent", "mixed"]


def generate(
    out: Annotated[Path, typer.Argument(help="The log to write: .jsonl, .jsonl.gz or .jsonl.zst.")],
    kind: Annotated[Kind, typer.Option(help="Conversations, retrieval, agent loops, or all three.")] = "chat",
    requests: Annotated[int, typer.Option(help="How many; of a mix, at most so many of each kind.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same log.")] = 0,
    sessions_per_s: Annotated[
        float | None, typer.Option(help="Sessions begun a second, in a mix of each kind; default by kind.")
    ] = None,
    bursty: Annotated[
        bool, typer.Option("--bursty", help="Sessions arrive in bursts, not as a Poisson process.")
    ] = False,
    block_size: Annotated[int, typer.Option(help="Tokens of a block.")] = 64,
    output_hashes: Annotated[bool, typer.Option("--output-hashes", help="Write the outputs' blocks too.")] = False,
) -> None:
    """Make a realistic log: prompts shared by Zipf's law, sessions of several turns, arrivals by chance.

    Example: kvsim generate chat.jsonl.gz --kind chat --requests 5000 --sessions-per-s 0.5 --bursty
    """
    from kvsim.files import check_outputs, whole  # noqa: PLC0415
    from kvtraces import generate as make  # noqa: PLC0415
    from kvtraces import write  # noqa: PLC0415
    from kvtraces.sources import rotated_set  # noqa: PLC0415
    from kvtraces.words import counted  # noqa: PLC0415
    from kvtraces.writer import SUFFIXES  # noqa: PLC0415

    if not out.name.endswith(SUFFIXES):
        raise UsageError(f"{out}: a log is written to {', '.join(SUFFIXES)}")
    check_outputs((out,))
    if out.exists() or rotated_set(out):
        raise UsageError(f"{out}: is there already; nothing is written over a log")
    if sessions_per_s is not None and not 0 < sessions_per_s < float("inf"):
        raise UsageError(f"--sessions-per-s {sessions_per_s:g}: it must be above zero")
    if requests < 1:
        raise UsageError(f"--requests {requests}: at least 1")
    if not 1 <= block_size <= 1 << 20:
        raise UsageError(f"--block-size {block_size}: from 1 to {1 << 20}")
    if seed < 0:
        raise UsageError(f"--seed {seed}: it cannot be negative")
    config = _config(kind, requests, seed, sessions_per_s, bursty, block_size)
    log = make(config, output_hashes=output_hashes)
    with whole(out) as place:
        write(log, place)
    typer.echo(f"{counted(len(log), 'request')}, {int(log.input_tokens.sum()):,} prompt tokens: {out}")


def _config(
    kind: Kind, requests: int, seed: int, sessions_per_s: float | None, bursty: bool, block_size: int
) -> "Chat | Rag | Agent | Mixed":
    """Return the generator's configuration; the parts of a mix are seeded one after the other."""
    from kvtraces import Agent, Bursty, Chat, Mixed, Poisson, Rag  # noqa: PLC0415

    def arrivals(default: Poisson) -> Poisson | Bursty:
        rate = default.sessions_per_s if sessions_per_s is None else sessions_per_s
        return Bursty(sessions_per_s=rate) if bursty else Poisson(sessions_per_s=rate)

    def chat(seed: int) -> Chat:
        return Chat(requests=requests, seed=seed, arrivals=arrivals(_rate(Chat)), block_tokens=block_size)

    def rag(seed: int) -> Rag:
        return Rag(requests=requests, seed=seed, arrivals=arrivals(_rate(Rag)), block_tokens=block_size)

    def agent(seed: int) -> Agent:
        return Agent(requests=requests, seed=seed, arrivals=arrivals(_rate(Agent)), block_tokens=block_size)

    def _rate(kind: type[Chat | Rag | Agent]) -> Poisson:
        default = kind().arrivals
        return default if isinstance(default, Poisson) else Poisson(sessions_per_s=default.sessions_per_s)

    match kind:
        case "chat":
            return chat(seed)
        case "rag":
            return rag(seed)
        case "agent":
            return agent(seed)
        case "mixed":
            return Mixed(chat=chat(seed), rag=rag(seed + 1), agent=agent(seed + 2))
