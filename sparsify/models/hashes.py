"""The hashes that name a tensor and a base model."""

import hashlib
from collections.abc import Mapping

import torch

from sparsify.common.choices import EMBEDDED as EMBEDDED
from sparsify.common.choices import Dtype as Dtype


@torch.no_grad()
def hash_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of the tensor's type, shape and bytes, in hexadecimal."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    digest.update(values.numpy().data)
    return digest.hexdigest()


def hash_parameters(
    parameters: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over Parameters by name, type, shape and value: the name of a base model; with
    ``dtype`` the one that they would have in this type.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {hash_tensor(parameter.to(dtype or parameter.dtype))}\n".encode())
    return digest.hexdigest()
