"""Writes the tables of docs/models.md from the tiny models that the tests run.

python docs/make_models.py
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from sparsify import SparsityStrategy  # noqa: E402
from sparsify.masking.masked_model import MaskedModel  # noqa: E402
from sparsify.masking.select import decoder_blocks  # noqa: E402
from sparsify.models.layer_names import family  # noqa: E402
from sparsify.models.permutable import permutable, proven  # noqa: E402
from tests.architectures import ARCHITECTURES, EXPERTS, HYBRID, PLAIN, tiny  # noqa: E402
from tests.conftest import masked_model  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
TABLES = {"plain": PLAIN, "hybrid": HYBRID, "experts": EXPERTS}
HEAD = "| architecture | masked | dense |\n|---|---|---|"
PERMUTED_HEAD = "| parts | architectures |\n|---|---|"


def answer(masked: MaskedModel) -> tuple[str, str]:
    """The names of a model's masked layers, and of its dense ones with a word on the reason."""
    blocks = next(iter(decoder_blocks(masked.model))).rpartition(".")[0]
    reasons: dict[str, list[str]] = {}
    for name, reason in masked.dense.items():
        module = masked.model.get_submodule(name)
        # Embeddings and heads are dense everywhere; the page says so once.
        if not isinstance(module, nn.Embedding) and not reason.startswith("output head"):
            reasons.setdefault(_word(reason), []).append(_short(name, blocks))
    dense = [f"{_joined(names)} ({reason})" for reason, names in sorted(reasons.items())]
    return _joined(_short(name, blocks) for name in masked.layers), "; ".join(dense)


def row_of(architecture: str, page: str) -> tuple[str, str]:
    """What a page says of an architecture, as :func:`answer` does."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found = [row for row in rows if f"`{architecture}`" in row[0].split(", ")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows name {architecture}; run docs/make_models.py")
    return found[0][1], found[0][2] if len(found[0]) > 2 else ""


def permuted(model: PreTrainedModel) -> str:
    """The kinds of parts of a model that can be permuted."""
    parts, _ = proven(model, permutable(model)[0])
    found = {part.kind for part in parts.values()}
    return ", ".join(kind for kind in ("mlp", "heads", "residual") if kind in found)


def permuted_row(architecture: str, page: str) -> str:
    """What a page says of an architecture, as :func:`permuted` does."""
    rows = [line.strip("| ").split(" | ") for line in page.splitlines()]
    found = [row[0] for row in rows if f"`{architecture}`" in row[-1].split(", ")]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows name {architecture}; run docs/make_models.py")
    return found[0]


def permuted_table() -> str:
    """A row for all architectures of which the same can be permuted, the longest first."""
    rows: dict[str, list[str]] = {}
    for kind in ARCHITECTURES:
        model = tiny(kind)
        rows.setdefault(permuted(model), []).append(f"`{type(model).__name__}`")
    lines = sorted(rows.items(), key=lambda row: -len(row[1]))
    return "\n".join([PERMUTED_HEAD, *(f"| {row} | {', '.join(names)} |" for row, names in lines)])


def table(kinds: Iterable[str]) -> str:
    """A row for all architectures of which the same is to say, the longest first."""
    rows: dict[tuple[str, str], list[str]] = {}
    for kind in kinds:
        masked = masked_model(tiny(kind), SparsityStrategy())
        masked.check_called()
        rows.setdefault(answer(masked), []).append(f"`{type(masked.model).__name__}`")
    lines = sorted(rows.items(), key=lambda row: -len(row[1]))
    return "\n".join(
        [HEAD, *(f"| {', '.join(names)} | {' | '.join(row)} |" for row, names in lines)]
    )


def _short(name: str, blocks: str) -> str:
    """A name within its block, without numbers."""
    inside = re.match(rf"{re.escape(blocks)}\.\d+\.", name)
    short = name[inside.end() :] if inside else name.removeprefix("model.")
    return re.sub(r"\.\d+$", ".*", family(short))


def _word(reason: str) -> str:
    """The first words of a reason, which need no name of a class."""
    if "is not a plain linear layer" in reason:
        return "convolution" if reason.startswith("Conv") else "no linear layer"
    return reason.partition(":")[0].removesuffix(" and state inputs")


def _joined(names: Iterable[str]) -> str:
    """Names in one module are written as one, as shells do: ``mlp.{gate,up}_proj``."""
    leaves: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        parent, dot, leaf = name.rpartition(".")
        leaves.setdefault(parent + dot, []).append(leaf)
    parts = []
    for front, found in leaves.items():
        same = [leaf.removesuffix("_proj") for leaf in found if leaf.endswith("_proj")]
        rest = [leaf for leaf in found if len(same) < 2 or not leaf.endswith("_proj")]
        for stems, end in ((same if len(same) > 1 else [], "_proj"), (rest, "")):
            if stems:
                braces = ("{", "}") if len(stems) > 1 else ("", "")
                parts.append(f"`{front}{braces[0]}{','.join(stems)}{braces[1]}{end}`")
    return ", ".join(parts)


def main() -> None:
    """Write the page's tables anew."""
    page = PAGE.read_text(encoding="utf-8")
    tables = {name: table(kinds) for name, kinds in TABLES.items()}
    tables["permuted"] = permuted_table()
    for name, rows in tables.items():
        page, count = re.subn(
            rf"(<!-- {name} .*-->\n\n)(?:\|.*\n)*", lambda m, r=rows: f"{m[1]}{r}\n", page
        )
        if count != 1:
            raise SystemExit(f"{PAGE}: there is no comment <!-- {name} ... --> before a table")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
