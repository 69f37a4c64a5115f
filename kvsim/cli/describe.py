"""`kvsim describe`: a log in figures."""

from kvsim.cli.options import BlockSize, Json, ShowProgress, SkipBad, Sort, Traces


def describe(
    trace: Traces,
    block_size: BlockSize = None,
    skip_bad: SkipBad = False,
    sort: Sort = False,
    json: Json = False,
    progress: ShowProgress = None,
) -> None:
    """Describe a log: requests, lengths, and what a cache without end could hit.

    Example: kvsim describe --trace prod.jsonl
    """
    from dataclasses import asdict  # noqa: PLC0415

    from kvsim.cli.console import print_json, read_log, stages, warnings  # noqa: PLC0415
    from kvtraces import describe as figures_of  # noqa: PLC0415

    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown, sort=sort)
    found = figures_of(log)
    if json:
        print_json({**asdict(found), **warnings(log)})
        return
    from kvsim.cli.show import facts  # noqa: PLC0415
    from kvsim.plots import number  # noqa: PLC0415

    rows = [
        ("requests", f"{found.requests:,} in {found.duration_s:,.0f} s, {number(found.requests_per_s)} a second"),
        ("prompt tokens", f"{found.input_tokens:,}"),
        ("  a request", _lengths(found.input_lengths.p50, found.input_lengths.p95, found.input_lengths.max)),
        ("output tokens", f"{found.output_tokens:,}"),
        ("  a request", _lengths(found.output_lengths.p50, found.output_lengths.p95, found.output_lengths.max)),
    ]
    if found.block_tokens is None:
        rows.append(("block hashes", "none: the log can drive load, but has no hit ratio"))
    else:
        rows.append(("blocks", f"{found.unique_blocks:,} different ones of {found.block_tokens:,} tokens"))
        rows.append(("hit without end", f"{100 * (found.unbounded_token_hit_ratio or 0):.2f}% of the prompt tokens"))
    if found.skipped:
        rows.append(("bad rows", f"{found.skipped:,} left out"))
    facts(", ".join(trace), rows)


def _lengths(p50: float, p95: float, most: int) -> str:
    return f"p50 {p50:,.0f}, p95 {p95:,.0f}, at most {most:,}"
