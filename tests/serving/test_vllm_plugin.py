"""The plugin on a stand-in for vLLM 0.33.0: every layer computes its dense product."""

import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsify import SparsifyError
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from tests.conftest import tiny_llama
from tests.export.test_folder import masked_module
from tests.serving import fake_vllm
from tests.serving.fake import FakeBackend, FakeClock
from tests.serving.fake_vllm import LinearBase, Mapper, Vllm, load_model

ATTENTION = "model.layers.0.self_attn"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Vllm]:
    monkeypatch.setenv("SPARSIFY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSIFY_VLLM_CHOOSE", raising=False)
    with fake_vllm.fake_vllm(monkeypatch) as state:
        entry = r'"vllm.general_plugins"\]\nsparsify = "([\w.]+):(\w+)"'
        found = re.search(entry, (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        assert found is not None
        for _ in range(2):  # vLLM may call it again
            getattr(import_module(found[1]), found[2])()
        yield state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny Llama, 2:4."""
    out = tmp_path_factory.mktemp("vllm") / "out"
    export(masked_module(tiny_llama(), tokenizer).masked, out, {})
    return out


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def config(
    vllm: Vllm,
    content: dict[str, Any],
    seconds: Callable[[int, int], float] = lambda tokens, rows: 0.5,
    **backend: Any,
) -> Any:
    """What vLLM makes of a manifest, with a stand-in backend and clock."""
    from sparsify.serving.vllm_plugin.loading import Loading

    made: Any = vllm.registered["sparsify"].from_config(content)  # type: ignore[attr-defined]
    made.packed_modules_mapping = FUSED
    clock = FakeClock(seconds)
    made.loading = Loading(made.choose, made.experts, [FakeBackend(**backend)], clock)
    return made


def fused(
    made: Any, weights: list[Tensor], prefix: str = f"{ATTENTION}.qkv_proj", **options: Any
) -> LinearBase:
    layer = LinearBase(weights[0].shape[1], [len(w) for w in weights], made, prefix, **options)
    for part, weight in enumerate(weights):
        layer.load(weight, part)
    return layer


def qkv(folder: Path) -> list[Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"{ATTENTION}.{name}.weight"] for name in FUSED["qkv_proj"]]


def test_what_it_imports() -> None:
    heavy = ("lightning", "jsonargparse", "wandb", "accelerate", "datasets", "sparsify.training")
    code = (
        "import sys, sparsify.serving.vllm_plugin as plugin\n"
        "assert 'torch' not in sys.modules\n"
        "import sparsify.serving.vllm_plugin.loading\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
        "plugin.register()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    # Without vLLM, or with another one, it says so and nothing fails.
    assert "no place for -q sparsify" in done.stderr


def test_it_is_registered_once(vllm: Vllm, folder: Path) -> None:
    [(name, kind)] = vllm.registered.items()
    assert (name, kind.get_config_filenames()) == ("sparsify", [MANIFEST])  # type: ignore[attr-defined]
    made = config(vllm, manifest(folder))
    assert (made.get_name(), made.get_min_capability()) == ("sparsify", 0)
    assert torch.bfloat16 in made.get_supported_act_dtypes()
    for prefix in ("a", "b"):
        made.get_quant_method(LinearBase.__new__(LinearBase), prefix)
    assert vllm.weight_loader_v2 == ["SparseLinearMethod"]
    sent = pickle.loads(pickle.dumps(made))  # noqa: S301
    assert (sent.patterns, sent.loading) == (made.patterns, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_fused_slices_compute_the_dense_product(vllm: Vllm, folder: Path, rank: int) -> None:
    made = config(vllm, manifest(folder))
    weights = qkv(folder)
    layer = fused(made, weights, ranks=(rank, 2), bias=True)
    wanted = torch.cat([w.chunk(2)[rank] for w in weights])
    load_model(layer)
    assert layer.weight.numel() == 0  # only the compressed weight is kept
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, wanted, layer.bias))

    down = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    row = fused(made, [down], "model.layers.1.mlp.down_proj", ranks=(rank, 2), by_rows=False)
    load_model(row)
    x = torch.randn(5, 32)
    torch.testing.assert_close(row(x), F.linear(x, down.chunk(2, 1)[rank]))
    assert made.loading.choices.keys() == {layer.prefix, row.prefix}


def test_the_number_of_tokens_decides(
    vllm: Vllm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(vllm, manifest(folder), lambda tokens, rows: 0.5 if tokens >= 4 else 2)
    weights = qkv(folder)
    layer = fused(made, weights)
    with caplog.at_level(logging.INFO, "vllm.sparsify"):
        load_model(layer)
    assert "sparsify: 1 of 1 linear layers run sparse" in caplog.text
    assert "dense from 1, fake from 4 tokens" in caplog.text
    sparse = layer.quant_method._sparse["fake"]
    calls: list[int] = []
    sparse.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    assert torch.equal(layer.weight, torch.cat(weights))
    wanted = torch.cat(weights)
    for tokens in (1, 3, 4, 100):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(layer(x), F.linear(x, wanted))
    assert calls == [4, 100]


def test_it_compiles_into_one_graph(vllm: Vllm, folder: Path) -> None:
    made = config(vllm, manifest(folder), lambda tokens, rows: 0.5 if tokens >= 4 else 2)
    layer = fused(made, qkv(folder), bias=True)
    load_model(layer)
    assert vllm.config.additional_config == {"sparsify": [layer.prefix]}
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
    few, many = torch.randn(2, 32), torch.randn(8, 32)
    with torch._dynamo.config.patch(error_on_recompile=True):  # an error that names the guard
        found = compiled(few), compiled(many)
    torch.testing.assert_close(found, (layer(few), layer(many)))
    [graph] = graphs
    assert "vllm_linear" in str(graph)
    # Some kernels give the transpose of a product; the operator gives what the compiler was told.
    sparse = layer.quant_method._sparse["fake"]
    sparse.register_forward_hook(lambda module, given, out: out.mT.contiguous().mT)
    x = torch.randn(2, 3, 32)
    assert layer.quant_method.product(layer, x).is_contiguous()
    name = f"{layer.prefix}.sparsify"
    torch.library.opcheck(torch.ops.sparsify.vllm_linear.default, (x, name, 64))


@pytest.mark.parametrize("choose", ["one_weight", "sparse", "dense", "measured"])
def test_the_setting(
    vllm: Vllm, folder: Path, choose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_VLLM_CHOOSE", choose)
    made = config(vllm, manifest(folder), lambda tokens, rows: 0.5 if tokens == 8 else 2)
    layer = fused(made, qkv(folder))
    load_model(layer)
    kept = {"one_weight": (0, 1), "sparse": (0, 1), "dense": (64 * 32, 0), "measured": (64 * 32, 1)}
    compressed = getattr(layer.quant_method, "_sparse", {})
    assert (layer.weight.numel(), len(compressed)) == kept[choose]
    assert (made.loading._clock.asked == []) == (choose in ("sparse", "dense"))
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, torch.cat(qkv(folder))))


def test_a_wrong_setting_is_refused(
    vllm: Vllm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_VLLM_CHOOSE", "fast")
    with pytest.raises(SparsifyError, match="SPARSIFY_VLLM_CHOOSE=fast: it must be one of measur"):
        config(vllm, manifest(folder))


@pytest.mark.parametrize(
    ("backend", "change", "reason"),
    [
        ({"runs": False}, None, "no backend runs on cpu"),
        ({"dtypes": ()}, None, "no backend takes float32"),
        ({}, ("k_proj", None), "its k_proj is not masked"),
        ({}, ("v_proj", "4:8"), "4:8 does not fit in 2:4"),
    ],
)
def test_what_stays_dense_is_a_plain_layer(
    backend: dict[str, Any],
    change: tuple[str, str | None] | None,
    reason: str,
    vllm: Vllm,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = manifest(folder)
    if change is not None:
        name, pattern = f"{ATTENTION}.{change[0]}", change[1]
        entry = content["layers"].pop(name)
        if pattern is not None:
            content["layers"][name] = entry | {"pattern": pattern}
        content["run"] = {}
    made = config(vllm, content, **backend)
    layer = fused(made, qkv(folder))
    with caplog.at_level(logging.INFO, "vllm.sparsify"):
        load_model(layer)
    assert type(layer.quant_method) is fake_vllm.UnquantizedLinearMethod
    assert "sparsify: 0 of 1 linear layers run sparse" in caplog.text
    assert reason in caplog.text
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), F.linear(x, torch.cat(qkv(folder))))


def test_one_four_runs_sparse(vllm: Vllm, folder: Path) -> None:
    content = manifest(folder)
    content["layers"][f"{ATTENTION}.q_proj"]["pattern"] = "1:4"
    made = config(vllm, content)
    weights = qkv(folder)
    weights[0] = weights[0] * (torch.arange(32) % 4 == 1)
    layer = fused(made, weights)
    load_model(layer)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), F.linear(x, torch.cat(weights)))
    assert layer.weight.numel() == 0


def test_batch_invariance_keeps_layers_dense(vllm: Vllm, folder: Path) -> None:
    vllm.envs.VLLM_BATCH_INVARIANT = True
    made = config(vllm, manifest(folder))
    layer = fused(made, qkv(folder))
    load_model(layer)
    assert "VLLM_BATCH_INVARIANT is set" in made.loading.choices[layer.prefix].reason


def test_experts_and_heads_are_left_to_vllm(
    vllm: Vllm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = manifest(folder)
    experts = {"shape": [128, 32], "pattern": "2:4", "layout": "out_in", "experts": 4}
    content["layers"]["model.layers.0.mlp.experts.up"] = experts
    content["run"] = {}
    made = config(vllm, content)
    assert made.get_quant_method(fake_vllm.RoutedExperts(), "model.layers.0.mlp.experts") is None
    assert made.get_quant_method(fake_vllm.ParallelLMHead(), "lm_head") is None
    router = fused(made, [torch.randn(4, 32)], "model.layers.0.mlp.gate")
    layer = fused(made, qkv(folder))
    with caplog.at_level(logging.INFO, "vllm.sparsify"):
        load_model(router, layer)
    assert "dense: 1 model.layers.*.mlp.gate: not masked" in caplog.text
    assert "dense: the experts of 1 masked layers: vLLM multiplies all experts" in caplog.text


def test_names_are_mapped_as_the_model_says(vllm: Vllm, folder: Path) -> None:
    made = config(vllm, manifest(folder))
    made.apply_vllm_mapper(Mapper({"model.": "language_model.model."}))
    layer = fused(made, qkv(folder), f"language_model.{ATTENTION}.qkv_proj")
    load_model(layer)
    assert layer.weight.numel() == 0


def test_no_layer_of_the_manifest_is_noticed(
    vllm: Vllm, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(vllm, manifest(folder))
    layers = [fused(made, qkv(folder), f"other.{i}.qkv_proj") for i in range(2)]
    with caplog.at_level(logging.WARNING, "vllm.sparsify"):
        load_model(*layers)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("sparsify: 0 of 2 linear layers run sparse")
    assert "dense: 2 other.*.qkv_proj: not masked" in line


def test_a_weight_that_is_not_two_four_is_refused(vllm: Vllm, folder: Path) -> None:
    weights = qkv(folder)
    weights[1][9, 4:8] = torch.ones(4)
    layer = fused(config(vllm, manifest(folder)), weights, ranks=(1, 2))
    where = rf"{ATTENTION}.k_proj: .* row 1 of .* keeps 4 weights in group 1 \(inputs 4 to 7\)"
    with pytest.raises(SparsifyError, match=where):
        load_model(layer)


def test_a_wrong_product_is_refused(vllm: Vllm, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SPARSIFY_VLLM_CHOOSE", "sparse")
    layer = fused(config(vllm, manifest(folder), scale=1.5), qkv(folder))
    with pytest.raises(SparsifyError, match="off by 0.5 .*set SPARSIFY_VLLM_CHOOSE=dense"):
        load_model(layer)


def test_loading_again_is_refused(vllm: Vllm, folder: Path) -> None:
    layer = fused(config(vllm, manifest(folder)), qkv(folder))
    load_model(layer)
    with pytest.raises(SparsifyError, match="was compressed and cannot be loaded again"):
        load_model(layer)


@pytest.mark.parametrize("schema", ["sparsify.manifest/9", None])
def test_an_unknown_manifest_is_refused(vllm: Vllm, folder: Path, schema: str | None) -> None:
    with pytest.raises(SparsifyError, match=r"-q sparsify: .* its schema is .*manifest/1"):
        config(vllm, manifest(folder) | {"schema": schema})


def test_what_is_sampled_does_not_depend_on_measurements(vllm: Vllm, folder: Path) -> None:
    layer = fused(config(vllm, manifest(folder)), qkv(folder))
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    load_model(layer)
    assert torch.equal(torch.rand(3), wanted)
