"""Small local tasks for lm-evaluation-harness in the words of the tiny tokenizer."""

import json
import random
from pathlib import Path

CHOOSE = """\
task: choose{suffix}
dataset_path: json
dataset_kwargs:
  data_files: {{train: "{folder}/choose.jsonl", test: "{folder}/choose.jsonl"}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: {version}}}
{extra}
"""
# perplexity: not a mean of its examples, and bootstrapped; word_perplexity: no error at all.
READ = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{folder}/read.jsonl"}}
output_type: {output}
test_split: test
doc_to_text: {text}
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: {metric}, aggregation: {metric}, higher_is_better: false}}
metadata: {{version: 2.5}}
"""
READ = READ.replace("aggregation: {metric}", "aggregation: {aggregation}")
QUESTIONS = 30


def write_tasks(folder: Path) -> Path:
    """Tasks choose, choose_fixed (0 examples in context), read, recall (some requests are longer
    than 32 tokens), and two that fail: lost (no data) and long (answers longer than 32 tokens).
    """
    folder.mkdir()
    rng = random.Random(2)  # noqa: S311

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(62)}" for _ in range(count))

    questions = [
        {
            "question": words(rng.randrange(3, 7)),
            "choices": [words(2) for _ in range(3)],
            "answer": rng.randrange(3),
        }
        for _ in range(QUESTIONS)
    ]
    texts = [{"context": words(12), "text": words(rng.randrange(10, 30))} for _ in range(8)]
    for name, rows in (("choose", questions), ("read", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    choose = CHOOSE.format(suffix="", folder=folder, version=3.0, extra="")
    fixed = CHOOSE.format(suffix="_fixed", folder=folder, version=1.0, extra="num_fewshot: 0")
    read = {"output": "loglikelihood_rolling", "text": '""', "metric": "word_perplexity"}
    recall = {"output": "loglikelihood", "text": "context", "metric": "perplexity"}
    for name, text in {
        "choose": choose,
        "choose_fixed": fixed,
        "read": READ.format(task="read", folder=folder, aggregation="weighted_perplexity", **read),
        "recall": READ.format(task="recall", folder=folder, aggregation="perplexity", **recall),
        "long": READ.format(task="long", folder=folder, aggregation="perplexity", **recall).replace(
            "{{text}}", "{{text}} {{text}} {{text}} {{text}}"
        ),
        "lost": choose.replace("choose.jsonl", "gone.jsonl").replace("task: choose", "task: lost"),
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder
