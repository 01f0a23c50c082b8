"""Which encoder replica encodes which samples, and where its rows of features go.

In: the feature rows of each sample, the numbers of replicas. Out: for each microbatch the samples of each encoder
replica, and *pieces*: contiguous rows of one encoder replica's output that are contiguous rows of one LLM replica's
input. The same table, read backwards, routes the gradients. A piece is a view on both sides: no copy.

All samples with images of a microbatch, in the order (LLM replica, place in the microbatch), are cut into as many
contiguous runs as there are encoder replicas, as even in feature rows as whole samples allow. Pieces are ordered by
(encoder replica, LLM replica) on every rank, so that sends and receives pair up.

Assumption: colocated, encoder replica d serves LLM replica d.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_dflop.pipeline.shape import StepShape

__all__ = ["Piece", "Route", "route_step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows `[source, source + rows)` of an encoder replica's output = `[target, ...)` of an LLM replica's input."""

    encoder: int
    llm: int
    source: int
    target: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One microbatch over the bridge."""

    samples: tuple[tuple[tuple[int, int], ...], ...]
    """`samples[v]`: (LLM replica, place in its microbatch) of what encoder replica v encodes, in order."""
    pieces: tuple[Piece, ...]
    encoder_rows: tuple[int, ...]
    """Feature rows of each encoder replica's output."""

    def from_encoder(self, replica: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.encoder == replica)

    def to_llm(self, replica: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.llm == replica)


def route_step(shape: StepShape, num_encoders: int, *, colocated: bool = False) -> tuple[Route, ...]:
    """The route of each microbatch.

    Example:
        >>> from hf_dflop.pipeline.shape import MicrobatchShape
        >>> step = StepShape(microbatches=((MicrobatchShape.of([9, 9], [4, 4]), MicrobatchShape.of([9], [4])),),
        ...                  label_tokens=1)
        >>> route_step(step, 2)[0].samples
        (((0, 0), (0, 1)), ((1, 0),))
    """
    return tuple(
        _route([replica.features for replica in replicas], num_encoders, colocated) for replicas in shape.microbatches
    )


def _route(features: Sequence[Sequence[int]], num_encoders: int, colocated: bool) -> Route:
    flat = [(d, i, rows) for d, samples in enumerate(features) for i, rows in enumerate(samples) if rows]
    if colocated:
        owner = [d for d, _, _ in flat]
    else:
        owner = _even_cut([rows for _, _, rows in flat], num_encoders)
    samples: list[list[tuple[int, int]]] = [[] for _ in range(num_encoders)]
    encoder_rows = [0] * num_encoders
    llm_rows = [0] * len(features)
    pieces: list[Piece] = []
    for (d, i, rows), v in zip(flat, owner, strict=True):
        if pieces and (pieces[-1].encoder, pieces[-1].llm) == (v, d):
            last = pieces.pop()
            pieces.append(Piece(encoder=v, llm=d, source=last.source, target=last.target, rows=last.rows + rows))
        else:
            pieces.append(Piece(encoder=v, llm=d, source=encoder_rows[v], target=llm_rows[d], rows=rows))
        samples[v].append((d, i))
        encoder_rows[v] += rows
        llm_rows[d] += rows
    return Route(samples=tuple(tuple(s) for s in samples), pieces=tuple(pieces), encoder_rows=tuple(encoder_rows))


def _even_cut(rows: Sequence[int], parts: int) -> list[int]:
    """Part of each item: the part in whose equal share of the total the item's middle lies; never decreasing."""
    total = sum(rows)
    owner, before = [], 0
    for n in rows:
        owner.append(min(parts - 1, (2 * before + n) * parts // (2 * total)))
        before += n
    return owner
