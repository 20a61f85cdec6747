"""Hashes tensors and base models, to name them."""

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
    """SHA-256 over the names, types, shapes and values of Parameters, which names a base model.
    ``dtype`` converts them first.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(f"{name} {hash_tensor(parameter.to(dtype or parameter.dtype))}\n".encode())
    return digest.hexdigest()
