"""Chooses the order of a model's channels for a strategy: collects what the search reads, block by
block on the dense model, and keeps the orders for equal runs.

Shapes: S windows, T tokens, C channels of a part, E experts, I in.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sparsify.calibration.cache import make_room, result_folder
from sparsify.calibration.channel_search import ChannelSearch
from sparsify.calibration.layerwise import Layerwise
from sparsify.calibration.results import INDEX, read_index
from sparsify.calibration.settings import Calibration
from sparsify.common.errors import SparsifyError
from sparsify.common.machine import device_name
from sparsify.common.ranks import from_rank_zero
from sparsify.common.replace import whole_file
from sparsify.common.seal import sealed
from sparsify.masking.layer import put_back
from sparsify.masking.masked_model import MaskedModel
from sparsify.masking.select import Selection
from sparsify.masking.strategy import SparsityStrategy
from sparsify.models.base import BaseModel
from sparsify.models.permutable import permutable, proven
from sparsify.models.permutation import Kind, Part

log = logging.getLogger("sparsify")

KINDS: tuple[Kind, ...] = get_args(Kind)
NONE, ALL = "none", "all"


def parse_permute(value: str | Sequence[str]) -> tuple[Kind, ...] | Path:
    """The kinds of parts to permute, or the export whose orders to take.

    Raises:
        SparsifyError: it is none of these.
    """
    if isinstance(value, str):
        if value in (NONE, ALL):
            return KINDS if value == ALL else ()
        if not is_kinds(value) and ("/" in value or Path(value).exists()):
            return Path(value)
        value = _split(value)
    asked = list(value)
    if odd := [kind for kind in asked if kind not in KINDS]:
        raise SparsifyError(
            f"permute={odd[0]!r}; it must be {NONE}, {ALL}, some of {', '.join(KINDS)}, or the "
            "path of an exported folder whose orders to take"
        )
    return tuple(kind for kind in KINDS if kind in asked)


def is_kinds(value: str) -> bool:
    """Whether a value of ``--model.permute`` names kinds of parts, and no folder."""
    return {*_split(value)} <= {NONE, ALL, *KINDS}


def _split(value: str) -> list[str]:
    return [kind.strip() for kind in value.strip("[]").split(",")]


def find_orders(
    base: BaseModel,
    strategy: SparsityStrategy,
    selection: Selection,
    kinds: Sequence[Kind],
    windows: Callable[[], Tensor],
    settings: Calibration,
    device: torch.device,
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The orders of a model's channels under which a strategy's masks lose least.

    In a run of several processes rank 0 searches, and all get its orders.

    Args:
        base: the model, with plain layers; it is not changed.
        strategy: whose masks count.
        selection: which layers will be masked.
        kinds: which kinds of parts to permute.
        windows: gives the calibration text, int64 ``[S, T]``.
        settings: of calibration; activations are always dense.
        device: where to compute.
        watch: wraps the iteration over blocks, to show its progress.

    Returns:
        int64 ``[C]`` by part, without parts that stay as they are, and the ``seconds`` that the
        search takes on a ``device``: of kept orders, those of the run that searched.

    Raises:
        SparsifyError: the model has no part of a kind.
    """
    cost: dict[str, Any] = {}

    def search() -> Iterator[tuple[str, Tensor]]:
        if not strategy.effect.prunes:
            return
        wanted, windows_ST = _wanted(base, kinds), windows()
        search = ChannelSearch(strategy, wanted, device)
        with _masked_for(base, search, selection) as masked:
            plainly = replace(settings, activations="dense", cache=False)
            engine = Layerwise(masked, lambda: windows_ST, plainly, device, watch)
            key = engine.depends_on() | {"permute": list(wanted)}
            folder = result_folder(strategy.calibrator(), key) if settings.cache else None
            found = None if folder is None else _kept(folder)
            if found is not None:
                orders, seconds, on = found
            else:
                start = time.perf_counter()
                for _ in engine.run_here(search):
                    pass
                orders = search.finish()
                seconds, on = time.perf_counter() - start, device_name(device)
                if folder is not None:
                    _keep(folder, orders, strategy, base, seconds, on)
        cost.update(seconds=round(seconds, 1), device=on)
        yield from orders.items()

    orders = dict(from_rank_zero(search()))
    (cost,) = from_rank_zero([cost])
    return orders, cost


@contextmanager
def _masked_for(
    base: BaseModel, strategy: SparsityStrategy, selection: Selection
) -> Iterator[MaskedModel]:
    """The model with masked layers, which get their plain layers back at the end."""
    plain = dict(base.model.named_modules())
    masked = MaskedModel(base, strategy, selection)
    try:
        masked.check_called()
        yield masked
    finally:
        put_back(base.model, plain)


def _wanted(base: BaseModel, kinds: Sequence[Kind]) -> dict[str, Part]:
    """The parts of these kinds by name; of all kinds those that there are."""
    parts, reasons = permutable(base.model)
    parts, refused = proven(base.model, parts)
    reasons |= refused
    for name, why in reasons.items():
        log.info("the inputs of %s stay in their order: %s", name, why)
    for kind in kinds:
        if not any(part.kind == kind for part in parts.values()):
            there = ", ".join(dict.fromkeys(part.kind for part in parts.values())) or "none"
            why = "".join(f"; {name}: {why}" for name, why in list(reasons.items())[:3])
            said = (
                f"permute: this {type(base.model).__name__} has no channels of kind {kind!r} that "
                f"can be permuted at no cost; there are: {there}{why}"
            )
            if len(kinds) < len(KINDS):
                raise SparsifyError(said)
            log.warning("%s", said)
    return {name: part for name, part in parts.items() if part.kind in kinds}


def _kept(folder: Path) -> tuple[dict[str, Tensor], float, str] | None:
    """The orders that an earlier run kept, the seconds that it searched, and its device; None if
    there are none that can be used.
    """
    if not folder.is_dir():
        return None
    try:
        index = read_index(folder)
        orders = {
            name: torch.tensor(order, dtype=torch.int64) for name, order in index["orders"].items()
        }
        return orders, float(index["seconds"]), str(index["device"])
    except Exception as error:  # a damaged file may raise anything
        log.warning(
            "%s, orders of an earlier run, is damaged (%s); they are searched again", folder, error
        )
        return None


def _keep(
    folder: Path,
    orders: Mapping[str, Tensor],
    strategy: SparsityStrategy,
    base: BaseModel,
    seconds: float,
    device: str,
) -> None:
    about = {"strategy": f"{type(strategy.calibrator()).__name__}, permute", "model": base.name}
    content = {
        "seconds": seconds,
        "device": device,
        "about": about,
        "files": {},
        "orders": {name: order.tolist() for name, order in orders.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with whole_file(folder / INDEX) as file:
            file.write(json.dumps(sealed(content)).encode())
        make_room()
    except OSError as error:
        log.warning("the orders are not kept for later runs: %s", error)
