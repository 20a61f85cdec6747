"""Checks that a model has a position for every token of a window."""

import logging

from torch import nn
from transformers import PreTrainedModel

from sparsify.common.errors import SparsifyError
from sparsify.models.multimodal import text_decoder

log = logging.getLogger("sparsify")


def check_positions(model: PreTrainedModel, block_size: int) -> None:
    """Refuse windows longer than the model's table of learned positions. For rotary positions, only
    warn of windows longer than those of its training.

    Args:
        model: its weights may be on the meta device.
        block_size: tokens of a window.

    Raises:
        SparsifyError: the table has fewer positions than the window has tokens.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or block_size <= positions:
        return
    prefix, decoder = text_decoder(model)  # a vision tower's table may be as long
    for name, table in decoder.named_modules(prefix=prefix):
        # OPT's table has extra rows before the first position.
        rows = table.num_embeddings if isinstance(table, nn.Embedding) else 0
        learned = rows - int(getattr(table, "offset", 0)) == positions
        if learned and table is not model.get_input_embeddings():
            raise SparsifyError(
                f"block_size={block_size}: {name} has learned {positions} positions, and a window "
                f"must not be longer; give --data.block_size {positions} or less"
            )
    if any(name.endswith("inv_freq") for name, _ in decoder.named_buffers()):
        log.warning(
            "block_size=%d is longer than the %d positions that the model was trained for "
            "(max_position_embeddings); its scores may be worse there",
            block_size,
            positions,
        )
