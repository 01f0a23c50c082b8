"""What stages cannot compute is refused, not left out: a balancing loss that came late, videos, adapters in shards."""

import pytest
import torch

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline import MicrobatchShape, StepBatch, StepShape, Topology, build_batch
from hf_dflop.pipeline._compat import takes_outputs
from hf_dflop.pipeline.handshake import Checks, Handshake
from hf_dflop.pipeline.kinds import takes_videos
from hf_dflop.pipeline.router import read_routers, sent_widths
from hf_dflop.pipeline.skeleton import unwrap
from hf_dflop.pipeline.split import build_part
from hf_dflop.pipeline.structure import read_structure
from hf_dflop.pipeline.tensor_rules import tensor_rules
from hf_dflop.plan import ModulePlan, Plan
from tests.distributed import pipelines


def test_a_balancing_loss_that_is_asked_for_after_the_model_was_cut_is_refused() -> None:
    model, plan = pipelines.model("qwen3_vl_moe", torch.float32), pipelines.plan((1, 2, 1))
    last = build_part(model, read_structure(model), plan, 2)
    ids = torch.arange(5)[None] + 10
    inputs = {"input_ids": ids, "labels": ids, "mm_token_type_ids": torch.zeros_like(ids)}
    hidden = torch.randn(1, 5, model.config.get_text_config().hidden_size)
    loss = last(inputs, hidden, None, torch.tensor(4)).loss
    assert loss.requires_grad
    with pytest.raises(ModelError, match="balancing loss"):
        last(inputs | {"output_router_logits": True}, hidden, None, torch.tensor(4))
    model.config.text_config.output_router_logits = True
    if not pipelines.takes_routers(model):  # the stock model does not look at its config
        assert torch.equal(last(inputs, hidden, None, torch.tensor(4)).loss, loss)
        return
    with pytest.raises(ModelError, match="balancing loss"):
        last(inputs, hidden, None, torch.tensor(4))


def test_routers_are_read_from_the_layers_and_refused_where_their_loss_would_differ() -> None:
    model = pipelines.model("qwen3_vl_moe", torch.float32)
    assert not any(read_routers(model, read_structure(model)))
    llava = pipelines.model("llava", torch.float32)
    llava.config.text_config.output_router_logits = True
    with pytest.raises(ModelError, match="computes no balancing loss"):
        read_routers(llava, read_structure(llava))
    model = pipelines.model("qwen3_vl_moe", torch.float32, balance=0.5)
    if not pipelines.takes_routers(model):
        with pytest.raises(ModelError, match="computes no balancing loss"):
            read_routers(model, read_structure(model))
        pytest.skip("models of this transformers compute no balancing loss from their config, and it was refused")
    routers = read_routers(model, read_structure(model))
    assert [[router.width for router in layer] for layer in routers] == [[4], [], [4], [4]]
    assert sent_widths(routers, (range(1), range(1, 3), range(3, 4)), 16) == (20, 24, 28)
    glm = pipelines.model("glm4v_moe", torch.float32, balance=0.5)
    assert [len(layer) for layer in read_routers(glm, read_structure(glm))] == [0, 1, 1, 1]
    glm.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"give torch\.float32, and its stages send torch\.bfloat16"):
        read_routers(glm, read_structure(glm))


@pytest.mark.parametrize("key", ["pixel_values_videos", "video_grid_thw"])
def test_videos_are_refused_where_they_cannot_be_run(key: str) -> None:
    assert takes_videos(body := pipelines.model("qwen2_vl").model) is takes_outputs(body)
    built, plan = pipelines.model("llava", torch.float32), pipelines.plan((1, 1, 1), num_microbatches=1)
    assert not takes_videos(built.model)
    topology, structure = Topology(plan=plan), read_structure(built)
    place, parts = topology.place(1), {1: build_part(built, structure, plan, 1)}
    handshake = Handshake("Llava", topology, place, None, parts, structure.body, Checks())  # type: ignore[arg-type]
    shape = StepShape(microbatches=((MicrobatchShape.of([5], [0]),),), label_tokens=4)
    handshake.meet(StepBatch(shape=shape, text=({"pixel_values": torch.ones(1), key: None},)), ())
    with pytest.raises(ModelError, match="the body of Llava has no get_video_features"):
        handshake.meet(StepBatch(shape=shape, text=({"input_ids": torch.zeros(1, 5), key: torch.ones(1)},)), ())


def test_ids_go_to_the_encoder_only_with_images_and_videos() -> None:
    shape = StepShape(microbatches=((MicrobatchShape.of([5], [2]),),), label_tokens=4)
    topology = Topology(plan=pipelines.plan((1, 1, 1), num_microbatches=1))
    one = torch.ones(1)
    given = {"input_ids": one, "labels": one, "pixel_values_videos": one, "video_grid_thw": one}
    assert set(build_batch(shape, topology, 0, lambda samples: given).vision[0] or {}) == set(list(given)[2:])
    both = given | {"pixel_values": one}
    assert set(build_batch(shape, topology, 0, lambda samples: both).vision[0] or {}) == set(both) - {"labels"}
    assert set(build_batch(shape, topology, 1, lambda samples: both).text[0] or {}) == set(list(given)[:2]) | {
        "video_grid_thw"
    }


def test_adapters_are_not_split_over_tensor_parallel_ranks() -> None:
    model = unwrap(pipelines.model("llava", torch.float32, key_heads=2, adapted=".*q_proj"))
    structure, tp_plan = read_structure(model), dict(model.tp_plan)
    plan = Plan(vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(4,), tp=2), num_microbatches=1)
    with pytest.raises(PlanError, match="an adapter"):
        tensor_rules(model, tp_plan, structure, plan)
    assert tensor_rules(unwrap(pipelines.model("llava", torch.float32, key_heads=2)), tp_plan, structure, plan)
