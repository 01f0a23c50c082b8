"""`hf-dflop plan`: the best layout of a model on a cluster, for a profiled dataset."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_dflop.cli.progress import progress_bar
from hf_dflop.errors import ModelError, PlanError

if TYPE_CHECKING:
    from hf_dflop.cost import CostModel, ModelSpec
    from hf_dflop.plan import Cluster
    from hf_dflop.plan.make_plan import Planning

__all__ = ["plan"]


def plan(
    profile: Annotated[Path, typer.Option("--profile", help="Folder that `hf-dflop profile --output` wrote.")],
    global_batch_size: Annotated[int, typer.Option("--global-batch-size", min=1, help="Samples of a step.")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id, folder or config.json of the model; by default the one of the profile."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    gpu: Annotated[str, typer.Option(help="A preset; `--gpu list` shows them.")] = "H100-80GB",
    inter_gbytes: Annotated[float, typer.Option(help="GB/s from one GPU to one of another node, one way.")] = 50.0,
    achieved: Annotated[
        float | None, typer.Option(help="Share of the peak FLOP/s that training reaches in a layer.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster as JSON (mixed GPUs, own numbers) instead of the options above.")
    ] = None,
    cost_model: Annotated[Path | None, typer.Option(help="Measured costs (JSON) on the fastest GPU.")] = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option("--constraint", "-c", help="Such as vision.tp<=2, llm.pp==4, no-fsdp; repeatable."),
    ] = None,
    frozen: Annotated[
        list[str] | None, typer.Option(help="A module that is not trained: vision, connector, llm; repeatable.")
    ] = None,
    cached_features: Annotated[
        bool, typer.Option("--cached-features", help="A frozen encoder's features are read from disk.")
    ] = False,
    padded: Annotated[bool, typer.Option("--padded", help="Rows are padded to the longest, not packed.")] = False,
    stock_sampler: Annotated[
        bool, typer.Option("--stock-sampler", help="Microbatches as the stock sampler deals them.")
    ] = False,
    every_kind: Annotated[
        bool, typer.Option("--every-kind", help="Find the best of each kind too: DDP, FSDP, colocated, disjoint.")
    ] = False,
    changes: Annotated[
        bool, typer.Option("--what-if", help="Also plan with one node more, a frozen encoder, half the batch.")
    ] = False,
    price: Annotated[float | None, typer.Option(help="Price of a GPU-hour, any currency.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the batches.")] = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Choose tensor, pipeline and data parallelism of encoder and LLM for a dataset, without a GPU.

    Every layout on all GPUs of the cluster is bounded, and those that could win are simulated on global batches drawn
    from the profile, composed as the sampler composes them. Prints the winner, why others lose, and what limits it.

    **Examples**

    `hf-dflop plan --profile out --nodes 8 --gpu A100-80GB --global-batch-size 512 -o plan.json`

    `hf-dflop plan --profile out --global-batch-size 128 -c "llm.tp<=4" -c no-fsdp --price 2.5 --what-if`
    """
    from hf_dflop.plan.cluster import GPUS
    from hf_dflop.plan.make_plan import make_plan
    from hf_dflop.plan.what_if import what_if, what_if_text
    from hf_dflop.profile.report import DatasetProfile

    if gpu == "list":
        for one in GPUS.values():
            print(f"{one.name}: {one.memory_bytes / 2**30:.0f} GiB, {one.peak_flops_per_s / 1e12:.0f} TFLOP/s bf16")
        return
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise PlanError(f"{output} cannot be written: it is a folder, or its folder is not there.")
    machines = _cluster(cluster, nodes, gpus_per_node, gpu, inter_gbytes, achieved, price)
    found = DatasetProfile.load(profile)
    spec = _spec(model) if model is not None else found.spec
    if spec is None:
        raise ModelError("the profile does not know its model's structure; give --model.")
    with progress_bar("layouts", quiet=as_json) as advance:
        planning = make_plan(
            spec,
            found,
            machines,
            global_batch_size=global_batch_size,
            cost_model=_costs(cost_model),
            constraints=constraint or (),
            frozen=frozen or (),
            cached_features=cached_features,
            balance=not stock_sampler,
            padded=padded,
            every_kind=every_kind,
            seed=seed,
            progress=advance,
        )
        others = what_if(planning, found.shapes) if changes else []
    if output is not None:
        planning.plan.save(output)
    if as_json:
        told: dict[str, Any] = planning.to_dict()
        told["what_if"] = [
            {"change": one.name, "samples_per_s": one.samples_per_s, "plan": one.plan and one.plan.to_dict()}
            for one in others
        ]
        print(json.dumps(told))
        return
    _table(planning)
    print(planning.explain())
    if others:
        print("\n" + what_if_text(planning, others))
    if output is not None:
        print(f"\nwritten: {output}")


def _cluster(
    path: Path | None,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    inter_gbytes: float,
    achieved: float | None,
    price: float | None,
) -> "Cluster":
    from dataclasses import replace

    from hf_dflop.plan import GPUS, Cluster

    if path is not None:
        if not path.is_file():
            raise PlanError(f"--cluster {path} is not a file.")
        try:
            found = Cluster.load(path)
        except json.JSONDecodeError as error:
            raise PlanError(f"--cluster {path} is not JSON ({error}).") from error
        return found if price is None else replace(found, price_per_gpu_hour=price)
    device: Any = gpu
    if achieved is not None and gpu in GPUS:
        device = replace(GPUS[gpu], achieved=achieved)
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=device,
        inter_bytes_per_s=inter_gbytes * 1e9,
        price_per_gpu_hour=price,
    )


def _spec(model: str) -> "ModelSpec":
    from hf_dflop.cost import ModelSpec

    path = Path(model)
    if path.suffix == ".json" or (path / "config.json").is_file():
        file = path if path.suffix == ".json" else path / "config.json"
        if not file.is_file():
            raise ModelError(f"--model {model} is not a file.")
        try:
            return ModelSpec.from_config(json.loads(file.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ModelError(f"--model {model} is not JSON ({error}).") from error
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {model}: {str(error).splitlines()[0]}") from error
    return ModelSpec.from_config(config)


def _costs(path: Path | None) -> "CostModel | None":
    from hf_dflop.cost import CostModel

    if path is None:
        return None
    if not path.is_file():
        raise ModelError(f"--cost-model {path} is not a file.")
    return CostModel.load(path)


def _table(planning: "Planning") -> None:
    """Winner and rivals side by side."""
    from rich.console import Console
    from rich.table import Table

    from hf_dflop.plan.make_plan import describe_layout

    table = Table(title="Plans", title_justify="left")
    for name in ("step s", "95 % below", "waits", "GiB", "layout"):
        table.add_column(name, justify="left" if name == "layout" else "right", overflow="fold")
    rows = [(planning.plan, planning.score), *((other, score) for _, other, score in planning.rivals)]
    for other, score in rows[:10]:
        table.add_row(
            f"{score.mean_s:.3f}",
            f"{score.p95_s:.3f}",
            f"{score.idle_fraction:.0%}",
            f"{score.peak_bytes / 2**30:.1f}",
            describe_layout(other),
        )
    console = Console(file=sys.stdout)
    console = Console(file=sys.stdout, width=max(console.width, 100))
    console.print(table)
