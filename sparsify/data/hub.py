"""Reads Hugging Face data sets, downloaded or streamed, without running code of theirs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify.common.errors import SparsifyError
from sparsify.data.sources import HUB, Source, check_columns, optional


class HubShard:
    """A data set, or one of the files that it streams from.

    Args:
        name: Name of the data set, for messages.
        dataset: The whole data set.
        part: Number of the file, from 0; None reads all.
    """

    def __init__(self, name: str, dataset: Any, part: int | None = None) -> None:
        self.name = name if part is None else f"{name} part {part + 1}"
        self._dataset, self._part = dataset, part

    def rows(self, position: Any = None) -> "HubRows":
        """The rows from a position, which must be None unless this is one file."""
        if self._part is None:
            return HubRows(self.name, self._dataset, position)
        # A new object each time, as a restored position would stay in an old one.
        parts = self._dataset.num_shards
        part = self._dataset.shard(num_shards=parts, index=self._part)
        return HubRows(self.name, part, position)


class HubRows(Iterator[tuple[int, object]]):
    """Rows of one part."""

    def __init__(self, name: str, dataset: Any, position: Any) -> None:
        self._name, self._dataset = name, dataset
        self._start = position or {"row": 0, "dataset": None}
        if self._start["dataset"] is not None:
            dataset.load_state_dict(self._start["dataset"])
        self._count = self._start["row"]
        self._rows = iter(dataset)

    def __next__(self) -> tuple[int, object]:
        try:
            row = next(self._rows)
        except (OSError, ValueError) as error:  # of the network, or of a damaged file
            raise SparsifyError(
                f"{self._name} cannot be read further than row {self._count} ({error}); every file "
                "of a data set must be reachable and whole: check the network or mend the file, "
                "and resume from the last checkpoint"
            ) from error
        self._count += 1
        return self._count, row

    def position(self) -> dict[str, Any]:
        """The number of rows read, and the data set's own state."""
        if self._count == self._start["row"]:  # the data set has no state before its first row
            return dict(self._start)
        return {"row": self._count, "dataset": self._dataset.state_dict()}


def hub_shards(source: Source, parts: bool) -> list[HubShard]:
    """The parts of a data set, in a fixed order.

    Args:
        source: The source that names it.
        parts: Whether to give each file that it streams from as a part, rather than all as one.

    Raises:
        SparsifyError: It is not found or cannot be reached, or lacks the configuration, split or
            column.
    """
    dataset = _load(source)
    if dataset.column_names is not None:
        check_columns(source.path, dataset.column_names, source.keys)
        dataset = dataset.select_columns(source.columns(dataset.column_names))
    if not parts:
        return [HubShard(source.path, dataset)]
    return [HubShard(source.path, dataset, part) for part in range(dataset.num_shards)]


def _load(source: Source) -> Any:
    datasets = optional("datasets", source.path)
    name = source.path.removeprefix(HUB)
    try:
        return datasets.load_dataset(
            name,
            name=source.config,
            split=source.split,
            streaming=source.streaming or _is_folder(name),
        )
    except OSError as error:
        raise SparsifyError(
            f"{source.path} is not found or not reached ({error}); it must be a data set of the "
            "hub that you may read, or a local folder in the hub's layout: correct the name, or "
            "check the network"
        ) from error
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _explain(source, name, datasets, error) from error


def _is_folder(name: str) -> bool:
    """Whether the name is a local folder, which is read in place: a cached copy could be stale."""
    return Path(name).is_dir()


def _explain(source: Source, name: str, datasets: Any, error: Exception) -> SparsifyError:
    """Explain why a data set that exists cannot be loaded."""
    try:
        configs = datasets.get_dataset_config_names(name)
        if "Config name is missing" in str(error) or source.config not in (None, *configs):
            return SparsifyError(
                f"{source.path} has no config {source.config!r}; its configs are "
                f"{', '.join(configs)}: name one by config"
            )
        splits = datasets.get_dataset_split_names(name, source.config)
        if re.split(r"\W", source.split)[0] not in splits:
            return SparsifyError(
                f"{source.path} has no split {source.split!r}; its splits are "
                f"{', '.join(splits)}: name one by split"
            )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
        pass  # the first error says more
    return SparsifyError(
        f"{source.path} cannot be loaded ({error}); a data set must be files that the datasets "
        "package reads without code of the data set's own: take another, or convert it"
    )
