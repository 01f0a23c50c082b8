"""Planning: layouts of a model over ranks and of a step over time, and how long a step takes, without torch."""

from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.check_order import check_order, dry_run
from hf_dflop.plan.choose_order import ChosenOrder, choose_order, data_aware_order
from hf_dflop.plan.compiled import CompiledOrder, batch_seconds, compile_order, compile_schedule, step_seconds
from hf_dflop.plan.durations import Durations
from hf_dflop.plan.orders import ORDERS, format_order, make_order, parse_order, stage_ranks
from hf_dflop.plan.plan import PLACEMENTS, PLAN_SCHEMA_VERSION, SCHEDULES, ModulePlan, Plan
from hf_dflop.plan.simulate import simulate_order
from hf_dflop.plan.timeline import CAUSES, TimedAction, Timeline

__all__ = [
    "CAUSES",
    "ORDERS",
    "PLACEMENTS",
    "PLAN_SCHEMA_VERSION",
    "SCHEDULES",
    "Action",
    "ChosenOrder",
    "CompiledOrder",
    "Durations",
    "Kind",
    "ModulePlan",
    "Order",
    "Plan",
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
    "parse_order",
    "simulate_order",
    "stage_ranks",
    "step_seconds",
]
