"""The text of a model card."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sparsify.export.card_facts import Facts, at, code, has_perplexity, line, table
from sparsify.masking.pattern import NMPattern
from sparsify.models.base import EMBEDDED

_WEIGHTS = {
    "frozen": "the kept weights are the base model's",
    "proxy": "the kept weights are the base model's",
    "updated": "the kept weights of these layers were updated",
    "adapted": "the kept weights of these layers were trained",
    "trained": "all weights were trained",
}


def body(facts: Facts) -> str:
    """The card below its metadata."""
    parts = [
        f"# {line(facts.title)}",
        *_what(facts),
        *_results(facts),
        *_use(facts),
        *_limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _what(facts: Facts) -> Iterator[str]:
    base = code(facts.base_name)
    if facts.base_id is not None:
        base = f"[{facts.base_id}](https://huggingface.co/{facts.base_id})"
    elif facts.base_name == EMBEDDED:
        base = "The embedded model of sparsify"
    if not facts.patterns:
        yield f"{base}, exported by sparsify without a sparse layer."
        return
    names = " and ".join(name for name, _ in facts.patterns.most_common())
    yield (
        f"{base} with {names} sparse weights, made by sparsify. N:M means: of every M weights in a "
        "row along a layer's inputs, at most N are not zero. This is an ordinary checkpoint with "
        "exact zeros, which loads without sparsify too."
    )
    yield "## What is sparse"
    run = table(facts.record.get("run"))
    rows = [("pattern", ", ".join(f"{name} in {n} layers" for name, n in facts.patterns.items()))]
    weights = _WEIGHTS.get(str(at(facts.manifest, "strategy.weights")), "")
    rows.append(("strategy", "; ".join(filter(None, (code(facts.strategy), weights)))))
    steps, tokens = run.get("steps"), run.get("tokens")
    if isinstance(steps, int) and isinstance(tokens, int) and steps:
        rows.append(("learned in", f"{steps:,} steps, {tokens:,} tokens"))
    calibration = table(run.get("calibration"))
    if samples := calibration.get("samples"):
        texts = ", ".join(map(line, table(calibration.get("sources"))))
        size = calibration.get("block_size")
        rows.append(("calibrated on", f"{samples} windows of {size} tokens: {texts}"))
    shares = [at(facts.manifest, f"coverage.{part}") for part in ("blocks", "model")]
    if all(isinstance(share, float | int) for share in shares):
        of = f"{shares[0]:.1%} of the decoder blocks' weights, {shares[1]:.1%} of all parameters"
        rows.append(("N:M", of))
    if facts.manifest.get("permutation"):
        rows.append(("channels", "in another order than the base's (`sparsity_permutation.json`)"))
    rows.append(("stored in", line(facts.manifest.get("dtype"))))
    yield "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    dense = at(facts.manifest, "coverage.dense")
    kinds = [table(kind) for kind in dense] if isinstance(dense, list) else []
    lines = [
        f"- {code(kind.get('name'))} ({kind.get('count')}), {kind.get('weights'):,} weights: "
        f"{line(kind.get('reason'))}"
        for kind in kinds
        if isinstance(kind.get("weights"), int)
    ]
    if lines:
        yield "Dense are:\n\n" + "\n".join(lines)


def _results(facts: Facts) -> Iterator[str]:
    yield "## Results"
    scores, protocol = facts.scores(), table(facts.record.get("protocol"))
    if scores:
        dense = {text: score for text, score in facts.dense.items() if has_perplexity(score)}
        extra, bar = (" dense perplexity |", "---:|") if dense else ("", "")
        rows = [
            f"| text |{extra} perplexity | nats a token | windows |",
            f"|---|{bar}---:|---:|---:|",
        ]
        for text, score in scores.items():
            beside = f" {dense[text]['perplexity']:.3f} |" if text in dense else " |" * bool(dense)
            loss = math.log(score["perplexity"])
            numbers = f"{score['perplexity']:.3f} | {loss:.4f} | {score.get('windows', '')} |"
            rows.append(f"| {line(text)} |{beside} {numbers}")
        yield "\n".join(rows)
        yield _protocol(facts, protocol)
        if not dense:
            yield "The dense model was not measured beside it."
    results = table(facts.tasks.get("results"))
    if rows := list(_task_rows(results)):
        head = ["| task | metric | examples | dense | sparse |", "|---|---|---:|---:|---:|"]
        yield "\n".join([*head, *rows])
        yield (
            f"Tasks of lm-evaluation-harness {line(at(facts.tasks, 'versions.lm_eval'))}, "
            f"computed in {line(at(facts.tasks, 'protocol.dtype'))}; ±: one standard error."
        )
    if not scores and not results:
        yield "Not measured: nothing is known of this model's quality."


def _protocol(facts: Facts, protocol: Mapping[str, Any]) -> str:
    data = table(protocol.get("data"))
    first = " ".join(map(str, data.get("bos") or [])) if isinstance(data.get("bos"), list) else ""
    start = f"each after {code(first)}" if first else "without a special token before them"
    digest = line(at(protocol, "base.hash"))[:12]
    return (
        "Token perplexity: exp of the mean over windows of the mean cross-entropy of the next "
        f"token. Split {code(protocol.get('split'))}, windows of {data.get('block_size')} tokens "
        f"that do not overlap, {start}; computed in {line(at(protocol, 'base.dtype'))}; base "
        f"model {digest}. Hashes of the texts are in `sparsity_manifest.json`. The numbers of "
        "other windows or tokenizers cannot be compared with these."
    )


def _task_rows(results: Mapping[str, Any]) -> Iterator[str]:
    for task, row in results.items():
        if at(row, "sparse.value") is None:
            continue
        cells = []
        for kind in ("dense", "sparse"):
            value, error = at(row, f"{kind}.value"), at(row, f"{kind}.stderr")
            bound = "" if error is None else f" ± {error:.4f}"
            cells.append("" if value is None else f"{value:.4f}{bound}")
        names = f"{line(task)} | {line(row.get('metric'))} | {row.get('examples', '')}"
        yield f"| {names} | {' | '.join(cells)} |"


def _use(facts: Facts) -> Iterator[str]:
    kind = "CausalLM" if facts.task == "text-generation" else "ImageTextToText"
    yield "## How to run it"
    yield "`FOLDER` is this repository on your disk: `hf download REPOSITORY --local-dir FOLDER`."
    yield (
        "Plain Transformers, which computes with the zeros as with any other weights:\n\n"
        f"```python\nfrom transformers import AutoModelFor{kind}\n\n"
        f'model = AutoModelFor{kind}.from_pretrained("FOLDER", dtype="auto")\n```'
    )
    if not facts.patterns:
        return
    yield (
        "Transformers with sparsify, which measures every layer on your GPU and runs it on "
        "compressed weights where that was faster:\n\n"
        "```python\nimport torch\nfrom sparsify.serving import load\n\n"
        'model = load("FOLDER", dtype=torch.bfloat16)\n```'
    )
    yield "vLLM, with sparsify installed beside it:\n\n```bash\nvllm serve FOLDER -q sparsify\n```"
    yield (
        "TensorRT (`docs/tensorrt.md` of sparsify):\n\n```bash\nsparsify onnx FOLDER model.onnx\n"
        "trtexec --onnx=model.onnx --saveEngine=model.plan --sparsity=enable\n```"
    )
    yield "`sparsify verify FOLDER` checks every zero, mask and file."


def _limits(facts: Facts) -> Iterator[str]:
    yield "## Limits"
    lines = ["- **No speed is claimed.** Zeros alone make nothing faster: measure on your own GPU."]
    odd = sum(
        count for name, count in facts.patterns.items() if not NMPattern.parse(name).within_two_four
    )
    if odd:
        lines.append(
            f"- {odd} layers are not 2:4, the one pattern that GPUs multiply: they run dense."
        )
    if facts.patterns:
        lines.append("- On text unlike that which the masks were made with, it may lose more.")
    licence = "" if facts.licence else " (which is not known here)"
    lines.append(f"- The base model's licence{licence} and its limits hold for this model too.")
    yield "\n".join(lines)
