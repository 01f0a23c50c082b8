"""What cannot be balanced exactly is refused, with the remedy, before the first sample is loaded."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dflop import DflopCallback, PackedCollator
from hf_dflop.errors import DatasetError, ModelError, ShapeMismatchError, TrainerError
from hf_dflop.shapes import Shapes
from tests.distributed import tiny
from tests.distributed.harness import NotingTrainer, train


def test_a_run_without_obstacles_logs_what_the_docstring_says() -> None:
    dataset, _ = tiny.rows(16)
    trainer = train(dataset, [DflopCallback(dataset)], max_steps=2)
    records = [log for log in trainer.state.log_history if "dflop/step_s" in log]
    assert [record["step"] for record in records] == [1, 2]
    assert len([log for log in trainer.state.log_history if "loss" in log]) == 2
    for key in ("dflop/gap", "dflop/scheduling_s", "dflop/idle_fraction", "dflop/busy_s_rank0"):
        assert key in records[0]


def test_batch_rebalance_beside_the_callback() -> None:
    dataset, shapes = tiny.rows(16)
    dataset = dataset.add_column("length", shapes.llm_tokens.tolist())
    settings = {"train_sampling_strategy": "batch_rebalance", "length_column_name": "length"}
    with pytest.raises(TrainerError, match=r"batch_rebalance.*train_sampling_strategy='random'"):
        train(dataset, [DflopCallback(dataset)], **settings)
    # Measuring is no balancing: it stays possible.
    trainer = train(dataset, [DflopCallback(dataset, balance=False)], **settings)
    assert any("dflop/idle_fraction" in log for log in trainer.state.log_history)


def test_dispatched_batches() -> None:
    dataset, _ = tiny.rows(16)
    with pytest.raises(TrainerError, match="dispatch_batches"):
        train(dataset, [DflopCallback(dataset)], accelerator_config={"dispatch_batches": True})


def test_streaming() -> None:
    dataset, _ = tiny.rows(16)
    with pytest.raises(TrainerError, match=r"map-style|IterableDataset"):
        train(dataset.to_iterable_dataset(), [DflopCallback(dataset)])


def test_a_model_that_averages_microbatch_means() -> None:
    dataset, _ = tiny.rows(16)
    model = tiny.model()
    model.accepts_loss_kwargs = False
    with pytest.raises(TrainerError, match=r"accepts_loss_kwargs = True"):
        train(dataset, [DflopCallback(dataset)], model=model)
    # One microbatch per step: there is nothing to regroup, and nothing to refuse.
    train(dataset, [DflopCallback(dataset)], model=model, gradient_accumulation_steps=1, max_steps=1)


def test_average_tokens_across_devices_off() -> None:
    from hf_dflop.integrations.checks import check_exactness

    dataset, _ = tiny.rows(16)
    trainer = train(dataset, [], max_steps=1)
    trainer.args.average_tokens_across_devices = False
    dataloader = trainer.get_train_dataloader()
    check_exactness(trainer, dataloader, 1)
    with pytest.raises(TrainerError, match="average_tokens_across_devices=True"):
        check_exactness(trainer, dataloader, 2)


def test_a_dataset_that_was_not_annotated() -> None:
    dataset, _ = tiny.rows(16)
    with pytest.raises(DatasetError, match="profile_dataset"):
        DflopCallback(dataset.select_columns(["id", "input_ids"]))


def test_a_dataset_of_another_length() -> None:
    dataset, _ = tiny.rows(16)
    with pytest.raises(ShapeMismatchError, match=r"16 samples.*has 12"):
        train(dataset.select(range(12)), [DflopCallback(dataset)])


def test_a_dataset_in_another_order() -> None:
    dataset, _ = tiny.rows(16)
    with pytest.raises(ShapeMismatchError, match=r"sample \d+ has \d+ .*say"):
        train(dataset.shuffle(seed=1), [DflopCallback(dataset)])


def test_wrong_image_tokens() -> None:
    dataset, shapes = tiny.rows(16, text_only=False)
    columns = {name.removeprefix("dflop_"): column for name, column in shapes.to_columns().items()}
    wrong = Shapes(**(columns | {"image_tokens": shapes.image_tokens - 1, "text_tokens": shapes.text_tokens + 1}))
    with pytest.raises(ShapeMismatchError, match="dflop_image_tokens"):
        train(dataset, [DflopCallback(wrong)])


def test_a_dataset_smaller_than_one_global_batch() -> None:
    dataset, _ = tiny.rows(7)
    message = r"7 samples, fewer than one global batch of 8 \(1 ranks × 4 microbatches × 2 samples\)"
    with pytest.raises(DatasetError, match=message):
        train(dataset, [DflopCallback(dataset)], gradient_accumulation_steps=4)


def test_a_dataset_that_another_processor_annotated() -> None:
    from hf_dflop import profile_dataset
    from hf_dflop.integrations.checks import check_processor
    from tests.distributed.chats import conversations
    from tests.unit.rows import tiny as processors

    own, other = processors.llava(), processors.llava_next()
    annotated, _ = profile_dataset(conversations(8), own)
    check_processor(SimpleNamespace(processing_class=own), annotated)
    check_processor(SimpleNamespace(processing_class=None), annotated)
    with pytest.raises(TrainerError, match=r"annotated with processor [0-9a-f]+, .*profile_dataset"):
        check_processor(SimpleNamespace(processing_class=other), annotated)


def test_a_model_without_a_vision_encoder() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dataset, _ = tiny.rows(16)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="vision"):
        train(dataset, [DflopCallback(dataset)], model=LlamaForCausalLM(config))


def test_a_collator_without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, _ = tiny.rows(16)
    original = tiny.Collate.__call__

    def unlabelled(self: tiny.Collate, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in original(self, features).items() if name != "labels"}

    monkeypatch.setattr(tiny.Collate, "__call__", unlabelled)
    with pytest.raises(TrainerError, match="labels"):
        train(dataset, [DflopCallback(dataset)])


def test_outside_of_a_trainer() -> None:
    dataset, _ = tiny.rows(16)
    callback = DflopCallback(dataset)
    with pytest.raises(TrainerError, match=r"transformers\.Trainer"):
        callback.on_train_begin(None, None, None, train_dataloader=None)  # type: ignore[arg-type]


def test_checking_samples_does_not_change_what_training_draws() -> None:
    dataset, _ = tiny.rows(16)
    stock, balanced = train(dataset, []), train(dataset, [DflopCallback(dataset, verify=8)])
    assert stock.samples_of_steps() == balanced.samples_of_steps()


def test_a_second_train_call_and_the_trace(tmp_path: Path) -> None:
    from hf_dflop.integrations.trace import read_trace

    dataset, _ = tiny.rows(16)
    callback = DflopCallback(dataset, trace_dir=tmp_path)
    trainer = train(dataset, [callback], max_steps=3)
    assert isinstance(trainer, NotingTrainer)
    (steps,) = read_trace(tmp_path)
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        edges = [step["begin_s"], *step["slot_end_s"], step["sync_end_s"], step["end_s"]]
        assert edges == sorted(edges)
        assert len(step["slot_end_s"]) == len(step["samples"]) == len(step["slot_predicted_s"]) == 2
    loaded = sorted(i for step in steps[:1] for group in step["samples"] for i in group)
    assert loaded == trainer.samples_of_steps()[0]
    trainer.train()
    assert len(read_trace(tmp_path)[0]) == 3, "a new run starts a new trace"


def test_measuring_only_keeps_the_stock_grouping() -> None:
    dataset, _ = tiny.rows(29)
    stock = train(dataset, [], max_steps=8)
    measured = train(dataset, [DflopCallback(dataset, balance=False)], max_steps=8)
    assert stock.noted == measured.noted


def test_packing_on_a_model_that_lets_samples_see_each_other(caplog: pytest.LogCaptureFixture) -> None:
    dataset, shapes = tiny.rows(16)

    class Leaking(PackedCollator):
        def pack(self, padded: Any) -> dict[str, Any]:
            return {key: value for key, value in super().pack(padded).items() if key != "position_ids"}

    for kind, wrapped in ((PackedCollator, False), (Leaking, False), (Leaking, True)):
        model = tiny.model()
        collator: Any = kind(tiny.Collate(), model)
        if wrapped:
            collator = Around(collator)
        callback = DflopCallback(dataset)
        if kind is Leaking:
            with pytest.raises(ModelError, match=r"moves sample \d.*Use a padding collator"):
                train(dataset, [callback], model=model, collator=collator)
            continue
        with caplog.at_level("INFO", logger="hf_dflop"):
            train(dataset, [callback], model=model, collator=collator, max_steps=1)
        assert "no sample of 3 moved another" in caplog.text
        assert callback.sampler is not None
        pair = callback.sampler.microbatch_s([0, 1])  # the sum, and what SDPA computes between the two
        one, other, none = (callback.sampler.microbatch_s(group) for group in ([0], [1], []))
        assert one + other - none < pair < 1.2 * (one + other - none)
        assert shapes.llm_tokens[0] != shapes.llm_tokens[1]


class Around:
    """A collator around the one that packs, as one that counts would be."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        return self.collator(rows)
