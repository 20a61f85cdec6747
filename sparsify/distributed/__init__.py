"""Training in several processes through Lightning; see ``docs/distributed.md``."""

from sparsify.distributed.sharded import Sharded

__all__ = ["Sharded"]
