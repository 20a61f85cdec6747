"""Write small tasks for ``sparsify eval`` from texts, by default the embedded model's test texts.

``continue_NAME`` shows 48 words and asks which of several continuations of 12 words is the text's
own; the others stand elsewhere in the text. ``cloze_NAME`` shows a passage of at most 59 words and
asks for the word that comes next, as LAMBADA does.

    python benchmarks/continuation_tasks.py [FOLDER]
    python benchmarks/continuation_tasks.py work/tasks --texts wikitext.txt c4.jsonl --choices 2

No passage runs over the end of a document.
"""

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path

from sparsify.data import Source
from sparsify.data.documents import read_documents
from sparsify.data.sources import BadRows
from sparsify.models.base import EMBEDDED_FOLDER

CONTEXT, CONTINUATION, LETTERS = 48, 12, 4
TASK = """\
task: {kind}_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
doc_to_text: context
metadata:
  version: 1.0
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
CLOZE = """\
output_type: loglikelihood
doc_to_target: "{{' ' + word}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""

Question = dict[str, object]


def embedded_texts() -> dict[str, Source]:
    folders = sorted((EMBEDDED_FOLDER / "text").iterdir())
    return {folder.name: Source(str(folder / "test.jsonl.gz")) for folder in folders}


def passages(source: Source) -> list[list[str]]:
    """Pieces of a text, in its order, each of equally many words."""
    size = CONTEXT + CONTINUATION
    documents = [str(text).split() for text in read_documents(source, "error", BadRows())]
    starts = [range(0, len(words) - size + 1, size) for words in documents]
    return [
        words[at : at + size] for words, each in zip(documents, starts, strict=True) for at in each
    ]


def choice_questions(parts: list[list[str]], choices: int) -> list[Question]:
    """Each passage's first words, its own end, and the ends of others."""
    ends = [" ".join(part[CONTEXT:]) for part in parts]
    if len({*ends}) < choices:
        raise SystemExit(
            f"a text has {len({*ends})} different passages of {CONTEXT + CONTINUATION} words; "
            f"questions with {choices} choices need as many: give a longer text"
        )
    found: list[Question] = []
    for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
        rng = random.Random(number)
        others = rng.sample(sorted({*ends} - {end}), choices - 1)
        answer = rng.randrange(choices)
        all_ends = [*others[:answer], end, *others[answer:]]
        found.append({"context": " ".join(part[:CONTEXT]), "choices": all_ends, "answer": answer})
    return found


def cloze_questions(parts: list[list[str]]) -> list[Question]:
    """Each passage up to its last word of letters alone, at least four, and that word."""
    found: list[Question] = []
    for part in parts:
        asked = [at for at, word in enumerate(part) if word.isalpha() and len(word) >= LETTERS]
        if asked and asked[-1] >= CONTEXT:
            found.append({"context": " ".join(part[: asked[-1]]), "word": part[asked[-1]]})
    return found


def write_tasks(folder: Path, texts: Mapping[str, Source], choices: int = 4) -> list[str]:
    """Write both tasks of each text, and give their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, source in texts.items():
        parts = passages(source)
        kinds = (
            ("continue", CHOICE, choice_questions(parts, choices)),
            ("cloze", CLOZE, cloze_questions(parts)),
        )
        for kind, how, questions in kinds:
            task = f"{kind}_{name}"
            file = folder.resolve() / f"{task}.jsonl"
            lines = "".join(json.dumps(question) + "\n" for question in questions)
            file.write_text(lines, encoding="utf-8")
            text = TASK.format(kind=kind, name=name, file=file) + how
            (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
            print(f"{task}: {len(questions)} questions")
            names.append(task)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/tasks"))
    parser.add_argument("--texts", type=Path, nargs="+", help="text or JSON lines of any kind")
    parser.add_argument("--choices", type=int, default=4, help="continuations of a question")
    args = parser.parse_args()
    given = {file.name.partition(".")[0]: Source(str(file)) for file in args.texts or ()}
    write_tasks(args.folder, given or embedded_texts(), args.choices)


if __name__ == "__main__":
    main()
