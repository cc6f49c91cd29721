"""Pictures that are the same to the eye, whatever was done to their files, found among a million.

A picture's hash is its perceptual hash (DCT signs of a 64 x 64 grey picture, by imagehash) and its colours in four
quarters. Two pictures are near-duplicates when their hashes have a small Hamming distance, their colours are alike, and
they agree in two of the blocks that the search goes by. Pairs are then joined to groups.

The limits were measured on 192 crops of 16 photographs, among them grass, gravel, bricks and stars, and on eleven changes
of each. Of 256 bits differ: after JPEG at quality 50, a resize or +-5 % of brightness at most 14; after cropping 3 % 41 in
the median and 72 in one of a hundred; between different pictures never under 92, between crops of one photograph that
share less than 70 % of their area never under 98.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DCT_SIDE = 16
DCT_BYTES = DCT_SIDE * DCT_SIDE // 8
COLOUR_SIDE = 2
COLOUR_BYTES = COLOUR_SIDE * COLOUR_SIDE * 3
HASH_BYTES = DCT_BYTES + COLOUR_BYTES
"""Length of a picture's hash."""

MAX_DISTANCE = 72
"""Bits of the 256 that may differ."""
MAX_COLOUR = 14 * COLOUR_BYTES
"""Sum of the differences of colour, each in [0, 255]: 5 % of the brightness of white is 12.75."""
NUM_BLOCKS, BLOCK_BITS = 12, 9
"""Two of these blocks must be equal. Whatever differs in at most 10 of their 108 bits, those of the lowest frequencies, is
found; of what was cropped by 3 %, 94 %. Two blocks without a bit say nothing: only plain pictures, all of whose blocks are
so, are compared for that."""
FLAT, FLAT_BORDER, RIM = 24, 0.98, 5
"""Levels of 255 within which a background has one colour, and the share of the picture's edge that it takes;
a window in pixels that takes an outline's own mixed pixels, and JPEG's rings around it, for background."""
BRIGHTNESS_BITS = 12
MAX_BRIGHTNESS = (1 << BRIGHTNESS_BITS) - 1
KEY_SHIFT = 32
SLICE = 1 << 16
"""Rows that are compared at a time, so that they stay in the processor's cache."""


def image_hash(image: Image.Image) -> bytes:
    """The perceptual hash of a picture, `HASH_BYTES` long. Its size and aspect do not count, its colours a little.

    A background of one colour counts for the colours alone: two objects cut out on white are not alike for their outline.

    Args:
        image: upright, of any size; made RGB.
    """
    small = image.convert("RGB").reduce(max(1, min(image.size) // 256))
    signs = imagehash.phash(_without_background(small), hash_size=DCT_SIDE).hash[_BY_FREQUENCY]
    colours = np.asarray(small.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX))
    return np.packbits(signs).tobytes() + colours.tobytes()


def _without_background(picture: Image.Image) -> Image.Image:
    """The picture with the mean colour of the rest in place of a background of one colour, if it has one."""
    pixels = np.asarray(picture).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colour = np.median(border, axis=0)
    if (np.abs(border - colour).max(axis=-1) <= FLAT).mean() < FLAT_BORDER:
        return picture
    flat = Image.fromarray(np.abs(pixels - colour).max(axis=-1) <= FLAT).convert("L")
    background = np.asarray(flat.filter(ImageFilter.MaxFilter(RIM))) > 0
    if not background.all():
        pixels[background] = pixels[~background].mean(axis=0)
    return Image.fromarray(pixels.astype(np.uint8))


def plain_pictures(hashes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pictures have one colour, or a straight gradient: nothing that would tell content, shape (N,)."""
    whole, rest = divmod(NUM_BLOCKS * BLOCK_BITS, 8)
    told = hashes[:, :whole].any(axis=1) | (hashes[:, whole] >> (8 - rest) > 0)
    return np.logical_not(told)


def same_content(hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """`near_duplicates`, but a plain picture is like no other: a white page in two rows does not tie them together."""
    return np.where(plain_pictures(hashes), np.arange(len(hashes)), near_duplicates(hashes))


def near_duplicates(hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Groups of near-duplicates. What is alike in a chain is one group.

    Args:
        hashes: hashes from `image_hash`, shape (N, HASH_BYTES).

    Returns:
        For each row the smallest index of its group, shape (N,): its own where the picture has no earlier double.
    """
    if hashes.dtype != np.uint8 or hashes.ndim != 2 or hashes.shape[1] != HASH_BYTES:
        raise ValueError(f"hashes must be uint8 of shape (N, {HASH_BYTES}), got {hashes.dtype} {hashes.shape}")
    first, number = _collapse(hashes)
    labels = _label_similar(hashes, first)[number]
    smallest = np.empty(len(first), dtype=np.int32)
    smallest[labels[::-1]] = np.arange(len(hashes), dtype=np.int32)[::-1]  # of those for one place, the last stays
    return smallest[labels].astype(np.int64)


def _collapse(hashes: NDArray[np.uint8]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """One row of each different hash, and for every row the number of its hash among these."""
    order = np.argsort(np.ascontiguousarray(hashes).view(np.dtype((np.void, HASH_BYTES)))[:, 0])
    new = np.ones(len(hashes), dtype=bool)
    for start in range(1, len(hashes), SLICE):
        sorted_hashes = hashes[order[start - 1 : start + SLICE]]
        new[start : start + SLICE] = (sorted_hashes[1:] != sorted_hashes[:-1]).any(axis=1)
    number = np.empty(len(hashes), dtype=np.int32)
    number[order] = np.cumsum(new, dtype=np.int32) - 1
    return order[new].astype(np.int32), number


def _label_similar(hashes: NDArray[np.uint8], rows: NDArray[np.int32]) -> NDArray[np.int32]:
    """A group's number for each of these rows. Those that agree in two blocks stand together when sorted."""
    groups = _Groups(len(rows))
    told = np.uint64(1 << (KEY_SHIFT + BRIGHTNESS_BITS))  # from here on a block has a bit
    for a, b in combinations(range(NUM_BLOCKS), 2):
        packed = _packed(hashes, rows, lambda some, a=a, b=b: _block(some, a) << BLOCK_BITS | _block(some, b))
        _join_sorted(hashes, rows, packed[np.searchsorted(packed, told) :], groups)
    packed = _packed(hashes, rows, lambda some: ~plain_pictures(some))
    _join_sorted(hashes, rows, packed[: np.searchsorted(packed, told)], groups)
    return groups.labels


def _packed(
    hashes: NDArray[np.uint8], rows: NDArray[np.int32], function: Callable[[NDArray[np.uint8]], NDArray[Any]]
) -> NDArray[np.uint64]:
    """Sorted numbers of three parts: what the function gives (18 bits), the brightness (12), and the place among the rows."""
    packed = np.empty(len(rows), dtype=np.uint64)
    for start in range(0, len(rows), SLICE):
        some = hashes[rows[start : start + SLICE]]
        keys = function(some).astype(np.uint64) << BRIGHTNESS_BITS | some[:, DCT_BYTES:].sum(axis=1, dtype=np.uint64)
        packed[start : start + SLICE] = keys << KEY_SHIFT | np.arange(start, start + len(some), dtype=np.uint64)
    packed.sort()
    return packed


def _join_sorted(
    hashes: NDArray[np.uint8], rows: NDArray[np.int32], packed: NDArray[np.uint64], groups: "_Groups"
) -> None:
    """Compares all that agree in the upper bits."""
    for start, stop in _slices(packed):
        some = packed[start:stop]
        places = (some & ((1 << KEY_SHIFT) - 1)).astype(np.int64)
        _join_slice(hashes[rows[places]], (some >> KEY_SHIFT).astype(np.uint32), places, groups)
    groups.settle()


def _join_slice(
    hashes: NDArray[np.uint8], keys: NDArray[np.uint32], rows: NDArray[np.int64], groups: "_Groups"
) -> None:
    """Compares each row of a slice with those after it, as long as these agree with it and are not too bright."""
    words = np.ascontiguousarray(hashes[:, :DCT_BYTES]).view(np.uint64).T.copy()
    colours = hashes[:, DCT_BYTES:].astype(np.int16)
    last = keys | MAX_BRIGHTNESS  # of the rows that agree in the two blocks
    limit = np.minimum(last, keys + MAX_COLOUR)
    left, step = np.arange(len(keys)), 0
    while len(left):
        step += 1
        left = left[: np.searchsorted(left, len(keys) - step)]
        left = left[keys[left + step] <= limit[left]]  # who has no neighbour at this step has none further on
        apart = left[groups.labels[rows[left]] != groups.labels[rows[left + step]]]
        distance = sum(np.bitwise_count(word[apart] ^ word[apart + step]).astype(np.int16) for word in words)
        near = apart[distance <= MAX_DISTANCE]
        near = near[np.abs(colours[near] - colours[near + step]).sum(axis=1) <= MAX_COLOUR]
        groups.join(rows[near], rows[near + step])


class _Groups:
    """Which rows belong together."""

    def __init__(self, num_rows: int):
        self.labels = np.arange(num_rows, dtype=np.int32)
        """Rows of one number belong together; what was joined since `settle` does not show yet."""
        self._pairs: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
        self._waiting = 0

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        """Puts each row of `left` in one group with that of `right`."""
        if not len(left):
            return
        self._pairs.append((self.labels[left], self.labels[right]))
        self._waiting += len(left)
        if self._waiting > len(self.labels):  # so many that they would take more memory than the rows
            self.settle()

    def settle(self) -> None:
        """Brings `labels` up to date."""
        if not self._pairs:
            return
        left, right = (np.concatenate(side) for side in zip(*self._pairs, strict=True))
        nodes, places = np.unique(
            np.concatenate([left, right]), return_inverse=True
        )  # a graph of all takes much memory
        edges = places[: len(left)], places[len(left) :]
        graph = coo_array((np.ones(len(left), dtype=np.int8), edges), shape=(len(nodes), len(nodes)))
        _, first, which = np.unique(
            connected_components(graph, directed=False)[1], return_index=True, return_inverse=True
        )
        new = np.arange(len(self.labels), dtype=np.int32)
        new[nodes] = nodes[first][which]
        self.labels = new[self.labels]
        self._pairs, self._waiting = [], 0


def _block(hashes: NDArray[np.uint8], number: int) -> NDArray[np.uint32]:
    """One of the blocks that the search goes by."""
    first, bits = divmod(number * BLOCK_BITS, 8)
    two_bytes = np.left_shift(hashes[:, first], 8, dtype=np.uint32) | hashes[:, first + 1]
    return np.right_shift(two_bytes, 16 - BLOCK_BITS - bits, dtype=np.uint32) & np.uint32((1 << BLOCK_BITS) - 1)


def _slices(packed: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Cuts sorted numbers into slices of about SLICE, or of as many as agree in the upper bits."""
    lower, start = np.uint64((1 << (KEY_SHIFT + BRIGHTNESS_BITS)) - 1), 0
    while start < len(packed):
        last = packed[min(start + SLICE, len(packed)) - 1] | lower
        stop = int(np.searchsorted(packed, last, side="right"))
        yield start, stop
        start = stop


def _by_frequency() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows and columns of the DCT's signs, low frequencies first, which change least; the mean, always set, last."""
    row, column = np.divmod(np.arange(DCT_SIDE**2), DCT_SIDE)
    order = np.argsort(row**2 + column**2, kind="stable")
    order = np.roll(order, -1)
    return row[order], column[order]


_BY_FREQUENCY = _by_frequency()
