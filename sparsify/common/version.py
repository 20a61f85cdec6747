"""The versions of what is installed."""

from importlib import metadata

# On the package index "sparsify" is another project.
DISTRIBUTION = "sparsify-llm"


def version(package: str = "sparsify") -> str:
    """The version of a package, ``sparsify`` being this one; of this one ``unknown`` where it was
    not installed under its own name.

    Raises:
        PackageNotFoundError: another one is not installed.
    """
    if package != "sparsify":
        return metadata.version(package)
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # a finished run's result is not to be lost for this
        return "unknown"
