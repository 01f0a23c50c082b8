"""A few linear unknowns, none below zero, solved to the same bits on every platform.

Input: the normal equations of a least-squares problem with at most six unknowns. Output: the solution, and how well
each unknown is told apart from the others.

All ranks must compute the same cost model from the same timings. BLAS and LAPACK round differently on different
processors; the basic operations of Python's floats do not. So the few hundred of them are done one by one.
"""

import math
from collections.abc import Sequence
from itertools import product

__all__ = ["nonnegative_least_squares", "sines"]

Matrix = Sequence[Sequence[float]]


def _solve(matrix: Matrix, target: Sequence[float]) -> list[float] | None:
    """Gaussian elimination with the largest pivot; None for a singular matrix."""
    size = len(target)
    rows = [[*matrix[i], target[i]] for i in range(size)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) <= 1e-13 * max(abs(matrix[i][i]) for i in range(size)):
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for i in range(column + 1, size):
            factor = rows[i][column] / rows[column][column]
            for j in range(column, size + 1):
                rows[i][j] -= factor * rows[column][j]
    solution = [0.0] * size
    for i in reversed(range(size)):
        value = rows[i][size]
        for j in range(i + 1, size):
            value -= rows[i][j] * solution[j]
        solution[i] = value / rows[i][i]
    return solution


def nonnegative_least_squares(matrix: Matrix, target: Sequence[float]) -> list[float]:
    """The x >= 0 with the least xᵀ · matrix · x − 2 xᵀ · target: every set of unknowns at zero is tried.

    Args:
        matrix (`(n, n)`): symmetric, positive semi-definite; at most 6 unknowns.
        target (`(n,)`).

    Example:
        >>> nonnegative_least_squares([[2.0, 0.0], [0.0, 1.0]], [4.0, -3.0])
        [2.0, 0.0]
    """
    size = len(target)
    best = [0.0] * size
    least = 0.0
    for is_free in product((False, True), repeat=size):
        free = [i for i in range(size) if is_free[i]]
        if not free:
            continue
        part = _solve([[matrix[i][j] for j in free] for i in free], [target[i] for i in free])
        if part is None or min(part) < 0.0:
            continue
        value = 0.0
        for x, i in zip(part, free, strict=True):
            value -= (
                x * target[i]
            )  # at the solution of the free unknowns, the quadratic term is half of the linear one
        if value < least:
            least = value
            best = [0.0] * size
            for x, i in zip(part, free, strict=True):
                best[i] = x
    return best


def sines(matrix: Matrix) -> list[float]:
    """For each unknown, the sine of the angle between its column and the span of the others; 0: not to be told apart.

    Args:
        matrix (`(n, n)`): the Gram matrix of the columns.
    """
    size = len(matrix)
    scale = [math.sqrt(matrix[i][i]) for i in range(size)]
    found = []
    for i in range(size):
        others = [j for j in range(size) if j != i and scale[j] > 0.0]
        if scale[i] == 0.0:
            found.append(0.0)
            continue
        # of columns of length 1: sin² = 1 − what the others explain
        gram = [[matrix[j][k] / (scale[j] * scale[k]) + 1e-9 * (j == k) for k in others] for j in others]
        cross = [matrix[i][j] / (scale[i] * scale[j]) for j in others]
        part = _solve(gram, cross) if others else []
        explained = sum(a * b for a, b in zip(part, cross, strict=True)) if part is not None else 1.0
        found.append(math.sqrt(max(1.0 - explained, 0.0)))
    return found
