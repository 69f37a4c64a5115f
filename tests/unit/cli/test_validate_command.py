"""`kvsim validate` on a log that a simulation recorded: its errors are known."""

import dataclasses
import json
import re

import numpy as np
import pytest

import kvsim
from kvcore.policy import (
    Cleared,
    Core,
    CoreConfig,
    InstanceLeft,
    InstanceRegistered,
    LoadCost,
    LookedUp,
    Pinned,
    QuotaSet,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierCleared,
    TierConfig,
    Unpinned,
)
from kvsim.tuner.pricing import kv_size
from kvtraces import Chat, Poisson, generate, write
from kvtraces.journal import Head, JournalWriter, take_snapshot

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")
SERVER = ("--chunk-tokens", 64, "--l0-gb", 6, "--l1-size-gb", 30)


@pytest.fixture(scope="module")
def recorded():
    """A log as a server of these settings would have recorded it, and that log without times."""
    log = generate(Chat(requests=400, seed=21, block_tokens=16, arrivals=Poisson(sessions_per_s=0.8)))
    profile = kvsim.costs(model="qwen3-8b", gpu="h100").run_profile
    settings = kvsim.RunSettings(profile=profile, chunk_tokens=64, l0_gb=6.0, l1_gb=30.0)
    columns = kvsim.run(log, settings, baseline=False).columns
    extra = {
        "ttft_ms": 1e3 * columns["ttft_s"],
        "queue_ms": 1e3 * (columns["handling_s"] + columns["queue_s"]),
        **{f"{part}_ms": 1e3 * columns[f"{part}_s"] for part in ("load", "prefill")},
        **{name: columns[name].astype(np.float64) for name in ("l0_tokens", "matched_l1", "loaded_tokens")},
    }
    return dataclasses.replace(log, extra={**log.extra, **extra}), log


@pytest.fixture
def trace(recorded, tmp_path):
    path = tmp_path / "prod.jsonl"
    write(recorded[0], path)
    return path


@pytest.fixture
def command(trace):
    return ("validate", "--trace", trace, *COSTS, *SERVER)


def test_a_simulation_validates_itself(kvsim_command, command):
    found = kvsim_command.json(*command)
    assert found["requests"] == 400
    for name in ("l0", "l1", "loaded"):
        assert found["hits"][name]["equal_requests"] == 1
        assert found["hits"][name]["recorded"] > 0
    for name in ("p50", "p90", "p95", "p99"):
        assert found["ttft"][name]["error"] == pytest.approx(0, abs=1e-6)
        assert {"low", "high", "baseline_error"} <= set(found["ttft"][name])
    assert found["beats_baseline"]
    assert found["settings"]["l0_block_tokens"] == 16
    assert found["notes"] == ["the log does not record matched_l2: those hits are not compared"]


@pytest.mark.usefixtures("narrow")
def test_an_error_is_reported_and_does_not_fail(kvsim_command, command):
    found = kvsim_command.json(*command, "--l1-size-gb", 0.5)
    assert found["hits"]["l1"]["error"] < -0.1
    shown = kvsim_command.shown(*command, "--l1-size-gb", 0.5)
    assert "It is worst for prompts of" in " ".join(shown.replace("│", " ").split())
    assert max(map(len, shown.splitlines())) <= 100


def test_for_a_person(kvsim_command, command):
    shown = kvsim_command.shown(*command)
    for word in ("TTFT p50 is predicted as recorded", "95% interval", "by length", "equal requests", "100.0%"):
        assert word in shown


def test_the_report_has_the_plot_and_the_data(kvsim_command, command, tmp_path):
    pytest.importorskip("plotly")
    path = tmp_path / "out.html"
    found = kvsim_command.json(*command, "--report", path)
    page = path.read_text()
    assert '<div class="plot" id="ttft_cdf">' in page
    figures = json.loads(re.search(r"<script>const figures = (.*?);\nfor ", page, flags=re.DOTALL).group(1))
    assert [line["name"] for line in figures["ttft_cdf"]["data"]] == ["recorded", "predicted", "mean by prompt length"]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, flags=re.DOTALL).group(1))
    assert data["ttft"] == found["ttft"]
    assert "Where the error lies" in page


def test_columns_that_are_missing_are_named(kvsim_command, command, recorded, trace):
    log = recorded[0]
    trace.unlink()
    write(dataclasses.replace(log, extra={"ttft_ms": log.extra["ttft_ms"]}), trace)
    notes = kvsim_command.json(*command)["notes"]
    assert "l0_tokens, matched_l1, matched_l2, loaded_tokens" in notes[0]
    assert "queue_ms, load_ms, prefill_ms" in notes[1]
    assert "does not record queue_ms" in " ".join(kvsim_command.shown(*command).split())


def test_a_log_without_ttft_is_refused(kvsim_command, command, recorded, trace):
    trace.unlink()
    write(recorded[1], trace)
    assert "no ttft_ms column" in kvsim_command.refused(*command)


def test_a_short_log_is_refused(kvsim_command, command, recorded, trace):
    log, untimed = recorded
    ttft = np.where(np.arange(len(log)) < 79, log.extra["ttft_ms"], np.nan)
    trace.unlink()
    write(dataclasses.replace(untimed, extra={**untimed.extra, "ttft_ms": ttft}), trace)
    assert "a comparison needs" in kvsim_command.refused(*command)


def test_bad_settings(kvsim_command, command, tmp_path):
    for arguments, word in (
        ((*command, "--chunk-tokens", 24), "24 is no multiple of the log's block of 16"),
        ((*command, "--report", tmp_path / "no" / "r.html"), "no folder"),
        ((*command, "--journal", tmp_path), "no journal in"),
        ((*command, "--l0-block-tokens", 0), "--l0-block-tokens is 0"),
    ):
        assert word in kvsim_command.refused(*arguments), arguments


def test_the_journal_is_decided_again_beside(kvsim_command, command, tmp_path):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=3),))
    core, writer = Core(config), JournalWriter(tmp_path / "journal", Head(config=config, meta={}))
    event = InstanceRegistered(now_ns=0, instance="i", chunk_pages=1)
    writer.step(event, core.handle(event))
    writer.close()
    found = kvsim_command.json(*command, "--journal", tmp_path / "journal")
    assert found["journal"] == {"equal": True, "segments": 1, "steps": 1, "torn": []}


class Server:
    """Writes a journal as a server of given settings would."""

    def __init__(self, folder):
        self.folder = folder

    def ran(self, config, meta, *, chunk_bytes=64 * 147_456, engines=()):
        core, writer = Core(config), JournalWriter(self.folder, Head(config=config, meta=meta))
        event = InstanceRegistered(now_ns=0, instance="i", chunk_pages=5, chunk_bytes=chunk_bytes)
        writer.step(event, core.handle(event))
        for number, facts in enumerate(engines):
            event = InstanceRegistered(now_ns=0, instance=f"engine-{number}", chunk_pages=5, chunk_bytes=64 * 147_456)
            writer.step(event, core.handle(event))
            writer.engine(f"engine-{number}", facts)
        writer.close()


PAGE = 2 << 20
THIRTY_GIB = CoreConfig(tiers=(TierConfig(name="l1", pages=30 * 512, eviction="lru"),))
META = {"page_bytes": PAGE, "chunk_tokens": 64, "l2": ""}


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "journal")


def test_the_servers_settings_are_taken_from_its_journal(kvsim_command, trace, command, server):
    server.ran(THIRTY_GIB, META)
    short = ("validate", "--trace", trace, *COSTS, "--l0-gb", 6, "--journal", server.folder)
    found = kvsim_command.json(*short)
    assert found["settings"] == kvsim_command.json(*command)["settings"]
    assert found["ttft"]["p50"]["error"] == pytest.approx(0, abs=1e-6)
    assert found["journal"]["equal"]


def test_what_is_given_beside_a_journal_is_taken_as_given(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META)
    short = ("validate", "--trace", trace, *COSTS, "--l0-gb", 6, "--journal", server.folder)
    settings = kvsim_command.json(*short, "--l1-size-gb", 7, "--policy", "fifo")["settings"]
    assert (settings["l1_gb"], settings["policy"], settings["chunk_tokens"]) == (7, "fifo", 64)


def test_every_setting_of_a_server(kvsim_command, trace, server):
    tiers = (TierConfig(name="l1", pages=1000, eviction="sieve"), TierConfig(name="l2", pages=4096, eviction="fifo"))
    config = CoreConfig(
        tiers=tiers, placement="write-back", promote_on_hit=False, admission="second-use", ttl_ns=90_000_000_000,
        quotas=(("tenant", 5),),
    )  # fmt: skip
    server.ran(config, {**META, "page_bytes": 1 << 20, "l2": "redis://host:6379/0"}, chunk_bytes=7_411_968)
    server.ran(config, {**META, "page_bytes": 1 << 20, "l2": "s3://bucket"}, chunk_bytes=7_411_968)
    found = kvsim_command.json("validate", "--trace", trace, *COSTS, "--l0-gb", 6, "--journal", server.folder)
    settings = found["settings"]
    wanted = {
        "l1_gb": 1000 / 1024, "policy": "sieve", "l2_gb": 4.0, "l2_kind": "network", "l2_policy": "fifo",
        "placement": "write-back", "promote_on_hit": False, "admission": "second-use", "ttl_s": 90.0,
        "page_bytes": 1 << 20, "load_or_recompute": False,
    }  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    assert settings["packed_share"] == pytest.approx(0.785, abs=0.001)
    assert "the server had quotas of tenants, which are not simulated" in found["notes"]
    assert "the server's settings changed within the journal: its last are simulated" in found["notes"]


def test_a_servers_own_costs_decide_what_is_loaded(kvsim_command, trace, server):
    """With a link that is never worth it nothing is loaded, whatever the profile says of links."""
    never = LoadCost(
        chunk_tokens=64, prefill_floor_ns=1.0, prefill_base_ns=0.0, prefill_linear_ns=1.0, prefill_quadratic_ns=0.0,
        latency_ns=(0.0,), bytes_per_s=(1.0,),
    )  # fmt: skip
    loaded = []
    for cost in (None, never):
        server.ran(dataclasses.replace(THIRTY_GIB, load_cost=cost), META)
        command = ("run", "--trace", trace, *COSTS, "--l0-gb", 6, "--journal", server.folder)
        found = kvsim_command.json(*command)
        assert found["settings"]["load_or_recompute"] is (cost is not None)
        assert found["settings"]["load_cost"] == (
            None if cost is None else json.loads(json.dumps(dataclasses.asdict(cost)))
        )
        loaded.append(found["loaded_tokens"])
    assert loaded[0] > 0
    assert loaded[1] == 0
    longer = kvsim_command.json(*command, "--chunk-tokens", 128, "--l2-size-gb", 40)["settings"]
    assert longer["load_or_recompute"], "costs of another number of tiers are the profile's"


ENGINE = {
    "l0_blocks": 2730,
    "l0_block_tokens": 16,
    "l0_prefix_caching": 1,
    "max_model_len": 8192,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 32,
    "chunked_prefill": 0,
    "async_scheduling": 0,
}


def test_the_engines_settings_are_taken_from_the_journal(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META, chunk_bytes=5, engines=[{**ENGINE, "max_num_seqs": 7}, ENGINE])  # beside a benchmark
    command = ("validate", "--trace", trace, *COSTS, "--journal", server.folder)
    found = kvsim_command.json(*command)
    settings = found["settings"]
    same = {name: value for name, value in ENGINE.items() if name != "l0_blocks"}
    assert {name: settings[name] for name in same} == same
    assert (settings["engines"], settings["packed_share"]) == (2, 1)
    assert int(settings["l0_gb"] * 2**30 // (16 * 147_456)) == 2730
    assert "the server's engines had different settings: the last one's are simulated" in found["notes"]
    given = kvsim_command.json(*command, "--l0-gb", 3, "--max-num-seqs", 9, "--l0-block-tokens", 8)["settings"]
    assert (given["l0_gb"], given["max_num_seqs"], given["l0_block_tokens"]) == (3, 9, 8)


def test_as_many_engines_as_there_were_at_once(kvsim_command, recorded, server, tmp_path):
    core = Core(THIRTY_GIB)
    writer = JournalWriter(server.folder, Head(config=THIRTY_GIB, meta=META))
    for kind, name in (("came", "i"), ("left", "i"), ("came", "j"), ("came", "k"), ("left", "j"), ("came", "l")):
        event = (
            InstanceLeft(now_ns=0, instance=name)
            if kind == "left"
            else InstanceRegistered(now_ns=0, instance=name, chunk_pages=5)
        )
        writer.step(event, core.handle(event))
    writer.close()
    names = np.array(["k", "l"] * 200, dtype=object)
    write(dataclasses.replace(recorded[0], extra={**recorded[0].extra, "instance": names}), tmp_path / "two.jsonl")
    command = ("validate", "--trace", tmp_path / "two.jsonl", *COSTS, "--l0-gb", 6, "--journal", server.folder)
    settings = kvsim_command.json(*command)["settings"]
    assert (settings["engines"], settings["routing"]) == (2, "recorded")
    assert kvsim_command.json(*command, "--routing", "least-loaded")["settings"]["routing"] == "least-loaded"
    assert kvsim_command.json(*command, "--engines", 1)["settings"]["routing"] == "round-robin"


class Journal:
    """A server's journal, event by event; it keeps its last segment alone where it `rotates`."""

    def __init__(self, folder, config=THIRTY_GIB, keep=1):
        self.core = Core(config)
        self.writer = JournalWriter(folder, Head(config=config, meta=META), keep=keep)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.writer.close()

    def happens(self, kind, second=0, **values):
        event = kind(now_ns=int(second * 1e9), **values)
        self.writer.step(event, self.core.handle(event))

    def came(self, name, second=0, chunk_bytes=7_411_968):
        self.happens(InstanceRegistered, second, instance=name, chunk_pages=5, chunk_bytes=chunk_bytes)

    def left(self, name, second=0):
        self.happens(InstanceLeft, second, instance=name)

    def stores(self, chunk):
        self.happens(LookedUp, request="r", instance="a", chunks=(chunk,))
        self.happens(RoomAsked, request="r", chunks=(chunk,))
        self.happens(StoreCommitted, request="r", tier=0, chunks=(chunk,))
        self.happens(RequestEnded, request="r")

    def rotates(self):
        self.writer.rotate(take_snapshot(self.core))


def test_engines_that_registered_in_segments_that_are_gone(kvsim_command, trace, tmp_path):
    """A server that runs for long deletes them; who is there is in the snapshot that the first one left begins with."""
    with Journal(tmp_path / "journal") as journal:
        for name in "abc":
            journal.came(name)
            journal.writer.engine(name, ENGINE)
        journal.left("c")
        journal.rotates()
        journal.rotates()
        journal.left("b")
        journal.came("d")
    (segment,) = (tmp_path / "journal").iterdir()
    assert segment.name == "00000003.kvj"
    found = kvsim.served(tmp_path / "journal")
    assert (found.engines, found.chunk_bytes, found.notes()) == (2, 7_411_968, [])
    settings = kvsim_command.json("validate", "--trace", trace, *COSTS, "--journal", tmp_path / "journal")["settings"]
    assert (settings["engines"], settings["packed_share"]) == (2, pytest.approx(0.785, abs=0.001))


def test_engines_of_which_the_journal_tells_no_more_than_their_settings(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.came("a")
        journal.writer.engine("a", ENGINE)
        journal.left("a")
        journal.came("bench", chunk_bytes=5)
        journal.rotates()
    found = kvsim.served(tmp_path / "journal")
    assert (found.engines, found.chunk_bytes, found.engine) == (None, None, ENGINE)
    (told,) = found.notes()
    assert told == (
        "the journal does not tell how many engines there were at once and whether engines packed their KV, as where "
        "its first segments are deleted: give --engines and --packing"
    )


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Cleared, {}, "chunks were cleared"),
        (TierCleared, {"tier": 0}, "L1 was emptied by a restart of the server"),
        (Pinned, {"chunks": (b"1",)}, "chunks were pinned in L1"),
        (QuotaSet, {"salt": "tenant", "pages": 5}, "quotas of tenants were set"),
        (Unpinned, {"chunks": ()}, None),
    ],
)
def test_what_was_done_at_run_time_is_told(kvsim_command, trace, tmp_path, kind, values, words):
    with Journal(tmp_path / "journal") as journal:
        journal.came("a", second=1000, chunk_bytes=64 * 147_456)
        journal.happens(kind, second=1012, **values)
    command = ("--trace", trace, *COSTS, "--l0-gb", 6, "--journal", tmp_path / "journal")
    ending = "after the journal's beginning, which is not simulated: hits from then on may differ"
    once = [] if words is None else [f"{words} 1 time, 12 s {ending}"]
    assert kvsim.served(tmp_path / "journal").notes() == once
    assert set(once) <= set(kvsim_command.json("validate", *command)["notes"])
    assert set(once) <= set(kvsim_command.json("run", *command).get("notes", ()))
    if words is None:
        return
    with Journal(tmp_path / "journal", keep=9) as journal:  # a server that knows nothing; the machine began anew, too
        journal.came("b", second=8)
        journal.happens(kind, second=20, **values)
        journal.rotates()
    assert kvsim.served(tmp_path / "journal").notes() == [
        f"{words} 2 times, first 12 and last 24 s {ending}",
        f"the server started with nothing cached 1 time, 12 s {ending}",
    ]


def test_what_was_done_before_the_journal_begins_is_told(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        journal.came("a")
        journal.stores(b"1")
        journal.happens(Pinned, chunks=(b"1",))
        journal.happens(QuotaSet, salt="tenant", pages=50)
        journal.rotates()
    assert kvsim.served(tmp_path / "journal").notes() == [
        "the server had quotas of tenants, which are not simulated",
        "chunks were pinned in L1 from the journal's beginning on, which is not simulated",
    ]


@pytest.fixture
def served_by(recorded, tmp_path):
    """Writes the log as if these engines had served it, in turn."""

    def written(*names):
        column = np.resize(np.array(names, dtype=object), len(recorded[0]))
        path = tmp_path / "named.jsonl"
        path.unlink(missing_ok=True)
        write(dataclasses.replace(recorded[0], extra={**recorded[0].extra, "instance": column}), path)
        return ("--trace", path, *COSTS, "--l0-gb", 6, "--journal", tmp_path / "journal")

    return written


def test_an_engine_that_restarts_goes_on_in_its_place(kvsim_command, served_by, tmp_path):
    with Journal(tmp_path / "journal") as journal:
        for name in ("a", "b"):
            journal.came(name)
        for old, new in (("b", "c"), ("a", "d")):
            journal.left(old)
            journal.came(new)
        for name in ("c", "d"):  # the server restarts, and they register again
            journal.left(name)
        for name in ("d", "c"):
            journal.came(name)
    names = "aabacdd"
    command = served_by(*names)
    told = "the log names 4 engine instances, and 2 at once are simulated: one that registered after another had left"
    for verb in ("validate", "run"):
        found = kvsim_command.json(verb, *command)
        assert (found["settings"]["engines"], found["settings"]["routing"]) == (2, "recorded")
        assert [note for note in found["notes"] if note.startswith(told)]
    by_two = kvsim_command.json("validate", *served_by(*("xy"["bc".count(name)] for name in names)))
    assert found["ttft_s"] == by_two["run"]["ttft_s"]
    assert not [note for note in by_two["notes"] if "engine instances" in note]


def test_routing_that_cannot_be_as_recorded_is_told(kvsim_command, served_by, tmp_path):
    with Journal(tmp_path / "journal") as journal:
        for name in ("a", "b"):
            journal.came(name)
    found = kvsim_command.json("validate", *served_by("a", "b", "from before"))
    assert (found["settings"]["engines"], found["settings"]["routing"]) == (2, "round-robin")
    (told,) = [note for note in found["notes"] if "engine instances" in note]
    assert told == (
        "the log names 3 engine instances, and 2 at once are simulated: the journal does not tell which took another's "
        "place, so requests go to engines by --routing round-robin, not to those that served them; --engines 3 "
        "--routing recorded makes each an engine of its own"
    )


def test_a_run_and_a_tuning_take_them_too(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META, chunk_bytes=5, engines=[ENGINE])
    command = ("--trace", trace, *COSTS, "--journal", server.folder)
    there = kvsim_command.json("validate", *command)["settings"]
    assert kvsim_command.json("run", *command)["settings"] == there
    what_if = kvsim_command.json("run", *command, "--l1-size-gb", 5, "--engines", 3)["settings"]
    assert (what_if["l1_gb"], what_if["engines"], what_if["l0_gb"]) == (5, 3, there["l0_gb"])
    tuned = kvsim_command.json("tune", *command, "--simulate", 1, "--chunk-sizes", 64, "--l1-sizes-gb", 5)
    assert (tuned["simulated"]["l0_blocks"], tuned["simulated"]["max_model_len"]) == (2730, 8192)
    assert "simulated" not in kvsim_command.json("tune", *command, "--chunk-sizes", 64, "--l1-sizes-gb", 5)


def test_engines_that_pack_are_priced_so(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META, chunk_bytes=7_411_968)
    command = ("tune", "--trace", trace, *COSTS, "--chunk-sizes", 64, "--l1-sizes-gb", 5)
    by_hand, by_journal, apart = (
        kvsim_command.json(*command, *more)["sweep"]
        for more in (("--packing", "lossless"), ("--journal", server.folder), ())
    )
    assert by_journal == by_hand != apart


def test_damage_in_the_journal_is_told_beside_the_prediction(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META, engines=[ENGINE])
    (segment,) = server.folder.iterdir()
    damaged = bytearray(segment.read_bytes())
    damaged[-5] ^= 1
    segment.write_bytes(damaged)
    found = kvsim_command.json("validate", "--trace", trace, *COSTS, "--l0-gb", 6, "--journal", server.folder)
    assert found["settings"]["l1_gb"] == 30
    assert not found["journal"]["equal"]


def test_a_journal_of_another_model_is_refused(kvsim_command, trace, server):
    server.ran(THIRTY_GIB, META, chunk_bytes=64 * 131_072)
    word = "chunks of 64 tokens have 8,388,608 bytes, but KV of this model takes 9,437,184, packed 7,411,968"
    assert word in kvsim_command.refused("validate", "--trace", trace, *COSTS, "--journal", server.folder)


def test_the_settings_in_python(server):
    server.ran(THIRTY_GIB, META)
    found = kvsim.served(server.folder)
    assert (found.l1_gb, found.chunk_tokens, found.policy, found.changed) == (30.0, 64, "lru", False)
    assert found.packing(kvsim.costs(model="qwen3-8b", gpu="h100").kv) == "none"
    with pytest.raises(kvsim.UsageError, match="no journal in"):
        kvsim.served(server.folder / "none")


def test_of_mla_every_rank_holds_the_engines_blocks(server):
    server.ran(THIRTY_GIB, META, engines=[ENGINE])
    plain = kvsim.costs(model="qwen3-8b", gpu="h100")
    ranks = dataclasses.replace(plain.profile, tensor_parallel=8)
    mla = dataclasses.replace(plain, profile=ranks, kv=kv_size("deepseek-v3", tensor_parallel=8))
    for costs in (plain, mla):
        size = kvsim.served(server.folder).flags(costs.kv)["l0_gb"]
        assert kvsim.RunSettings(profile=costs.run_profile, l0_gb=size).l0_blocks == ENGINE["l0_blocks"]


def test_what_the_simulation_refuses_is_told_where_nothing_is_left_to_compare(kvsim_command, command):
    said = kvsim_command.refused(*command, "--max-model-len", 10)
    assert "400 requests with a recorded ttft_ms, but the simulation refuses 400 of them: longer" in said


def test_hits_in_l1_that_nothing_can_simulate_are_told(kvsim_command, command, trace):
    hint = "the log records hits in L1, and no L1 is simulated: give the server's --journal"
    bare = kvsim_command.json("validate", "--trace", trace, *COSTS, "--l0-gb", 6)
    assert any(note.startswith(hint) for note in bare["notes"])
    assert not any(note.startswith(hint) for note in kvsim_command.json(*command)["notes"])
