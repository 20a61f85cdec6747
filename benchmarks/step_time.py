"""Time of a learning step of every strategy that learns, as a share of a dense one.

All take turns in one process, on one thread, in fp32: random weights of SmolLM2-135M's shapes,
2,048 tokens in windows of 512. Medians of the process's CPU seconds are compared, because a machine
may do other work beside::

    python benchmarks/step_time.py --save benchmarks/results

A dense step is forward, and backward to all inputs and to the weights of the blocks' linear layers.
Four blocks are measured, with a vocabulary so small that the head takes no time; the head with
cross-entropy is measured apart. From both follows the time of all 30 blocks and the head, but not
for strategies that run the model several times a step. ``NAME`` is a strategy's, or
``NAME:ARGUMENT=VALUE`` for one with a setting.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from kept_runs import save
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import Draw, LayerResult
from sparsify.common.machine import cpu_name
from sparsify.masking.distillation import Distillation
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import STRATEGIES, find_strategy, make_strategy, plugins
from sparsify.models.base import BaseModel
from sparsify.models.perplexity import mean_loss, token_losses
from sparsify.training.optimizers import adamw, make
from sparsify.training.step import BatchRun

MORE = ["maskllm:hard=True"]
BLOCKS = 30


@dataclass(frozen=True)
class Shapes:
    """SmolLM2-135M's, except for the number of blocks."""

    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    blocks: int = 4
    windows: int = 4
    window: int = 512
    device: str = "cpu"
    dtype: str = "float32"


TINY = Shapes(32, 64, 4, 2, 128, 1, 2, 16)


def model_of(shapes: Shapes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.blocks,
        num_attention_heads=shapes.heads,
        num_key_value_heads=shapes.kv_heads,
        tie_word_embeddings=True,
    )
    with torch.device(shapes.device):
        return LlamaForCausalLM(config).eval().to(getattr(torch, shapes.dtype))


class DenseStep:
    """A plain training step of the blocks' linear weights."""

    def __init__(self, shapes: Shapes) -> None:
        self.model = model_of(shapes).requires_grad_(False)
        linears = [m for m in self.model.model.modules() if isinstance(m, nn.Linear)]
        self.params = [linear.weight.requires_grad_() for linear in linears]
        self.optimizer = adamw(self.params)

    def backward(self, tokens: Tensor, step: int) -> None:
        logits = self.model(input_ids=tokens, use_cache=False).logits
        mean_loss(token_losses(logits, tokens), None).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class LearningStep:
    """A step of a strategy, as a run takes it; the masks start from magnitude's."""

    def __init__(self, name: str, shapes: Shapes, distillation: Distillation) -> None:
        strategy = strategy_of(name)
        model = model_of(shapes)
        self.teacher = None
        if distillation.weight and strategy.effect.trains_base:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.distillation = distillation
        self.masked = MaskedModel(BaseModel(model, "", model.dtype, ""), strategy)
        self.masked.calibrate(
            (n, LayerResult(layer.masker.pattern.top(layer.weight_OI.detach().abs())))
            for n, layer in self.masked.layers.items()
        )
        self.several = strategy.effect.without_gradients
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make(self.masked, self.params, adamw) if self.params else None

    def backward(self, tokens: Tensor, step: int) -> None:
        strategy = self.masked.strategy
        run = BatchRun(self.masked, tokens, Draw(0, step, 0), self.distillation, self.teacher)
        loss = strategy.loss(run)
        if strategy.effect.without_gradients:
            loss = loss.detach().requires_grad_()
        loss.backward()

    def update(self) -> None:
        strategy, optimizer = self.masked.strategy, self.optimizer
        strategy.before_step(self.masked.maskers)
        optimizer.step(lambda: 0.0)
        strategy.after_step(self.masked.maskers, optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()


class HeadStep:
    """The head alone: its gradient reaches its input, its weight is frozen."""

    def __init__(self, shapes: Shapes, distillation: Distillation) -> None:
        self.head = nn.Linear(shapes.hidden, shapes.vocabulary, bias=False).requires_grad_(False)
        self.x = torch.randn(shapes.windows, shapes.window, shapes.hidden, requires_grad=True)
        self.distillation = distillation

    def backward(self, tokens: Tensor, step: int) -> None:
        logits = self.head(self.x)
        loss = mean_loss(token_losses(logits, tokens), None)
        if self.distillation.weight:
            loss = self.distillation.mix(loss, logits, self.head(self.x.detach()), None)
        loss.backward()

    def update(self) -> None:
        self.x.grad = None


def strategy_of(name: str) -> Any:
    short, _, setting = name.partition(":")
    options = {}
    if setting:
        argument, _, value = setting.partition("=")
        options[argument] = yaml.safe_load(value)
    return make_strategy(short, **options)


def learned() -> list[str]:
    """The strategies that learn, with default settings."""
    found = []
    for name in plugins(STRATEGIES):
        if find_strategy(name)().effect.prunes:
            step = LearningStep(name, TINY, Distillation())
            found += [name] if step.params else []
    return found


def seconds(function: Callable[..., Any], *args: Any) -> float:
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def measure(
    names: list[str], shapes: Shapes, rounds: int, weights: list[float] = [0.0]
) -> dict[str, Any]:
    """CPU seconds of all steps, after one round that does not count.

    Args:
        names: the strategies.
        weights: of the divergence from a teacher, whose blocks' outputs count 0.2; 0 is without.
    """
    tokens = torch.randint(0, 64, (shapes.windows, shapes.window))
    steps: dict[str, Any] = {"dense": DenseStep(shapes)}
    for weight in weights:
        label, teacher = (", teacher" if weight else ""), Distillation(weight)
        blocks = Distillation(weight, hidden=0.2 if weight else 0.0)
        steps |= {name + label: LearningStep(name, shapes, blocks) for name in names}
        steps["head" + label] = HeadStep(shapes, teacher)
    several = {name for name, step in steps.items() if getattr(step, "several", False)}
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            now = [seconds(step.backward, tokens, turn), seconds(step.update)]
            times[name] += [now] if turn else []
    return {
        "shapes": vars(shapes),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "versions": {p: version(p) for p in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "steps": summary(times, BLOCKS / shapes.blocks, several),
    }


def summary(
    times: dict[str, list[list[float]]], blocks: float, several: set[str]
) -> dict[str, dict[str, Any]]:
    """Medians, and shares of the dense forward and backward.

    Args:
        times: [backward, update] of every round.
        blocks: how many times the measured blocks a whole model has.
        several: those that run the model several times.
    """
    medians = {
        n: [statistics.median(part) for part in zip(*t, strict=True)] for n, t in times.items()
    }
    dense, _ = medians["dense"]
    whole_dense = blocks * dense + medians["head"][0]
    found: dict[str, dict[str, Any]] = {}
    for name, (backward, update) in medians.items():
        found[name] = {"backward": backward, "update": update, "times": times[name]}
        if name.startswith("head"):
            continue
        found[name] |= {
            "blocks": backward / dense,
            "blocks_with_update": (backward + update) / dense,
        }
        if name in several:
            continue
        head, _ = medians["head, teacher" if name.endswith(", teacher") else "head"]
        found[name] |= {
            "whole": (blocks * backward + head) / whole_dense,
            "whole_with_update": (blocks * (backward + update) + head) / whole_dense,
        }
    return found


def table(result: dict[str, Any]) -> Table:
    shapes = result["shapes"]
    out = Table(title=f"a step of {shapes['windows'] * shapes['window']} tokens, dense = 1")
    out.add_column("step")
    heads = ("seconds", "optimizer", "blocks", "+ optimizer", "with head", "+ optimizer")
    for column in heads:
        out.add_column(column, justify="right")
    kinds = ("blocks", "blocks_with_update", "whole", "whole_with_update")
    for name, row in result["steps"].items():
        shares = [f"{row[kind]:.2f}" if kind in row else "" for kind in kinds]
        out.add_row(name, f"{row['backward']:.2f}", f"{row['update']:.2f}", *shares)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these strategies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=Shapes.blocks)
    parser.add_argument("--window", type=int, default=Shapes.window)
    parser.add_argument("--teacher", action="store_true", help="also measure with a dense teacher")
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = Shapes(blocks=args.blocks, windows=2048 // args.window, window=args.window)
    weights = [0.0, 1.0] if args.teacher else [0.0]
    result = measure(args.only or [*learned(), *MORE], shapes, args.rounds, weights)
    Console().print(table(result))
    save(result, args.save, "step_time")


if __name__ == "__main__":
    main()
