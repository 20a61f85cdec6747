"""How much memory and time a run will take, part by part, before anything is loaded."""

from sparsify.training.plan.dry_run import DryRun, dry_run
from sparsify.training.plan.estimate import Estimate, estimate
from sparsify.training.plan.report import to_dict, to_table
from sparsify.training.plan.search import Plan, make_plan
from sparsify.training.plan.settings import PlanSettings, of_trainer

__all__ = [
    "DryRun",
    "Estimate",
    "Plan",
    "PlanSettings",
    "dry_run",
    "estimate",
    "make_plan",
    "of_trainer",
    "to_dict",
    "to_table",
]
