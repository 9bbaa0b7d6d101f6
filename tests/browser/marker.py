"""A bar code in every camera frame: who sent it and its number, readable after JPEG, scaling and mirroring.

Two rows of eight cells along the bottom of the centre square. The top row is white, 6 bits, black, so a mirrored
picture is noticed; the bottom row is 8 bits. Together: 3 bits owner, 10 bits number, 1 parity.
"""

from __future__ import annotations

import numpy as np

COLUMNS, NUMBER_BITS, OWNER_BITS = 8, 10, 3
NUM_FRAMES = 1 << NUMBER_BITS
BAND = 0.25
"""Share of the square's height that the two rows take."""
BLACK, WHITE = 16, 235


def bits_of(owner: int, number: int) -> list[int]:
    """14 bits: owner, number, parity."""
    bits = [(owner >> i) & 1 for i in range(OWNER_BITS)] + [(number >> i) & 1 for i in range(NUMBER_BITS)]
    return [*bits, sum(bits) % 2]


def stamp(frame: np.ndarray, owner: int, number: int) -> np.ndarray:
    """A copy of the frame [H, W, 3] with the code in its centre square."""
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    bits = bits_of(owner, number % NUM_FRAMES)
    rows = [[1, *bits[:6], 0], bits[6:]]
    out, cell_h, cell_w = frame.copy(), BAND * side / 2, side / COLUMNS
    for r, row in enumerate(rows):
        for c, bit in enumerate(row):
            y = top + side * (1 - BAND) + r * cell_h
            x = left + c * cell_w
            out[round(y) : round(y + cell_h), round(x) : round(x + cell_w)] = WHITE if bit else BLACK
    return out


def read(square: np.ndarray) -> tuple[int, int] | None:
    """(owner, number) of a square picture [S, S, 3]; None when the code does not add up."""
    side = len(square)
    grey = square.astype(float).mean(-1)
    cell_h, cell_w = BAND * side / 2, side / COLUMNS
    values = np.empty((2, COLUMNS))
    for r in range(2):
        for c in range(COLUMNS):
            y, x = side * (1 - BAND) + (r + 0.5) * cell_h, (c + 0.5) * cell_w
            dy, dx = cell_h / 5, cell_w / 5
            values[r, c] = grey[round(y - dy) : round(y + dy), round(x - dx) : round(x + dx)].mean()
    return decode(values)


def decode(values: np.ndarray) -> tuple[int, int] | None:
    """(owner, number) from the grey levels [2, 8] of the cells."""
    if values[0, 0] < values[0, -1]:
        values = values[:, ::-1]
    if values[0, 0] - values[0, -1] < 40:
        return None
    bits = (values > (values[0, 0] + values[0, -1]) / 2).astype(int)
    flat = [*bits[0, 1:-1], *bits[1]]
    owner = sum(b << i for i, b in enumerate(flat[:OWNER_BITS]))
    number = sum(b << i for i, b in enumerate(flat[OWNER_BITS : OWNER_BITS + NUMBER_BITS]))
    return (owner, number) if bits_of(owner, number) == flat else None
