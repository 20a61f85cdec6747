"""What each of two ranks does in ``test_keep_zeros.py``: it fine-tunes an export that FSDP2 shards,
and the same export whole.

torchrun --nproc_per_node 2 keep_zeros_run.py FOLDER...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsify import KeepZeros
from sparsify.export.manifest import manifest_patterns
from sparsify.masking.linear import maskable
from sparsify.masking.select import decoder_blocks
from sparsify.masking.sharded_rows import whole

TOKENS = torch.randint(2, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def train(model: PreTrainedModel, folder: Path) -> None:
    """Three steps, in the order of the Trainer's events."""
    keep = KeepZeros(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    keep.on_train_begin(None, None, None, model=model)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        keep.on_optimizer_step(None, None, None)
        optimizer.zero_grad()


def case(folder: Path) -> dict[str, float]:
    """How far the sharded run ends from the whole one, and what it did to the zeros."""
    models = [AutoModelForCausalLM.from_pretrained(folder) for _ in range(3)]
    _, alone, sharded = models
    train(alone, folder)
    for block in decoder_blocks(sharded).values():
        fully_shard(block)
    fully_shard(sharded)
    train(sharded, folder)
    layers = [maskable(model) for model in models]
    found = {"apart": 0.0, "filled": 0, "moved": 0, "rows": 0}
    for name in manifest_patterns(folder):
        first, own, weight = (of[name].weight.detach() for of in layers)
        assert isinstance(weight, DTensor)
        found["rows"] += len(weight.to_local()) / len(weight)
        after = whole(weight)
        found["apart"] = max(found["apart"], float((after - own).abs().max()))
        found["filled"] += int((after[first == 0] != 0).sum())
        found["moved"] += float((after != first).float().mean())
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {folder: case(Path(folder)) for folder in sys.argv[1:]}
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()
