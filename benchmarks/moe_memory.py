"""Peak memory of calibrating one block of Qwen3-30B-A3B's shapes, with random weights.

    python benchmarks/moe_memory.py --strategy wanda --save benchmarks/results

It takes the memory of the process before calibration from its peak during calibration, and states
beside it the block, and the inputs of all windows.
"""

import argparse
import platform
import threading
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from sparsify.calibration import Calibration, Layerwise
from sparsify.common.files import write_json
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.registry import make_strategy
from sparsify.models.base import BaseModel

GIB = 2**30


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


def block(experts: int) -> Qwen3MoeForCausalLM:
    """A model of one block, with a small vocabulary."""
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def measure(name: str, experts: int, windows: int, tokens: int) -> dict[str, float]:
    """Calibrate the block once; bytes and seconds."""
    model = block(experts)
    masked = MaskedModel(BaseModel(model, "random", torch.float32, ""), make_strategy(name))
    text_ST = torch.randint(0, 1024, (windows, tokens))
    engine = Layerwise(masked, lambda: text_ST, Calibration(cache=False), torch.device("cpu"))
    size = sum(p.nbytes for n, p in model.model.layers.named_parameters() if ".masker." not in n)
    before, start = resident(), time.perf_counter()
    with peak_memory() as seen:
        results = sum(1 for _ in engine.run(masked.strategy))
    return {
        "matrices": results,
        "block": size,
        "inputs": windows * tokens * model.config.hidden_size * 4,
        "more": seen[-1] - before,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--strategy", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--save", type=Path, help="a folder for the JSON")
    args = parser.parse_args()
    found = {name: measure(name, args.experts, args.windows, args.tokens) for name in args.strategy}
    table = Table(title=f"{args.experts} experts, {args.windows} windows of {args.tokens} tokens")
    for column in ("strategy", "block GiB", "inputs GiB", "more at the peak GiB", "seconds"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for name, row in found.items():
        sizes = (f"{row[key] / GIB:.2f}" for key in ("block", "inputs", "more"))
        table.add_row(name, *sizes, f"{row['seconds']:.0f}")
    Console().print(table)
    if args.save is not None:
        about = {"torch": torch.__version__, "machine": platform.machine()}
        about |= {"threads": str(torch.get_num_threads())}
        content = {"about": about, "experts": args.experts, "windows": args.windows}
        content |= {"tokens": args.tokens, "found": found}
        write_json(args.save / f"moe_memory-{date.today()}.json", content)


if __name__ == "__main__":
    main()
