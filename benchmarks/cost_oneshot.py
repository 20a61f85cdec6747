"""Time and memory of one-shot pruning, beside a plain implementation.

The plain one follows the papers' pseudocode: hooks on every linear layer, a Hessian for each, one
window at a time, the block once more when it is pruned. Both start from the same dense model.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cost_steps import TINY, model_of
from measuring import allocated, in_turns, linear_weights
from torch import Tensor, nn

from sparsify import TextDataModule
from sparsify.calibration import Calibration, Layerwise
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import make_strategy
from sparsify.masking.select import decoder_blocks
from sparsify.models.base import BaseModel, load_model, load_tokenizer

STRATEGIES: dict[str, dict[str, Any]] = {"wanda": {}, "sparsegpt": {"update_weights": True}}


@torch.no_grad()
def ours(model: Any, windows: Tensor, name: str) -> None:
    """This package's engine, masks and weights applied as in a run."""
    strategy = make_strategy(name, **STRATEGIES[name])
    masked = MaskedModel(BaseModel(model, "", model.dtype, ""), strategy)
    settings = Calibration(samples=len(windows), cache=False)
    engine = Layerwise(masked, lambda: windows, settings, torch.device("cpu"))
    masked.calibrate(engine.run(strategy))
    masked.fold()


@torch.no_grad()
def plain(model: Any, windows: Tensor, name: str) -> None:
    """The papers' pseudocode."""
    blocks = list(decoder_blocks(model).values())
    inputs, keywords = [], {}

    class Caught(Exception):
        pass

    def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(args[0])
        keywords.update(kwargs)
        raise Caught

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        try:
            model(input_ids=window[None], use_cache=False)
        except Caught:
            continue
    hook.remove()
    for block in blocks:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        sums: dict[str, Tensor] = {}

        def add(layer_name: str, x: Tensor, sums: dict[str, Tensor] = sums) -> None:
            x = x.flatten(0, -2).float()
            found = x.square().sum(0) if name == "wanda" else x.T @ x
            sums[layer_name] = sums.get(layer_name, 0) + found

        hooks = [
            m.register_forward_pre_hook(lambda _, a, n=n: add(n, a[0])) for n, m in linears.items()
        ]
        for x in inputs:
            block(x, **keywords)
        for h in hooks:
            h.remove()
        for layer_name, linear in linears.items():
            if name == "wanda":
                drop = smallest(linear.weight.abs() * sums[layer_name].sqrt())
                linear.weight.data[drop] = 0
            else:
                linear.weight.data = obs(linear.weight.data, sums[layer_name])
        inputs = [first(block(x, **keywords)) for x in inputs]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def smallest(scores: Tensor) -> Tensor:
    """Where the two smallest of every four are."""
    groups = scores.unflatten(1, (-1, 4))
    index = groups.topk(2, dim=-1, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, index, True).flatten(1)


def obs(weight: Tensor, hessian: Tensor, width: int = 128) -> Tensor:
    """SparseGPT's pseudocode, column by column in runs of 128."""
    weight = weight.clone().float()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], width):
        end = min(start + width, weight.shape[1])
        part, errors = weight[:, start:end].clone(), torch.zeros(len(weight), end - start)
        mask = torch.zeros_like(part, dtype=torch.bool)
        u = factor[start:end, start:end]
        for i in range(end - start):
            if i % 4 == 0:
                score = part[:, i : i + 4] ** 2 / u.diagonal()[i : i + 4] ** 2
                mask[:, i : i + 4] = smallest(score)
            kept = part[:, i].clone()
            kept[mask[:, i]] = 0
            errors[:, i] = (part[:, i] - kept) / u[i, i]
            part[:, i:] -= errors[:, i : i + 1] @ u[i : i + 1, i:]
            part[:, i] = kept
        weight[:, start:end] = part
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


CONTESTANTS: dict[str, Callable[[Any, Tensor, str], None]] = {"ours": ours, "plain": plain}


def calibrate(model: Any, windows: Tensor, rounds: int) -> dict[str, dict[str, Any]]:
    """CPU seconds in turns, and the peak of all tensors beside the model for each masked weight."""
    cases = [(name, who) for name in STRATEGIES for who in CONTESTANTS]

    def fresh(name: str, who: str) -> Callable[[], None]:
        return partial(CONTESTANTS[who], copy.deepcopy(model), windows, name)

    times = in_turns({case: lambda _, case=case: fresh(*case) for case in cases}, rounds)
    medians = {case: statistics.median(seconds) for case, seconds in times.items()}
    size, weights = sum(p.nbytes for p in model.parameters()), linear_weights(model)
    rows: dict[str, dict[str, Any]] = {}
    for name, who in cases:
        peak, _ = allocated(partial(fresh, name, who))
        rows[f"{name}, {who}"] = {
            "seconds": medians[name, who],
            "share_of_plain": medians[name, who] / medians[name, "plain"],
            "peak_bytes": (peak - size) / weights,
            "times": times[name, who],
        }
    return rows


def measure(
    quick: bool, rounds: int, name: str, text: str | None, samples: int, window: int
) -> dict[str, Any]:
    """On a model and text (the command line's), or with ``quick`` on tiny random ones."""
    if quick:
        name, samples, window = "random", TINY.windows, TINY.window
        model, windows = model_of(TINY), torch.randint(0, 64, (samples, window))
    else:
        data = TextDataModule(train=text, block_size=window, tokenizer=load_tokenizer(name))
        data.setup("fit")
        model, windows = load_model(name), data.calibration(samples)
    size = {"masked_weights": linear_weights(model), "windows": samples, "window": window}
    return {"model": Path(name).name, **size, "rows": calibrate(model, windows, rounds)}
