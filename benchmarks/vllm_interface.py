"""Runs the vLLM plugin on a real vLLM 0.33.0 without a GPU, with a stand-in for the sparse kernel.

    python benchmarks/vllm_interface.py --save benchmarks/results

Install vLLM and this package in an environment of their own first. On a machine without a GPU, vLLM
says that its compiled parts are missing; attention needs them, and linear layers do not. So models
are configured, built, loaded and processed by vLLM's own code, from ``-q sparsify`` on, and every
linear layer is called; generating is not possible.

For each model the folder is loaded twice, with and without ``-q sparsify``, and every linear layer
of both gets the same input. Layers run sparse from 8 tokens on.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
sys.path.append(str(Path(__file__).parent.parent))  # for tests; the package is the installed one

import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.library import Library
from torch.multiprocessing import spawn
from transformers import PreTrainedTokenizerFast

from sparsify import SparseCausalLM
from sparsify.common.files import write_json
from sparsify.export.folder import export
from sparsify.export.manifest import MANIFEST
from sparsify.strategies.magnitude import Magnitude
from sparsify.training.build import calibrate
from tests.serving.fake import FakeBackend, FakeClock

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True}
OPT = {"ffn_dim": 256, "word_embed_proj_dim": 128, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Phi3": {},
    "Olmo2": {},
    "GPT2": GPT2,
    "OPT": OPT,
    "Qwen3Moe": {"head_dim": 32, "norm_topk_prob": True, **EXPERTS},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
# Compiled functions that vLLM looks for when it builds GPT-2 and loads experts; none is called for
# a linear layer.
COMPILED = Library("_C", "FRAGMENT")
COMPILED.define("gelu_new(Tensor! out, Tensor x) -> ()")
COMPILED.define("prepack_moe_weight(Tensor weight, Tensor! packed, str isa) -> ()")
COMPILED.impl("prepack_moe_weight", lambda weight, packed, isa: None, "CPU")
SPARSE_FROM = 8
TOKENS = (1, 5, 8, 40)
MOST_TOKENS = 64


def make_folder(name: str, folder: Path) -> None:
    """Export a tiny random model with 2:4 masks by magnitude, and random biases."""
    sizes = {
        k: v for k, v in SIZES.items() if name != "GPT2" or k in ("vocab_size", "eos_token_id")
    }
    config = getattr(transformers, f"{name}Config")(**sizes | MODELS[name])
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, head)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.randn_like(parameter) * 0.1
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="a"))  # noqa: S106
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")  # noqa: S106
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    module.configure_model()
    calibrate(module)
    export(module.masked, folder, {})


def engine_config(folder: Path, ranks: int = 1, quantization: str | None = "sparsify") -> Any:
    """What ``vllm serve FOLDER -q sparsify`` makes of its arguments."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(folder),
        quantization=quantization,
        dtype="float32",
        max_model_len=MOST_TOKENS,
        max_num_batched_tokens=MOST_TOKENS,
        tensor_parallel_size=ranks,
    ).create_engine_config()


def load_model(config: Any) -> nn.Module:
    """Build, load and process a model by vLLM's own loader."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def start(rank: int, ranks: int, port: int) -> None:
    """Start vLLM's process groups."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    torch.set_num_threads(1)
    torch.accelerator.empty_cache = lambda: None  # fails in PyTorch 2.13 where there is no GPU
    with set_current_vllm_config(VllmConfig()):
        address = f"tcp://127.0.0.1:{port}"
        init_distributed_environment(ranks, rank, address, rank, backend="gloo")
        ensure_model_parallel_initialized(ranks, 1)


def compare(folder: Path, ranks: int) -> dict[str, Any]:
    """Call every linear layer of the folder's model, loaded with and without the plugin."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.linear import LinearBase

    from sparsify.serving.vllm_plugin.linear import SparseLinearMethod
    from sparsify.serving.vllm_plugin.loading import Loading

    config = engine_config(folder, ranks)
    speed = FakeClock(lambda tokens, rows: 0.5 if tokens >= SPARSE_FROM else 2)
    quant = config.quant_config
    quant.loading = Loading(quant.choose, quant.experts, [FakeBackend()], speed)
    sparse, plain = load_model(config), load_model(engine_config(folder, ranks, None))
    wanted = dict(plain.named_modules())
    kinds: Counter[str] = Counter()
    worst = 0.0
    called: Counter[str] = Counter()
    with set_forward_context(None, config):
        for name, layer in sparse.named_modules():
            if not isinstance(layer, LinearBase):
                continue
            is_sparse = isinstance(layer.quant_method, SparseLinearMethod)
            kinds[f"{type(layer).__name__} {'sparse' if is_sparse else 'dense'}"] += 1
            if is_sparse:
                count_calls(layer, called)
            for tokens in TOKENS:
                columns = getattr(layer, "input_size_per_partition", layer.input_size)
                x = torch.randn(tokens, columns)
                found, expected = first(layer(x)), first(wanted[name](x))
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                worst = max(worst, float((found - expected).abs().max()))
    total = sum(count for kind, count in kinds.items() if kind.endswith(" sparse"))
    many = sum(tokens >= SPARSE_FROM for tokens in TOKENS)
    assert called["sparse"] == total * many, (called, total)
    return {
        "linear_layers": dict(kinds),
        "largest_difference": worst,
        "experts_left_dense": quant.experts,
        "report": quant.loading.report().splitlines(),
    }


def count_calls(layer: Any, called: Counter[str]) -> None:
    """Count how often a layer runs on its compressed weight."""

    def count(*_: Any) -> None:
        called["sparse"] += 1

    for part in layer.quant_method._sparse.values():
        part.register_forward_hook(count)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def compile_layer(folder: Path) -> dict[str, Any]:
    """Compile an MLP whose first layer is sparse from 8 tokens on, for any number of tokens."""
    from vllm.forward_context import set_forward_context

    from sparsify.serving.vllm_plugin.loading import Loading

    config = engine_config(folder)
    before = config.compute_hash()
    speed = FakeClock(lambda tokens, rows: 0.5 if tokens >= SPARSE_FROM else 2)
    config.quant_config.loading = Loading("measured", 0, [FakeBackend()], speed)
    mlp = load_model(config).model.layers[0].mlp
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([str(n.target) for n in graph.graph.nodes if n.op == "call_function"])
        return graph.forward

    called: Counter[str] = Counter()
    count_calls(mlp.gate_up_proj, called)
    with set_forward_context(None, config), torch.no_grad():
        compiled = torch.compile(mlp, backend=keep, fullgraph=True, dynamic=True)
        for tokens in TOKENS[1:]:
            x = torch.randn(tokens, 128)
            torch.testing.assert_close(compiled(x), mlp(x))
    assert len(graphs) == 1
    return {
        "graphs": len(graphs),
        "operators_of_the_plugin": sum("vllm_linear" in target for target in graphs[0]),
        "sparse_calls": called["sparse"],
        "compile_hash_changed": config.compute_hash() != before,
    }


def one_rank(rank: int, ranks: int, port: int, folder: Path, out: Path) -> None:
    """One of several processes; writes what it found."""
    start(rank, ranks, port)
    write_json(out / f"{rank}.json", compare(folder, ranks))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find_plugin() -> dict[str, Any]:
    """What vLLM's processes do when they start, twice."""
    from vllm import plugins
    from vllm.model_executor.layers.quantization import get_quantization_config

    for _ in range(2):
        plugins.plugins_loaded = False
        plugins.load_general_plugins()
    kind = get_quantization_config("sparsify")
    [entry] = [e for e in entry_points(group="vllm.general_plugins") if e.name == "sparsify"]
    return {"entry_point": entry.value, "class": f"{kind.__module__}.{kind.__name__}"}


def refused(folder: Path, change: Callable[[Path], None]) -> dict[str, str]:
    """What the user reads when the folder is not as it should be."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "model"
        shutil.copytree(folder, copy)
        change(copy)
        try:
            engine_config(copy)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error).replace(scratch, "")}
    raise AssertionError("it was not refused")


def other_version(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, content | {"schema": "sparsify.manifest/9"})


def attempt(name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one check; a failure is a result too."""
    try:
        found = {"passed": True, **call()}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = {
            "passed": False,
            "error": f"{type(error).__name__}: {str(error)[:400]}",
            "where": f"{Path(where.filename).name}:{where.lineno}",
        }
    print(name, json.dumps(found, indent=1), flush=True)
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("vllm", "torch", "transformers", "sparsify-llm", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def two_ranks(folder: Path, scratch: Path) -> dict[str, Any]:
    """The model over two processes, tensor-parallel."""
    out = scratch / "ranks"
    out.mkdir()
    spawn(one_rank, (2, free_port(), folder, out), nprocs=2)
    return {f"rank_{rank}": json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        os.environ["SPARSIFY_CACHE"] = str(scratch / "cache")
        llama = scratch / "Llama"
        make_folder("Llama", llama)
        checks = {
            "plugin": attempt("plugin", find_plugin),
            "folder without manifest": attempt(
                "folder without manifest", lambda: refused(llama, lambda f: (f / MANIFEST).unlink())
            ),
            "manifest of another version": attempt(
                "manifest of another version", lambda: refused(llama, other_version)
            ),
        }
        checks["Llama, two ranks"] = attempt("two ranks", lambda: two_ranks(llama, scratch))
        start(0, 1, free_port())
        for name in MODELS:
            folder = scratch / name

            def check(name: str = name, folder: Path = folder) -> dict[str, Any]:
                if not folder.exists():
                    make_folder(name, folder)
                return compare(folder, 1)

            checks[name] = attempt(name, check)
        checks["compiled"] = attempt("compiled", lambda: compile_layer(llama))
    if args.save is not None:
        content = {
            "versions": versions(),
            "platform": f"vLLM's CpuPlatform, {platform.machine()}, without vLLM's compiled parts",
            "stubbed": ["_C.gelu_new", "_C.prepack_moe_weight", "torch.accelerator.empty_cache"],
            "sparse_kernel": "a stand-in: packed values and positions, multiplied dense",
            "tokens": list(TOKENS),
            "sparse_from_tokens": SPARSE_FROM,
            "checks": checks,
        }
        write_json(args.save / f"vllm_interface-{date.today()}.json", content)


if __name__ == "__main__":
    main()
