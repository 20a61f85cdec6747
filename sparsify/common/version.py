"""The versions of installed packages."""

from importlib import metadata

# On the package index "sparsify" is another project.
DISTRIBUTION = "sparsify-llm"


def version(package: str = "sparsify") -> str:
    """The version of a package; ``sparsify`` is this one, whose version is ``unknown`` where it was
    not installed under its own name.

    Raises:
        PackageNotFoundError: the package is another one, and not installed.
    """
    if package != "sparsify":
        return metadata.version(package)
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # no reason to lose a finished run's result
        return "unknown"
