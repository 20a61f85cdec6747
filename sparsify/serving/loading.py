"""Loads an exported folder as a Transformers model; its layers run sparse where that is faster.

The model is built without memory for its weights; :mod:`sparsify.serving.filling` fills them in.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from sparsify.common.errors import SparsifyError, first_line
from sparsify.export.manifest import MANIFEST, manifest_patterns
from sparsify.masking.linear import Stack, linear_shape, maskable
from sparsify.masking.pattern import NMPattern
from sparsify.models.model_files import check_model_files
from sparsify.models.multimodal import auto_class
from sparsify.serving.backends import BACKENDS, Backend
from sparsify.serving.choose import DENSE, Choices, Choose, Layer, choose_layers
from sparsify.serving.filling import fill, names_by_parameter
from sparsify.serving.measure import LayerKind, in_turns, token_counts


@torch.no_grad()
def load(
    folder: str | Path,
    *,
    tokens: int | tuple[int, int] = (1, 2048),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    choose: Choose = "measured",
    backends: Sequence[Backend] = BACKENDS,
) -> PreTrainedModel:
    """Load an exported folder for inference; nothing in it trains.

    Args:
        folder: what ``sparsify export`` wrote, or a run's ``export`` folder.
        tokens: how many rows a layer's input will have (batch x prompt length for a prompt, then
            the batch size while generating), or the smallest and the largest such number.
        device: where the model goes; None is the GPU if there is one, else the CPU.
        dtype: the type of the weights; None is the type in which they are stored. No backend takes
            float32: the layers of a float32 model run dense unless another type is given.
        choose: ``measured`` runs a layer sparse if that is faster here at both ends of ``tokens``
            and all powers of two between; ``sparse`` runs all layers sparse that can be; ``dense``
            none.
        backends: what may run sparse layers; if several are equally good, the first is taken.

    Returns:
        The model in evaluation mode; :func:`choices` says how its layers run.

    Raises:
        SparsifyError: the folder is not an export or is damaged, a layer does not hold its pattern,
            or an argument is out of its range.
    """
    folder = Path(folder)
    check_wishes(tokens, choose)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SparsifyError(f"dtype={dtype!r}: a model's weights are floats; write torch.bfloat16")
    place = _device(device)
    patterns = manifest_patterns(folder)
    # Measurements and checks draw random numbers; restore the caller's generators afterwards.
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        model = _empty_model(folder, dtype)
        how = choose_for(model, patterns, place, tokens, choose, backends)
        fill(model, folder, place, patterns, compressing(how, backends))
    model.sparsify_choices = how  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def choices(model: nn.Module) -> Choices:
    """How the layers of a loaded model run; ``print`` it for a table.

    Raises:
        SparsifyError: neither :func:`load` nor ``from_pretrained`` with a ``SparsifyConfig`` loaded
            it.
    """
    found = getattr(model, "sparsify_choices", None)
    if not isinstance(found, Choices):
        raise SparsifyError(
            f"this {type(model).__name__} was not loaded by sparsify.serving.load, so nothing was "
            "chosen for its layers"
        )
    return found


def check_wishes(tokens: int | tuple[int, int], choose: str) -> None:
    """Check two arguments of :func:`load`.

    Raises:
        SparsifyError: one of them is out of its range.
    """
    ends = tokens if isinstance(tokens, tuple) else (tokens, tokens)
    whole = len(ends) == 2 and all(isinstance(end, int) for end in ends)
    if not whole or not 1 <= ends[0] <= ends[1]:
        raise SparsifyError(
            f"tokens={tokens}: give a number of at least 1, or the least and the most, in order"
        )
    if choose not in get_args(Choose):
        raise SparsifyError(f"choose={choose!r}: write 'measured', 'sparse' or 'dense'")


def choose_for(
    model: PreTrainedModel,
    patterns: Mapping[str, NMPattern],
    device: torch.device,
    tokens: int | tuple[int, int],
    choose: Choose,
    backends: Sequence[Backend],
) -> Choices:
    """Decide how the sparse layers of a model run; its Parameters need no memory.

    Args:
        model: the model, in the type that it will have.
        patterns: the pattern of every layer that was made sparse.
        device: where it will run; the other arguments are those of :func:`load`.

    Raises:
        SparsifyError: the model has no such layer, or nothing here runs what is asked for.
    """
    counts = token_counts(*(tokens if isinstance(tokens, tuple) else (tokens, tokens)))
    layers = _sparse_layers(model, patterns)
    return choose_layers(layers, device, choose, counts, backends, in_turns)


def compressing(how: Choices, backends: Sequence[Backend]) -> dict[str, Backend]:
    """The backend of every layer that is to be compressed."""
    by_name = {backend.name: backend for backend in backends}
    return {name: by_name[c.backend] for name, c in how.items() if c.backend != DENSE}


def _device(device: torch.device | str | None) -> torch.device:
    cuda = torch.cuda.is_available()
    try:
        place = torch.device(device or ("cuda" if cuda else "cpu"))
        if place.type == "meta":
            raise TypeError("it holds no values")
    except (RuntimeError, TypeError) as error:
        raise SparsifyError(f"device={device!r}: write 'cuda', 'cuda:1' or 'cpu'") from error
    if place.type == "cuda" and not cuda:
        raise SparsifyError(f"device={str(device)!r}: PyTorch finds no CUDA device; give 'cpu'")
    return place


def _empty_model(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model with Parameters that have no memory, tied as they should be, and real buffers."""
    from accelerate import init_empty_weights  # takes a second

    try:
        check_model_files(str(folder))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model: Any = auto_class(config).from_config(
                config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=False
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparsifyError(
            f"{folder} holds no configuration that Transformers can read "
            f"({first_line(error)}); export the model again"
        ) from error
    model.tie_weights()  # outside the context, where each assignment would make a new Parameter
    take_kept_types(model)
    return cast(PreTrainedModel, model)


def take_kept_types(model: PreTrainedModel) -> None:
    """Give what Transformers keeps in float32 that type, by its own rule: it follows it where it
    reads files, and not where it builds a model.

    Args:
        model: the model in the type asked for, before its weights are read.
    """
    tensors = model.state_dict(keep_vars=True)
    for key, dtype in model._get_dtype_plan(model.dtype).items():
        for name, tensor in tensors.items():
            if re.search(key.replace("*", ".*"), name):
                tensor.data = tensor.data.to(dtype)


def _sparse_layers(model: PreTrainedModel, patterns: Mapping[str, NMPattern]) -> dict[str, Layer]:
    """The model's layers that the manifest says are sparse."""
    modules = maskable(model)
    shared = {
        name for names in names_by_parameter(model).values() if len(names) > 1 for name in names
    }
    layers = {}
    for name, pattern in patterns.items():
        if (module := modules.get(name)) is None:
            raise SparsifyError(
                f"{MANIFEST} lists {name}, which is no linear layer of this "
                f"{type(model).__name__}; export the model again"
            )
        weight = cast(Tensor, module.weight)
        has_bias = getattr(module, "bias", None) is not None
        kind = LayerKind(linear_shape(module), weight.dtype, has_bias)
        obstacle = None
        if isinstance(module, Stack):
            obstacle = "no backend multiplies a stack of experts"
        elif not isinstance(module, nn.Linear):
            obstacle = f"{type(module).__name__} stores its weight transposed"
        elif f"{name}.weight" in shared:
            obstacle = "shares its weight with another layer"
        layers[name] = Layer(kind, pattern, obstacle)
    return layers
