"""torchdata's StatefulDataLoader keeps the place in a balanced sampler and in a balanced stream, with workers too."""

from typing import Any

import pytest
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.unit.data.samplers import build as build_sampler
from tests.unit.data.samplers import shapes_of
from tests.unit.data.test_stream import build, ids, stream_of

SHAPES = shapes_of(96)


def loader_of(kind: str, num_workers: int) -> Any:
    settings: dict[str, Any] = {"num_workers": num_workers, "timeout": 60 if num_workers else 0, "collate_fn": list}
    if kind == "stream":
        return StatefulDataLoader(build(stream_of(shuffled=True), 1), batch_size=None, **settings)
    sampler = build_sampler(SHAPES, 2, 2, 4, 1)
    return StatefulDataLoader([{"id": i} for i in range(len(SHAPES))], batch_sampler=sampler, **settings)


@pytest.mark.parametrize(("kind", "num_workers"), [("stream", 0), ("stream", 2), ("sampler", 0), ("sampler", 2)])
def test_the_rest_of_an_epoch_is_the_same(kind: str, num_workers: int) -> None:
    whole = ids(loader_of(kind, 0))
    for done in (1, 5):
        running = loader_of(kind, num_workers)
        iterator = iter(running)
        seen = [next(iterator) for _ in range(done)]
        state = running.state_dict()
        resumed = loader_of(kind, num_workers)
        resumed.load_state_dict(state)
        assert ids(seen) + ids(resumed) == whole
