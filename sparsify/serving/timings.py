"""Stores measured times on disk: one JSON file per machine and its library versions."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparsify.common.files import cache_folder
from sparsify.common.replace import whole_file
from sparsify.serving.measure import LayerKind

log = logging.getLogger("sparsify")

SCHEMA = "sparsify.timings/1"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Everything that times depend on, except the layer."""
    cuda = device.type == "cuda"
    return {
        "schema": SCHEMA,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cusparselt": torch.backends.cusparselt.version() if cuda else None,
    }


class Timings:
    """The times that were measured on a machine, by layer, backend and number of tokens.

    Args:
        device: where the layers run.
        folder: where the files are; None means the user's cache folder.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        self._machine = describe_machine(device)
        digest = hashlib.sha256(json.dumps(self._machine, sort_keys=True).encode()).hexdigest()
        self.path = (folder or cache_folder()) / f"timings-{digest[:16]}.json"

    def get(
        self, kind: LayerKind, backend: str, counts: Sequence[int]
    ) -> dict[int, tuple[float, float]]:
        """The stored (dense, sparse) seconds, for those counts that were measured before."""
        stored = self._read()
        keys = {count: _key(kind, backend, count) for count in counts}
        return {
            count: (stored[key][0], stored[key][1]) for count, key in keys.items() if key in stored
        }

    def add(
        self, kind: LayerKind, backend: str, seconds: Mapping[int, tuple[float, float]]
    ) -> None:
        """Store times. On a full disk they are not stored, and the run continues."""
        new = {_key(kind, backend, count): list(pair) for count, pair in seconds.items()}
        content = {"machine": self._machine, "seconds": self._read() | new}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as file:
                file.write(json.dumps(content, indent=1).encode())
        except OSError as error:
            log.warning("the measured times are not kept for later: %s", error)

    def _read(self) -> dict[str, list[float]]:
        """The times in the file; none if it is damaged or from another machine."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["machine"] != self._machine:
                return {}
            return {key: pair for key, pair in content["seconds"].items() if _is_pair(pair)}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, float) and 0 < v < math.inf for v in value)
    )


def _key(kind: LayerKind, backend: str, count: int) -> str:
    return f"{kind} | {backend} | {count}"
