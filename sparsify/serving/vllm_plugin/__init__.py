"""A plugin of vLLM that serves exported folders: ``vllm serve FOLDER -q sparsify``.

Written against vLLM 0.33.0. Every process of vLLM calls :func:`register`, also one that serves
another model, so nothing here is imported before it is needed.
"""

import logging

#: A child of vLLM's own logger, so that its lines are shown like those of vLLM.
log = logging.getLogger("vllm.sparsify")


def register() -> None:
    """Make the quantisation method ``sparsify`` known to vLLM. Calling it again changes nothing."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from sparsify.serving.vllm_plugin.config import NAME, SparsityConfig

        register_quantization_config(NAME)(SparsityConfig)
    except (ImportError, AttributeError) as error:  # other models must be served all the same
        log.warning("this vLLM has no place for -q sparsify, which was written for 0.33: %s", error)
