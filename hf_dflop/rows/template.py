"""The chat template of a processor as a function: turns in, text out, quick enough to be called for every row.

`apply_chat_template` copies and inspects the conversation on each call, which costs several times what the template
itself does. Turns of a `Row` are plain dicts of plain text, so the compiled template is rendered directly, with the
variables that `apply_chat_template` gives it. The first calls are rendered both ways; where a version of
transformers compiles otherwise, or one text differs, `apply_chat_template` is used for all rows.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["ChatTemplate", "find_template"]

logger = logging.getLogger(__name__)

_COMPARED = 16
"""Calls that are rendered both ways."""


class ChatTemplate:
    """Renders conversations with one template.

    Args:
        owner (`ProcessorMixin` or `PreTrainedTokenizerBase`): whose `apply_chat_template` is meant.
        template (`str`): the Jinja template.
        tokenizer (`PreTrainedTokenizerBase`): whose special tokens the template may name.
    """

    def __init__(self, owner: Any, template: str, tokenizer: Any) -> None:
        self._owner = owner
        self._template = template
        self._variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
        self._left_to_compare = _COMPARED
        self._compiled: Callable[..., str] | None = _compiled(template)

    def __call__(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        """The text of a conversation."""
        # Keys beside these (reasoning, tool calls) have rules of their own in apply_chat_template.
        if self._compiled is None or any(len(turn) > 2 for turn in messages):
            return self._slow(messages, add_generation_prompt)
        if not self._left_to_compare:
            return self._compiled(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)
        expected = self._slow(messages, add_generation_prompt)  # its errors are the user's, so it comes first
        self._left_to_compare -= 1
        try:
            text = self._compiled(messages=messages, add_generation_prompt=add_generation_prompt, **self._variables)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        if text != expected:
            logger.info("the compiled chat template renders otherwise than apply_chat_template, which is used instead")
            self._compiled = None
        return expected

    def __getstate__(self) -> dict[str, Any]:
        # A compiled template cannot be sent to worker processes; they compile their own.
        return {**vars(self), "_compiled": None, "_has_compiled": self._compiled is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        has_compiled = state.pop("_has_compiled")
        vars(self).update(state)
        self._compiled = _compiled(self._template) if has_compiled else None

    def _slow(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool) -> str:
        kwargs: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self._owner.apply_chat_template(list(messages), chat_template=self._template, **kwargs))


def find_template(processor: Any) -> tuple[Any, str] | None:
    """The template of the processor, else of its tokenizer, and which of them it belongs to."""
    for owner in (processor, processor.tokenizer):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if template is not None:
            return owner, template
    return None


def _compiled(template: str) -> Callable[..., str] | None:
    try:
        from jinja2.runtime import new_context
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled = _compile_jinja_template(template)
        # `render` would merge and list the environment's names anew for each row.
        names, concat = dict(compiled.globals), compiled.environment.concat
        draw, blocks, environment = compiled.root_render_func, compiled.blocks, compiled.environment
    except Exception:  # another version, or a template that does not compile, of which the owner will tell
        return None
    return lambda **variables: concat(draw(new_context(environment, None, blocks, {**names, **variables}, True)))
