"""Builds a Weights & Biases workspace for a project of sparse runs.

Only metrics that every run logs are named here; a strategy's own metrics (``train/*``) and metrics
of single layers are found by regular expressions.
"""

from typing import Any

from sparsify.common.errors import SparsifyError

GROUPS = ("base_hash", "protocol", "strategy")
COLUMNS = (
    "config:base",
    "config:pattern",
    "config:weights",
    "summary:test/perplexity",
    "summary:run/seconds",
)
STEP = "trainer/global_step"
SCORE = "test/perplexity"


def make_workspace(project: str, entity: str, name: str) -> Any:
    """Make the workspace without saving it.

    Args:
        project: the project whose runs it shows.
        entity: the user or team that owns the project.
        name: the workspace's title.

    Returns:
        A ``wandb_workspaces.workspaces.Workspace``.

    Raises:
        SparsifyError: wandb or wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise SparsifyError(
            f"sparsify dashboard needs {error.name}, which is not installed; "
            "pip install 'sparsify-llm[wandb]'"
        ) from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(name=title, panels=panels, is_open=True)
            for title, panels in _sections(wr).items()
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            # Never group perplexities of different base models or protocols.
            groupby=[ws.Config(key) for key in GROUPS],
            order=[ws.Ordering(ws.Summary(SCORE), ascending=True)],
            pinned_columns=list(COLUMNS),
        ),
    )


def describe_workspace(workspace: Any) -> dict[str, Any]:
    """The content that would be sent to the server, as plain values."""
    content: dict[str, Any] = workspace._spec  # the package has no public way to get it
    return content


def save_workspace(workspace: Any) -> str:
    """Create the workspace on the server, and return its address.

    Raises:
        SparsifyError: nobody is logged in, the server cannot be reached, or it refuses.
    """
    import wandb

    try:
        if not workspace.entity:
            workspace.entity = wandb.Api().default_entity
        workspace.save()
        return str(workspace.url)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise SparsifyError(
            f"the workspace was not created: {str(error).rstrip('.')}; this needs an account and "
            "network: run `wandb login` or set WANDB_API_KEY, check --entity and --project, or "
            "look at what would be sent with --dry_run"
        ) from error


def _sections(wr: Any) -> dict[str, list[Any]]:
    """The panels by section; ``wr`` is the package's module of panels."""

    def line(metric: str, x: str = STEP, log_y: bool = False) -> Any:
        return wr.LinePlot(title=f"{metric} over {x}", x=x, y=[metric], log_y=log_y)

    def lines(title: str, regex: str) -> Any:
        return wr.LinePlot(title=title, x=STEP, metric_regex=regex)

    def scatter(x: str) -> Any:
        title = f"{SCORE} against {x}; compare within one base and protocol"
        return wr.ScatterPlot(
            title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(SCORE), log_y=True
        )

    masks = (
        "flips",
        "distance",
        "retained_norm",
        "max_probability",
        "entropy",
        "sample_change",
        "soft_hard_gap",
    )
    return {
        "Which to ship": [
            wr.BarPlot(title=f"{SCORE} by base, protocol and strategy", metrics=[SCORE]),
            wr.RunComparer(diff_only="split"),
        ],
        "Perplexity over cost": [
            line("val/perplexity", "run/tokens", log_y=True),
            line("val/perplexity", "run/seconds", log_y=True),
            scatter("run/seconds"),
            scatter("run/peak_memory_gib"),
        ],
        "Masks move": [
            *(line(f"masks/{metric}") for metric in masks),
            lines("losses and schedules", "^train/.*"),
        ],
        "Layers": [
            wr.WeavePanelSummaryTable(table_name="layers"),
            lines("distance by layer", "^layers/.*/distance$"),
            lines("flips by layer", "^layers/.*/flips$"),
        ],
        "Speed": [line("speed/tokens_per_second"), line("speed/peak_memory_gib")],
    }
