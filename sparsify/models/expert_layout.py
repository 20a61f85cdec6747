"""How mixtures of experts store their matrices. Shapes: E experts, O out, I in."""

from torch import nn

# Classes of experts that do not say so themselves, by name.
_TRANSPOSED = {
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
}


def is_transposed(experts: nn.Module) -> bool | None:
    """Whether a module stores the matrices of its experts as ``[E, I, O]`` and not ``[E, O, I]``;
    None if its class does not tell.
    """
    named = _TRANSPOSED.get(type(experts).__name__)
    transposed = getattr(experts, "is_transposed", named)  # as Transformers' experts say
    return transposed if isinstance(transposed, bool) else None
