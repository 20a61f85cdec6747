"""Time and memory of a learning step of every strategy that learns, beside a dense one.

In fp32, on random weights of SmolLM2-135M's shapes and 2,048 tokens in windows of 512. A dense step
is forward, and backward to all inputs and to the weights of the blocks' linear layers. Four blocks
are measured, with a vocabulary so small that the head takes no time; the head with cross-entropy is
measured apart. From both follows the time of all 30 blocks and the head, but not for strategies
that run the model several times a step.

Memory is that of all tensors beyond the model, for each masked weight, in a step of one window of
16 tokens: what activations take follows from the tokens, and ``sparsify plan`` tells it. Held is
what remains between steps.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import yaml
from measuring import Contestant, allocated, in_turns, linear_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsify import Draw, LayerResult
from sparsify.masking.distillation import Distillation
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import STRATEGIES, find_strategy, make_strategy, plugins
from sparsify.models.base import BaseModel
from sparsify.models.perplexity import mean_loss, token_losses
from sparsify.training.optimizers import adamw, make
from sparsify.training.step import BatchRun

# A strategy's name, and an argument where it is not the default.
MORE = ["maskllm:hard=true", "selfmask:dtype=bfloat16"]
# Those that are measured with a dense teacher too, whose blocks' outputs count 0.2.
TAUGHT = ["selfmask", "maskllm"]
NONE = Distillation()
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

    def __init__(self, name: str, shapes: Shapes, distillation: Distillation = NONE) -> None:
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


def take(step: Any, tokens: Tensor, turn: int) -> None:
    """A whole step, of any of these."""
    step.backward(tokens, turn)
    step.update()


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
            step = LearningStep(name, TINY)
            found += [name] if step.params else []
    return found


def memory(maker: Callable[[Shapes], Any], shapes: Shapes) -> dict[str, float]:
    """Bytes a masked weight beyond the model: at the peak of the second step, and after it."""
    shapes = replace(shapes, windows=1, window=16)
    tokens = torch.randint(0, 64, (shapes.windows, shapes.window))

    def prepare() -> Callable[[], None]:
        step = maker(shapes)
        take(step, tokens, 0)  # makes the optimizer's state
        return partial(take, step, tokens, 1)

    peak, held = allocated(prepare)
    model = model_of(shapes)
    base, masked = sum(p.nbytes for p in model.parameters()), linear_weights(model)
    return {"peak_bytes": (peak - base) / masked, "held_bytes": (held - base) / masked}


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """CPU seconds of all steps in turns, and their bytes a weight."""
    shapes = TINY if quick else Shapes()
    taught = Distillation(1.0, hidden=0.2)
    makers: dict[str, Callable[[Shapes], Any]] = {"dense": DenseStep}
    makers |= {name: partial(LearningStep, name) for name in [*learned(), *MORE]}
    makers |= {f"{n}, teacher": partial(LearningStep, n, distillation=taught) for n in TAUGHT}
    heads = {"head": HeadStep(shapes, NONE), "head, teacher": HeadStep(shapes, Distillation(1.0))}
    steps = {name: maker(shapes) for name, maker in makers.items()} | heads
    tokens = torch.randint(0, 64, (shapes.windows, shapes.window))
    turns: dict[tuple[str, str], Contestant] = {}
    for name, step in steps.items():
        turns[name, "backward"] = lambda turn, step=step: partial(step.backward, tokens, turn)
        turns[name, "update"] = lambda _, step=step: step.update
    times = in_turns(turns, rounds)
    pairs = {name: [times[name, "backward"], times[name, "update"]] for name in steps}
    several = {name for name, step in steps.items() if getattr(step, "several", False)}
    rows = summary(pairs, BLOCKS / shapes.blocks, several)
    for name, maker in makers.items():
        rows[name] |= memory(maker, shapes)
    return {"shapes": vars(shapes), "rows": rows}


def summary(
    times: dict[str, list[list[float]]], blocks: float, several: set[str]
) -> dict[str, dict[str, Any]]:
    """Medians, and shares of the dense forward and backward.

    Args:
        times: of [backward, update], the seconds of every round.
        blocks: how many times the measured blocks a whole model has.
        several: those that run the model several times.
    """
    medians = {name: [statistics.median(part) for part in parts] for name, parts in times.items()}
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
