"""The parts of the demo's model that need no downloaded weights: vocabulary cut, chat template, parameters."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from recipes.demo.model import CHAT_TEMPLATE, DemoModelConfig
from recipes.demo.weights import first_tokens


def byte_pair_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_the_first_tokens_are_a_tokenizer_of_their_own() -> None:
    whole = byte_pair_tokenizer()
    cut = Tokenizer.from_str(first_tokens(whole.to_str(), 258))
    assert cut.get_vocab_size() == 258
    assert whole.encode("hello").tokens == ["hello"]
    assert cut.encode("hello").tokens == ["he", "ll", "o"]
    assert cut.decode(cut.encode("hello, ‘world’").ids) == "hello, ‘world’"
    assert all(cut.token_to_id(token) == whole.token_to_id(token) for token in cut.get_vocab())


def test_a_vocabulary_out_of_order_is_refused() -> None:
    content = json.loads(byte_pair_tokenizer().to_str())
    vocab = content["model"]["vocab"]
    vocab["he"], vocab["hell"] = vocab["hell"], vocab["he"]
    with pytest.raises(ValueError, match="cannot be cut"):
        first_tokens(json.dumps(content), 257)


def test_the_chat_template_takes_images_in_any_turn() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(*messages: dict, **options: bool) -> str:
        return render_jinja_template(conversations=[list(messages)], chat_template=CHAT_TEMPLATE, **options)[0][0]

    user = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]}
    assistant = {
        "role": "assistant",
        "content": [{"type": "text", "text": "So:\n"}, {"type": "image", "text": None}],
    }
    turn = "<|im_start|>user\n<image>Why?<|im_end|>\n<|im_start|>assistant\n"
    assert render(user, assistant) == turn + "So:\n<image><|im_end|>\n"
    assert render(user, add_generation_prompt=True) == turn
    assert render({"role": "user", "content": "Hi"}) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile_pixels": 70}, "multiple of 42"),
        ({"vision_layers": 13}, "the encoder has 12"),
        ({"max_tiles": 0}, "at least 1"),
    ],
)
def test_impossible_parameters_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoModelConfig(**changes)  # type: ignore[arg-type]
