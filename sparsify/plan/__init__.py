"""How much memory a run will take, part by part, before anything is loaded."""

from sparsify.plan.dry_run import DryRun, dry_run
from sparsify.plan.estimate import Estimate, estimate
from sparsify.plan.report import to_dict, to_table
from sparsify.plan.search import Plan, make_plan
from sparsify.plan.settings import PlanSettings

__all__ = [
    "DryRun",
    "Estimate",
    "Plan",
    "PlanSettings",
    "dry_run",
    "estimate",
    "make_plan",
    "to_dict",
    "to_table",
]
