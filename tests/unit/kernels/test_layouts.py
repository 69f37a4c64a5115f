import numpy as np
import pytest

from kvkernels import LayoutError, describe

HALF = np.float16


def per_layer(shape, layers=3, dtype=HALF):
    return [np.zeros(shape, dtype) for _ in range(layers)]


def test_joined_is_one_plane_a_layer():
    layout = describe(per_layer((40, 8, 16, 256)), num_blocks=40, block_tokens=16, chunk_tokens=256)
    assert len(layout.planes) == 3
    assert {plane.row_bytes for plane in layout.planes} == {8 * 16 * 256 * 2}
    assert layout.chunk_blocks == 16
    assert layout.slot_bytes == 3 * 16 * 65536
    assert layout.plane_starts() == (0, 1 << 20, 2 << 20, 3 << 20)
    assert [layout.planes_of_layer(i) for i in range(3)] == [range(1), range(1, 2), range(2, 3)]


def test_k_and_v_apart_are_two_planes_a_layer():
    layout = describe(per_layer((2, 40, 16, 8, 128)), num_blocks=40, block_tokens=16, chunk_tokens=32)
    assert [plane.layer for plane in layout.planes] == [0, 0, 1, 1, 2, 2]
    assert layout.planes[1].offset == 40 * 16 * 8 * 128 * 2
    assert layout.planes_of_layer(1) == range(2, 4)


def test_cross_layer_block_is_one_plane_that_every_layer_waits_for():
    layout = describe(
        [np.zeros((40, 6, 8, 16, 64), HALF)], num_blocks=40, block_tokens=16, chunk_tokens=64, num_layers=6
    )
    assert layout.cross_layer
    assert len(layout.planes) == 1
    assert layout.planes[0].row_bytes == 6 * 8 * 16 * 64 * 2
    assert layout.planes_of_layer(5) == range(1)


def test_one_tensor_with_layers_outermost_is_a_plane_a_layer():
    layout = describe([np.zeros((6, 40, 16, 64), HALF)], num_blocks=40, block_tokens=16, chunk_tokens=16, num_layers=6)
    assert not layout.cross_layer
    assert [plane.layer for plane in layout.planes] == list(range(6))


def test_smaller_kernel_blocks_fold_into_the_schedulers():
    layout = describe(per_layer((80, 64, 8, 64)), num_blocks=40, block_tokens=128, chunk_tokens=256)
    assert layout.planes[0].row_bytes == 2 * 64 * 8 * 64 * 2
    assert layout.planes[0].block_stride == layout.planes[0].row_bytes


def test_layers_with_different_rows_share_a_layout():
    tensors = [np.zeros((40, 2, 16, 64), HALF), np.zeros((40, 4, 16, 64), HALF)]
    layout = describe(tensors, num_blocks=40, block_tokens=16, chunk_tokens=16)
    assert [plane.row_bytes for plane in layout.planes] == [4096, 8192]


def test_layer_out_of_range():
    layout = describe(per_layer((40, 16, 64)), num_blocks=40, block_tokens=16, chunk_tokens=16)
    with pytest.raises(IndexError):
        layout.planes_of_layer(3)


@pytest.mark.parametrize(
    ("tensors", "given", "words"),
    [
        ([], {}, "no KV cache tensors"),
        (per_layer((40, 8, 16, 64)), {"chunk_tokens": 24}, "no multiple"),
        (per_layer((40, 8, 16, 64)), {"chunk_tokens": 0}, "no multiple"),
        (per_layer((40, 8, 16, 64)), {"num_layers": 4}, "3 tensors for 4 layers"),
        (per_layer((40, 8, 16, 64), dtype=np.int32), {}, "dtype int32"),
        ([*per_layer((40, 8, 16, 64)), np.zeros((40, 8, 16, 64), np.float32)], {}, "differ in dtype"),
        (per_layer((41, 8, 16, 64)), {}, "could count 40 blocks"),
        (per_layer((40, 40, 16, 64)), {}, "could count 40 blocks"),
        ([np.zeros((40, 8, 16, 128), HALF)[..., :64]], {}, "not dense"),
        ([np.zeros((40, 8, 64, 16), HALF)[:, ::2]], {}, "not dense"),
        ([np.broadcast_to(np.zeros((1, 8, 16, 64), HALF), (40, 8, 16, 64))], {}, "overlap|interleaves"),
        ([np.zeros((40, 5, 5, 16), HALF)], {"num_layers": 5}, "pass layer_dim"),
    ],
)
def test_what_cannot_be_handled_is_refused(tensors, given, words):
    with pytest.raises(LayoutError, match=words):
        describe(tensors, **{"num_blocks": 40, "block_tokens": 16, "chunk_tokens": 64, **given})


def test_an_ambiguous_block_dimension_can_be_named():
    layout = describe(per_layer((16, 16, 64)), num_blocks=16, block_tokens=16, chunk_tokens=16, block_dim=0)
    assert layout.planes[0].row_bytes == 16 * 64 * 2


def describe_joined(**changes):
    options = {"blocks": 40, "heads": 8, "tokens": 16, "dim": 64, "dtype": HALF, "layers": 3, "order": ""} | changes
    shape = (options["blocks"], options["heads"], options["tokens"], options["dim"])
    return describe(
        per_layer(shape, options["layers"], options["dtype"]),
        num_blocks=options["blocks"],
        block_tokens=options["tokens"],
        chunk_tokens=changes.get("chunk", 128),
        order=options["order"],
    )


def test_fingerprint_names_what_changes_a_blocks_bytes_and_nothing_else():
    base = describe_joined().fingerprint()
    assert base == "kv1:cpu:float16:b16:layers3:3x16384:(d1:8xd2:16xd3:64)*2"
    assert describe_joined(blocks=48).fingerprint() == base
    assert describe_joined(chunk=256).fingerprint() == base
    others = [
        describe_joined(**change).fingerprint()
        for change in (
            {"heads": 4},
            {"tokens": 32},
            {"dim": 32},
            {"dtype": np.uint8},
            {"layers": 2},
            {"order": "HND"},
            {"heads": 16, "dim": 32},
        )
    ]
    assert len({base, *others}) == 8


def test_fingerprint_tells_memory_orders_of_one_shape_apart():
    head_major = [np.zeros((40, 8, 16, 64), HALF)]
    token_major = [np.zeros((40, 16, 8, 64), HALF).transpose(0, 2, 1, 3)]
    sizes = {"num_blocks": 40, "block_tokens": 16, "chunk_tokens": 16}
    assert describe(head_major, **sizes).fingerprint() != describe(token_major, **sizes).fingerprint()
