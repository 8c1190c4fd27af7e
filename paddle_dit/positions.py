"""The fixed position table of the transformer, in NumPy alone: models and conversions share it."""

import numpy as np


def sincos_position_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """Return the fixed 2-D sine-cosine position table, float32 ``[rows * columns, width]``.

    As in the paper's code, the first half of the width encodes the column and the second half the row.
    """
    frequencies = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = []
    for positions in (columns, rows):
        angles = np.outer(positions.reshape(-1), frequencies)
        halves += [np.sin(angles), np.cos(angles)]
    return np.concatenate(halves, axis=1).astype(np.float32)
