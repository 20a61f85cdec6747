"""The values that options may take, in a file that can be imported without PyTorch."""

from typing import Literal

EMBEDDED = "embedded"  # the name of the model that comes with the package

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["32-true", "bf16-mixed"]
Device = Literal["cpu", "cuda"]

# Fang et al. 2024 (arXiv 2409.17481), table 1: zero-shot accuracy.
PAPER_TASKS = (
    "hellaswag",
    "race",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
