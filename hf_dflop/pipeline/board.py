"""Words that ranks leave for each other, without waiting for each other: on the store of the process group.

For what one rank learns when others, and it is not known which, need it: nobody has to take part but who tells and who
reads.

Assumption: all ranks make their boards in the same order.
"""

import json
import uuid
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

__all__ = ["Board"]


class Board:
    """JSON objects by name. Making one is a collective call, for a name that no other board has."""

    def __init__(self) -> None:
        told = [uuid.uuid4().hex]
        dist.broadcast_object_list(told, src=0)
        self._name = told[0]

    def tell(self, name: str, value: dict[str, Any]) -> None:
        """Leave a value for all ranks."""
        _get_default_store().set(f"{self._name}/{name}", json.dumps(value))

    def read(self, name: str) -> dict[str, Any]:
        """What was told, now or later.

        Raises:
            RuntimeError: nobody told it within the process group's time-out.
        """
        value: dict[str, Any] = json.loads(_get_default_store().get(f"{self._name}/{name}"))
        return value
