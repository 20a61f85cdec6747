"""Chooses which layers of a model are masked, and by which patterns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.masking.dense_layers import (
    EXCLUDED,
    NOT_INCLUDED,
    OVERRIDDEN,
    default_reason,
    why_not_linear,
)
from sparsify.masking.layer import masked_layers
from sparsify.masking.linear import Stack, elsewhere, linear_shape, maskable
from sparsify.masking.overrides import DENSE, Overrides
from sparsify.masking.pattern import MAX_M, NMPattern
from sparsify.models.layer_names import family
from sparsify.models.multimodal import text_decoder, towers


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's repeated blocks by qualified name: the members of the largest ``ModuleList`` of
    its text decoder, but for those of a model within that, such as a vision tower.

    Raises:
        SparsifyError: the model holds no ``ModuleList``.
    """
    prefix, decoder = text_decoder(model)
    within = tuple(
        f"{name}."
        for name, m in decoder.named_modules(prefix=prefix)
        if isinstance(m, PreTrainedModel) and m is not decoder
    )
    lists = [
        (name, module)
        for name, module in decoder.named_modules(prefix=prefix)
        if isinstance(module, nn.ModuleList)
    ]
    lists = [item for item in lists if not item[0].startswith(within)] or lists
    if not lists:
        raise SparsifyError(
            f"{type(model).__name__} holds no list of decoder blocks "
            "(torch.nn.ModuleList); name its layers with include"
        )
    name, blocks = max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(blocks)}


@dataclass(frozen=True)
class Selection:
    """Which layers of a model are to be masked, and by which patterns.

    Attributes:
        pattern: the pattern of every layer without an override.
        include: globs on qualified names; None means every linear layer of the decoder blocks but
            those of :data:`~sparsify.masking.dense_layers.DENSE_BY_DEFAULT`.
        exclude: globs of layers to leave dense.
        overrides: other patterns for some of the layers that ``include`` and ``exclude`` leave.
    """

    pattern: NMPattern = NMPattern(2, 4)
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    overrides: Overrides = Overrides()

    @classmethod
    def parse(
        cls,
        pattern: str,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None,
    ) -> "Selection":
        """Make a selection from command-line values; one glob need not be in a list.

        Raises:
            SparsifyError: a text is not a pattern.
        """
        return cls(
            NMPattern.parse(pattern),
            [include] if isinstance(include, str) else include,
            [exclude] if isinstance(exclude, str) else exclude or (),
            Overrides.parse(overrides),
        )

    def pattern_of(self, name: str) -> NMPattern | None:
        """The pattern of a layer; None if an override leaves it dense."""
        return self.overrides.pattern(name, self.pattern)


def select(
    model: PreTrainedModel, selection: Selection
) -> tuple[dict[str, nn.Module | Stack], dict[str, str]]:
    """Choose the layers to mask.

    Args:
        model: the dense model.
        selection: what the user asked for.

    Returns:
        The layers to mask by name, and for every other matrix of the model the reason why it stays
        dense.

    Raises:
        SparsifyError: a glob matches nothing; a layer's inputs do not divide into groups of its
            pattern; or its weight is shared with a layer that has another pattern, or with a module
            that cannot be masked.
    """
    if masked_layers(model):
        raise SparsifyError(
            f"this {type(model).__name__} has masked layers already, from an earlier run on the "
            "same object; load it again"
        )
    layers = maskable(model)
    include, overrides = selection.include, selection.overrides
    for glob in [*(include or ()), *selection.exclude]:
        if not any(fnmatchcase(name, glob) for name in layers):
            raise SparsifyError(
                f"{glob!r} matches no linear layer; there are {_what_there_is(model, layers)}"
            )
    blocks = tuple(f"{name}." for name in decoder_blocks(model)) if include is None else ()
    others = elsewhere(model, layers)
    beside = towers(model) if include is None else {}
    head = model.get_output_embeddings()
    candidates: dict[str, nn.Module | Stack] = {}
    dense: dict[str, str] = {}
    for name, layer in layers.items():
        wanted = (
            name.startswith(blocks)
            if include is None
            else any(fnmatchcase(name, glob) for glob in include)
        )
        left_out = next((glob for glob in selection.exclude if fnmatchcase(name, glob)), None)
        if layer is head and include is None:
            tied = layer.weight is model.get_input_embeddings().weight
            dense[name] = "output head, shared with the embedding" if tied else "output head"
        elif left_out is not None:
            dense[name] = f"{EXCLUDED} {left_out!r}"
        elif (tower := _holder(name, beside)) is not None:
            dense[tower] = beside[tower]
        elif not wanted:
            dense[name] = "outside the decoder blocks" if include is None else NOT_INCLUDED
        elif include is None and (why := default_reason(name)) is not None:
            dense[name] = why
        else:
            candidates[name] = layer
    if (unused := overrides.unused(candidates)) is not None:
        raise SparsifyError(
            f"overrides: {unused!r} matches no layer that would be masked; there are "
            f"{', '.join(_families(candidates))}"
        )
    _check_shared(candidates, selection)
    chosen: dict[str, nn.Module | Stack] = {}
    for name, layer in candidates.items():
        own = selection.pattern_of(name)
        if own is None:
            dense[name] = f"{OVERRIDDEN} {overrides.glob(name)!r}"
        else:
            _check(name, layer, own, others)
            chosen[name] = layer
    if not chosen:
        raise SparsifyError(f"no layer is left to mask; there are {_what_there_is(model, layers)}")
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim < 2 or owner in layers or name in layers:
            continue
        if (tower := _holder(name, beside)) is not None:
            dense[tower] = beside[tower]
        else:
            dense[owner or name] = why_not_linear(owner or name, model.get_submodule(owner))
    return chosen, dense


def _holder(name: str, modules: Mapping[str, str]) -> str | None:
    """Which of the modules is or holds the one of this name."""
    return next((m for m in modules if f"{name}.".startswith(f"{m}.")), None)


def _check(name: str, layer: nn.Module | Stack, pattern: NMPattern, others: dict[int, str]) -> None:
    columns = linear_shape(layer)[1]
    fix = f"leave it dense with --model.exclude '*{name.rpartition('.')[2]}'"
    if columns % pattern.m:
        fit = ", ".join(str(m) for m in range(2, MAX_M + 1) if columns % m == 0)
        raise SparsifyError(
            f"{name}: in_features={columns} is not a multiple of m={pattern.m}; take an M "
            f"that divides it ({fit}), or {fix}"
        )
    if (other := others.get(id(layer.weight))) is not None:
        raise SparsifyError(
            f"{name}: its weight is tied to {other}, which a mask would change too; {fix}"
        )


def _check_shared(layers: Mapping[str, nn.Module | Stack], selection: Selection) -> None:
    first: dict[int, str] = {}
    for name, layer in layers.items():
        other = first.setdefault(id(layer.weight), name)
        own, others = selection.pattern_of(name), selection.pattern_of(other)
        if own != others:
            raise SparsifyError(
                f"{name} is {own or DENSE} and {other}, whose weight it shares, is "
                f"{others or DENSE}; one weight has one mask: give both the same in "
                "--model.overrides"
            )


def _what_there_is(model: nn.Module, layers: Mapping[str, nn.Module | Stack]) -> str:
    """The linear layers that can be masked, and those whose class does not allow it."""
    others = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
    }
    kinds = dict.fromkeys(f"{family(name)} ({kind})" for name, kind in others.items())
    text = ", ".join(_families(layers)) or "none"
    if kinds:
        text += f"; not maskable, as their class computes something else: {', '.join(kinds)}"
    return text


def _families(layers: Mapping[str, nn.Module | Stack]) -> list[str]:
    """Qualified names with ``*`` for numbers, each once, so that a message stays short."""
    return list(dict.fromkeys(map(family, layers)))
