"""``sparsify eval``: equal to the harness itself, dense beside sparse, and what it refuses."""

import gc
import inspect
import json
import math
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from transformers import LlamaForCausalLM

from sparsify.cli.commands.evaluate import evaluate
from sparsify.cli.main import main
from sparsify.common.errors import SparsifyError
from sparsify.common.version import version
from sparsify.export.mask_file import read_masks
from sparsify.results.downstream import run
from sparsify.results.downstream.quiet import quiet_harness
from sparsify.serving.verify import verify
from tests.conftest import Cli, start_in
from tests.results.downstream.tasks import QUESTIONS, write_tasks

Eval = Callable[..., tuple[int, str, str]]
TASKS = "--tasks=choose,read,recall"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text: Path
) -> Iterator[Path]:
    """A folder with ``tasks``, and ``run/export`` of a magnitude mask; the data sets' cache too."""
    folder = tmp_path_factory.mktemp("eval")
    write_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        start_in(folder, patch)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        Cli(folder, model_folder, text)(
            "export", "--strategy=magnitude", "--output.folder=run/export"
        )
        yield folder


@pytest.fixture
def eval_(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Eval:
    """Runs the command: its exit status, output and errors."""
    monkeypatch.setenv("COLUMNS", "120")

    def evaluated(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["eval", *words])
        return int(exit_.value.code or 0), *capsys.readouterr()

    return evaluated


@pytest.fixture
def words(place: Path, model_folder: Path, tmp_path: Path) -> list[str]:
    """Words that are the same in most runs: export, base, tasks and a free place."""
    return [
        "run/export",
        f"--base={model_folder}",
        "--include_path=tasks",
        f"--out={tmp_path}/out.json",
    ]


@cache
def harness(model: str, tasks: str, num_fewshot: int | None = None) -> Any:
    """What the harness' own command calls."""
    with quiet_harness():
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": model, "dtype": "float32"},
            tasks=tasks.split(","),
            num_fewshot=num_fewshot,
            batch_size=8,
            device="cpu",
            bootstrap_iters=1000,
            task_manager=lm_eval.tasks.TaskManager(include_path="tasks", include_defaults=False),
        )


def test_both_models_score_as_in_the_harness_itself(
    words: list[str], model_folder: Path, eval_: Eval
) -> None:
    status, text, _ = eval_(*words, TASKS, "--format=json")
    assert status == 0, text
    report = json.loads(text)
    for kind, folder in (("dense", str(model_folder)), ("sparse", "run/export")):
        direct = harness(folder, "choose,read,recall")["results"]
        for task, row in report["results"].items():
            found, expected = row[kind], direct[task]
            key = f"{row['metric']},none"
            error = expected[f"{row['metric']}_stderr,none"]
            assert found["value"] == pytest.approx(expected[key], rel=1e-5)
            assert found["stderr"] == (None if error == "N/A" else pytest.approx(error, rel=1e-4))
            assert found["metrics"].keys() == {
                name.partition(",")[0] for name in expected if "," in name and "stderr" not in name
            }
        assert report["results"]["choose"][kind]["metrics"]["acc_norm"]["value"] == pytest.approx(
            direct["choose"]["acc_norm,none"]
        )
    rows = report["results"]
    assert {task: row["metric"] for task, row in rows.items()} == {
        "choose": "acc",
        "read": "word_perplexity",
        "recall": "perplexity",
    }
    assert rows["choose"]["dense"]["value"] != rows["choose"]["sparse"]["value"]
    assert rows["read"]["difference"] == {
        "value": rows["read"]["sparse"]["value"] - rows["read"]["dense"]["value"],
        "stderr": None,
        "method": "independent",
    }
    assert rows["recall"]["difference"]["stderr"] == pytest.approx(
        math.hypot(rows["recall"]["dense"]["stderr"], rows["recall"]["sparse"]["stderr"])
    )
    assert report["mean"]["tasks"] == ["choose"]


def test_the_difference_is_of_the_same_questions(
    words: list[str], model_folder: Path, eval_: Eval
) -> None:
    row = json.loads(eval_(*words, "--tasks=choose", "--format=json")[1])["results"]["choose"]
    answers = [
        {s["doc_id"]: s["acc"] for s in harness(folder, "choose,read,recall")["samples"]["choose"]}
        for folder in (str(model_folder), "run/export")
    ]
    lost = sum(answers[0][i] > answers[1][i] for i in answers[0])
    won = sum(answers[0][i] < answers[1][i] for i in answers[0])
    n = len(answers[0])
    assert (n, lost > 0, won > 0) == (QUESTIONS, True, True)
    variance = ((lost + won) - (won - lost) ** 2 / n) / (n - 1)
    assert row["difference"] == {
        "value": pytest.approx((won - lost) / n),
        "stderr": pytest.approx(math.sqrt(variance / n)),
        "method": "paired",
    }


def test_examples_in_context_are_the_harness_own(words: list[str], eval_: Eval) -> None:
    report = json.loads(eval_(*words, "--tasks=choose", "--num_fewshot=2", "--format=json")[1])
    direct = harness("run/export", "choose", 2)
    row, protocol = report["results"]["choose"], report["protocol"]["tasks"]["choose"]
    assert protocol["num_fewshot"] == 2
    # The same prompts: each is part of the hash that the harness gives a task.
    assert row["sparse"]["value"] == direct["results"]["choose"]["acc,none"]
    prompts = [s["prompt_hash"] for s in direct["samples"]["choose"]]
    asked = "".join(
        s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in direct["samples"]["choose"]
    )
    assert len(set(prompts)) == QUESTIONS
    assert protocol["examples_hash"] == lm_eval.utils.hash_string(asked)


def test_the_report_says_how_all_was_measured(
    words: list[str], tmp_path: Path, eval_: Eval
) -> None:
    assert eval_(*words, "--tasks=choose", "--limit=7", "--batch_size=3")[0] == 0
    report = json.loads((tmp_path / "out.json").read_text())
    manifest = json.loads(Path("run/export/sparsity_manifest.json").read_text())
    assert report["schema"] == "sparsify.downstream/1"
    for name in ("sparsify", "lm_eval", "transformers", "torch", "datasets"):
        assert report["versions"][name] == version(name)
    protocol = report["protocol"]
    task = protocol.pop("tasks")["choose"]
    assert protocol.pop("base")["hash"] == manifest["base"]["hash"]
    assert protocol.pop("masks") == read_masks(Path("run/export")).digest
    assert len(protocol.pop("manifest")) == 64
    assert protocol == {
        "metric": "acc",
        "limit": 7,
        "batch_size": 3,
        "dtype": "float32",
        "device": "cpu",
        "max_length": 32,
    }
    assert (task["version"], task["examples"], task["available"]) == (3.0, 7, QUESTIONS)
    assert report["results"]["choose"]["examples"] == 7
    assert verify(Path("run/export")).ok


def test_the_table_and_what_stands_around_it(
    words: list[str], model_folder: Path, eval_: Eval
) -> None:
    status, text, progress = eval_(*words, "--tasks=choose,choose_fixed,read", "--limit=5")
    assert status == 0
    report = json.loads(Path(words[-1].partition("=")[2]).read_text())
    dense, sparse = (report["results"]["choose"][kind] for kind in ("dense", "sparse"))
    line = next(line for line in text.splitlines() if line.strip().startswith("choose "))
    assert f"{dense['value']:.4f} ± {dense['stderr']:.4f}" in line
    assert f"{sparse['value']:.4f} ± {sparse['stderr']:.4f}" in line
    assert f"{report['results']['choose']['difference']['value']:+.4f} ±" in line
    for expected in (
        "word_perplexity (lower is better)",
        "mean of 2 tasks",
        "paired over the examples (taken as independent in read)",
        "the first 5 examples, 0 examples in context, float32 on cpu, batches of 8, at most 32 tok",
        f"base {model_folder.name} {report['protocol']['base']['hash'][:12]}, masks ",
    ):
        assert expected in text
    assert progress.splitlines() == [
        f"{kind}: {task} ({at} of 3)"
        for kind in ("dense", "sparse")
        for at, task in enumerate(("choose", "choose_fixed", "read"), 1)
    ]


def test_requests_that_were_cut_are_told_of(words: list[str], eval_: Eval) -> None:
    text = eval_(*words, "--tasks=recall")[1]
    warned = [line for line in text.splitlines() if line.startswith("warning, recall, ")]
    assert len(warned) == 1
    assert "exceeds model's maximum length (N)" in warned[0]


def test_acc_norm_is_shown_when_asked_for(words: list[str], eval_: Eval) -> None:
    report = json.loads(eval_(*words, "--tasks=choose", "--metric=acc_norm", "--format=json")[1])
    row = report["results"]["choose"]
    assert (row["metric"], report["mean"]["metric"]) == ("acc_norm", "acc_norm")
    direct = harness("run/export", "choose,read,recall")["results"]["choose"]
    assert row["sparse"]["value"] == pytest.approx(direct["acc_norm,none"])


def test_sparse_alone_in_a_run_s_folder(place: Path, eval_: Eval) -> None:
    shutil.copytree("run", "one/run")
    Path("one/run/result.json").write_text("{}")
    status, text, _ = eval_("one/run", "--base=none", "--include_path=tasks", "--tasks=choose")
    assert status == 0
    assert "wrote one/run/downstream.json" in text
    assert "difference" not in text
    report = json.loads(Path("one/run/downstream.json").read_text())
    assert "dense" not in report["results"]["choose"]
    assert report["results"]["choose"]["sparse"]["value"] == pytest.approx(
        harness("run/export", "choose,read,recall")["results"]["choose"]["acc,none"]
    )


def test_outside_a_run_the_report_lies_beside_the_export(place: Path, eval_: Eval) -> None:
    words = ("--base=none", "--include_path=tasks", "--tasks=choose", "--limit=1")
    assert eval_("run/export", *words)[0] == 0
    assert Path("run/export.downstream.json").is_file()
    status, _, error = eval_("run/export", *words)
    assert (status, "run/export.downstream.json exists, and stays" in error) == (2, True)
    Path("run/export.downstream.json").unlink()


def test_the_two_models_are_never_in_memory_together(
    words: list[str], eval_: Eval, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    load = run.load_model

    def watched(*arguments: Any) -> Any:
        assert [model() for model in alive] == [None] * len(alive)
        model = load(*arguments)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(run, "load_model", watched)
    gc.disable()  # or chance would do it
    try:
        status, text, _ = eval_(*words, "--tasks=choose", "--limit=2")
    finally:
        gc.enable()
    assert (status, len(alive)) == (0, 2), text


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness' own tasks, as far as the defaults need: listing all of them takes seconds."""
    own = Path(lm_eval.tasks.__file__).parent
    parts = ("arc", "hellaswag", "openbookqa", "piqa", "race", "winogrande")
    folders = [str(own / part) for part in parts]
    manager = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda: manager)
    return manager


def test_by_default_the_papers_tasks_are_measured(known: Any) -> None:
    defaults = inspect.signature(evaluate).parameters
    names = "hellaswag,race,piqa,winogrande,arc_easy,arc_challenge,openbookqa"
    assert defaults["tasks"].default == names
    assert (defaults["metric"].default, defaults["num_fewshot"].default) == ("acc", None)
    for name in names.split(","):
        config = known.task_index[name].cfg
        assert "acc" in [entry["metric"] for entry in config["metric_list"]]
        assert "num_fewshot" not in config


def test_tasks_of_the_hub_need_a_network(place: Path, known: Any, eval_: Eval) -> None:
    status, text, error = eval_("run/export", "--base=none")
    assert (status, text, error.count("\n")) == (2, "", 1)
    expected = "error: --tasks hellaswag: the task could not be loaded (Couldn't reach 'Rowan/hella"
    assert error.startswith(expected)
    assert "without HF_HUB_OFFLINE" in error
    assert "--include_path DIR" in error


def test_tasks_that_resemble_an_unknown_one_are_named(place: Path, known: Any, eval_: Eval) -> None:
    error = eval_("run/export", "--base=none", "--tasks=arc_chalenge")[2]
    assert "--tasks arc_chalenge: there is no such task; the nearest names are arc_cha" in error
    assert "no name is near" in eval_("run/export", "--base=none", "--tasks=zzz")[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--base=embedded"], "embedded is not the base: its hash in float32 is .* was pruned"),
        (["--base=gone/model"], "no model could be loaded from 'gone/model'"),
        (["--limit=0"], "--limit 0: it must be 1 or more"),
        (["--batch_size=0"], "--batch_size 0: it must be 1 or more"),
        (["--batch_size=auto"], "--batch_size auto .* needs --device cuda"),
        (["--num_fewshot=-1"], "--num_fewshot -1: it must be 0 or more"),
        (["--tasks=,"], "--tasks names no task"),
        (["--tasks=lost"], r"--tasks lost: the task could not be loaded \(.*gone.jsonl"),
        (
            ["--tasks=long"],
            r"--tasks long: the harness cannot run it \(assert len\(continuation_enc\) <= ",
        ),
        (
            ["--tasks=choose_fixed", "--num_fewshot=1"],
            "--num_fewshot 1: choose_fixed is defined with 0 examples",
        ),
        (["--include_path=no"], "--include_path no is not a folder"),
        (["--out=run/export/x.json"], "--out run/export/x.json: an exported folder stays"),
        (["--out=tasks/choose.yaml"], "tasks/choose.yaml exists, and stays"),
        (
            [
                "--out=tasks/choose.yaml/x.json",
                "--base=gone/model",
            ],  # refused before it is looked for
            "tasks/choose.yaml/x.json cannot be written: .*choose.yaml is a file, not a folder",
        ),
    ],
)
def test_what_it_refuses(
    given: list[str], message: str, words: list[str], eval_: Eval, tmp_path: Path
) -> None:
    status, _, error = eval_(*words, "--tasks=choose", *given)
    assert status == 2
    assert "Traceback" not in error
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_what_was_measured_is_shown_though_it_cannot_be_written(
    words: list[str], eval_: Eval, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise SparsifyError("the disk is full")

    monkeypatch.setattr("sparsify.common.files.write_json", full)
    for form, expected in (("table", r"\bchoose .*±"), ("json", '"choose"')):
        status, text, error = eval_(*words, "--tasks=choose", "--limit=2", f"--format={form}")
        assert (status, "the disk is full" in error) == (2, True)
        assert re.search(expected, text), text
        assert "wrote " not in text


def test_cuda_must_be_there(words: list[str], eval_: Eval, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda: PyTorch finds no" in eval_(*words, "--device=cuda")[2]


def test_a_folder_that_was_not_exported_is_refused(model_folder: Path, eval_: Eval) -> None:
    status, _, error = eval_(str(model_folder))
    assert (status, error.count("\n")) == (2, 1)
    assert "holds no sparsity_manifest.json, so nothing says which dense model" in error


def test_a_local_base_must_be_named(place: Path, model_folder: Path, eval_: Eval) -> None:
    status, _, error = eval_("run/export", "--include_path=tasks", "--tasks=choose")
    assert status == 2
    assert (
        f"its base is {model_folder.name!r}, and the manifest does not say where that is" in error
    )
    assert "--base none" in error


@pytest.mark.parametrize("name", ["embedded", "owner/model"])
def test_a_base_that_its_name_finds_needs_not_be_given(name: str) -> None:
    content = {"base": {"name": name}}
    assert run._base_name(Path("x"), None, content) == name
    assert run._base_name(Path("x"), "other", content) == "other"
    assert run._base_name(Path("x"), "none", content) is None


def test_a_missing_harness_says_what_to_install(
    words: list[str], eval_: Eval, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    status, _, error = eval_(*words, "--tasks=choose")
    assert (status, "pip install 'sparsify-llm[eval]'" in error) == (2, True)


def test_a_task_that_the_harness_refuses_is_a_message(words: list[str], eval_: Eval) -> None:
    Path("tasks/unsafe.yaml").write_text(
        Path("tasks/choose.yaml").read_text().replace("task: choose", "task: unsafe")
        + "unsafe_code: true\n"
    )
    status, _, error = eval_(*words, "--tasks=unsafe")
    Path("tasks/unsafe.yaml").unlink()
    assert (status, "--tasks unsafe: the harness cannot run it (" in error) == (2, True)


def test_another_type_is_measured_in_both_models(
    words: list[str], eval_: Eval, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = []
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        _spy(LlamaForCausalLM.forward, lambda model: types.append(str(model.dtype))),
    )
    report = json.loads(
        eval_(*words, "--tasks=choose", "--limit=2", "--dtype=bfloat16", "--format=json")[1]
    )
    assert report["protocol"]["dtype"] == "bfloat16"
    assert set(types) == {"torch.bfloat16"}


def _spy(forward: Any, see: Callable[[Any], None]) -> Any:
    def spied(self: Any, *arguments: Any, **named: Any) -> Any:
        see(self)
        return forward(self, *arguments, **named)

    return spied


def test_an_export_without_masks_says_none(
    place: Path, cli: Cli, eval_: Eval, tmp_path: Path
) -> None:
    cli("export", "--strategy=dense", "--output.folder=dense")
    words = (f"--base={cli.model[0].partition('=')[2]}", "--tasks=choose", "--limit=4")
    status, text, _ = eval_("dense", f"--include_path={place}/tasks", *words)
    assert status == 0
    assert ", masks none\n" in text
    row = json.loads(Path("dense.downstream.json").read_text())["results"]["choose"]
    assert row["difference"] == {"value": 0, "stderr": 0, "method": "paired"}
