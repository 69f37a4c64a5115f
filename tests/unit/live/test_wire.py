from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.live import wire

DIGESTS = st.lists(st.binary(min_size=32, max_size=32), max_size=20).map(tuple)
IDS = st.integers(0, 2**63 - 1)
MESSAGES = st.one_of(
    st.builds(wire.Ping),
    st.builds(
        wire.Lookup,
        IDS,
        st.text(max_size=50),
        DIGESTS,
        st.integers(0, 1000),
        st.text(max_size=9),
        st.integers(0, 2**40),
        st.booleans(),
        st.integers(0, 2**40),
        st.binary(max_size=64),
    ),
    st.builds(wire.Ask, IDS, st.text(max_size=50), DIGESTS),
    st.builds(wire.Committed, IDS, st.text(max_size=9), st.integers(-1, 4095), DIGESTS, st.integers(0, 2**53 - 1)),
    st.builds(wire.Clear, st.none() | DIGESTS),
    st.builds(wire.SetQuota, st.text(max_size=9), st.none() | st.integers(0, 2**40)),
)


@given(MESSAGES, st.integers(0, 2**64 - 1))
def test_requests_survive_the_way(message, correlation):
    assert wire.decode_request(wire.encode(message, correlation)) == (correlation, message)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_rubbish_is_a_wire_error_and_nothing_else(frames):
    with pytest.raises(wire.WireError) as raised:
        wire.decode_request(frames)
    assert raised.value.kind in {"bad_message", "unknown_operation"}


@given(MESSAGES, st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(message, data):
    frames = wire.encode(message, 5)
    damaged = bytearray(frames[1])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        _, decoded = wire.decode_request([frames[0], bytes(damaged)])
    except wire.WireError:
        return
    assert isinstance(decoded, get_args(wire.Request))


def test_a_later_version_may_add_fields():
    frames = wire.encode(wire.End(5, "r"), 1)
    longer = msgspec.msgpack.encode([*msgspec.msgpack.decode(frames[1]), "added"])
    assert wire.decode_request([frames[0], longer])[1] == wire.End(5, "r")


def test_every_message_has_a_tag_of_its_own():
    tags = [kind.__struct_config__.tag for kind in (*get_args(wire.Request), *get_args(wire.Reply))]
    assert len(set(tags)) == len(tags)


def test_replies_survive_the_way():
    found = wire.Found((3, 1), True, 1, 3, b"\0" * 12, b"\0" * 24, 2**61)
    assert wire.decode_reply(wire.encode(found, 2**64 - 1)) == (2**64 - 1, found)
    with pytest.raises(wire.WireError):
        wire.decode_reply(wire.encode(wire.Ping(), 1))


@pytest.mark.parametrize("field", ["tokens", "bytes"])
def test_counts_are_bounded_so_that_their_sums_can_travel(field):
    message = wire.Committed(1, "r", 0, (b"c",), **{field: 2**53})
    with pytest.raises(wire.WireError, match="<= 9007199254740991"):
        wire.decode_request(wire.encode(message, 1))
