"""Texts → ids and character offsets of their tokens, in batches, as the tokenizer's own call gives them.

A tokenizer's call converts each encoding into lists for every key it may return; counting needs two of them. The
backend is therefore asked directly, as soon as it gave the same as the tokenizer's own call for a first batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_dflop.errors import ProcessorError

__all__ = ["Tokeniser"]

Tokens = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


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
        """Ids `(num_tokens,)` and offsets `(num_tokens, 2)` of each text."""
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
        if self._agrees.get(special):
            return self._direct(texts, special)
        called = self._called(texts, special, truncation=False)
        if special not in self._agrees:
            direct = self._direct(texts, special)
            self._agrees[special] = all(
                np.array_equal(a, b) for one, other in zip(called, direct, strict=True) for a, b in zip(one, other)
            )
        return called

    def _called(self, texts: list[str], special: bool, **kwargs: Any) -> list[Tokens]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            padding=False,
            **kwargs,
        )
        return [
            _arrays(ids, offsets)
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _direct(self, texts: list[str], special: bool) -> list[Tokens]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # the last call of the tokenizer may have left its own settings
        backend.no_padding()
        return [_arrays(e.ids, e.offsets) for e in backend.encode_batch(texts, add_special_tokens=special)]


def _arrays(ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    return np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2)
