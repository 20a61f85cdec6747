"""What an offline run of Weights & Biases holds, read from its file."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
FULL, LAST = 1, 4  # kinds of a record that is whole, and of the last part of one


@dataclass
class OfflineRun:
    """What a run logged.

    Attributes:
        config: as it was at the end.
        tags: of the run.
        history: the rows in order, with their values as plain JSON.
        summary: as it was at the end.
        metrics: the definitions by name or glob.
        artifacts: by type, each with its record.
    """

    config: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)

    def keys(self) -> set[str]:
        """The names of all that was logged."""
        return {name for row in self.history for name in row}


def read_run(folder: Path) -> OfflineRun:
    """Read the only offline run below a folder."""
    [file] = folder.rglob("offline-run-*/run-*.wandb")
    return read_file(file)


def read_file(file: Path) -> OfflineRun:
    """Read the file of an offline run."""
    run = OfflineRun()
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            _update(run.config, record.run.config.update)
            run.tags = list(record.run.tags)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "history":
            run.history.append({})
            _update(run.history[-1], record.history.item)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts[record.artifact.type] = record.artifact
    return run


def _update(content: dict[str, Any], items: Any) -> None:
    for item in items:
        at, *rest = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        if rest:
            content.setdefault(at, {})[".".join(rest)] = value
        else:
            content[at] = value


def _records(data: bytes) -> Iterator[Any]:
    """The records of a log in LevelDB's format: parts that do not cross blocks of 32 KiB."""
    at, parts = FILE_HEADER, b""
    while at < len(data):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += RECORD_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
