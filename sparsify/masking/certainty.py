"""Measures how sure a distribution over masks is, for every strategy that learns one.

Shapes: O out, G groups, M group size, K candidate masks.
"""

import torch
from torch import Tensor


def describe_distribution(probability_OKG: Tensor, table_KM: Tensor) -> dict[str, Tensor]:
    """Measure a distribution; each number is a mean over groups, 0-d.

    Args:
        probability_OKG: the probability of every candidate.
        table_KM: the candidates, 1 = kept.

    Returns:
        ``entropy`` of a group's mask, nats; ``max_probability`` of its most probable mask (Fang et
        al. 2024, figure 5b); ``sample_change``: the expected share of weights whose state differs
        between two independent samples, ``2 q (1 - q)`` for a weight that is kept with probability
        q (what figure 5a measures on samples of adjacent steps).
    """
    log_p = probability_OKG.clamp_min(torch.finfo(probability_OKG.dtype).tiny).log()
    kept_OMG = torch.einsum("okg,km->omg", probability_OKG, table_KM.to(probability_OKG))
    return {
        "entropy": -(probability_OKG * log_p).sum(1).mean(),
        "max_probability": probability_OKG.amax(1).mean(),
        "sample_change": (2 * kept_OMG * (1 - kept_OMG)).mean(),
    }
