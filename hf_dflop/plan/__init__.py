"""Planning: layouts of a model over ranks, without torch."""

from hf_dflop.plan.actions import Action, Kind, Order
from hf_dflop.plan.plan import PLACEMENTS, PLAN_SCHEMA_VERSION, SCHEDULES, ModulePlan, Plan

__all__ = [
    "PLACEMENTS",
    "PLAN_SCHEMA_VERSION",
    "SCHEDULES",
    "Action",
    "Kind",
    "ModulePlan",
    "Order",
    "Plan",
]
