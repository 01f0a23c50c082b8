"""Tiny models of each family run through a pipeline and, whole, in one process. Used by the launched scripts."""

import contextlib
import copy
import datetime
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from hf_dflop.data import VisionLanguageCollator
from hf_dflop.pipeline import MicrobatchShape, PipelineModel, StepBatch, StepShape, build_batch
from hf_dflop.pipeline.skeleton import unwrap
from hf_dflop.plan import ModulePlan, Plan
from tests.unit.data import families
from tests.unit.rows import tiny

FLOOR = 1e-3
"""Gradients are compared relative to their own largest entry, but not to less than this share of the model's largest:
what is zero in exact arithmetic (key biases) is rounding noise, whose relative difference means nothing."""

Layout = tuple[int, int, int]
Cells = list[list[dict[str, Any]]]
"""Cells of a global batch: each is one microbatch of one replica."""


FAMILIES = {
    **families.FAMILIES,
    "llava_next": tiny.llava_next,
    "llava_granite": tiny.llava,  # scales what it takes for embeddings
    "qwen3_vl_moe": tiny.qwen3_vl,
    "glm4v_moe": tiny.qwen3_vl,
}


class Remembering(VisionLanguageCollator):
    """Remembers the batches of the rows of `rows_of`, which are the same objects each time."""

    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        self.made: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        return self._once("whole", super().__call__, rows)

    def without_pixels(self, rows: Sequence[Any]) -> dict[str, Any]:
        return self._once("without pixels", super().without_pixels, rows)

    def _once(self, what: str, collate: Callable[..., dict[str, Any]], rows: Sequence[Any]) -> dict[str, Any]:
        key = (what, *map(id, rows))
        if key not in self.made:
            self.made[key] = list(rows), collate(rows)  # with the rows, whose ids stay theirs that way
        return {name: value.clone() for name, value in self.made[key][1].items()}


@functools.cache
def collator(family: str) -> Any:
    return Remembering(FAMILIES[family]())


def prepare(family: str, *text_only: bool, dtype: torch.dtype = torch.float64, **settings: Any) -> None:
    """Make what all ranks make: a model, and the batches of cells with and without images and of each row."""
    model(family, dtype, **settings)
    collate_cells(family, *text_only)


def collate_cells(family: str, *text_only: bool) -> None:
    for chosen in text_only or (False,):
        for rows in cells_of(family, text_only=chosen):
            if rows:
                collator(family)(rows)
                for row in rows:
                    collator(family)([row])


def _config(family: str) -> Any:
    import transformers as tf

    processor = collator(family).processor
    if family == "llava_next":
        like = families.config_of("llava", collator("llava").processor)
        return tf.LlavaNextConfig(
            vision_config=like.vision_config.to_dict(),
            text_config=like.text_config.to_dict(),
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            vision_feature_layer=-1,
        )
    if family == "llava_granite":
        config = families.config_of("llava", processor)
        scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0}
        config.text_config = tf.GraniteConfig(**families.TEXT, **scales)
        return config
    if family == "qwen3_vl_moe":
        like = families.config_of("qwen3_vl", processor)
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
        text = {**families.TEXT, "head_dim": 8, "rope_parameters": families.MROPE, **experts}
        return tf.Qwen3VLMoeConfig(
            vision_config=like.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
            text_config=text,
            image_token_id=like.image_token_id,
            vision_start_token_id=like.vision_start_token_id,
        )
    if family == "glm4v_moe":
        like = families.config_of("qwen3_vl", processor)
        vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
        rope = families.MROPE | {"partial_rotary_factor": 1.0}
        text = {**families.TEXT, "head_dim": 8, "rope_parameters": rope, **experts}
        return tf.Glm4vMoeConfig(
            vision_config={**vision, "patch_size": 16, "image_size": 64},
            text_config=text | {"topk_group": 1, "first_k_dense_replace": 1},
            image_token_id=like.image_token_id,
            image_start_token_id=like.vision_start_token_id,
        )
    return families.config_of(family, processor)


@functools.cache
def _master(
    family: str,
    dtype: torch.dtype,
    layers: int,
    tied: bool,
    deepstack: int,
    encoder: int,
    feature_layers: tuple[int, ...],
    key_heads: int,
    balance: float,
) -> Any:
    import transformers as tf

    config = _config(family)
    if encoder:
        setattr(
            config.vision_config, "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers", encoder
        )
    if feature_layers:
        config.vision_feature_layer = list(feature_layers)
    text = config.get_text_config()
    if balance:
        text.output_router_logits, text.router_aux_loss_coef = True, balance
    text.num_hidden_layers = layers
    text.num_key_value_heads = key_heads or text.num_key_value_heads
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[i % len(text.layer_types)] for i in range(layers)]
    if deepstack:
        config.vision_config.deepstack_visual_indexes = list(range(deepstack))
    config.tie_word_embeddings = text.tie_word_embeddings = tied
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    torch.manual_seed(0)
    built = tf.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a random tiny model hardly looks around itself: make attention sharp
        for value in built.parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=generator, dtype=dtype) * 0.3)
    return built.train()


def model(
    family: str,
    dtype: torch.dtype = torch.float64,
    *,
    layers: int = 4,
    tied: bool = False,
    deepstack: int = 0,
    encoder: int = 0,
    feature_layers: tuple[int, ...] = (),
    key_heads: int = 0,
    balance: float = 0.0,
    adapted: str = "",
    shared: bool = False,
) -> Any:
    """A fresh model, the same on every rank; `encoder` layers of the encoder, features of `feature_layers`,
    `key_heads` heads of keys and values; `balance` times the routers' balancing loss; with LoRA on the modules whose
    names fit the expression `adapted`; with a weight that the first and the last layer have in common."""
    built = copy.deepcopy(_master(family, dtype, layers, tied, deepstack, encoder, feature_layers, key_heads, balance))
    if shared:
        decoder = built.model.language_model.layers
        decoder[-1].mlp.up_proj.weight = decoder[0].mlp.up_proj.weight
    return with_lora(built, target_modules=adapted) if adapted else built


def takes_routers(built: Any) -> bool:
    """Whether the model computes the balancing loss where its config asks; before, only where a call did (5.17)."""
    return "output_router_logits" in inspect.signature(type(built).forward).parameters


def with_lora(built: Any, **settings: Any) -> Any:
    """Wrapped by peft; both matrices random, so that both get gradients at once."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    return get_peft_model(built, LoraConfig(r=2, init_lora_weights=False, **settings))


def plan(
    layout: Layout,
    *,
    layers: int = 4,
    num_microbatches: int = 8,
    schedule: str = "1f1b",
    chunks: int = 1,
    placement: str = "disjoint",
    checkpointing: bool = False,
    encoder: tuple[int, ...] = (1,),
    tp: int = 1,
    vision_tp: int = 1,
    **settings: Any,
) -> Plan:
    """A plan of (vision replicas, LLM pipeline ranks, LLM replicas), its layers spread unevenly where possible;
    `encoder` layers of each stage of the encoder; `tp`: tensor-parallel ranks of the LLM."""
    vision_dp, pp, dp = layout
    stages = pp * chunks
    spread = [layers // stages] * stages
    if stages > 1 and spread[0] > 1:
        spread[0], spread[1] = spread[0] + 1, spread[1] - 1
    return Plan(
        vision=ModulePlan(
            layers=encoder,
            dp=dp if placement != "disjoint" else vision_dp,
            tp=vision_tp,
            checkpointing=checkpointing,
        ),
        llm=ModulePlan(layers=tuple(spread), dp=dp, tp=tp, num_chunks=chunks, checkpointing=checkpointing),
        num_microbatches=num_microbatches,
        schedule=schedule,
        placement=placement,
        **settings,
    )


@functools.cache
def rows_of(family: str) -> list[dict[str, Any]]:
    """The family's rows; their images are the same in every process."""
    generator = np.random.default_rng(0)

    def seeded(image: dict[str, Any]) -> dict[str, Any]:
        size = Image.open(BytesIO(image["bytes"])).size[::-1]
        file = BytesIO()
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = families.rows_of(family)
    for row in rows:
        if "image" in row:
            row["image"] = seeded(row["image"])
        else:
            row["images"] = [seeded(image) for image in row["images"]]
    return rows


def cells_of(family: str, *, text_only: bool = False, few_shapes: bool = False) -> Cells:
    """Eight ragged cells: of several samples, of one, without images, and one without any sample. With `few_shapes`
    three are there several times: DTensor works out anew for each shape how its operators share out their work."""
    rows = rows_of(family)
    pictures = [row for row in rows if row.get("images") or row.get("image")]
    words = [row for row in rows if row not in pictures]
    if text_only:
        pictures = words * 2
    long, other, short = pictures[0], pictures[-2], pictures[-1]
    text = words[0] if words else pictures[1]
    if few_shapes:
        two, pair = [long, text], [other, short]
        return [two, pair, [text], [], two, [text], pair, two]
    return [[long, text], [short], [text], [], [other], [short, long, text], [text, text], [other, short]]


def shape_of(family: str, cells: Sequence[Cells], collate: Callable[..., Any]) -> StepShape:
    """Shapes by collating everything, as the shape columns would tell them. `cells[m][d]`."""
    token = collator(family).renderer.token.feature_id
    microbatches, labels = [], 0
    for replicas in cells:
        line = []
        for rows in replicas:
            if not rows:
                line.append(MicrobatchShape())
                continue
            features = []
            for row in rows:
                alone = collator(family)([row])
                features.append(int((alone["input_ids"] == token).sum()))
            batch = collate(rows)
            labels += int((batch["labels"][:, 1:] != -100).sum())
            line.append(
                MicrobatchShape(
                    rows=batch["input_ids"].shape[0], length=batch["input_ids"].shape[1], features=tuple(features)
                )
            )
        microbatches.append(tuple(line))
    return StepShape(microbatches=tuple(microbatches), label_tokens=labels)


def casting(collate: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(rows: Any) -> dict[str, Any]:
        return {k: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for k, v in collate(rows).items()}

    return cast


def deal(cells: Cells, dp: int) -> list[Cells]:
    """Cells in order → `[m][d]`."""
    return [cells[i : i + dp] for i in range(0, len(cells), dp)]


def batch_of(
    pipe: PipelineModel, dealt: Sequence[Cells], shape: StepShape, collate: Callable[..., Any], encode: Any = None
) -> StepBatch:
    """This rank's inputs; `encode` collates for the encoder where it is not `collate`."""

    def by(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda samples: function([dealt[m][d][i] for m, d, i in samples])

    return build_batch(shape, pipe.topology, pipe.place.rank, by(collate), by(encode or collate))


Gradients = dict[str, torch.Tensor | None]


def stock_gradients(
    built: Any, cells: Cells, collate: Callable[..., Any], label_tokens: int
) -> tuple[float, Gradients]:
    """Loss and gradients of the stock model over all cells, in one process."""
    total = 0.0
    for rows in cells:
        if rows:
            loss = built(**collate(rows), num_items_in_batch=torch.tensor(label_tokens)).loss
            if loss.requires_grad:  # text alone through a frozen LLM: nothing learns
                loss.backward()
            total += float(loss.detach())
    return total, {
        n: None if p.grad is None else p.grad.clone()
        for n, p in unwrap(built).named_parameters(remove_duplicate=False)
    }


def worst_error(pipe: PipelineModel, expected: Gradients) -> tuple[float, str]:
    """Largest relative difference over this rank's parameters, and where."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    worst, where = 0.0, ""
    for name, parameter in pipe.named_parameters():
        reference = expected[name]
        if (reference is None) != (parameter.grad is None):
            return float("inf"), f"{name}: gradient is {'missing' if parameter.grad is None else 'there'}"
        if reference is None or parameter.grad is None:
            continue
        scale = max(float(reference.abs().max()), FLOOR * largest)
        error = float((pipe.whole(name, parameter.grad) - reference).abs().max()) / scale
        if error > worst:
            worst, where = error, name
    return worst, where


def over_ranks(value: float, op: Any = dist.ReduceOp.MAX) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=op)
    return float(found)


def told(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank of the world."""
    made = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made)
    return made[0]


def covered(pipe: PipelineModel) -> bool:
    """Whether the ranks together hold every parameter of the model."""
    names: list[Any] = [None] * pipe.plan.num_ranks
    dist.all_gather_object(names, [n for n, _ in pipe.named_parameters(remove_duplicate=False)])
    return set(pipe.stock_names) <= {name for rank in names for name in rank}


def keep_float64() -> None:
    """Let `.float()` keep float64: models compute norms and the loss through it in float32, whatever their type.

    What is summed over samples in float32 (the weight of Gemma's norm) depends on their grouping by 1e-8 or so, which
    would hide what a float64 run is to show. The stock run is under it too.
    """
    stock = torch.Tensor.float
    torch.Tensor.float = lambda self, *a, **k: self if self.dtype == torch.float64 else stock(self, *a, **k)
    product = torch.Tensor.__matmul__  # of float64 frequencies and float32 positions, before transformers 5.18
    torch.Tensor.__matmul__ = lambda self, other: product(
        *((self, other) if self.dtype == other.dtype else (self.double(), other.double()))
    )


class Worlds:
    """Worlds of the first n launched processes, one after the other."""

    def __init__(self, timeout_s: float = 300) -> None:
        self.timeout_s = timeout_s
        torch.set_num_threads(1)
        keep_float64()
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
        self.store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=self.rank == 0 and not hosted,
            wait_for_workers=False,
        )
        self.count = 0

    @contextlib.contextmanager
    def of(self, size: int) -> Iterator[bool]:
        """A default process group of `size` ranks; gives whether this process is one of them."""
        self.count += 1
        inside = self.rank < size
        if inside:
            store = dist.PrefixStore(f"world{self.count}", self.store)
            timeout = datetime.timedelta(seconds=self.timeout_s)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=size, timeout=timeout)
        try:
            yield inside
        finally:
            if inside:
                dist.destroy_process_group()
