"""What a GPU must do as a CPU does."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparsify import serving as runtime
from sparsify.calibration import Calibration, Layerwise
from sparsify.export.folder import export
from sparsify.export.mask_file.index import FILE_NAME
from sparsify.masking import noise
from sparsify.masking.masker import Draw
from sparsify.masking.pattern import TWO_FOUR
from sparsify.masking.registry import make_strategy
from sparsify.models.perplexity import token_losses
from sparsify.serving.backends import BACKENDS, Backend
from sparsify.serving.decode import DECODE
from sparsify.strategies.maskllm import MaskLLM
from sparsify.training.build import calibrate
from sparsify.training.module import SparseCausalLM
from tests.conftest import SIZES, Cli, masked_model, tiny_llama, word_tokenizer
from tests.export.test_folder import masked_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_noise_is_the_same_on_both_devices() -> None:
    key = noise.fold(1, 2, 3, "layer")
    assert torch.equal(noise.uniform(key, 64, 96, 5, "cuda").cpu(), noise.uniform(key, 64, 96, 5))


def test_a_draw_gives_the_same_loss_and_gradients_on_both_devices() -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        module = SparseCausalLM.from_model(tiny_llama(), word_tokenizer(), MaskLLM("magnitude"))
        module.configure_model()
        calibrate(module)
        module.to(device)
        with module.masked.scope.use(Draw(0, 0, 0)):
            logits = module.lm(input_ids=tokens.to(device)).logits
        loss = token_losses(logits, tokens.to(device)).mean()
        loss.backward()
        grads = [p.grad.cpu() for p in module.parameters() if p.grad is not None]
        found.append((loss.item(), grads))
    (cpu_loss, cpu_grads), (gpu_loss, gpu_grads) = found
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-4)
    assert len(cpu_grads) == 14
    for cpu, gpu in zip(cpu_grads, gpu_grads, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["sparsegpt", "gblm"])
@pytest.mark.parametrize("offload", [False, True])
def test_calibration_moves_blocks_to_the_gpu_and_back(name: str, offload: bool) -> None:
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model, strategy = tiny_llama(), make_strategy(name)
        settings = Calibration(samples=8, offload=offload, cache=False)
        engine = Layerwise(
            masked_model(model, strategy), lambda: tokens, settings, torch.device(device)
        )
        found.append({layer: result.mask for layer, result in engine.run(strategy)})
        assert {mask.device.type for mask in found[-1].values()} == {"cpu"}
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert found[0].keys() == found[1].keys()
    same = [(found[0][layer] == found[1][layer]).float().mean() for layer in found[0]]
    assert torch.stack(same).mean() > 0.99


def test_a_run_on_the_gpu_exports(cli: Cli) -> None:
    cli("fit", "--strategy=maskllm", "--trainer.accelerator=gpu", "--trainer.devices=1")
    assert (cli.runs()[0] / "export" / FILE_NAME).is_file()
    assert Path("runs").is_dir()


CUDA = torch.device("cuda")
SPARSE_BACKENDS = [b for b in BACKENDS if torch.cuda.is_available() and b.available(CUDA)]
"""Empty on a GPU that no library knows, and on none."""


@pytest.fixture(scope="module")
def wide_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers every backend takes, some with biases, exported with magnitude masks."""
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 192}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("wide") / "out"
    export(masked_module(model.bfloat16(), word_tokenizer()).masked, folder, {})
    return folder


@pytest.mark.skipif(not SPARSE_BACKENDS, reason="no sparse backend runs on this GPU")
@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 3), (2, 64)])
@torch.no_grad()
def test_compressed_layers_multiply_as_dense_ones(
    backend: Backend, shape: tuple[int, ...], wide_export: Path
) -> None:
    model = runtime.load(wide_export, choose="dense")
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 14
    for linear in linears:
        assert backend.takes((linear.out_features, linear.in_features), linear.weight.dtype)
        bias = None if linear.bias is None else linear.bias.detach()
        sparse = backend.compress(linear.weight.detach(), bias)
        x = torch.randn(*shape, linear.in_features, dtype=torch.bfloat16, device="cuda")
        for value in (x, x.transpose(0, 1)) if x.ndim == 3 else (x,):
            torch.testing.assert_close(sparse(value), linear(value), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not SPARSE_BACKENDS, reason="no sparse backend runs on this GPU")
@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda backend: backend.name)
def test_a_loaded_model_runs_sparse_on_the_gpu(backend: Backend, wide_export: Path) -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)).cuda()
    dense = runtime.load(wide_export, choose="dense")
    sparse = runtime.load(wide_export, choose="sparse", backends=[backend])
    assert {choice.backend for choice in runtime.choices(sparse).values()} == {backend.name}
    assert {p.device.type for p in sparse.parameters()} == {"cuda"}
    wanted, found = (model(input_ids=tokens).logits.float() for model in (dense, sparse))
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    out = sparse.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 24)
    with torch.inference_mode():
        assert torch.isfinite(sparse(input_ids=tokens).logits).all()


@pytest.mark.skipif(not SPARSE_BACKENDS, reason="no sparse backend runs on this GPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, in its compiler
@pytest.mark.parametrize("backend", SPARSE_BACKENDS, ids=lambda backend: backend.name)
def test_a_loaded_model_compiles_on_the_gpu(backend: Backend, wide_export: Path) -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0)).cuda()
    model = runtime.load(wide_export, choose="sparse", backends=[backend])
    with torch.inference_mode():
        wanted = model(input_ids=tokens).logits.float()
        found = torch.compile(model)(input_ids=tokens).logits.float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_layers_are_measured_on_the_gpu(wide_export: Path) -> None:
    found = runtime.choices(runtime.load(wide_export, tokens=(1, 16)))
    measured = {name for choice in found.values() for name in choice.seconds}
    assert measured == {backend.name for backend in SPARSE_BACKENDS}
    for choice in found.values():
        for seconds in choice.seconds.values():
            assert list(seconds) == [1, 2, 4, 8, 16]
            assert all(0 < s < 0.1 for pair in seconds.values() for s in pair)


def packed_layer(
    rows: int, columns: int, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A layer of small integers, so that every sum is exact; its dense weight and its bias."""
    weight = torch.randint(-8, 9, (rows, columns), device="cuda").to(dtype)
    weight *= TWO_FOUR.top(weight.abs())
    bias = torch.randint(-8, 9, (rows,), device="cuda").to(dtype)
    return DECODE.compress(weight, bias), weight, bias


@pytest.mark.skipif(DECODE not in SPARSE_BACKENDS, reason="the kernels do not run on this GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4), (9, 20), (17, 2052), (192, 576), (1024, 4096)])
@torch.no_grad()
def test_the_decode_kernels_are_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, weight, bias = packed_layer(*shape, dtype)
    assert torch.equal(layer(torch.eye(shape[1], dtype=dtype, device="cuda")), weight.T + bias)
    for tokens in range(1, 18):
        x = torch.randint(-8, 9, (tokens, shape[1]), device="cuda").to(dtype)
        wanted = (x.double() @ weight.double().T + bias.double()).to(dtype)
        assert torch.equal(layer(x), wanted)


@pytest.mark.skipif(DECODE not in SPARSE_BACKENDS, reason="the kernels do not run on this GPU")
@pytest.mark.parametrize("tokens", [1, 8])
@torch.no_grad()
def test_a_decode_layer_runs_in_a_cuda_graph(tokens: int) -> None:
    layer, weight, bias = packed_layer(192, 576, torch.bfloat16)
    x = torch.zeros(tokens, 576, dtype=torch.bfloat16, device="cuda")
    layer(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.copy_(torch.randint(-8, 9, x.shape, device="cuda"))
    graph.replay()
    wanted = (x.double() @ weight.double().T + bias.double()).bfloat16()
    assert torch.equal(y, wanted)
