"""The parts of ``gpu_check.py`` that learn: the cost of a step, and that a GPU learns what a CPU
learns.
"""

import csv
import gc
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cost_steps import TINY, DenseStep, LearningStep, Shapes
from gpu_serving import Report
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsify
from sparsify.data import TextDataModule
from sparsify.masking.registry import make_strategy
from sparsify.models.base import EMBEDDED_FOLDER

STRATEGIES = ("maskllm", "selfmask", "maskpro")
LLAMA_2_7B = Shapes(4096, 11008, 32, 32, windows=1, window=2048, device="cuda", dtype="bfloat16")
OF_LLAMA = 32
FEW = (1, 3)
TIMED = 3
# Sums are added in another order on a GPU, and what that changes in the losses grows with steps. On
# one CPU, another implementation of attention changed the first four losses by less than 2e-7, and
# the 56 after them by 2.0e-3 (median) and 1.3e-2 at most.
FIRST, LATER, MEAN = 1e-4, 3e-2, 1e-2


def steps(tiny: bool, report: Report) -> None:
    """Seconds and peak bytes of a step, dense and of some strategies, for a few blocks. From the
    difference of two numbers of blocks follows what all blocks take, by a straight line. Embedding
    and head are not in it: the vocabulary has 64 entries.
    """
    shapes = TINY if tiny else LLAMA_2_7B
    counts = (1, 2) if tiny else FEW
    report.add("shapes", vars(shapes))
    for name in ("dense", *STRATEGIES):
        found = []
        for blocks in counts:
            found.append(step_cost(name, replace(shapes, blocks=blocks)))
            report.add(name, f"{blocks} blocks", found[-1])
        report.add(name, f"{OF_LLAMA} blocks, extrapolated", extrapolated(counts, found))


def step_cost(name: str, shapes: Shapes) -> dict[str, float]:
    """Of one step with its update: median seconds, and on a GPU the largest memory."""
    cuda = shapes.device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        gc.collect()  # what the step before has left
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step: Any = DenseStep(shapes) if name == "dense" else LearningStep(name, shapes)
    tokens = torch.randint(0, 64, (shapes.windows, shapes.window)).to(shapes.device)
    times = []
    for turn in range(TIMED + 1):  # the first allocates and compiles, and does not count
        wait()
        begin = time.perf_counter()
        step.backward(tokens, turn)
        step.update()
        wait()
        times.append(time.perf_counter() - begin)
    peak = {"peak_bytes": float(torch.cuda.max_memory_allocated())} if cuda else {}
    return {"seconds": statistics.median(times[1:])} | peak


def extrapolated(counts: tuple[int, int], found: list[dict[str, float]]) -> dict[str, float]:
    """What all blocks take, on the line through two numbers of blocks."""
    (few, more), (first, second) = counts, found
    return {
        key: first[key] + (second[key] - first[key]) / (more - few) * (OF_LLAMA - few)
        for key in first
    }


def learning(tiny: bool, report: Report) -> None:
    """The losses of some steps on the embedded model, on the GPU and then on the CPU."""
    count = 2 if tiny else 60
    here = losses("cpu" if tiny else "gpu", count)
    report.add("losses", here)
    there = losses("cpu", count)
    report.add("losses_on_cpu", there)
    report.add("comparison", compared(here, there))


def losses(accelerator: str, count: int) -> list[float]:
    """The loss of each step."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    text = EMBEDDED_FOLDER / "text" / "shakespeare" / "validation.jsonl.gz"
    data = TextDataModule(train=text, block_size=128, batch_size=4)
    with TemporaryDirectory() as folder:
        settings = {
            "accelerator": accelerator,
            "devices": 1,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "logger": CSVLogger(folder),
            "default_root_dir": folder,
        }
        strategy = make_strategy("selfmask", prior="magnitude")
        sparsify.sparsify(model, strategy, data, tokenizer, steps=count, trainer=settings)
        [file] = Path(folder).rglob("metrics.csv")
        with file.open() as rows:
            found = [float(row["train/loss"]) for row in csv.DictReader(rows) if row["train/loss"]]
    return found


def compared(here: list[float], there: list[float]) -> dict[str, Any]:
    """Relative differences, and whether they can be those of rounding."""
    shares = [abs(a - b) / b for a, b in zip(here, there, strict=True)]
    found = {
        "first_difference": shares[0],
        "largest_difference": max(shares),
        "difference_of_means": abs(sum(here) - sum(there)) / sum(there),
    }
    tolerances = [FIRST, LATER, MEAN]
    equal = all(one <= most for one, most in zip(found.values(), tolerances, strict=True))
    return {**found, "tolerances": tolerances, "equal": equal}
