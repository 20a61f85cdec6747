"""What options may be, for signatures whose help must not wait for PyTorch."""

from typing import Literal

EMBEDDED = "embedded"  # the model that is named by nothing else

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["32-true", "bf16-mixed"]
Device = Literal["cpu", "cuda"]

# Fang et al. 2024 (arXiv 2409.17481), table 1: accuracy without examples in context.
PAPER_TASKS = (
    "hellaswag",
    "race",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
)
