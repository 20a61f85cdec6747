"""What a GPU must do as a CPU does."""

from pathlib import Path

import pytest
import torch

from sparsify import NMPattern, noise
from sparsify.calibration import Calibration, Layerwise
from sparsify.evaluation import token_losses
from sparsify.inject import inject, select
from sparsify.masker import Draw
from sparsify.masks.file import FILE_NAME
from sparsify.module import SparseCausalLM
from sparsify.registry import make_strategy
from sparsify.strategies.maskllm import MaskLLM
from tests.conftest import Cli, tiny_llama, word_tokenizer

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
        module._calibrate()
        module.to(device)
        with module.scope.use(Draw(0, 0, 0)):
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
        model, pattern = tiny_llama(), NMPattern(2, 4)
        strategy = make_strategy(name)
        scope = inject(model, select(model, pattern)[0], pattern, strategy.make_masker)
        settings = Calibration(samples=8, offload=offload, cache=False)
        engine = Layerwise(model, scope, lambda: tokens, settings, "", torch.device(device))
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
