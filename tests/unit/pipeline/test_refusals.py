"""What stages cannot compute is refused, not left out: a balancing loss that came late, videos, adapters in shards."""

import pytest
import torch

from hf_dflop.errors import ModelError, PlanError
from hf_dflop.pipeline import MicrobatchShape, StepShape, Topology, build_batch
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
    assert last(inputs, hidden, None, torch.tensor(4)).loss.requires_grad
    with pytest.raises(ModelError, match="balancing loss"):
        last(inputs | {"output_router_logits": True}, hidden, None, torch.tensor(4))
    model.config.text_config.output_router_logits = True
    with pytest.raises(ModelError, match="balancing loss"):
        last(inputs, hidden, None, torch.tensor(4))


def test_routers_are_read_from_the_layers_and_refused_where_their_loss_would_differ() -> None:
    model = pipelines.model("qwen3_vl_moe", torch.float32)
    assert not any(read_routers(model, read_structure(model)))
    model = pipelines.model("qwen3_vl_moe", torch.float32, balance=0.5)
    routers = read_routers(model, read_structure(model))
    assert [[router.width for router in layer] for layer in routers] == [[4], [], [4], [4]]
    assert sent_widths(routers, (range(1), range(1, 3), range(3, 4)), 16) == (20, 24, 28)
    glm = pipelines.model("glm4v_moe", torch.float32, balance=0.5)
    assert [len(layer) for layer in read_routers(glm, read_structure(glm))] == [0, 1, 1, 1]
    glm.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"give torch\.float32, and its stages send torch\.bfloat16"):
        read_routers(glm, read_structure(glm))
    llava = pipelines.model("llava", torch.float32)
    llava.config.text_config.output_router_logits = True
    with pytest.raises(ModelError, match="computes no balancing loss"):
        read_routers(llava, read_structure(llava))


@pytest.mark.parametrize("key", ["pixel_values_videos", "video_grid_thw"])
@pytest.mark.parametrize("rank", [0, 1])
def test_videos_are_refused(key: str, rank: int) -> None:
    shape = StepShape(microbatches=((MicrobatchShape.of([5], [2]),),), label_tokens=4)
    topology = Topology(plan=pipelines.plan((1, 1, 1), num_microbatches=1))
    with pytest.raises(ModelError, match=f"holds {key}; the pipeline runs images only"):
        build_batch(shape, topology, rank, lambda samples: {"input_ids": torch.zeros(1, 5), key: torch.ones(1)})


def test_adapters_are_not_split_over_tensor_parallel_ranks() -> None:
    model = unwrap(pipelines.model("llava", torch.float32, key_heads=2, adapted=".*q_proj"))
    structure, tp_plan = read_structure(model), dict(model.tp_plan)
    plan = Plan(vision=ModulePlan(layers=(2,)), llm=ModulePlan(layers=(4,), tp=2), num_microbatches=1)
    with pytest.raises(PlanError, match="an adapter"):
        tensor_rules(model, tp_plan, structure, plan)
    assert tensor_rules(unwrap(pipelines.model("llava", torch.float32, key_heads=2)), tp_plan, structure, plan)
