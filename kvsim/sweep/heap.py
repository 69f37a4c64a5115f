"""A binary heap of numbered items by keys that lie outside it, lowest key on top."""

from kvsim.sweep.jit import inlined
from kvsim.sweep.paths import Ints, Longs

NOWHERE = -1
"""The place of an item that is not in the heap."""


@inlined
def put(order: Ints, places: Ints, keys: Longs, length: int, item: int) -> int:
    """Put `item` where its key belongs and return the new length.

    `order` holds the items as a heap, `places` by item where that is. A key may only grow while it is in the heap.
    """
    if places[item] != NOWHERE:
        sink(order, places, keys, length, places[item], item)
        return length
    place = length
    while place > 0:
        parent = (place - 1) >> 1
        if keys[order[parent]] <= keys[item]:
            break
        order[place] = order[parent]
        places[order[place]] = place
        place = parent
    order[place] = item
    places[item] = place
    return length + 1


@inlined
def take(order: Ints, places: Ints, keys: Longs, length: int) -> int:
    """Take out the item on top and return the new length."""
    places[order[0]] = NOWHERE
    if length > 1:
        sink(order, places, keys, length - 1, 0, order[length - 1])
    return length - 1


@inlined
def sink(order: Ints, places: Ints, keys: Longs, length: int, place: int, item: int) -> None:
    """Put `item` at the empty `place`, or as far below it as its key belongs."""
    while True:
        child = 2 * place + 1
        if child >= length:
            break
        if child + 1 < length and keys[order[child + 1]] < keys[order[child]]:
            child += 1
        if keys[item] <= keys[order[child]]:
            break
        order[place] = order[child]
        places[order[place]] = place
        place = child
    order[place] = item
    places[item] = place
