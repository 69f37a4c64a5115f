import os
import re

from kvcore.live.members import Instance, Work
from kvcore.live.metrics import HELP, Metrics, render, sampled, veiled
from kvcore.live.wire import Register, Report, encode
from kvcore.policy import Demote, Evict, Refuse, StoreCommitted

SECOND_NS = 10**9
FOLLOWED = tuple(bytes([at]) * 31 + b"\0" for at in range(4))


def work(chunks, hits, salt="", model="m"):
    register = Register("e", "scheduler", 16, 256, namespace={"model": model})
    return Work("e/r", Instance("e", register, 256, 4096, 1), chunks, salt, 0, hits)


def look_up(metrics, chunks, hits, *, tokens=0, salt="", resumed=False, probe=b"", now_s=0):
    metrics.looked_up(
        work(chunks, hits, salt), tokens=tokens, salt=salt, resumed=resumed, probe=probe, now_ns=now_s * SECOND_NS
    )


def samples(metrics, extra=()):
    text = render(metrics.report(extra)).decode()
    return {key: float(value) for key, value in re.findall(r"^(kvcore_\w+(?:{.*})?) (\S+)$", text, re.MULTILINE)}


def test_requested_is_matched_and_missed():
    metrics = Metrics()
    chunks = tuple(os.urandom(32) for _ in range(10))
    look_up(metrics, chunks, (3, 2), tokens=10 * 256 + 100)
    found = samples(metrics)
    labels = 'model="m",salt=""'
    requested = found[f"kvcore_requested_tokens_total{{{labels}}}"]
    matched = sum(value for key, value in found.items() if key.startswith("kvcore_matched_tokens_total"))
    missed = {key: value for key, value in found.items() if key.startswith("kvcore_missed_tokens_total")}
    assert requested == 2660 == matched + sum(missed.values())
    assert found['kvcore_matched_tokens_total{model="m",salt="",tier="l2"}'] == 512
    assert missed['kvcore_missed_tokens_total{model="m",reason="tail",salt=""}'] == 100


def test_a_resumed_request_is_counted_apart():
    metrics = Metrics()
    look_up(metrics, FOLLOWED, (0,), resumed=True)
    found = samples(metrics)
    assert found['kvcore_requests_total{model="m",resumed="yes",salt=""}'] == 1
    assert not any(key.startswith("kvcore_requested_tokens_total") for key in found)


def test_reuse_gap_and_lifetime_of_the_chunks_that_are_followed():
    metrics = Metrics()
    metrics.observe(StoreCommitted(now_ns=0, request="r", tier=0, chunks=FOLLOWED), ())
    look_up(metrics, FOLLOWED, (4,), now_s=20)
    cleared = Evict(tier=0, chunks=FOLLOWED[:2], reason="room")
    metrics.observe(StoreCommitted(now_ns=50 * SECOND_NS, request="s", tier=1, chunks=()), (cleared,))
    found = samples(metrics)
    assert found["kvcore_reuse_gap_seconds_sum"] == 80
    assert found['kvcore_reuse_gap_seconds_bucket{le="30"}'] == found["kvcore_reuse_gap_seconds_count"] == 4
    assert found['kvcore_reuse_gap_seconds_bucket{le="10"}'] == 0
    assert found["kvcore_chunk_lifetime_seconds_sum"] == 100
    assert found['kvcore_evicted_chunks_total{reason="room",tier="l1"}'] == 2


def test_chunks_that_are_demoted_leave_l1_too():
    metrics = Metrics()
    metrics.observe(StoreCommitted(now_ns=0, request="r", tier=0, chunks=FOLLOWED), ())
    event = StoreCommitted(now_ns=20 * SECOND_NS, request="s", tier=1, chunks=())
    metrics.observe(event, (Demote(tier=0, chunks=FOLLOWED[:3]),))
    found = samples(metrics)
    assert found['kvcore_evicted_chunks_total{reason="demoted",tier="l1"}'] == 3
    assert found["kvcore_chunk_lifetime_seconds_sum"] == 60
    assert [*metrics._stored_ns] == [FOLLOWED[3]]
    look_up(metrics, FOLLOWED[:1], (0,))  # it was lost on its way down
    assert samples(metrics)['kvcore_missed_tokens_total{model="m",reason="evicted",salt=""}'] == 256


def test_one_chunk_in_64_is_followed_by_its_digest_alone():
    chunks = [os.urandom(32) for _ in range(20_000)]
    followed = sampled(chunks)
    assert 200 < len(followed) < 430
    assert set(sampled(chunks[::-1])) == set(followed)
    assert sampled(()) == []


def test_digests_of_any_length_are_followed():
    chunks = [b"\3", b"\0" * 64, b"\0\4", b"ab\0", b"\4"]
    assert sampled(chunks) == [b"\3", b"\0" * 64, b"ab\0"]


def test_a_counter_beyond_what_can_travel_is_shown_as_the_most():
    metrics = Metrics()
    for _ in range(5000):
        metrics.stored("m", tokens=0, nbytes=2**53 - 1, seconds=0.0, salt="")
    (frame,) = encode(Report(metrics.report(())), 1)[1:]
    assert len(frame) > 0
    assert samples(metrics)['kvcore_stored_bytes_total{model="m"}'] == 2.0**63


def test_tenants_share_a_label_beyond_a_bound():
    metrics = Metrics()
    for at in range(1500):
        look_up(metrics, FOLLOWED, (4,), salt=f"tenant {at}")
    found = samples(metrics)
    assert found['kvcore_matched_tokens_total{model="m",salt="other",tier="l1"}'] == 500 * 1024
    assert sum(key.startswith("kvcore_requested_tokens_total") for key in found) == 1001


def test_a_salt_is_shown_only_where_the_operator_has_named_it():
    metrics = Metrics()
    metrics.name("bob")
    for salt in ("bob", "s3cret", "other", "\udc80"):
        look_up(metrics, FOLLOWED, (4,), salt=salt)
        metrics.stored("m", tokens=1, nbytes=1, seconds=0.0, salt=salt)
    text = render(metrics.report(())).decode()
    labels = {line.split('salt="')[1].split('"')[0] for line in text.splitlines() if 'salt="' in line}
    assert labels == {"bob", *map(veiled, ("s3cret", "other", "\udc80"))}
    assert all(re.fullmatch("#[0-9a-f]{8}", label) for label in labels - {"bob"})
    metrics.name("s3cret")
    look_up(metrics, FOLLOWED, (4,), salt="s3cret")
    assert samples(metrics)['kvcore_requests_total{model="m",resumed="no",salt="s3cret"}'] == 1


def test_every_family_is_rendered_with_labels_that_need_escaping():
    metrics = Metrics()
    metrics.observe(
        StoreCommitted(now_ns=0, request="r", tier=0, chunks=FOLLOWED),
        (Refuse(request="r", tier=0, chunks=FOLLOWED, reason="lease"),),
    )
    metrics.name('bob "the\nbuilder"')
    look_up(metrics, FOLLOWED, (4,), salt='bob "the\nbuilder"')
    metrics.time("kvcore_l2_seconds", 0.002, "get")
    text = render(metrics.report([(("kvcore_pages", "free"), 7)])).decode()
    assert {line.split()[2].removesuffix("_total") for line in text.splitlines() if line.startswith("# TYPE")} >= set(
        HELP
    )
    assert r'salt="bob \"the\nbuilder\""' in text
    found = samples(metrics, [(("kvcore_pages", "free"), 7)])
    assert found['kvcore_pages{state="free"}'] == 7
    assert found['kvcore_refused_chunks_total{reason="lease"}'] == 4
    assert found['kvcore_l2_seconds_bucket{le="0.003",operation="get"}'] == 1


def test_a_chunk_whose_commit_is_refused_is_not_followed():
    metrics = Metrics()
    metrics.observe(
        StoreCommitted(now_ns=0, request="r", tier=0, chunks=FOLLOWED),
        (Refuse(request="r", tier=0, chunks=FOLLOWED[1:], reason="lease"),),
    )
    assert [*metrics._stored_ns] == [FOLLOWED[0]]
