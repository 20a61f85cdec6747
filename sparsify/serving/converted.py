"""Reads weights that are stored under other names than the model's, as Transformers does.

Transformers joins or renames some tensors while it loads them, by rules that depend on its version:
for instance, experts that are stored one by one become one tensor.
"""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig
from transformers import __version__ as transformers_version

from sparsify.common.errors import SparsifyError, first_line
from sparsify.common.files import read_json
from sparsify.models.multimodal import auto_class


class ConvertedWeights:
    """The tensors of a folder under the model's names; it holds all of them at once, on the CPU.

    Attributes:
        folder: where the files are.

    Raises:
        SparsifyError: Transformers does not find all of them in the files, or finds others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            loaded, info = auto_class(config).from_pretrained(
                folder,
                dtype="auto",
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SparsifyError(
                f"Transformers {transformers_version} does not load {folder} "
                f"({first_line(error)}); {_fix(folder)}"
            ) from error
        for kind, what in (
            ("missing_keys", "hold no tensor of the name"),
            ("mismatched_keys", "hold a tensor of another shape,"),
            ("unexpected_keys", "hold a tensor that the model lacks,"),
        ):
            wrong = [key if isinstance(key, str) else key[0] for key in info[kind]]
            if wrong:
                more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise SparsifyError(
                    f"the files in {folder} {what} {min(wrong)}{more}; {_fix(folder)}"
                )
        self._tensors: dict[str, Tensor] = dict(loaded.state_dict())

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._tensors))

    def get(self, name: str) -> Tensor:
        """One tensor; tensors that are tied share memory."""
        return self._tensors[name]


def _fix(folder: Path) -> str:
    """For a message: what is known about the folder, and what to do."""
    wrote = read_json(folder / "config.json").get("transformers_version")
    if wrote and wrote != transformers_version:
        return (
            f"Transformers {wrote} wrote them and {transformers_version} reads them: install "
            f"transformers=={wrote}, or export the model again with {transformers_version}"
        )
    return (
        f"Transformers {transformers_version} wrote and reads them, so that they were changed "
        "after the export: export the model again"
    )
