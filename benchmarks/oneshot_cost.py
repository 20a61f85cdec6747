"""Time and memory of one-shot pruning, beside a straightforward implementation in one process.

The straightforward one follows the papers' pseudocode: hooks on every linear layer, a Hessian for
each, one window at a time, the block once more when it is pruned. Both start from the same dense
model and take turns::

    python benchmarks/oneshot_cost.py MODEL --text train.jsonl --save benchmarks/results
"""

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import NMPattern, TextDataModule
from sparsify.calibration import Calibration, Layerwise
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import make_strategy
from sparsify.masking.select import decoder_blocks
from sparsify.models.base import BaseModel, load_model, load_tokenizer

PATTERN = NMPattern(2, 4)
STRATEGIES: dict[str, dict[str, Any]] = {"wanda": {}, "sparsegpt": {"update_weights": True}}


def resident() -> int:
    """Bytes of this process in main memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@contextmanager
def peak_memory():
    """Watch resident memory; yields a list whose last entry is the highest value."""
    seen, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(max(seen[-1], resident()))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


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
def straightforward(model: Any, windows: Tensor, name: str) -> None:
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


def measure(make: Callable[[], Any], run: Callable[..., None], *args: Any) -> dict[str, float]:
    """Seconds, and bytes above what was resident when the model had been loaded."""
    model = make()
    before = resident()
    with peak_memory() as seen:
        start = time.perf_counter()
        run(model, *args)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "above_model": seen[-1] - before, "resident": seen[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", help="the default is the embedded text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    data = TextDataModule(
        train=args.text, block_size=args.block_size, tokenizer=load_tokenizer(args.model)
    )
    data.setup("fit")
    windows = data.calibration(args.samples)

    def make() -> Any:
        return load_model(args.model)

    model_bytes = sum(p.nbytes for p in make().parameters())
    results: dict[str, Any] = {
        "model": Path(args.model).name,
        "model_bytes": model_bytes,
        "samples": args.samples,
        "block_size": args.block_size,
        "threads": torch.get_num_threads(),
        "date": str(date.today()),
        "versions": {p: version(p) for p in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "strategies": {},
    }
    for name in STRATEGIES:
        turns = {"ours": [], "straightforward": []}
        for _ in range(args.turns):
            for label, function in (("ours", ours), ("straightforward", straightforward)):
                turns[label].append(measure(make, function, windows, name))
                print(name, label, {k: round(v, 1) for k, v in turns[label][-1].items()})
        ratio = statistics.median(r["seconds"] for r in turns["ours"]) / statistics.median(
            r["seconds"] for r in turns["straightforward"]
        )
        worst = max(r["resident"] for r in turns["ours"]) - model_bytes
        print(f"{name}: {ratio:.2f} of the time; peak resident = model + {worst / 2**30:.2f} GiB")
        results["strategies"][name] = turns | {"time_ratio": ratio, "peak_above_model_bytes": worst}
    if args.save is not None:
        args.save.mkdir(parents=True, exist_ok=True)
        path = args.save / f"oneshot_cost-{date.today()}.json"
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"saved {path}")


if __name__ == "__main__":
    main()
