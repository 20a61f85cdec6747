"""Options of ``sparsify fit`` for the rows of ``real_models.py``, in the order of the table."""

from embedded_table import ALLOWED, DISTILLED, NO_TEACHER, RUNS
from smollm2 import BY_MODULE, RECIPES

CONFIGS = RECIPES.parent
# The teacher of the recipe of selfmask.
SAME_TEACHER = ["--model.distillation.weight=1"]

# Rows of the embedded model, as they are.
ONE_SHOT = {
    name: RUNS[name]
    for name in (
        "dense",
        "magnitude",
        "wanda",
        "ria",
        "gblm",
        "pruner_zero",
        "dsnot",
        "sparsegpt",
        "sparsegpt, updated",
        "admm",
        "swaps",
        "swaps, refitted",
        "wanda, permuted",
        "wanda, budget",
    )
}


def recipe(name: str, *options: str) -> list[str]:
    return [f"--config={RECIPES / f'smollm2_{name}.yaml'}", *options]


def config(name: str, *options: str) -> list[str]:
    return [f"--config={CONFIGS / f'{name}.yaml'}", *options]


# The export of the row selfmask takes the place of {selfmask}, and what this search chose that of
# {budget}. It reads held-out C4, on which the rows are measured too.
BUDGETS = {"budget": ["--kept=0.5", "--strategy=wanda", *BY_MODULE, ALLOWED]}
SMOLLM2 = ONE_SHOT | {
    "maskpro": recipe("maskpro"),
    "maskllm": recipe("maskllm"),
    "maskllm, distilled": recipe("maskllm", *SAME_TEACHER),
    "selfmask": recipe("selfmask"),
    "selfmask, twice the steps": recipe("selfmask"),
    "selfmask, no teacher": recipe("selfmask", *NO_TEACHER),
    "selfmask, budget": recipe("selfmask", "--config={budget}"),
    "selfmask, then fixed_mask": recipe("fixed_mask", "--model.strategy.prior={selfmask}"),
    "sr_ste, distilled": recipe("sr_ste"),
}
EXPERTS = ("dense", "magnitude", "wanda", "sparsegpt", "sparsegpt, updated", "admm", "swaps")
MOE = {name: ONE_SHOT[name] for name in EXPERTS} | {
    "maskllm": config("maskllm"),
    "maskllm, distilled": config("maskllm", *DISTILLED),
    "selfmask": config("selfmask"),
    "selfmask, no teacher": config("selfmask", *NO_TEACHER),
}
# Of learned rows, where --steps does not say; a recipe may have its own.
STEPS = {"smollm2": 240, "moe": 300}
OWN_STEPS = {"maskpro": 40, "selfmask, twice the steps": 480}
