"""One row without padding: every sample has the logits and the gradients that it has alone, and sees no other."""

import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForImageTextToText, Lfm2Config, Qwen3_5Config, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_dflop import PackedCollator, VisionLanguageCollator, attend_by_sample, check_packing
from hf_dflop.data.by_sample import BY_SAMPLE
from hf_dflop.errors import DatasetError, ModelError
from tests.distributed import hearing
from tests.unit.data.families import FAMILIES, config_of, model_of, rows_of
from tests.unit.data.test_models_take_it import TEXT
from tests.unit.rows import tiny


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager", BY_SAMPLE])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_unpacked(name: str, attention: str) -> None:
    processor = FAMILIES[name]()
    model = model_of(name, processor, attention="sdpa" if attention == BY_SAMPLE else attention)
    if attention == BY_SAMPLE:
        has_own_rule = name in ("gemma3", "paligemma")
        assert attend_by_sample(model) is not has_own_rule
        if has_own_rule:
            assert PackedCollator(processor, model).structure.attention == "sdpa"
            return
    collate = PackedCollator(processor, model)
    rows = rows_of(name)
    found = check_packing(model, collate, rows)
    assert found.error <= 1e-5
    assert found.num_text_probes == len(rows)
    assert found.num_image_probes == sum(bool(row.get("images", True)) for row in rows)

    padded, packed = collate.collator(rows), collate(rows)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    counts = [int((batch["labels"][..., 1:] != -100).sum()) for batch in (padded, packed)]
    assert counts[0] == counts[1] == int((packed["labels"] != -100).sum()) > 0
    expected, joined = gradients(model, padded), gradients(model, packed)
    # Key biases of encoders have a gradient of zero in exact arithmetic: below this, all is rounding.
    floor = 1e-6 * max(float(g.norm()) for g in expected.values() if g is not None)
    for key, gradient in expected.items():
        assert (gradient is None) == (joined[key] is None), key
        if gradient is not None:
            assert float((joined[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + floor, key


@pytest.mark.parametrize("name", ["audioflamingo3", "qwen2_audio"])
def test_rows_with_sounds(name: str) -> None:
    processor = tiny.audioflamingo3() if name == "audioflamingo3" else tiny.qwen2_audio(2)
    model = hearing.audioflamingo3(processor) if name == "audioflamingo3" else hearing.qwen2_audio(processor, 2)
    collate = PackedCollator(processor, model)
    rows = [
        {"question": "What?", "answer": said, "audio": {"array": tone(length), "sampling_rate": 16_000}}
        for said, length in (("a cat", 9_000), ("the sea", 25_000))
    ]
    rows.append({"question": "What?", "answer": "a picture", "audio": None})
    found = check_packing(model, collate, rows)
    assert found.error <= 1e-5
    assert (found.num_text_probes, found.num_image_probes) == (3, 2)
    padded, packed = collate.collator(rows), collate(rows)
    assert packed["input_ids"].shape == (1, int(padded["attention_mask"].sum()))
    assert packed["input_features"].equal(padded["input_features"])
    expected, joined = gradients(model, padded), gradients(model, packed)
    norm = max(float(g.norm()) for g in expected.values() if g is not None)
    for key, gradient in expected.items():
        if gradient is not None:
            assert float((joined[key] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6 * norm, key


def tone(length: int) -> list[float]:
    return torch.arange(length).div(5).sin().tolist()


def test_sounds_of_a_model_whose_positions_are_not_known_are_not_packed() -> None:
    processor = tiny.qwen2_5_omni()
    collate = PackedCollator(processor, hearing.qwen2_5_omni(processor))
    row = {"question": "What?", "answer": "a cat", "audio": {"array": tone(9_000), "sampling_rate": 16_000}}
    with pytest.raises(DatasetError, match=r"Qwen2_5Omni\w+ has positions of several dimensions"):
        collate([row, row])
    assert collate([{**row, "audio": None}] * 2)["position_ids"].shape[0] == 4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_text_only_and_lone_samples(name: str) -> None:
    processor = FAMILIES[name]()
    model = model_of(name, processor)
    collate = PackedCollator(processor, model)
    texts = [row for row in rows_of(name) if not row["images"]] * 2
    assert not [key for key in collate(texts) if "pixel" in key]
    assert check_packing(model, collate, texts).num_image_probes == 0
    for row in rows_of(name)[:2]:
        alone, packed = collate.collator([row]), collate([row])
        with torch.no_grad():
            torch.testing.assert_close(model(**packed).logits, model(**alone).logits, rtol=1e-4, atol=1e-4)


def test_what_a_row_holds() -> None:
    def pad(rows: Any) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]),
            "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),  # padding on either side
            "labels": torch.tensor([[5, 6, -100], [-100, 8, 9]]),
            "sample_ids": torch.tensor([3, 4]),
            "pixel_values": torch.ones(2, 3),
        }

    packed = PackedCollator(pad, config_of("llava", FAMILIES["llava"]()))([])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["labels"].tolist() == [[-100, 6, -100, -100, 9]]
    assert packed["sample_ids"].tolist() == [3, 4]
    assert packed["pixel_values"].shape == (2, 3)
    assert packed["use_cache"] is False
    assert "attention_mask" not in packed


def test_positions_of_several_dimensions_are_the_models_own() -> None:
    processor = FAMILIES["qwen2_5_vl"]()
    model = model_of("qwen2_5_vl", processor)
    rows = rows_of("qwen2_5_vl")[:2]
    collate = PackedCollator(processor, model.config)
    positions = collate(rows)["position_ids"]
    start = 0
    for row in rows:
        batch = collate.collator([row])
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
        alone = model.model.get_rope_index(**{name: batch[name] for name in names if name in batch})[0]
        length = alone.shape[-1]
        assert torch.equal(positions[1:, :, start : start + length], alone)
        assert torch.equal(positions[0, 0, start : start + length], torch.arange(length))
        start += length
    assert positions.shape == (4, 1, start)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_it_travels_to_loader_workers(name: str) -> None:
    processor = FAMILIES[name]()
    model = model_of(name, processor)
    collate = PackedCollator(VisionLanguageCollator(processor), model)
    rows = rows_of(name)
    expected = collate(rows)
    collate.collator = None  # processors loaded by path do not pickle
    copied = pickle.loads(pickle.dumps(collate))  # noqa: S301
    assert copied.structure.model_class is type(model)
    copied.collator = VisionLanguageCollator(processor)
    assert torch.equal(copied(rows)["position_ids"], expected["position_ids"])


class Broken(PackedCollator):
    """Packs without one of the things that keep samples apart."""

    lost = ""

    def pack(self, padded: Any) -> dict[str, Any]:
        packed = super().pack(padded)
        if self.lost == "pixel order":
            return {key: value.flip(0) if key == "pixel_values" else value for key, value in packed.items()}
        if self.lost == "what images see":
            causal = {kind: mask & torch.ones_like(mask).tril() for kind, mask in packed["attention_mask"].items()}
            return packed | {"attention_mask": causal}
        assert self.lost in packed
        return {key: value for key, value in packed.items() if key != self.lost}


@pytest.mark.parametrize(
    ("name", "lost", "reason"),
    [
        ("llava", "position_ids", "text of sample 0 moves sample 1"),
        ("llava", "use_cache", "text of sample 0 moves sample 1"),  # a cache turns the detection off
        ("llava", "pixel order", r"logits of sample \d differ by"),
        ("qwen3_vl", "position_ids", "text of sample 0 moves sample 1"),
        ("gemma3", "what images see", r"logits of sample \d differ by"),
        pytest.param(
            *("gemma3", "attention_mask", r"logits of sample \d differ by"),  # images and windows by absolute place
            marks=pytest.mark.skipif(
                not hasattr(masking_utils, "remap_positions_for_packed_sequence"),
                reason="this transformers builds the mask of packed samples with images right by itself",
            ),
        ),
    ],
)
def test_the_check_sees_what_is_missing(name: str, lost: str, reason: str) -> None:
    processor = FAMILIES[name]()
    model = model_of(name, processor)
    collate = Broken(processor, model)
    collate.lost = lost
    with pytest.raises(ModelError, match=reason + ".*padding collator"):
        check_packing(model, collate, rows_of(name))
    assert model.training


def test_attention_that_ignores_positions_is_refused() -> None:
    AttentionInterface.register("ignorant", sdpa_attention_forward)  # no mask function: it never gets a mask
    processor = FAMILIES["llava"]()
    model = model_of("llava", processor)
    model.model.language_model.set_attn_implementation("ignorant")
    with pytest.raises(ModelError, match="with ignorant attention does not keep the samples"):
        check_packing(model, PackedCollator(processor, model), rows_of("llava"))


def test_samples_attend_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is as long as its sample, in every layer; a padded row is not cut, nor is one with windows."""
    lengths: list[int] = []
    stock = sdpa_attention_forward

    def noted(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return stock(module, query, *args, **kwargs)

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", noted)
    processor = FAMILIES["llava"]()
    model = model_of("llava", processor)
    wrapped = torch.nn.Module()
    wrapped.module = model
    assert attend_by_sample(wrapped)
    collate, rows = PackedCollator(processor, model), rows_of("llava")
    padded = collate.collator(rows)
    model(**collate(rows))
    assert lengths == padded["attention_mask"].sum(dim=1).tolist() * 2  # two layers
    lengths.clear()
    model(**padded)
    assert lengths == [padded["input_ids"].shape[1]] * 2


def test_windows_keep_their_mask() -> None:
    """A sliding window is no matter of samples alone: such layers compute the masked row, and exactly."""
    processor = FAMILIES["mistral3"]()
    model = model_of("mistral3", processor)
    collate, rows = PackedCollator(processor, model), rows_of("mistral3")
    without = model(**collate(rows)).logits
    text = model.config.get_text_config()
    for config in (text, model.get_decoder().config):
        config.sliding_window = 8
    assert attend_by_sample(model)
    assert check_packing(model, collate, rows).error <= 1e-5
    with_windows = model(**collate(rows)).logits
    assert not torch.allclose(without, with_windows, atol=1e-2)
    for config in (text, model.get_decoder().config):
        config._attn_implementation = "sdpa"
    torch.testing.assert_close(with_windows, model(**collate(rows)).logits)


def test_other_attention_is_left_alone() -> None:
    model = model_of("llava", FAMILIES["llava"](), attention="eager")
    assert not attend_by_sample(model)
    assert model.config.get_text_config()._attn_implementation == "eager"
    with pytest.raises(ModelError, match="neither a transformers model"):
        attend_by_sample(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_layers_that_run_along_the_row_are_refused(name: str) -> None:
    """Short convolutions and linear attention carry a state from token to token, whatever the mask."""
    if name == "lfm2":
        processor = FAMILIES["llava"]()
        config = config_of("llava", processor)
        config.text_config = Lfm2Config(**TEXT, layer_types=["conv", "full_attention"])
    else:
        processor = FAMILIES["qwen3_vl"]()
        stock = config_of("qwen3_vl", processor)
        linear = {f"linear_num_{kind}_heads": 2 for kind in ("value", "key")}
        linear |= {f"linear_{kind}_head_dim": 8 for kind in ("value", "key")}
        config = Qwen3_5Config(
            vision_config=stock.vision_config.to_dict() | {"model_type": "qwen3_5_vision"},
            text_config={**TEXT, **linear, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]},
            image_token_id=stock.image_token_id,
        )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ModelError, match=r"does not keep the samples of a packed row apart.*moves sample"):
        check_packing(model, PackedCollator(processor, model), rows_of(name))


def test_a_wrapped_model_is_looked_into() -> None:
    processor = FAMILIES["llava"]()
    model = model_of("llava", processor)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped = torch.nn.Module()
    wrapped.module = adapted
    assert PackedCollator(processor, wrapped).structure.model_class is type(model)
    check_packing(adapted, PackedCollator(processor, adapted), rows_of("llava"))


def test_a_model_that_does_not_take_the_positions_is_refused() -> None:
    processor = FAMILIES["llava"]()
    model = model_of("llava", processor)
    collate = PackedCollator(processor, config_of("qwen2_5_vl", FAMILIES["qwen2_5_vl"]()))
    with pytest.raises(ModelError, match=r"attention fails on a packed microbatch: .*padding collator"):
        check_packing(model, collate, rows_of("llava"))


def test_half_precision_is_measured_by_what_padding_changes() -> None:
    processor = FAMILIES["llava"]()
    model = model_of("llava", processor, dtype=torch.bfloat16)
    found = check_packing(model, PackedCollator(processor, model), rows_of("llava"))
    assert found.error <= found.tolerance
    assert 1e-3 < found.tolerance < 0.3
    broken = Broken(processor, model)
    broken.lost = "pixel order"
    with pytest.raises(ModelError, match=r"logits of sample \d differ by"):
        check_packing(model, broken, rows_of("llava"))


def test_what_it_does_not_take() -> None:
    processor = FAMILIES["llava"]()
    config = config_of("llava", processor)
    with pytest.raises(ValueError, match="max_length"):
        PackedCollator(VisionLanguageCollator(processor), config, max_length=3)
    with pytest.raises(ModelError, match="neither a transformers model nor"):
        PackedCollator(processor, torch.nn.Linear(1, 1))
    with pytest.raises(ModelError, match="LlamaConfig is not the config of an image-text-to-text"):
        PackedCollator(processor, config.text_config)
    with pytest.raises(DatasetError, match="no attention_mask"):
        PackedCollator(lambda rows: {"input_ids": torch.ones(1, 3)}, config)([])
    with pytest.raises(ValueError, match="at least 2"):
        check_packing(None, PackedCollator(processor, config), [{}])
