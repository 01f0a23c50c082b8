"""Texts → how many tokens each has, how many of them are image tokens, and how many are learned.

A tokenizer's call converts each encoding into lists for every key it may return; counting needs two of them. The
backend is therefore asked directly, once it gave the same as the tokenizer's own call for some of the first texts. The
tokens of all texts are then counted together.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import ProcessorError
from hf_dflop.rows.labels import Span

__all__ = ["Tokeniser", "Tokens", "count_tokens"]

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Ids, and the character offsets of each."""


class Tokeniser:
    """Tokenises texts with one fast tokenizer.

    Raises:
        ProcessorError: it is not a fast tokenizer, so its tokens have no offsets.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ProcessorError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; the offsets of its tokens are needed to "
                "tell which are learned"
            )
        self.tokenizer = tokenizer
        self._agrees: dict[bool, bool] = {}

    def __call__(self, texts: Sequence[str], add_special_tokens: Sequence[bool]) -> list[Tokens]:
        """The tokens of each text."""
        result: list[Any] = [None] * len(texts)
        for special in (True, False):
            picked = [i for i, wanted in enumerate(add_special_tokens) if wanted is special]
            if picked:
                for i, tokens in zip(picked, self._batch([texts[i] for i in picked], special), strict=True):
                    result[i] = tokens
        return result

    def cut(self, text: str, add_special_tokens: bool, max_length: int) -> Tokens:
        """The tokens of one text that the tokenizer keeps when it truncates."""
        return self._called([text], add_special_tokens, truncation=True, max_length=max_length)[0]

    def _batch(self, texts: list[str], special: bool) -> list[Tokens]:
        if special not in self._agrees:
            some = texts[:: max(1, len(texts) // 32)]
            self._agrees[special] = self._called(some, special, truncation=False) == self._direct(some, special)
        return (
            self._direct(texts, special) if self._agrees[special] else self._called(texts, special, truncation=False)
        )

    def _called(self, texts: list[str], special: bool, **kwargs: Any) -> list[Tokens]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            **kwargs,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _direct(self, texts: list[str], special: bool) -> list[Tokens]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # the last call of the tokenizer may have left its own settings
        backend.no_padding()
        return [(e.ids, e.offsets) for e in backend.encode_batch(texts, add_special_tokens=special)]


def count_tokens(
    tokens: Sequence[Tokens], spans: Sequence[Sequence[Span]], policy: str, feature_ids: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Tokens, image tokens and labels of each text, `(num_texts, 3)`.

    Which tokens are labels is what `rows.labels.labelled` says, here for all texts at once: characters are numbered
    on from text to text, and the first span that ends behind a token's start is found by bisection. Labels are
    counted after the shift, so that a text's first token is none.

    Args:
        tokens (`Sequence[Tokens]`): ids and offsets of each text.
        spans (`Sequence[Sequence[Span]]`): the learned spans of each text, in order and apart.
        policy (`str`): label policy.
        feature_ids (`Sequence[int]`): ids of image and video tokens, which are never labels.

    Example:
        >>> count_tokens([([5, 6, 7], [(0, 0), (0, 2), (2, 5)])], [[(2, 5)]], "assistant", [9]).tolist()
        [[3, 0, 1]]
    """
    lengths = np.array([len(ids) for ids, _ in tokens], dtype=np.int64)
    total = int(lengths.sum())
    text_of = np.repeat(np.arange(len(tokens)), lengths)
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in tokens), dtype=np.int64, count=total)
    pairs = chain.from_iterable(chain.from_iterable(offsets for _, offsets in tokens))
    offsets = np.fromiter(pairs, dtype=np.int64, count=2 * total).reshape(-1, 2)
    widths = [
        1 + max(where[-1][1] if where else 0, max((end for _, end in marks), default=0))
        for (_, where), marks in zip(tokens, spans, strict=True)
    ]
    bases = np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.int64)
    starts, ends = offsets[:, 0] + bases[text_of], offsets[:, 1] + bases[text_of]
    learned = (starts == ends) if policy == "all" else np.zeros(total, dtype=bool)
    marked = [
        (first + base, last + base) for marks, base in zip(spans, bases.tolist(), strict=True) for first, last in marks
    ]
    if marked:
        firsts, lasts = np.array(marked, dtype=np.int64).T
        found = np.searchsorted(lasts, starts, side="right")
        learned |= (found < len(lasts)) & (firsts[np.minimum(found, len(lasts) - 1)] < ends)
    is_feature = np.isin(ids, feature_ids)
    learned &= ~is_feature
    learned[np.cumsum(lengths)[:-1][lengths[1:] > 0]] = False
    learned[:1] = False
    counts = np.zeros((len(tokens), 3), dtype=np.int64)
    counts[:, 0] = lengths
    counts[:, 1] = np.bincount(text_of, weights=is_feature, minlength=len(tokens))
    counts[:, 2] = np.bincount(text_of, weights=learned, minlength=len(tokens))
    return counts
