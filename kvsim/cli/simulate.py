"""`kvsim simulate`: one setting."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvsim.cli.options import (
    BlockSize,
    Json,
    KvDtype,
    Model,
    PackingName,
    ShowProgress,
    SkipBad,
    Sort,
    TensorParallel,
    Traces,
)
from kvsim.errors import UsageError

if TYPE_CHECKING:
    from kvsim.tuner import KvSize


def simulate(  # noqa: PLR0913, PLR0917 - a command's options
    trace: Traces,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens of a chunk, a multiple of the log's block.")],
    capacity_chunks: Annotated[int | None, typer.Option(help="Chunks that fit in L1; default without end.")] = None,
    l1_size_gb: Annotated[float | None, typer.Option(help="L1 in GiB instead, all ranks; needs --model.")] = None,
    policy: Annotated[str, typer.Option(help="lru, fifo, lfu, sieve, s3fifo, arc, gdsf, w-tinylfu, belady.")] = "lru",
    engine: Annotated[
        Literal["sweep", "core"], typer.Option(help="The compiled sweep, or the server's policy core. They agree.")
    ] = "sweep",
    block_size: BlockSize = None,
    skip_bad: SkipBad = False,
    sort: Sort = False,
    model: Model = None,
    tensor_parallel: TensorParallel = None,
    kv_dtype: KvDtype = "auto",
    packing: PackingName = "none",
    json: Json = False,
    progress: ShowProgress = None,
) -> None:
    """Count what one setting hits: exactly, each request taking no time, from an empty cache.

    Example: kvsim simulate --trace prod.jsonl --chunk-tokens 256 --l1-size-gb 20 --model qwen3-8b --policy s3fifo
    """
    from kvsim import api  # noqa: PLC0415 - numpy is loaded when it runs, not for --help
    from kvsim.cli.console import print_json, read_log, stages, warnings  # noqa: PLC0415

    if l1_size_gb is not None and capacity_chunks is not None:
        raise UsageError("--capacity-chunks and --l1-size-gb say the same: give one")
    size = _kv(model, tensor_parallel, kv_dtype, packing)
    if l1_size_gb is not None:
        capacity_chunks = _capacity(l1_size_gb, chunk_tokens, size)
    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown, sort=sort)
    result = api.simulate(
        log, chunk_tokens=chunk_tokens, capacity_chunks=capacity_chunks, policy=policy.lower(), engine=engine
    ).to_dict()
    if json:
        print_json({**result, **warnings(log)})
        return
    from kvsim.cli.show import facts  # noqa: PLC0415

    without_end = "without end" if capacity_chunks is None else f"{capacity_chunks:,} chunks"
    facts(
        f"{policy} over chunks of {chunk_tokens:,} tokens, {without_end}",
        [
            ("requests", f"{result['requests']:,}"),
            ("chunk accesses", f"{result['chunk_accesses']:,}"),
            ("hit chunks", f"{result['hit_chunks']:,}"),
            ("hit tokens", f"{result['hit_tokens']:,} of {result['input_tokens']:,}"),
            ("token hit ratio", f"{100 * result['token_hit_ratio']:.2f}%"),
        ],
    )


def _kv(model: str | None, tensor_parallel: int | None, kv_dtype: str, packing: PackingName) -> "KvSize | None":
    """Return the KV's size; None without a model, which then nothing may be said of."""
    from kvsim.tuner.pricing import kv_size  # noqa: PLC0415

    if model is not None:
        ranks = 1 if tensor_parallel is None else tensor_parallel
        return kv_size(model, tensor_parallel=ranks, kv_dtype=kv_dtype, packing=packing)
    if tensor_parallel is not None or kv_dtype != "auto" or packing != "none":
        raise UsageError("--tensor-parallel, --kv-dtype and --packing say how large a model's KV is: give --model")
    return None


def _capacity(
    l1_size_gb: float,
    chunk_tokens: int,
    size: "KvSize | None",
) -> int:
    from kvsim.engine.settings import MOST  # noqa: PLC0415

    if size is None:
        raise UsageError("--l1-size-gb needs --model: how many chunks fit depends on the KV's size")
    if not 0 <= l1_size_gb <= MOST:
        raise UsageError(f"--l1-size-gb {l1_size_gb:g}: it cannot be negative, or above {MOST:g}")
    if chunk_tokens < 1:
        raise UsageError(f"--chunk-tokens {chunk_tokens}: at least 1")
    return size.capacity_chunks(l1_size_gb, chunk_tokens)
