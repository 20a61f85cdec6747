"""Training in several processes through Lightning; see ``docs/distributed.md``."""

from sparsify.training.parallel.fsdp import Sharded

__all__ = ["Sharded"]
