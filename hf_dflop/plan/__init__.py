"""Planning: layouts of a model over ranks and of a step over time, and how long a step takes, without torch."""

from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.calibration import Calibration
from hf_dflop.plan.check_order import check_order, dry_run
from hf_dflop.plan.choose_order import ChosenOrder, choose_order, data_aware_order
from hf_dflop.plan.cluster import GPUS, Cluster, Gpu, NodeGroup
from hf_dflop.plan.compiled import CompiledOrder, batch_seconds, compile_order, compile_schedule, step_seconds
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.fit_memory import MemoryRule
from hf_dflop.plan.make_plan import Planning, Score, make_plan
from hf_dflop.plan.network import Communication, Network
from hf_dflop.plan.orders import ORDERS, format_order, make_order, parse_order, stage_ranks
from hf_dflop.plan.plan import PLACEMENTS, PLAN_SCHEMA_VERSION, SCHEDULES, ModulePlan, Plan
from hf_dflop.plan.simulate import simulate_order
from hf_dflop.plan.simulation import Simulation
from hf_dflop.plan.step import PlannedStep, plan_step
from hf_dflop.plan.timeline import CAUSES, TimedAction, Timeline

__all__ = [
    "CAUSES",
    "GPUS",
    "ORDERS",
    "PLACEMENTS",
    "PLAN_SCHEMA_VERSION",
    "SCHEDULES",
    "Action",
    "Calibration",
    "ChosenOrder",
    "Cluster",
    "Communication",
    "CompiledOrder",
    "Durations",
    "Gpu",
    "Kind",
    "MemoryRule",
    "ModulePlan",
    "Network",
    "NodeGroup",
    "Order",
    "Plan",
    "PlannedStep",
    "Planning",
    "Score",
    "Simulation",
    "TimedAction",
    "Timeline",
    "batch_seconds",
    "check_order",
    "choose_order",
    "compile_order",
    "compile_schedule",
    "data_aware_order",
    "dry_run",
    "format_order",
    "make_order",
    "make_plan",
    "parse_order",
    "plan_step",
    "simulate_order",
    "stage_ranks",
    "step_seconds",
]
