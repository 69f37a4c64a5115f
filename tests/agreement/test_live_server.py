"""The same workload through a shell without time and through a real server process: the same events and decisions.

And what was decided live, by many clients at once, is decided again by a replay in another process.
"""

import random
import shutil
import subprocess
import sys
import threading
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from instant import InstantShell, timeless
from live_fakes import ServerProcess, SyncEngine, chain, environment

from kvcore.live import wire
from kvcore.live.settings import load
from kvcore.policy import (
    POLICIES,
    Cleared,
    InstanceRegistered,
    LookedUp,
    Pinned,
    RequestEnded,
    RoomAsked,
    StoreAborted,
    StoreCommitted,
    Unpinned,
)
from kvcore.policy.hashing import chunk_names
from kvtraces.journal import Step, read_segment, segments, verify
from kvtraces.workloads import Agent, Chat, Poisson, Rag, Spread, workload

PAGE_BYTES = 4096
BLOCK_TOKENS = 16


@st.composite
def scripts(draw):
    """A workload and what an engine and an operator do with it, request by request."""
    seed = draw(st.integers(0, 10_000))
    requests = draw(st.integers(5, 60))
    common = {"requests": requests, "seed": seed, "block_tokens": BLOCK_TOKENS, "arrivals": Poisson(sessions_per_s=1)}
    short = Spread(median=300, sigma=0.5, high=1200)
    kind = draw(st.sampled_from(["chat", "rag", "agent"]))
    if kind == "chat":
        made = workload(Chat(system_tokens=short, system_prompts=4, **common))
    elif kind == "rag":
        made = workload(Rag(document_tokens=short, documents=20, **common))
    else:
        made = workload(Agent(tool_definition_tokens=600, system_tokens=short, max_context_tokens=6000, **common))
    rng = random.Random(seed)
    steps = [
        {
            "hashes": made.hashes_of(i),
            "salt": rng.choice(["", "", "bob"]),
            "computed": rng.choice([0, 0, 0, 1, 3]),
            "split": rng.choice([1, 2, 5, 1000]),
            "abort": rng.random() < 0.15,
            "cancel": rng.random() < 0.1,
            "ask_everything": rng.random() < 0.3,
            "operator": rng.choice([None] * 12 + ["clear", "clear all", "pin", "unpin"]),
        }
        for i in range(len(made))
    ]
    return {
        "steps": steps,
        "chunk_tokens": draw(st.sampled_from([16, 64, 256])),
        "pages": draw(st.integers(4, 120)),
        "pages_a_chunk": draw(st.integers(1, 3)),
        "policy": draw(st.sampled_from(POLICIES)),
        "admission": draw(st.sampled_from(["always", "always", "second-use"])),
        "quota_pages": draw(st.sampled_from([None, 3, 10])),
    }


def flags_of(script):
    flags = {
        "l1_size_gb": script["pages"] * PAGE_BYTES / 2**30,
        "page_size": str(PAGE_BYTES),
        "chunk_size": script["chunk_tokens"],
        "eviction_policy": script["policy"],
        "admission": script["admission"],
    }
    if script["quota_pages"] is not None:
        flags["quota"] = (f"bob={script['quota_pages'] * PAGE_BYTES / 2**30!r}",)
    return flags


def missing_of(step, chunks, hits):
    return chunks if step["ask_everything"] else chunks[hits:]


def run_instant(script):
    """Return the log of the shell without time."""
    shell = InstantShell(load(flags_of(script), {}).core_config())
    size = script["pages_a_chunk"] * PAGE_BYTES
    shell.tell(InstanceRegistered, instance="engine", chunk_pages=script["pages_a_chunk"], chunk_bytes=size)
    previous = ()
    for at, step in enumerate(script["steps"]):
        name = f"engine/{at}"
        chunks = chunk_names(step["hashes"], script["chunk_tokens"] // BLOCK_TOKENS)
        shell.tell(
            LookedUp,
            request=name,
            instance="engine",
            chunks=chunks,
            computed_chunks=min(step["computed"], len(chunks)),
            salt=step["salt"],
        )
        (hits,) = next(
            decision.hits
            for event, decisions in reversed(shell.log)
            if isinstance(event, LookedUp)
            for decision in decisions[:1]
        )
        missing = () if step["cancel"] else missing_of(step, chunks, hits)
        for start in range(0, len(missing), step["split"]):
            shell.tell(RoomAsked, request=name, chunks=missing[start : start + step["split"]])
            placed = shell.placed
            lost = placed[-1:] if step["abort"] else ()
            if written := placed[: len(placed) - len(lost)]:
                shell.tell(StoreCommitted, request=name, tier=0, chunks=written)
            if lost:
                shell.tell(StoreAborted, request=name, tier=0, chunks=lost)
        shell.tell(RequestEnded, request=name)
        match step["operator"]:
            case "clear":
                shell.tell(Cleared, chunks=chunks[1:3])
            case "clear all":
                shell.tell(Cleared, chunks=None)
            case "pin":
                shell.tell(Pinned, chunks=chunks[:2])
                previous = chunks[:2]
            case "unpin":
                shell.tell(Unpinned, chunks=previous)
    return shell.log


def run_live(script, folder):
    """Return the log of a real server process over ZMQ, from its journal."""
    folder.mkdir()
    given = flags_of(script)
    flags = ["--journal", str(folder / "journal")]
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", value[0] if isinstance(value, tuple) else str(value)]
    server = ServerProcess(folder, *flags, l1_pages=script["pages"], page_bytes=PAGE_BYTES)
    try:
        size = script["pages_a_chunk"] * PAGE_BYTES
        with SyncEngine(
            server.endpoint, chunk_bytes=size, block_tokens=BLOCK_TOKENS, chunk_tokens=script["chunk_tokens"]
        ) as engine:
            play(script, engine)
            server.kill()
    finally:
        server.stop()
    log = []
    for path in segments(folder / "journal"):
        log += [(r.record.event, r.record.decisions) for r in read_segment(path) if isinstance(r.record, Step)]
    return log


def play(script, engine):
    previous = ()
    for at, step in enumerate(script["steps"]):
        name, call = str(at), engine.client.call
        chunks = chunk_names(step["hashes"], script["chunk_tokens"] // BLOCK_TOKENS)
        computed = min(step["computed"], len(chunks))
        found = engine.lookup(name, chunks, computed_chunks=computed, salt=step["salt"])
        if run := engine.read(found, chunks):
            engine.loaded(name, run)
        missing = () if step["cancel"] else missing_of(step, chunks, found.hits[0])
        for start in range(0, len(missing), step["split"]):
            asked = missing[start : start + step["split"]]
            placed = engine.write(engine.ask(name, asked), asked)
            lost = placed[-1:] if step["abort"] else []
            if written := placed[: len(placed) - len(lost)]:
                engine.committed(name, written)
            if lost:
                engine.aborted(name, lost)
        engine.end(name)
        match step["operator"]:
            case "clear":
                call(wire.Clear(chunks[1:3]))
            case "clear all":
                call(wire.Clear())
            case "pin":
                call(wire.Pin(chunks[:2]))
                previous = chunks[:2]
            case "unpin":
                call(wire.Unpin(previous))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=scripts())
def test_a_real_server_decides_what_the_shell_without_time_decides(script, shm):
    folder = shm / sha256(repr(script).encode()).hexdigest()[:12]
    if folder.exists():  # hypothesis runs a script again to see whether it fails again
        shutil.rmtree(folder)
    instant, live = timeless(run_instant(script)), timeless(run_live(script, folder))
    for at, (ours, theirs) in enumerate(zip(instant, live, strict=False)):
        assert ours == theirs, f"step {at}"
    assert len(instant) == len(live)


def test_the_two_shells_can_be_told_apart(shm):
    """A negative control: another policy gives another log."""
    prompts = [chain("often" if at % 6 < 2 else f"once {at}", 3) for at in range(40)]
    steps = [
        {
            "hashes": prompt,
            "salt": "",
            "computed": 0,
            "split": 1000,
            "abort": False,
            "cancel": False,
            "ask_everything": False,
            "operator": None,
        }
        for prompt in prompts
    ]
    script = {
        "steps": steps,
        "chunk_tokens": 16,
        "pages": 10,
        "pages_a_chunk": 1,
        "policy": "lru",
        "admission": "always",
        "quota_pages": None,
    }
    live = timeless(run_live(script, shm / "lru"))
    assert timeless(run_instant(script)) == live
    assert timeless(run_instant({**script, "policy": "lfu"})) != live


def verify_elsewhere(folder, seed):
    """Replay a journal in a fresh process whose strings hash otherwise."""
    program = "import sys; from kvtraces.journal import verify; print(repr(verify(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONHASHSEED": str(seed)},
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_what_many_clients_caused_replays_equal_in_another_process(shm, policy):
    journal = shm / "journal"
    flags = ["--journal", str(journal), "--eviction-policy", policy, "--journal-segment-mb", "1"]
    server = ServerProcess(shm, *flags, l1_pages=48, page_bytes=PAGE_BYTES)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            with SyncEngine(server.endpoint, f"engine-{seed}") as engine:
                for at in range(250):
                    prompt = chain(f"p{rng.randrange(12)}", rng.randrange(1, 12))
                    engine.serve(f"{at}", prompt, salt=rng.choice(["", "bob"]))
                    if rng.random() < 0.03:
                        engine.client.call(wire.Clear(prompt[:2]))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.kill()
    assert not failures
    found = verify_elsewhere(journal, 4711)
    assert found.startswith("Equal("), found
    assert verify(journal).steps >= 3000
    path = segments(journal)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert verify_elsewhere(journal, 1).startswith("Difference("), "one byte changed is seen"
    server.stop()
