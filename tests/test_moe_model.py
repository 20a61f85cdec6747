"""The script that trains a small mixture of experts: its optimizer, and a run that goes on."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.conftest import Scripts


@pytest.fixture
def script(scripts: Scripts) -> ModuleType:
    return scripts("moe_model")


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_a_stack_moves_as_torchs_muon_moves_each_matrix(
    script: ModuleType, shape: tuple[int, int]
) -> None:
    stack = torch.nn.Parameter(torch.randn(3, *shape))
    start = stack.detach().clone()
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    ours = script.Muon([stack], lr=0.1, weight_decay=0.1)
    theirs = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn_like(stack)
        for matrix, grad in zip(matrices, stack.grad, strict=True):
            matrix.grad = grad.clone()
        ours.step()
        theirs.step()
    moved, expected = stack - start, torch.stack(matrices) - start
    assert (moved - expected).norm() < 0.03 * expected.norm()  # theirs computes in bf16


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import embedded_model

    tokens = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}

    def run(state: str) -> MixtralForCausalLM:
        torch.manual_seed(1)
        model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        script.train(model, script.optimizers(model), tokens, tokens, 4, tmp_path / state, every=2)
        return model

    whole = run("whole.ckpt")
    scores = iter([1.0])  # none for the validation of step 4
    with monkeypatch.context() as patch:
        patch.setattr(embedded_model, "perplexity", lambda *_: next(scores))
        with pytest.raises(StopIteration):
            run("stopped.ckpt")
    assert torch.load(tmp_path / "stopped.ckpt", weights_only=True)["step"] == 2
    resumed = run("stopped.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
