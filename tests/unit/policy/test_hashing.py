import dataclasses
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.policy.hashing import (
    MultimodalItem,
    Namespace,
    block_hashes,
    chunk_names,
    token_bytes,
    trace_ids,
)

NAMESPACE = Namespace(
    model="Qwen/Qwen3-8B",
    revision="b968826",
    kv_dtype="bfloat16",
    layout="LBNHC",
    isa="",
    block_tokens=16,
    parallel=(("tensor", 2), ("pipeline", 1)),
)
ROOT = NAMESPACE.digest()
PROMPT = list(range(1000, 1100))
NAMESPACE_HEX = "4db21769f9f65db02d9aa37b7e9df3190fe3112df8d62397cb72d10d73431da3"
LAST_HEX = "b536f7418a5e28246a9800b1a28cdeef403c602a5ea8dc09a462a26e31a2c031"
LAST_ID = 6528948015236846610

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=200)


def test_constant_hashes() -> None:
    hashes = block_hashes(PROMPT, 16, ROOT)
    assert ROOT.hex() == NAMESPACE_HEX
    assert hashes[-1].hex() == LAST_HEX
    assert trace_ids(hashes)[-1] == LAST_ID


@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_constant_under_any_hash_seed(seed: str) -> None:
    program = (
        "from kvcore.policy.hashing import Namespace, block_hashes\n"
        f"root = {NAMESPACE!r}.digest()\n"
        "print(root.hex(), block_hashes(list(range(1000, 1100)), 16, root)[-1].hex())\n"
    )
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [NAMESPACE_HEX, LAST_HEX]


@given(tokens, st.integers(1, 40))
def test_equals_the_definition(prompt: list[int], block_tokens: int) -> None:
    expected, parent = [], ROOT
    for i in range(len(prompt) // block_tokens):
        block = prompt[i * block_tokens : (i + 1) * block_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{block_tokens}I", *block)).digest()
        expected.append(parent)
    assert block_hashes(prompt, block_tokens, ROOT) == expected


@given(tokens, tokens, st.integers(1, 20))
def test_prefix_stability(prompt: list[int], more: list[int], block_tokens: int) -> None:
    shorter = block_hashes(prompt, block_tokens, ROOT)
    longer = block_hashes(prompt + more, block_tokens, ROOT)
    assert longer[: len(shorter)] == shorter
    assert len(longer) == (len(prompt) + len(more)) // block_tokens


@given(tokens, st.integers(0, 199), st.integers(1, 20))
def test_one_token_changes_its_block_and_all_after_it(prompt: list[int], at: int, block_tokens: int) -> None:
    if at >= len(prompt):
        return
    changed = [*prompt]
    changed[at] ^= 1
    before, after = block_hashes(prompt, block_tokens, ROOT), block_hashes(changed, block_tokens, ROOT)
    first = at // block_tokens
    assert before[:first] == after[:first]
    assert not set(before[first:]) & set(after[first:])


@st.composite
def multimodal_items(draw: st.DrawFn) -> list[MultimodalItem]:
    offset, items = 0, []
    for name in draw(st.lists(st.text(max_size=5), max_size=4)):
        offset += draw(st.integers(0, 30))
        length = draw(st.integers(1, 50))
        items.append(MultimodalItem(identifier=name, offset=offset, length=length))
        offset += length
    return items


@given(tokens, multimodal_items(), st.integers(1, 20), st.integers(0, 20))
def test_a_chain_goes_on_from_any_block(
    prompt: list[int], items: list[MultimodalItem], block_tokens: int, split: int
) -> None:
    whole = block_hashes(prompt, block_tokens, ROOT, items)
    split = min(split, len(whole))
    head = block_hashes(prompt[: split * block_tokens], block_tokens, ROOT, items)
    parent = head[-1] if head else ROOT
    start = split * block_tokens
    assert head + block_hashes(prompt[start:], block_tokens, parent, items, start=start) == whole


def test_multimodal_items_change_the_blocks_they_overlap_and_those_after() -> None:
    plain = block_hashes(PROMPT, 16, ROOT)
    item = MultimodalItem(identifier="a", offset=20, length=20)
    imaged = block_hashes(PROMPT, 16, ROOT, [item])
    assert imaged[0] == plain[0]
    assert all(a != b for a, b in zip(imaged[1:], plain[1:], strict=True))
    other = block_hashes(PROMPT, 16, ROOT, [dataclasses.replace(item, identifier="b")])
    moved = block_hashes(PROMPT, 16, ROOT, [dataclasses.replace(item, offset=21)])
    assert len({imaged[1], other[1], moved[1]}) == 3
    later = MultimodalItem(identifier="z", offset=50, length=3)
    assert block_hashes(PROMPT, 16, ROOT, [later, item]) == block_hashes(PROMPT, 16, ROOT, [item, later])
    assert block_hashes(PROMPT, 16, ROOT, [item, later])[2] == imaged[2]
    assert block_hashes(PROMPT, 16, ROOT, [item, later])[3] != imaged[3]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "Qwen/Qwen3-4B"},
        {"revision": "main"},
        {"kv_dtype": "fp8_e4m3"},
        {"layout": "BLNHC"},
        {"isa": "avx512"},
        {"block_tokens": 32},
        {"parallel": (("tensor", 1), ("pipeline", 2))},
        {"lora": "sql-adapter@3"},
        {"lora": ""},
        {"salt": "tenant-a"},
        {"salt": ""},
    ],
)
def test_whatever_changes_kv_changes_every_hash(change: dict[str, object]) -> None:
    other = dataclasses.replace(NAMESPACE, **change)
    assert not set(block_hashes(PROMPT, 16, ROOT)) & set(block_hashes(PROMPT, 16, other.digest()))


def test_rank_layout_has_no_order() -> None:
    swapped = dataclasses.replace(NAMESPACE, parallel=NAMESPACE.parallel[::-1])
    assert swapped.digest() == ROOT


short = st.text(max_size=4)
spaces = st.builds(
    Namespace,
    model=short,
    revision=short,
    kv_dtype=short,
    layout=short,
    isa=short,
    block_tokens=st.integers(1, 64),
    parallel=st.dictionaries(short, st.integers(1, 4), max_size=3).map(lambda d: tuple(sorted(d.items()))),
    lora=st.none() | short,
    salt=st.none() | short,
)


@given(spaces, spaces)
def test_the_encoding_is_unambiguous(a: Namespace, b: Namespace) -> None:
    assert (a.encode() == b.encode()) == (a == b)


@given(tokens)
def test_lists_tuples_and_arrays_agree(prompt: list[int]) -> None:
    expected = struct.pack(f"<{len(prompt)}I", *prompt)
    forms = [prompt, tuple(prompt), np.array(prompt, dtype=np.int64), np.array(prompt, dtype=np.uint32)]
    assert all(token_bytes(form) == expected for form in forms)
    strided = np.repeat(np.array(prompt, dtype=np.int64), 2)[::2]
    assert token_bytes(strided) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([5, -1], "token 1 is -1, outside 0 to 4294967295"),
        ((2**32,), "token 0 is 4294967296, outside 0 to 4294967295"),
        ([1, 2.5], "token 1 is 2.5, not an integer"),
        (np.array([3, -7]), "token 1 is -7, outside 0 to 4294967295"),
        (np.array([2**40]), "token 0 is 1099511627776, outside 0 to 4294967295"),
        (b"abcd", "token ids must be a sequence of integers, not bytes"),
        (np.array([1.0]), "token ids must be a 1-D array of integers, not 1-D float64"),
    ],
)
def test_bad_tokens(bad: list[int], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(") + "$"):
        block_hashes(bad, 16, ROOT)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="parent hash has 32 bytes, this one 3"):
        block_hashes(PROMPT, 16, b"abc")
    with pytest.raises(ValueError, match="multiple of block_tokens \\(16\\), not 8"):
        block_hashes(PROMPT, 16, ROOT, start=8)
    with pytest.raises(ValueError, match="block_tokens must be at least 1"):
        block_hashes(PROMPT, 0, ROOT)
    with pytest.raises(ValueError, match="names a kind twice"):
        dataclasses.replace(NAMESPACE, parallel=(("tensor", 1), ("tensor", 2)))
    with pytest.raises(ValueError, match="offset must be >= 0"):
        MultimodalItem(identifier="a", offset=-1, length=1)


def test_chunk_names_read_off_the_chain() -> None:
    hashes = block_hashes(PROMPT, 16, ROOT)
    assert len(hashes) == 6
    assert chunk_names(hashes, 1) == tuple(hashes)
    assert chunk_names(hashes, 4) == (hashes[3],)
    assert chunk_names(hashes, 2) == (hashes[1], hashes[3], hashes[5])
    assert chunk_names(hashes, 7) == ()
    with pytest.raises(ValueError, match="at least 1"):
        chunk_names(hashes, 0)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=10))
def test_trace_ids(digests: list[bytes]) -> None:
    ids = trace_ids(digests)
    assert ids.dtype == np.int64
    assert ids.tolist() == [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
    assert all(0 <= i < 2**63 for i in ids.tolist())
