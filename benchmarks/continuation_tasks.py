"""Write small tasks for ``sparsify eval`` from the embedded test text.

For each of the three texts: 48 words, and four continuations of 12 words, of which one is the
text's own and the others stand elsewhere in it.

    python benchmarks/continuation_tasks.py [FOLDER]
"""

import gzip
import json
import random
import sys
from pathlib import Path

from sparsify.models.base import EMBEDDED_FOLDER

CONTEXT, CONTINUATION, CHOICES = 48, 12, 4
TASK = """\
task: continue_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: context
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def examples(file: Path) -> list[dict[str, object]]:
    """Questions on a text, in its order."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        words = " ".join(json.loads(line)["text"] for line in lines).split()
    size = CONTEXT + CONTINUATION
    parts = [words[at : at + size] for at in range(0, len(words) - size + 1, size)]
    contexts = [" ".join(part[:CONTEXT]) for part in parts]
    ends = [" ".join(part[CONTEXT:]) for part in parts]
    found: list[dict[str, object]] = []
    for at, context in enumerate(contexts):
        rng = random.Random(at)
        others = rng.sample([end for end in ends if end != ends[at]], CHOICES - 1)
        answer = rng.randrange(CHOICES)
        choices = [*others[:answer], ends[at], *others[answer:]]
        found.append({"context": context, "choices": choices, "answer": answer})
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for text in sorted((EMBEDDED_FOLDER / "text").iterdir()):
        file = folder.resolve() / f"{text.name}.jsonl"
        rows = examples(text / "test.jsonl.gz")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        task = TASK.format(name=text.name, file=file)
        (folder / f"{text.name}.yaml").write_text(task, encoding="utf-8")
        print(f"continue_{text.name}: {len(rows)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tasks"))
