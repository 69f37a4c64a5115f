import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkernels import RequestError
from kvkernels.slots import SlotTable, merge_copies


@st.composite
def tables(draw):
    """Slots over an arena of a few hundred bytes, and for every slot the arena byte behind each of its bytes."""
    slot_bytes = draw(st.integers(1, 40))
    slots, behind = [], []
    for _ in range(draw(st.integers(0, 4))):
        pieces, bytes_behind = [], []
        while len(bytes_behind) < slot_bytes:
            piece = (draw(st.integers(0, 250)), draw(st.integers(0, 50)))
            pieces.append(piece)
            bytes_behind += range(piece[0], sum(piece))
        slots.append(pieces)
        behind.append(bytes_behind[:slot_bytes])
    split = draw(st.sampled_from([0, 7, 64]))
    if slots and len({len(pieces) for pieces in slots}) == 1 and draw(st.booleans()):
        slots = np.array(slots, np.int64)
    return SlotTable(slots, slot_bytes=slot_bytes, arena_bytes=300, split_bytes=split), behind, split


@settings(deadline=None)
@given(st.data())
def test_slots_of_equal_pieces_in_one_array_are_what_they_are_in_lists(data):
    """As a server's are, whose table is made with less ado; more than a slot needs is left alone, less is refused."""
    least, outside = data.draw(st.integers(0, 1)), data.draw(st.booleans())
    chunks, lengths = data.draw(st.integers(1, 4)), data.draw(st.lists(st.integers(least, 12), min_size=1, max_size=5))
    within = st.integers(-2, 299) if outside else st.integers(0, 288)
    offsets = [[data.draw(within) for _ in lengths] for _ in range(chunks)]
    slots = np.array([[*zip(row, lengths, strict=True)] for row in offsets], np.int64)
    slot_bytes = data.draw(st.integers(1, max(1, sum(lengths)) + data.draw(st.integers(0, 2))))
    sizes = {"slot_bytes": slot_bytes, "arena_bytes": 300, "split_bytes": data.draw(st.sampled_from([0, 7, 64]))}
    made = []
    for form in (slots, slots.tolist()):
        try:
            table = SlotTable(form, **sizes)
        except RequestError as error:
            made.append(str(error))
        else:
            made.append([table._virtual.tolist(), *(column.tolist() for column in table.pieces)])
    assert made[0] == made[1]


@settings(deadline=None)
@given(tables(), st.data())
def test_resolve_finds_the_byte_behind_every_byte(made, data):
    table, behind, split = made
    flat = [byte for slot in behind for byte in slot]
    count = data.draw(st.integers(0, 5)) if flat else 0
    starts = [data.draw(st.integers(0, len(flat) - 1)) for _ in range(count)]
    lengths = [data.draw(st.integers(1, len(flat) - start)) for start in starts]
    found = table.resolve(np.array(starts, np.int64), np.array(lengths, np.int64))
    for index, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        seen = [-1] * length
        for i, within, offset, size in zip(*found.columns(), strict=True):
            if i == index:
                seen[within : within + size] = range(offset, offset + size)
                assert not split or offset // split == (offset + size - 1) // split
        assert seen == flat[start : start + length]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 3)), max_size=12))
def test_merged_copies_move_the_same_bytes(copies):
    columns = [np.array([copy[i] for copy in copies], np.int64) for i in range(3)]
    moved = [(h + i, d + i) for h, d, n in copies for i in range(n)]
    _, *merged = merge_copies(*columns)
    assert [(h + i, d + i) for h, d, n in zip(*merged, strict=True) for i in range(n)] == moved
    assert all(
        h0 + n0 != h1 or d0 + n0 != d1
        for (h0, d0, n0), (h1, d1, _) in zip(
            list(zip(*merged, strict=True))[:-1], list(zip(*merged, strict=True))[1:], strict=True
        )
    )


@pytest.mark.parametrize(
    ("slot", "words"),
    [([(0, 9)], "holds 9 bytes"), ([(-1, 10)], "outside"), ([(95, 10)], "outside"), ([], "holds 0 bytes")],
)
def test_bad_slots_are_refused(slot, words):
    with pytest.raises(RequestError, match=words):
        SlotTable([[(0, 10)], slot], slot_bytes=10, arena_bytes=100)


def test_slots_may_come_in_one_array_and_neighbours_are_one_piece():
    slots = [[(40, 10), (50, 10)], [(0, 10), (20, 10)], [(30, 10), (10, 10)]]
    tables = [SlotTable(form, slot_bytes=20, arena_bytes=100) for form in (slots, np.array(slots, np.int64))]
    for table in tables:
        assert [column.tolist() for column in table.pieces] == [[40, 0, 20, 10], [20, 10, 20, 10]]


def test_overlap():
    assert SlotTable([[(0, 10)], [(9, 10)]], slot_bytes=10, arena_bytes=100).overlapping()
    assert not SlotTable([[(10, 10)], [(0, 10)]], slot_bytes=10, arena_bytes=100).overlapping()
    # Slack beyond the chunk is not used, so it may be shared.
    assert not SlotTable([[(0, 10)], [(5, 10)]], slot_bytes=5, arena_bytes=100).overlapping()
