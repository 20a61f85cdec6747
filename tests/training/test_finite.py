"""Numbers that are not finite end a run, and the message names where they began."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sparsify import SparseCausalLM, SparsifyError
from sparsify.models.perplexity import PerplexityMeter, token_losses
from sparsify.strategies.magnitude import Magnitude
from sparsify.strategies.maskllm import MaskLLM
from sparsify.training.build import calibrate
from sparsify.training.guards import check_learned, finite_scores, not_finite
from tests.conftest import Cli, quiet_trainer, tiny_llama

TOKENS = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))


def module_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> SparseCausalLM:
    module = SparseCausalLM.from_model(model, tokenizer, Magnitude())
    module.configure_model()
    calibrate(module)
    return module


def scores_of(module: SparseCausalLM) -> None:
    meter = PerplexityMeter(["text"], torch.device("cpu"))
    meter.update("text", module.window_losses(TOKENS), None, TOKENS)
    finite_scores(meter, module)


def test_the_layer_in_which_it_begins_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    module = module_of(model, tokenizer)
    scores_of(module)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data[0] = 3e38  # the sum overflows, the weights themselves are finite
    with pytest.raises(SparsifyError) as error:
        scores_of(module)
    assert "text: the loss of window 1 is not finite" in str(error.value)
    assert "it begins in the output of model.layers.1.mlp.up_proj," in str(error.value)


def test_a_tensor_that_is_not_finite_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    module = module_of(model, tokenizer)
    model.model.layers[0].input_layernorm.weight.data[5] = torch.nan
    with pytest.raises(SparsifyError, match="the tensor model.layers.0.input_layernorm.weight"):
        scores_of(module)


def test_only_a_window_that_is_reached_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    module = module_of(model, tokenizer)
    odd = int(next(token for token in TOKENS[2] if token not in TOKENS[:2]))
    model.model.embed_tokens.weight.data[odd] = torch.nan
    meter = PerplexityMeter(["text"], torch.device("cpu"))
    logits = model(input_ids=TOKENS).logits
    meter.update("text", token_losses(logits, TOKENS), None, TOKENS)
    with pytest.raises(SparsifyError, match="the loss of window 3"):
        finite_scores(meter, module)


def test_learned_tensors_are_checked(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    module = SparseCausalLM.from_model(tiny_llama(), tokenizer, MaskLLM(prior=None))
    module.configure_model()
    trainer = quiet_trainer(tmp_path)
    check_learned(module, trainer)
    name, logits = next((n, p) for n, p in module.named_parameters() if p.requires_grad)
    logits.data.view(-1)[7] = torch.inf
    with pytest.raises(SparsifyError, match=f"after optimizer step 0, {name} is not finite"):
        check_learned(module, trainer)


def test_integers_and_nothing_are_finite() -> None:
    assert not_finite({}) is None
    assert not_finite({"a": torch.ones(2, dtype=torch.int8)}) is None


@pytest.mark.parametrize("command", ["fit", "validate", "test", "export"])
def test_no_command_ends_in_success(
    cli: Cli, model_folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    model = tiny_llama()
    model.model.norm.weight.data.fill_(3e38)  # finite at loading, and not in any logit
    model.save_pretrained("overflows")
    for file in model_folder.glob("tokenizer*"):
        (Path("overflows") / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SystemExit) as stop:
        cli(command, "--strategy=magnitude", "--model.name_or_path=overflows")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "is not finite, so there is no perplexity" in error
    assert "it begins in the output of model.norm," in error
    assert not list(Path().glob("runs/*/*/result*.json"))
    assert not list(Path().glob("runs/*/*/export"))
