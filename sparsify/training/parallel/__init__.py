"""Training in several processes through Lightning; see ``docs/distributed.md``."""

import sys

from sparsify.training.parallel.fsdp import Sharded

__all__ = ["Sharded"]

# Configs and checkpoints of version 0.1.0 know this module by this name.
sys.modules.setdefault("sparsify.distributed", sys.modules[__name__])
