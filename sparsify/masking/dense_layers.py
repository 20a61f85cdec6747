"""Which layers stay dense unless the user names layers with include, and why other matrices do."""

from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparsify.masking.linear import stacks

_ROUTER = "router: it chooses the experts of a token"
_SCAN = "Mamba's time steps and state inputs: narrow, and fused kernels read the weight itself"
_HEADS = "gate of linear attention: one or two outputs a head"

# How the reasons begin that are a setting of the user's.
EXCLUDED, NOT_INCLUDED, OVERRIDDEN = "excluded by", "not in include", "dense by override"
BY_SETTING = (EXCLUDED, NOT_INCLUDED, OVERRIDDEN)

# Globs on qualified names. These layers hold a few hundredths of a block's weights at most, and
# what they compute decides over everything that comes after them.
DENSE_BY_DEFAULT = {
    "*.gate": _ROUTER,
    "*.gate.*": _ROUTER,
    "*.router": _ROUTER,
    "*.router.*": _ROUTER,
    "*.shared_expert_gate": "gate of the shared expert: one output",
    "*.x_proj": _SCAN,
    "*.dt_proj": _SCAN,
    "*.in_proj_ba": _HEADS,
    "*.in_proj_[ab]": _HEADS,
    "*.linear_attn.[ab]_proj": _HEADS,
    "*.self_attn.b_proj": _HEADS,
    "*.[if]gate_preact": _HEADS,
    "*.altup.*": "AltUp's mixing coefficients: a few inputs",
    "*.indexer.*": "indexer: it chooses the tokens to attend to",
}


def default_reason(name: str) -> str | None:
    """Why a layer of this qualified name stays dense by default; None if it does not."""
    return next((why for glob, why in DENSE_BY_DEFAULT.items() if fnmatchcase(name, glob)), None)


def is_block_weight(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a decoder block counts among its weights: a matrix, or a stack of
    matrices (experts); depthwise convolutions do not.
    """
    return len(shape) == 2 or (len(shape) == 3 and min(shape[1:]) > 1)


def why_not_linear(name: str, module: nn.Module) -> str:
    """Why a module that holds matrices cannot be masked.

    Args:
        name: its qualified name.
        module: anything but a layer that a masked one can replace.
    """
    kind = type(module).__name__
    if stacks(module):
        return "biases of experts, whose matrices are by themselves"
    own: list[Tensor] = list(module.parameters(recurse=False))
    if (why := default_reason(name)) is not None:
        return why
    if "expert" in f"{name}.{kind}".lower() and not isinstance(module, _ConvNd | nn.Linear):
        return f"experts: {max(p.ndim for p in own)}-D parameter of {kind}"
    if isinstance(module, nn.Linear):
        return f"{kind} is a subclass of Linear that computes something else"
    return f"{kind} is not a plain linear layer"
