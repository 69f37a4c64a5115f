from hypothesis import given
from hypothesis import strategies as st

from kvcore.live.ranks import Acknowledgements


def test_a_chunk_is_copied_when_every_rank_has_said_so():
    acks = Acknowledgements()
    acks.expect("r", (b"a", b"b"), 2)
    assert acks.take("r", 0, (b"a", b"b"), copied=True) == ([], [])
    assert acks.take("r", 0, (b"a",), copied=True) == ([], []), "said twice"
    assert acks.take("r", 1, (b"b",), copied=True) == ([b"b"], [])
    assert acks.waits("r")
    assert acks.take("r", 1, (b"a", b"b", b"c"), copied=True) == ([b"a"], [])
    assert not acks.waits("r")
    assert acks.take("r", 1, (b"a",), copied=True) == ([], [])


def test_one_failure_fails_the_chunk_once_all_have_spoken():
    acks = Acknowledgements()
    acks.expect("r", (b"a", b"b"), 3)
    assert acks.take("r", 1, (b"a",), copied=False) == ([], [])
    assert acks.take("r", 0, (b"a", b"b"), copied=True) == ([], [])
    assert acks.take("r", 1, (b"b",), copied=True) == ([], [])
    assert acks.take("r", 2, None, copied=True) == ([b"b"], [b"a"])


def test_a_negative_rank_speaks_for_all():
    acks = Acknowledgements()
    acks.expect("e/1", (b"a", b"b"), 4)
    acks.expect("f/1", (b"a",), 1)
    acks.take("e/1", 2, (b"a",), copied=False)
    assert acks.take("e/1", -1, (b"a", b"b"), copied=True) == ([b"b"], [b"a"])
    assert acks.of("f/") == ["f/1"]
    acks.forget("f/1")
    assert not acks.waits("f/1")


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=60),
)
def test_against_counting_by_hand(ranks, words):
    acks = Acknowledgements()
    chunks = [bytes([at]) for at in range(5)]
    acks.expect("r", chunks, ranks)
    heard = {chunk: {} for chunk in chunks}
    for rank, at, copied in words:
        if rank >= ranks:
            continue
        chunk = chunks[at]
        was_over = len(heard[chunk]) == ranks
        heard[chunk].setdefault(rank, copied)
        done, failed = acks.take("r", rank, (chunk,), copied=copied)
        over = len(heard[chunk]) == ranks and not was_over
        assert done == ([chunk] if over and all(heard[chunk].values()) else [])
        assert failed == ([chunk] if over and not all(heard[chunk].values()) else [])
    assert acks.waits("r") == any(len(said) < ranks for said in heard.values())
