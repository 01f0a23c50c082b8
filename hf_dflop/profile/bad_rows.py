"""What happens to rows that are not usable: raise, skip or mark.

Inputs: for each bad row its index and the reason. The counts of a bad row are all 0; `on_error` says what becomes
of it in the dataset that is returned:

    raise   the first bad row stops the call (the default)
    skip    bad rows are dropped; the other rows keep their order
    mark    bad rows stay, with counts of 0 and the reason in the column `dflop_error`
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_dflop.errors import DatasetError

__all__ = ["ON_ERROR", "RowError", "check_on_error", "raise_first", "reasons_of", "row_errors"]

ON_ERROR = ("raise", "skip", "mark")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowError:
    """A row that is not usable."""

    index: int
    """Row of the dataset that was given, before anything was dropped."""
    reason: str
    """Why, naming the row and the column."""


def check_on_error(on_error: str) -> None:
    """Raise `ValueError` for a policy that does not exist."""
    if on_error not in ON_ERROR:
        raise ValueError(f"unknown on_error {on_error!r}; choose one of {', '.join(map(repr, ON_ERROR))}")


def row_errors(reasons: Mapping[int, str], positions: Sequence[int] | None = None) -> tuple[RowError, ...]:
    """Reasons by index as records, in the order of the rows.

    Args:
        reasons (`Mapping[int, str]`): index → reason, which begins with "row <index>".
        positions (`Sequence[int]`, *optional*): where the rows lie in the dataset that was given, when only some of
            them were looked at.
    """
    errors = []
    for index in sorted(reasons):
        given = index if positions is None else int(positions[index])
        reason = re.sub(rf"^row {index}\b", f"row {given}", reasons[index])
        errors.append(RowError(index=given, reason=reason))
    return tuple(errors)


def raise_first(reasons: Mapping[int, str], num_rows: int, on_error: str) -> None:
    """Stop where the policy says so, and where no row is left.

    Raises:
        DatasetError: there is a bad row and `on_error` is "raise", or every row is bad.
    """
    if not reasons:
        return
    first = reasons[min(reasons)]
    if on_error == "raise":
        more = (
            f" ({len(reasons) - 1} more rows are not usable; on_error='skip' drops them)" if len(reasons) > 1 else ""
        )
        raise DatasetError(first + more)
    if len(reasons) == num_rows:
        raise DatasetError(f"none of the {num_rows} rows is usable; the first one: {first}")


def reasons_of(column: Sequence[str | None]) -> dict[int, str]:
    """Reasons by index, from the values of the column `dflop_error`."""
    return {index: str(reason) for index, reason in enumerate(column) if reason is not None}
