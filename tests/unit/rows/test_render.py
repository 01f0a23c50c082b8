"""What is learned of a conversation, and how text is put together."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_dflop.errors import ProcessorError
from hf_dflop.rows import Renderer, Row, image_token
from hf_dflop.rows.labels import expand, labelled, shift_spans
from hf_dflop.rows.render import _takes_suffix
from tests.unit.rows import tiny

IMAGE = {"type": "image"}


def turn(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


def learned(processor: Any, *turns: dict[str, Any], labels: str = "assistant") -> list[str]:
    images = [None for t in turns for part in t["content"] if part["type"] == "image"]
    rendered = Renderer(processor, labels)(Row(messages=list(turns), images=images))
    return [rendered.text[a:b] for a, b in rendered.spans]


def test_every_assistant_turn_with_its_end() -> None:
    found = learned(
        tiny.qwen2_vl(),
        turn("system", "be kind"),
        turn("user", IMAGE, "one"),
        turn("assistant", "same"),
        turn("user", "same"),
        turn("assistant", "see ", IMAGE, " there"),
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert found == ["same<|im_end|>", f"see {image} there<|im_end|>"]


def test_a_conversation_that_the_assistant_begins() -> None:
    assert learned(tiny.qwen2_vl(), turn("assistant", "hello"), turn("user", "a")) == ["hello<|im_end|>"]


def test_everything() -> None:
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert learned(tiny.qwen2_vl(), turn("user", "a"), turn("assistant", "b"), labels="all") == [text]


def test_templates_that_take_only_text() -> None:
    processor = tiny.llava()
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    renderer = Renderer(processor)
    row = Row(messages=[turn("user", IMAGE, "what?"), turn("assistant", "a cat")], images=[None])
    rendered = renderer(row)
    assert rendered.text == "USER: <image>what?\nASSISTANT: a cat\n</s>"
    assert [rendered.text[a:b] for a, b in rendered.spans] == [" a cat\n</s>"]


@pytest.mark.parametrize("header", ["[%s]", "<|im_start|>%s\n"])
def test_a_template_that_only_ends_the_last_turn(header: str) -> None:
    # "<|im_start|>" begins like the "</s>" that the last turn ends with: no part of it may be learned.
    processor = tiny.qwen2_vl()
    processor.chat_template = (
        f"{{% for m in messages %}}{{{{ '{header}' % m['role'] }}}}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{header}' % 'assistant' }}}}{{% endif %}}"
    )
    turns = turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two")
    assert learned(processor, *turns) == ["one", "two</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    processor = tiny.qwen2_vl()
    processor.chat_template = (
        "{{ messages | length }}{% for m in messages %}"
        "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ProcessorError, match=r"does not render turn 1 as a continuation.*labels='all'"):
        learned(processor, turn("user", "a"), turn("assistant", "one"), turn("user", "b"), turn("assistant", "two"))


def test_the_tokenizers_template_serves_too() -> None:
    processor = tiny.qwen2_vl()
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    assert learned(processor, turn("user", IMAGE), turn("assistant", "b")) == ["b<|im_end|>"]


def test_without_any_template() -> None:
    processor = tiny.llava()
    processor.chat_template = None
    rendered = Renderer(processor)(
        Row(messages=[turn("user", IMAGE, "what?"), turn("assistant", "a cat")], images=[None])
    )
    assert rendered.text == "<image>what?\na cat</s>"
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["a cat</s>"]


def test_bos_is_written_once() -> None:
    row = Row(messages=[turn("user", "a"), turn("assistant", "b")], images=[])
    assert Renderer(tiny.gemma3())(row).add_special_tokens is False
    assert Renderer(tiny.llava())(row).add_special_tokens is True


def test_image_tokens() -> None:
    assert image_token(tiny.gemma3()).feature == "<image_soft_token>"
    assert image_token(tiny.aya_vision()).feature == "<|IMG_PATCH|>"
    assert image_token(tiny.pixtral()).feature == "[IMG]"
    processor = tiny.llava()
    processor.image_token = None
    with pytest.raises(ProcessorError, match="has no image token"):
        image_token(processor)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="labels='none'"):
        Renderer(tiny.llava(), "none")


def test_spans_move_with_the_text_and_leave_images_out() -> None:
    text, spans = expand("@ab@@cd@", "@", ["<1>", "<22>", "<3>", "<4>"], [(0, 8)])
    assert text == "<1>ab<22><3>cd<4>"
    assert [text[a:b] for a, b in spans] == ["ab", "cd"]
    assert shift_spans([(1, 3), (5, 7)], [(0, 1, 2), (3, 4, 3), (4, 5, 2), (7, 8, 2)]) == [(3, 5), (12, 14)]


def test_a_token_on_the_border_is_learned() -> None:
    offsets = np.array([[0, 0], [0, 2], [2, 4], [4, 6], [0, 0]])
    assert labelled(offsets, [(3, 5)], "assistant").tolist() == [False, False, True, True, False]
    assert labelled(offsets, [(3, 5)], "all").tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("declared", [True, False])
def test_a_suffix_is_given_to_processors_that_say_they_take_one(declared: bool) -> None:
    """In the signature of their call, or, as older ones, in the typed dict of its arguments."""
    arguments = {"suffix": str} if declared else {}
    stand = SimpleNamespace(__annotations__={"text_kwargs": SimpleNamespace(__annotations__=arguments)})

    class Older:
        valid_processor_kwargs = stand

        def __call__(self, text: Any, **kwargs: Any) -> None: ...

    assert _takes_suffix(Older()) is declared
    assert Renderer(tiny.paligemma()).takes_suffix
    assert not Renderer(tiny.llava()).takes_suffix
