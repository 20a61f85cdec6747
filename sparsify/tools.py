"""The commands that need no Trainer: plain functions, whose docstrings are their help."""

import os
import sys
from typing import Any

from jsonargparse import auto_cli, set_parsing_settings

from sparsify import yaml_text
from sparsify.commands import masks
from sparsify.commands.compare import compare, join_runs
from sparsify.commands.dashboard import dashboard
from sparsify.commands.evaluate import evaluate
from sparsify.commands.exports import onnx, verify
from sparsify.commands.plan import plan
from sparsify.errors import SparsifyError

COMMANDS: Any = {
    "compare": compare,
    "verify": verify,
    "eval": evaluate,
    "plan": plan,
    "onnx": onnx,
    "dashboard": dashboard,
    "mask": {
        "_help": "Show, compare, convert and pack masks.",
        "show": masks.show,
        "import": masks.import_masks,
        "export": masks.export_masks,
        "diff": masks.diff,
        "delta": masks.delta,
        "join": masks.join,
    },
}
ABOUT = {
    "compare": "Compare finished runs: which is best at which cost, and how sure that is.",
    "verify": "Check that an exported folder is what it says.",
    "eval": "Score an exported folder and its dense model on tasks of lm-evaluation-harness.",
    "plan": "Predict the memory of a run, and find settings that fit.",
    "onnx": "Write an exported folder as an ONNX graph for TensorRT.",
    "dashboard": "Create a Weights & Biases workspace that compares runs.",
    "mask": "Show, compare, convert and pack masks.",
}


FLAGS = ("--shard", "--gradient_checkpointing", "--overwrite", "--dry_run")


def run(words: list[str]) -> int:
    """Run one of the commands: its exit status."""
    # Nothing is instantiated where any value may stand.
    set_parsing_settings(instantiate_subclass_spec_in_any=False)
    # Flags as those of fit: what says nothing says true.
    following = [*words[1:], "--"]
    words = [
        f"{word}=true" if word in FLAGS and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]
    if words[0] == "compare":
        words = ["compare", *join_runs(words[1:])]
    try:
        mode = yaml_text.MODE
        found = auto_cli(COMMANDS, words, as_positional=True, prog="sparsify", parser_mode=mode)
        return found or 0
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        raise SparsifyError(f"{error.filename or 'a file'}: {error.strerror}") from error
