"""Losses of validation windows under any choice of masks, each measured once.

Shapes: W windows, B of a batch, T tokens.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsify.common.errors import SparsifyError
from sparsify.common.files import write_json
from sparsify.models.hashes import hash_tensor
from sparsify.models.token_batch import TokenBatch, split_batch
from sparsify.results.budget.bank import Bank, Masks
from sparsify.results.budget.prefix import Batch, Prefix

SCORES = "scores.json"


def spread(batches: Iterable[Batch], windows: int, size: int) -> list[Batch]:
    """Evenly spaced windows with targets, in batches of ``size`` or fewer."""
    tokens, targets = [], []
    marked = False
    for batch in batches:
        tokens_BT, targets_BT = split_batch(batch)
        marked |= targets_BT is not None
        targets_BT = torch.ones_like(tokens_BT).bool() if targets_BT is None else targets_BT
        some_B = targets_BT[:, 1:].any(1)
        tokens.append(tokens_BT[some_B])
        targets.append(targets_BT[some_B])
    tokens_WT, targets_WT = torch.cat(tokens), torch.cat(targets)
    count = min(windows, len(tokens_WT))
    # The middles of equal parts, so that many windows contain no more of one end than few.
    at = ((torch.arange(count) + 0.5) * len(tokens_WT) / count).long()
    parts = zip(tokens_WT[at].split(size), targets_WT[at].split(size), strict=True)
    return [TokenBatch(*part) if marked else part[0] for part in parts]


class Scores:
    """Measures, and keeps every measurement in a file from which a second start takes it.

    Args:
        path: the file.
        context: all that losses depend on besides windows and masks.
        bank: the masks.
    """

    def __init__(self, path: Path, context: Any, bank: Bank) -> None:
        self._path, self._bank = path, bank
        self._context = json.dumps(context, sort_keys=True)
        self.known = _read(path)
        self.measured = 0

    def __call__(self, masks: Masks, prefix: Prefix) -> Tensor:
        """The loss of every window of a prefix's batches, nats a token: float64 ``[W]``."""
        parts = [self._context, self._bank.digest(masks)]
        for batch in prefix.batches:
            parts += [hash_tensor(part) for part in split_batch(batch) if part is not None]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        if key not in self.known:
            with self._bank.use(masks):
                found = torch.cat(prefix(masks)).double().cpu()
            self.known[key] = found.tolist()
            self.measured += 1
            write_json(self._path, self.known)
        return torch.tensor(self.known[key], dtype=torch.float64)


def check_ours(path: Path) -> None:
    """Refuse a file that is there and holds no measurements, so that it is not replaced.

    Raises:
        SparsifyError: it holds something else.
    """
    if path.exists() and _measurements(path) is None:
        raise SparsifyError(
            f"{path} holds no measurements of sparsify budget, and stays; move it away, or give "
            "another --output.folder"
        )


def _read(path: Path) -> dict[str, list[float]]:
    """What an earlier start measured; nothing if the file is damaged."""
    return _measurements(path) or {}


def _measurements(path: Path) -> dict[str, list[float]] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(key): [float(loss) for loss in losses] for key, losses in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
