"""Measure a simulator's profile of one model on this GPU: prefill and decode steps, copies, both directions at once.

    python benchmarks/profile_h100.py --model qwen3-8b --out benchmarks/results/h100-qwen3-8b-measured.json

The file is a profile as kvsim/profiles/data holds them. Prefills of up to 32k new behind up to 32k cached tokens are
steps of their own (the engine's token budget and lengths are raised for it). Copies are those of kvkernels' start-up
measurement, over a cache of the same layout. About six minutes on an H100; `--state FILE` lets it go on where it was
cut off.
"""

import argparse
import contextlib
import gc
import json
import mmap
import tempfile
import time
from pathlib import Path

from vllm_gpu import facts, interrupt_on_term, model_folder, parameters, say

from kvcore.vllm.ttft.systems import connector, kvcore_server, wait_until_touched
from kvsim.calibration import Facts, LocalEndpoint, Plan, calibrate
from kvsim.profiles import Part, TransferCurve
from kvsim.profiles.load import to_json

NEW = (1, 16, 64, 128, 256, 384, 512, 520, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16_384, 32_768)
CACHED = (0, 512, 2048, 8192, 16_384, 32_768)
BATCH = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = (16, 512, 2048, 8192, 32_768)
CHUNK = 256
GIB = 1 << 30


def plan_of(given):
    """The points, in an order in which a prefix is computed once."""
    longest = given.max_model_len - given.decode_steps - 1
    return Plan(
        prefill=tuple((n, c) for c in CACHED for n in NEW if n + c <= longest and n <= given.max_num_batched_tokens),
        decode=tuple(
            (b, c) for c in CONTEXT for b in BATCH if c <= longest and b * (c + given.decode_steps) <= given.kv_tokens
        ),
        repeats=given.repeats,
        decode_steps=given.decode_steps,
        vocabulary=given.vocabulary,
        seed=given.seed,
    )


def copies(config, blocks=2048, block_tokens=16):
    """Curves of kvkernels' best backend by direction, and the duplex share, over a cache of this model's shape."""
    import torch  # noqa: PLC0415 - the calibration's engine has the GPU before

    from kvkernels import describe  # noqa: PLC0415
    from kvkernels.choose import best_backend  # noqa: PLC0415
    from kvkernels.cuda_driver import cuda_driver  # noqa: PLC0415
    from kvkernels.cuda_streams import CudaRuntime  # noqa: PLC0415
    from kvkernels.registered import RegisteredArena  # noqa: PLC0415

    device = torch.device("cuda", 0)
    heads, head = config["num_key_value_heads"], config["head_dim"]
    cache = [
        torch.empty(blocks, block_tokens, heads, 2 * head, dtype=torch.bfloat16, device=device).permute(0, 2, 1, 3)
        for _ in range(config["num_hidden_layers"])
    ]
    layout = describe(cache, num_blocks=blocks, block_tokens=block_tokens, chunk_tokens=CHUNK, block_dim=0, order="NHD")
    runtime = CudaRuntime(device)
    arena = RegisteredArena(mmap.mmap(-1, GIB), cuda_driver(), enter_thread=runtime.enter_thread)
    arena.wait()
    choice = best_backend(layout, cache, arena, scratch_bytes=GIB)
    profile = choice.profile
    choice.transfer.close()
    arena.close()
    curves = profile["curves"][profile["backend"]]
    return (
        {"h2d": _curve(curves["load"]), "d2h": _curve(curves["store"])},
        duplex(torch, device),
        f"kvkernels' {profile['backend']} over {profile['layout']}, pinned host memory",
    )


def _curve(points):
    sizes, rates = zip(*points, strict=True)
    return TransferCurve(
        sizes=tuple(int(size) for size in sizes), bytes_per_s=tuple(rate * 1e9 for rate in rates), latency_s=1.3e-5
    )


def duplex(torch, device):
    """The speed of each direction of the link while both are busy, as a share of its speed alone."""
    host, other = (torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    near, far = (torch.empty(GIB, dtype=torch.uint8, device=device) for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(2)]

    def seconds(into, out_of):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for stream, wanted, (target, source) in zip(streams, (into, out_of), ((near, host), (other, far)), strict=True):
            if wanted:
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    times = {which: sorted(seconds(*which) for _ in range(7))[3] for which in ((1, 0), (0, 1), (1, 1))}
    return min(1.0, (times[1, 0] + times[0, 1]) / 2 / times[1, 1])


def without_gpu():
    """Copies where there is no GPU: assumed, so that the rest can be tried."""
    curve = TransferCurve(sizes=(1 << 20,), bytes_per_s=(5e9,), latency_s=1e-5)
    return {"h2d": curve, "d2h": curve}, 1.0, "no GPU here"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-8b", help="a model of vllm_gpu.py, or a folder")
    parser.add_argument("--gpu", default="h100", help="the profile's short name of this GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--kv-tokens", type=int, default=280_000, help="the most that a decode point may hold")
    parser.add_argument("--max-model-len", type=int, default=65_600)
    parser.add_argument("--max-num-batched-tokens", type=int, default=32_768)
    parser.add_argument(
        "--max-num-seqs", type=int, default=256, help="vLLM captures CUDA graphs for twice as many tokens"
    )
    parser.add_argument("--connector", action="store_true", help="beside a kvcore server, as predict_h100.py runs it")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.88)
    parser.add_argument("--state", type=Path, help="keeps measurements, to go on with")
    parser.add_argument("--budget-s", type=float, default=560.0, help="give up later")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measured(given, folder, config, transfers, duplex_share, source):
    """The profile, from an engine in a child process."""
    import torch  # noqa: PLC0415

    cuda = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else 8 * GIB
    known = Facts(
        name=f"{given.gpu}-{Path(given.model).name}",
        model=Path(given.model).name,
        gpu=given.gpu,
        layers=config["num_hidden_layers"],
        kv_bytes_per_token=4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"],
        weight_bytes=2 * parameters(config),
        gpu_memory_bytes=memory,
        max_model_len=config["max_position_embeddings"],
        transfers=transfers,
        transfers_from=Part(kind="measured" if cuda else "assumed", source=source, error="medians of 5"),
        duplex=duplex_share,
    )
    engine = {
        "dtype": given.dtype,
        "load_format": given.load_format,
        "skip_tokenizer_init": True,
        "enforce_eager": given.eager,
        "max_model_len": given.max_model_len,
        "max_num_batched_tokens": given.max_num_batched_tokens,
        "max_num_seqs": given.max_num_seqs,
        "gpu_memory_utilization": given.gpu_memory_utilization,
    }
    if given.max_model_len > known.max_model_len:  # points beyond what the model was trained for cost what they cost
        engine["hf_overrides"] = {"max_position_embeddings": given.max_model_len}
    begun = last = time.perf_counter()

    def progress(done, of, what):
        nonlocal last
        if time.perf_counter() - begun > given.budget_s:
            raise SystemExit(f"out of time at point {done} of {of}; --state FILE and a second run go on from there")
        if time.perf_counter() - last > 5 or done == of:
            last = time.perf_counter()
            say(f"{done} of {of}: {what}")

    with contextlib.ExitStack() as stack:
        if given.connector:  # as it will be deployed: the connector's part of a step belongs to the step
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvcore-profile-")))
            place = stack.enter_context(kvcore_server(scratch, **{"l1-size-gb": 16, "chunk-size": CHUNK}))
            wait_until_touched(place)
            engine["kv_transfer_config"] = connector("KVCoreMPConnector", endpoint=place)
        endpoint = stack.enter_context(LocalEndpoint(str(folder), arguments=engine))
        say("the engine is up")
        return calibrate(endpoint, plan_of(given), known, state=given.state, progress=progress)


def main():
    given = arguments()
    interrupt_on_term()
    folder = model_folder(given.model, tempfile.gettempdir())
    config = json.loads((folder / "config.json").read_text())
    import torch  # noqa: PLC0415

    transfers, share, source = copies(config) if torch.cuda.is_available() else without_gpu()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the engine needs what the copies had
    say({name: [round(rate / 1e9, 1) for rate in curve.bytes_per_s] for name, curve in transfers.items()}, share)
    profile = measured(given, folder, config, transfers, share, source)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(to_json(profile), encoding="utf-8")
    beside = given.out.with_name(given.out.stem + "-run.json")
    beside.write_text(json.dumps({**facts(), "profile": given.out.name}, indent=1) + "\n")
    for tokens in (2048, 8192, 32_000):
        say(f"prefill of {tokens:,}: {profile.prefill_s(tokens):.4f} s; one token behind it: "
            f"{profile.prefill_s(16, tokens):.4f} s")  # fmt: skip
    say(f"handling {profile.handling_base_s:.5f} s + {profile.handling_token_s:.2e} s a token; {given.out}")


if __name__ == "__main__":
    main()
