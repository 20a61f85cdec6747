"""Training in several processes through Lightning; see ``docs/distributed.md``."""

import sys

from sparsify.training.parallel.fsdp import Sharded

__all__ = ["Sharded"]

# The name by which configs and checkpoints of version 0.1.0 know it.
sys.modules.setdefault("sparsify.distributed", sys.modules[__name__])
