"""Draws docs/images/architecture.svg from the imports of the code.

python docs/draw_architecture.py
"""

import ast
import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
# Which folder may import which, besides itself. docs/architecture.md says what lives in each.
MAY_IMPORT = {
    "common": (),
    "models": ("common",),
    "masking": ("common", "models"),
    "data": ("common", "models", "masking"),
    "export": ("common", "models", "masking"),
    "calibration": ("common", "models", "masking", "data", "export"),
    "serving": ("common", "models", "masking", "data", "export"),
    "training": ("common", "models", "masking", "data", "export", "calibration"),
    "results": (
        *("common", "models", "masking", "data", "export", "calibration", "serving", "training"),
    ),
    "strategies": ("common", "models", "masking", "calibration"),
    "callbacks": (
        *("common", "models", "masking", "data", "export", "calibration", "serving", "training"),
        "results",
    ),
    "api": (
        *("common", "models", "masking", "data", "export", "calibration", "training", "callbacks"),
    ),
    "cli": (
        *("common", "models", "masking", "data", "export", "calibration", "serving", "training"),
        *("results", "callbacks"),
    ),
}
# Left, bottom of each box, in the picture's units; what is above imports what is below.
PLACES = {
    "common": (3.4, 0),
    "models": (3.4, 1.2),
    "masking": (3.4, 2.4),
    "data": (1.0, 3.6),
    "export": (5.8, 3.6),
    "calibration": (2.6, 4.8),
    "serving": (7.4, 4.8),
    "strategies": (0.0, 6.0),
    "training": (3.4, 6.0),
    "results": (5.8, 7.2),
    "callbacks": (3.4, 8.4),
    "api": (0.4, 9.6),
    "cli": (6.4, 9.6),
}
WIDTH, HEIGHT = 1.8, 0.7


def folder_of(module: str) -> str:
    """The folder of a module of the package, ``sparsify.masking.layer`` -> ``masking``."""
    return [*module.split("."), ""][1]


def module_imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from sparsify import signals` imports a module, as far as can be seen from here.
            names = [node.module]
            if node.module == "sparsify":
                names = [f"sparsify.{alias.name}" for alias in node.names]
            found.update(names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "sparsify"}


def sources(root: Path) -> dict[str, list[Path]]:
    """The Python files of each folder."""
    files = {name: sorted((root / "sparsify" / name).rglob("*.py")) for name in MAY_IMPORT}
    files |= {name: sorted((root / name).rglob("*.py")) for name in ("strategies", "callbacks")}
    return files | {"api": [root / "sparsify" / "api.py"]}


def edges(root: Path = ROOT) -> Counter[tuple[str, str]]:
    """How many files of one folder import from another."""
    found: Counter[tuple[str, str]] = Counter()
    for folder, files in sources(root).items():
        for file in files:
            targets = {folder_of(name) for name in module_imports(file)} & set(MAY_IMPORT)
            found.update((folder, target) for target in targets - {folder})
    return found


def violations(root: Path = ROOT) -> list[str]:
    """The imports that run the wrong way, one sentence each."""
    return [
        f"{file.relative_to(root)} imports {name}"
        for folder, files in sources(root).items()
        for file in files
        for name in sorted(module_imports(file))
        if folder_of(name) in MAY_IMPORT and folder_of(name) not in (folder, *MAY_IMPORT[folder])
    ]


def direct(found: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that no way over other folders stands for."""

    def below(folder: str) -> set[str]:
        targets = {target for source, target in found if source == folder}
        return targets.union(*map(below, targets))

    return {
        (source, target)
        for source, target in found
        if not any(target in below(other) for one, other in found if one == source)
    }


def draw(path: Path = PICTURE) -> None:
    """Boxes for folders, and an arrow to each that one imports, less those that others imply."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "sparsify", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure, axes = plt.subplots(figsize=(7, 7.5))
    for source, target in sorted(direct(set(edges()))):
        (x, y), (u, v) = PLACES[source], PLACES[target]
        arrow = FancyArrowPatch(
            (x + WIDTH / 2, y),
            (u + WIDTH / 2, v + HEIGHT),
            arrowstyle="-|>",
            mutation_scale=12,
            linewidth=1.3,
            color="#78909c",
            shrinkA=0,
            shrinkB=0,
        )
        axes.add_patch(arrow)
    for name, (x, y) in PLACES.items():
        own = name in ("strategies", "callbacks")
        box = FancyBboxPatch(
            (x, y),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor="#fff3d6" if own else "#d8efec",
            edgecolor="#00695c",
        )
        axes.add_patch(box)
        label = name if name == "api" else f"{name}/"
        axes.text(x + WIDTH / 2, y + HEIGHT / 2, label, ha="center", va="center", fontsize=11)
    axes.set_xlim(-0.3, 9.5)
    axes.set_ylim(-0.3, 10.6)
    axes.set_aspect("equal")
    axes.axis("off")
    told = json.dumps(sorted([*edge, count] for edge, count in edges().items()))
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None, "Description": told})
    plt.close(figure)


if __name__ == "__main__":
    draw()
