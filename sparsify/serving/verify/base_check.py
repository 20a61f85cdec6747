"""Compare stored tensors with the dense model that they came from."""

from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from sparsify.common.bits import bits
from sparsify.export.manifest import MANIFEST, Manifest
from sparsify.masking.layer import base_parameters
from sparsify.models.base import Dtype, load_model
from sparsify.models.hashes import hash_parameters
from sparsify.models.permutation_file import Permutation
from sparsify.models.stored_weights import StoredWeights


def wrong_base(base: str, model: PreTrainedModel, manifest: Manifest) -> str | None:
    """What is wrong with a model, loaded in the manifest's ``base_dtype``, as the base of a folder.

    None if its hash is the manifest's, or the manifest states none.
    """
    found = hash_parameters(dict(model.named_parameters()))
    if not manifest.base_hash or found == manifest.base_hash:
        return None
    return (
        f"{base} is not the base: its hash in {manifest.base_dtype} is {found[:12]}, and "
        f"{MANIFEST} says {manifest.base_hash[:12]}"
    )


class BaseCheck:
    """The base model's Parameters by the names that they have in a folder's files.

    Args:
        base: its name or folder.
        manifest: what the folder says of it; None where it says nothing.
        weights: the folder's tensors.
        permutation: the orders of channels in which they are stored; None for the base's own.

    Attributes:
        problems: what is wrong with the folder as a whole.
        notes: what cannot be compared.

    Raises:
        SparsifyError: there is no such model.
    """

    def __init__(
        self,
        base: str,
        manifest: Manifest | None,
        weights: StoredWeights,
        permutation: Permutation | None = None,
    ) -> None:
        known = manifest or Manifest()
        # A hash names values of one type: it must be computed in the same again.
        dtype = known.base_dtype if manifest else "auto"
        model = load_model(base, cast(Dtype, dtype), "--base")
        self.problems: list[str] = []
        self.notes: list[str] = []
        if (problem := wrong_base(base, model, known)) is not None:
            self.problems.append(problem)
        elif permutation is not None:
            permutation.apply(model)
        self._values: dict[str, Tensor] = {}
        parameters = base_parameters(model, all_names=True)
        for name, parameter in parameters.items():
            stored = name if name in weights else known.stored_as.get(name)
            if stored is not None:
                self._values[stored] = parameter.detach()
            elif name in known.layers:
                for part, row in known.layers[name].tensors.items():
                    if part in weights:
                        rows = weights.shape(part)[0]
                        self._values[part] = parameter.detach().flatten(0, 1)[row : row + rows]
        shared = {id(p) for name, p in parameters.items() if name in weights}
        self.problems += [
            f"{name} is a Parameter of {base}, and is not stored"
            for name, p in parameters.items()
            if name not in known.stored_as and id(p) not in shared
        ]
        self.notes += [
            f"{name} is no Parameter of {base} by this name: not compared with it"
            for name in weights
            if name not in self._values
        ]

    def knows(self, tensor: str) -> bool:
        """Whether the base has a Parameter for a tensor of this name in the files."""
        return tensor in self._values

    def compare(
        self, tensor: str, values: Tensor, kept: Tensor | None = None, sparse: bool = False
    ) -> str | None:
        """Compare a stored tensor with the base's, bit by bit; what is wrong, if anything is.

        Args:
            tensor: its name in the files.
            values: as stored; the base's are converted to its type first.
            kept: where to compare, of the same shape; None means everywhere.
            sparse: without ``kept``, compare only what is not +0.0.
        """
        if (base := self._values.get(tensor)) is None:
            return None
        if base.shape != values.shape:
            return f"it is {tuple(values.shape)}, and in the base {tuple(base.shape)}"
        found = bits(values)
        differs = found != bits(base.to(values.dtype))
        compared = differs.numel()
        if sparse:
            where = found != 0 if kept is None else kept
            differs, compared = differs & where, int(where.sum())
        if not (count := int(differs.sum())):
            return None
        what = "kept weights" if sparse else "values"
        return f"{count} of {compared} {what} differ from the base's"
