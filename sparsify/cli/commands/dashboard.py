"""``sparsify dashboard``."""

from sparsify.cli.commands.output import say, say_json


def create_dashboard(
    project: str = "sparsify",
    entity: str | None = None,
    name: str = "Sparse models",
    dry_run: bool = False,
) -> None:
    """Create a Weights & Biases workspace that compares the runs of a project.

    Args:
        project: the project that the runs log to.
        entity: the user or team that owns it; the default is the account's.
        name: the workspace's title.
        dry_run: print what would be sent, without an account or network.
    """
    from sparsify.results.dashboard import describe_workspace, make_workspace, save_workspace

    workspace = make_workspace(project, entity or "", name)
    if dry_run:
        say_json(describe_workspace(workspace))
    else:
        say(f"created {save_workspace(workspace)}")
