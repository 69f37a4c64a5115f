from collections.abc import Sequence

import numpy as np
import pytest

from kvsim.engine.settings import RunSettings
from kvsim.profiles import Grid, PrefillFit, Profile, TransferCurve
from kvtraces import Log

NOTHING = 1e-15


def build_profile(
    *,
    base: float = 0.0,
    linear: float = 1e-5,
    quadratic: float = 0.0,
    decode: float = NOTHING,
    decode_token: float = 0.0,
    rate: float = 1e9,
    disk: float = 1e8,
    duplex: float = 1.0,
    layers: int = 10,
    handling: float = 0.0,
) -> Profile:
    """One byte of KV a token and nothing else that costs: what a test wants, it names."""
    curve = TransferCurve(sizes=(1,), bytes_per_s=(rate,))
    slow = TransferCurve(sizes=(1,), bytes_per_s=(disk,))
    contexts = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 65536)
    return Profile(
        name="test",
        model="test",
        gpu="test",
        tensor_parallel=1,
        layers=layers,
        kv_bytes_per_token=1,
        weight_bytes=0,
        gpu_memory_bytes=2**40,
        max_model_len=2**40,
        prefill=None,
        prefill_fit=PrefillFit(floor_s=0.0, base_s=base, linear_s=linear, quadratic_s=quadratic),
        decode=Grid((1, 1024), contexts, tuple(tuple(decode + decode_token * c for c in contexts) for _ in range(2))),
        transfers={"h2d": curve, "d2h": curve, "disk_read": slow, "disk_write": slow},
        duplex=duplex,
        handling_base_s=handling,
        handling_token_s=0.0,
        provenance={},
    )


def build_log(
    times_s: Sequence[float],
    prompts: Sequence[int],
    outputs: Sequence[int] | int = 1,
    chains: Sequence[Sequence[int]] | None = None,
    block: int = 16,
) -> Log:
    """A log; without chains, every block of every prompt is new."""
    count = len(prompts)
    if chains is None:
        full = [prompt // block for prompt in prompts]
        ends = np.cumsum([0, *full])
        chains = [range(a, b) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    return Log(
        block_tokens=block,
        timestamp_ms=1e3 * np.asarray(times_s, dtype=np.float64),
        input_tokens=np.asarray(prompts, dtype=np.int64),
        output_tokens=np.broadcast_to(np.asarray(outputs, dtype=np.int64), count).copy(),
        starts=np.cumsum([0, *map(len, chains)]).astype(np.int64),
        blocks=np.array([name for chain in chains for name in chain], dtype=np.int64),
    )


def build_settings(profile: Profile, **changes: object) -> RunSettings:
    defaults: dict[str, object] = {"profile": profile, "l1_gb": 0.0, "max_num_batched_tokens": 2**40, "page_bytes": 1}
    return RunSettings(**(defaults | changes))


@pytest.fixture(scope="session")
def make_profile():
    return build_profile


@pytest.fixture(scope="session")
def make_log():
    return build_log


@pytest.fixture(scope="session")
def make_settings():
    return build_settings
