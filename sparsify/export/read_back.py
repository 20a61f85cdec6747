"""Loads an exported folder as its users will, and compares its logits with the measured ones.

They can differ though every number was written correctly: a flag of the config may tie one tensor
to another, a tensor may have a name that the loader does not ask for, and a setting may exist only
in the model object.

Shapes: B windows, T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsify.common.bits import bits
from sparsify.common.errors import SparsifyError
from sparsify.common.values import first_few
from sparsify.masking.layer import base_parameters
from sparsify.masking.masked_model import MaskedModel
from sparsify.models.multimodal import loader_of

WINDOWS = 2
_DRAWN_TOKENS = 16


Measuring = Callable[[], AbstractContextManager[None]]


class Measured(NamedTuple):
    """Logits of the masked model, ``[B, T, V]`` on CPU, with their tokens ``[B, T]`` and the
    context under which they were computed.
    """

    tokens_BT: Tensor
    logits_BTV: Tensor
    measuring: Measuring


def measure(masked: MaskedModel, tokens_BT: Tensor | None, measuring: Measuring) -> Measured:
    """Run the masked model over windows of text, or over random token ids if there are none.

    Every rank of a sharded run must call this.
    """
    model = masked.model
    if tokens_BT is None:
        generator = torch.Generator().manual_seed(0)
        ids = cast(int, model.get_input_embeddings().num_embeddings)
        tokens_BT = torch.randint(ids, (WINDOWS, _DRAWN_TOKENS), generator=generator)
    tokens_BT = tokens_BT[:WINDOWS].to(model.device)
    with measuring():
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits.cpu()
    return Measured(tokens_BT, logits_BTV, measuring)


@torch.no_grad()
def check_read_back(
    folder: Path,
    like: PreTrainedModel,
    plain_class: type[PreTrainedModel],
    written: Mapping[str, Tensor],
    measured: Measured,
) -> None:
    """Load a folder with plain Transformers, and refuse it if it does not hold the same Parameters
    or compute the same logits. Not every Parameter is computed with: text reaches no vision tower.

    On an accelerator its weights are moved there layer by layer, so that no second model has to
    fit.

    Args:
        folder: the folder that was written.
        like: the masked model that it holds.
        plain_class: the model's class without masks.
        written: the Parameters by name, as they should be stored.
        measured: the logits of the masked model.

    Raises:
        SparsifyError: the folder does not load completely, or a value differs by a bit; the tensors
            that differ are named.
    """
    model = _load(folder, like, plain_class)
    read = dict(model.named_parameters(remove_duplicate=False))
    # The model's own: Transformers keeps some in float32 whatever the model's type.
    types = {name: parameter.dtype for name, parameter in base_parameters(like).items()}
    odd = [
        name
        for name, value in written.items()
        if name not in read
        or not torch.equal(bits(read[name].to(types[name])), bits(value.to("cpu", types[name])))
    ]
    if like.device.type != "cpu":
        from accelerate import cpu_offload

        model = cpu_offload(model, like.device)
    with measured.measuring():
        found_BTV = model(input_ids=measured.tokens_BT, use_cache=False).logits.cpu()
    if not odd and torch.equal(found_BTV, measured.logits_BTV):
        return
    difference = float((found_BTV.double() - measured.logits_BTV.double()).abs().max())
    raise SparsifyError(
        f"what was written, read back as plain Transformers, does not compute what was measured "
        f"(logits differ by up to {difference:.3g}): {_reason(model, like, odd)}; nothing "
        "was exported"
    )


def _load(
    folder: Path, like: PreTrainedModel, plain_class: type[PreTrainedModel]
) -> PreTrainedModel:
    try:
        model, info = loader_of(plain_class, like.config).from_pretrained(
            str(folder),
            dtype=like.dtype,
            # Others add in another order.
            attn_implementation=like.config._attn_implementation,
            experts_implementation=like.config._experts_implementation,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # a model class may raise anything for wrong files
        raise SparsifyError(
            f"what was written cannot be read back by Transformers ({type(error).__name__}: "
            f"{error}); nothing was exported"
        ) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            raise SparsifyError(
                f"what was written, read back by Transformers, has {kind.replace('_', ' ')}: "
                f"{first_few(names)}; nothing was exported"
            )
    return cast(PreTrainedModel, model.eval())


def _reason(model: PreTrainedModel, like: PreTrainedModel, odd: Sequence[str]) -> str:
    """Say in words what differs, of the Parameters and all else."""
    if odd:
        return f"it reads other values for {first_few(odd)}"
    own = dict(like.named_buffers())
    odd = [name for name, value in model.named_buffers() if _differs(value, own.get(name))]
    if odd:
        return (
            f"the model object has other values in {first_few(odd)}, which no file holds; "
            ".bfloat16() and .half() round them too: load the model with dtype=..., or give "
            "--model.dtype"
        )
    one, other = model.config.to_dict(), like.config.to_dict()
    settings = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
    settings = [key for key in settings if key not in ("architectures", "dtype", "_name_or_path")]
    said = f"in its config, {first_few(settings)} differ" if settings else "its config is the same"
    return f"all tensors are as they were written; {said}, so the model object computes otherwise"


def _differs(value: Tensor, other: Tensor | None) -> bool:
    return other is None or value.dtype != other.dtype or not torch.equal(value.cpu(), other.cpu())
