"""`hf-dflop simulate`: what a plan's steps take on a dataset, where ranks wait, and how near that is to a real run."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_dflop.errors import DatasetError, ModelError, PlanError

if TYPE_CHECKING:
    from hf_dflop.cost import CostModel
    from hf_dflop.plan import Calibration, Network
    from hf_dflop.profile.report import DatasetProfile

__all__ = ["simulate"]

CALIBRATION_NAME = "calibration.json"


def simulate(
    plan: Annotated[
        Path, typer.Option("--plan", help="The plan: JSON that `hf-dflop plan` wrote or a person edited.")
    ],
    profile: Annotated[Path, typer.Option("--profile", help="Folder that `hf-dflop profile --output` wrote.")],
    cost_model: Annotated[
        Path | None, typer.Option(help="Measured costs (JSON); without it, FLOPs at the speeds below.")
    ] = None,
    vision_tflops: Annotated[float, typer.Option(help="Achieved TFLOP/s of a GPU in the encoder.")] = 150.0,
    llm_tflops: Annotated[float, typer.Option(help="Achieved TFLOP/s of a GPU in the LLM.")] = 250.0,
    intra_gbytes: Annotated[
        float | None, typer.Option(help="GB/s between GPUs of a node; without it nothing that is sent takes time.")
    ] = None,
    inter_gbytes: Annotated[
        float | None, typer.Option(help="GB/s between GPUs of different nodes; by default as inside.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    latency_us: Annotated[float, typer.Option(help="Microseconds that a message takes at least.")] = 10.0,
    optimizer_ms: Annotated[float, typer.Option(help="Milliseconds of clipping and the optimizer.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Global batches to draw.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace (JSON) that ui.perfetto.dev opens.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a timeline that zooms.")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Compare with a recorded run: folder of its trace files.")
    ] = None,
    save_calibration: Annotated[
        bool,
        typer.Option(
            "--save-calibration", help=f"Save the fit to the run as {CALIBRATION_NAME} in the profile's folder."
        ),
    ] = False,
    no_calibration: Annotated[
        bool, typer.Option("--no-calibration", help="Leave a saved calibration out of account.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object to stdout, and nothing else.")
    ] = False,
) -> None:
    """Simulate training steps of a plan on a dataset, without a GPU and without torch.

    Draws global batches from the profile, composes their microbatches as the run would, and plays them action by
    action. Prints the step's seconds, and for each rank how long it computes and why it waits: imbalance, fill and
    drain of the pipeline, communication, data. With `--against`, recorded steps are compared with their simulation.

    **Examples**

    `hf-dflop simulate --plan plan.json --profile out --html timeline.html`

    `hf-dflop simulate --plan plan.json --profile out --against run/trace --save-calibration`
    """
    from hf_dflop.plan.compare_run import compare_run
    from hf_dflop.plan.page import timeline_page
    from hf_dflop.plan.plan import Plan
    from hf_dflop.plan.recorded import recorded_steps
    from hf_dflop.plan.simulation import simulate as run
    from hf_dflop.plan.trace_events import chrome_trace, recorded_events, simulated_events
    from hf_dflop.profile.report import DatasetProfile

    if save_calibration and against is None:
        raise PlanError("--save-calibration needs a run to calibrate with: add --against RUN.")
    if not plan.is_file():
        raise PlanError(f"--plan {plan} is not a file.")
    for path in (trace, html):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise PlanError(f"{path} cannot be written: it is a folder, or its folder is not there.")
    layout = Plan.load(plan)
    found = DatasetProfile.load(profile)
    cost = _cost(found, cost_model, vision_tflops, llm_tflops)
    network = _network(intra_gbytes, inter_gbytes, gpus_per_node, latency_us)
    calibration = None if no_calibration else _calibration(profile / CALIBRATION_NAME, cost, quiet=as_json)
    optimizer_s = optimizer_ms / 1e3
    recorded = recorded_steps(against) if against is not None else []
    with _progress(steps, quiet=as_json) as advance:
        simulation = run(
            layout,
            found,
            cost,
            communication=network,
            num_steps=steps,
            optimizer_s=optimizer_s,
            calibration=calibration,
            seed=seed,
            progress=advance,
        )
    comparison = None
    if recorded:
        assert found.shapes is not None
        comparison = compare_run(
            layout,
            recorded,
            found.shapes,
            cost,
            communication=network,
            optimizer_s=optimizer_s,
            calibration=calibration,
        )
    shown = simulation if comparison is None else comparison.replayed
    # everything is computed before anything is written
    written: dict[Path, str] = {}
    if trace is not None:
        events = [*simulated_events(shown), *recorded_events(recorded, layout)]
        written[trace] = json.dumps(chrome_trace(events)) + "\n"
    if html is not None:
        written[html] = timeline_page(shown, recorded=recorded, comparison=comparison)
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    if save_calibration and comparison is not None and comparison.helps:
        comparison.calibration.save(profile / CALIBRATION_NAME)
    if as_json:
        told: dict[str, Any] = simulation.to_dict()
        if comparison is not None:
            told["comparison"] = comparison.to_dict()
        print(json.dumps(told))
        return
    print(simulation.summary())
    if comparison is not None:
        print()
        print(comparison.summary())
        if not comparison.helps:
            print("the fit does not reduce the error of steps that it has not seen: record more steps")
        elif save_calibration:
            print(f"calibration: {profile / CALIBRATION_NAME}")
        else:
            print("save the fit for the next simulation with --save-calibration")
    for path in written:
        print(f"written: {path}")


def _cost(profile: "DatasetProfile", path: Path | None, vision_tflops: float, llm_tflops: float) -> "CostModel":
    from hf_dflop.cost import CostModel

    if path is not None:
        if not path.is_file():
            raise ModelError(f"--cost-model {path} is not a file.")
        try:
            return CostModel.load(path)
        except json.JSONDecodeError as error:
            raise ModelError(f"--cost-model {path} is not JSON ({error}).") from error
    if profile.spec is None:
        raise DatasetError(
            "the profile does not know its model's structure, so FLOPs cannot be counted; pass --cost-model, or "
            "profile the dataset again with a model whose config is known."
        )
    return CostModel.analytic(profile.spec, vision_flops_per_s=vision_tflops * 1e12, llm_flops_per_s=llm_tflops * 1e12)


def _network(intra: float | None, inter: float | None, gpus_per_node: int, latency_us: float) -> "Network | None":
    from hf_dflop.plan import Network

    if intra is None:
        if inter is not None:
            raise PlanError("--inter-gbytes needs --intra-gbytes beside it.")
        return None
    return Network(
        intra_bytes_per_s=intra * 1e9,
        inter_bytes_per_s=(intra if inter is None else inter) * 1e9,
        gpus_per_node=gpus_per_node,
        latency_s=latency_us * 1e-6,
    )


def _calibration(path: Path, cost: "CostModel", *, quiet: bool) -> "Calibration | None":
    from hf_dflop.plan import Calibration

    if not path.is_file():
        return None
    calibration = Calibration.load(path)
    fits = calibration.cost_version in (None, cost.version)
    if not quiet:
        told = (
            f"with {path}" if fits else f"without {path}: it corrects another cost model ({calibration.cost_version})"
        )
        print(told, file=sys.stderr)
    return calibration if fits else None


class _progress:
    """A progress bar where someone watches."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task("steps", total=total)

    def __enter__(self) -> Any:
        self._bar.start()
        return lambda done: self._bar.update(self._task, completed=done)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
