"""Lists all commands: name, purpose and place of each; this imports none of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """A command that is one function, whose docstring is its help.

    Args:
        about: one line of help.
        function: its module and name. The name must not be that of a module of ``sparsify``: the
            parser would look there, and so import it.
        loads_models: whether it may load a model; Transformers' messages are then silenced.
        reads_words: whether the function itself parses the words of the command line.
    """

    about: str
    function: str
    loads_models: bool = False
    reads_words: bool = False


@dataclass(frozen=True)
class Group:
    """A command that has commands of its own."""

    about: str
    tools: dict[str, Tool]


# Commands with a Trainer; ``trainer_cli`` reads and runs them.
TRAINER_COMMANDS = {
    "fit": "Learn or compute the masks, then test and export the sparse model.",
    "validate": "Measure perplexity on the validation text.",
    "test": "Measure perplexity on the test text.",
    "export": "Test a checkpoint and write its model as a Hugging Face folder.",
    "sensitivity": (
        "Measure on the validation text how much each decoder block loses by its masks. A strategy "
        "that learns is measured by its starting masks unless --ckpt_path is given."
    ),
    "budget": (
        "Choose a pattern for each layer: the fewest bytes within a perplexity, or the lowest "
        "perplexity within a size or time. A strategy that learns is measured by its starting "
        "masks."
    ),
}
TOOLS: dict[str, Tool | Group] = {
    "compare": Tool(
        "Compare finished runs: which is best at which cost, and how sure that is.",
        "sparsify.cli.commands.compare:compare_runs",
    ),
    "verify": Tool(
        "Check that an exported folder is what it says.",
        "sparsify.cli.commands.exports:verify_folder",
        loads_models=True,
    ),
    "eval": Tool(
        "Score an exported folder and its dense model on tasks of lm-evaluation-harness.",
        "sparsify.cli.commands.evaluate:evaluate",
        loads_models=True,
    ),
    "plan": Tool(
        "Predict the memory and the GPU-hours of a run, and find settings that fit.",
        "sparsify.cli.commands.plan:plan_run",
        loads_models=True,
        reads_words=True,
    ),
    "merge": Tool(
        "Merge a LoRA adapter into an exported folder, whose zeros stay zeros.",
        "sparsify.cli.commands.exports:merge_adapter",
        loads_models=True,
    ),
    "onnx": Tool(
        "Write an exported folder as an ONNX graph for TensorRT.",
        "sparsify.cli.commands.exports:onnx",
        loads_models=True,
    ),
    "card": Tool(
        "Write the model card of an exported folder.",
        "sparsify.cli.commands.card:write",
        loads_models=True,
    ),
    "push": Tool(
        "Verify an exported folder and upload it to the Hugging Face Hub.",
        "sparsify.cli.commands.card:push",
        loads_models=True,
    ),
    "cache": Group(
        "Show or clear kept results of calibration.",
        {
            "show": Tool("List what the cache holds.", "sparsify.cli.commands.cache:show_cache"),
            "clear": Tool(
                "Remove results from the cache.", "sparsify.cli.commands.cache:clear_cache"
            ),
        },
    ),
    "dashboard": Tool(
        "Create a Weights & Biases workspace that compares runs.",
        "sparsify.cli.commands.dashboard:create_dashboard",
    ),
    "mask": Group(
        "Show, compare, convert and pack masks.",
        {
            "show": Tool("Say what a mask file holds.", "sparsify.cli.commands.mask_show:show"),
            "import": Tool(
                "Make a mask file of masks in another form.",
                "sparsify.cli.commands.masks:import_masks",
                loads_models=True,
            ),
            "export": Tool(
                "Give masks the form that others take.",
                "sparsify.cli.commands.masks:export_masks",
                loads_models=True,
            ),
            "diff": Tool(
                "Compare masks by block and kind of layer.", "sparsify.cli.commands.masks:diff"
            ),
            "delta": Tool(
                "Write masks as changes to those of another file.",
                "sparsify.cli.commands.masks:delta",
            ),
            "join": Tool(
                "Write the masks that a delta file stands for as a file of its own.",
                "sparsify.cli.commands.masks:join",
            ),
        },
    ),
}
