"""When the model is wrapped, and what the names of Lightning's Trainer stand for.

Two processes that train with it are in ``test_population_run.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy

from sparsify import SparseCausalLM
from sparsify.masking.registry import make_strategy
from sparsify.training.parallel import ddp
from sparsify.training.parallel.ddp import DDP
from tests.conftest import quiet_trainer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was wrapped or given the first rank's values, in order."""
    made: list[Any] = []
    monkeypatch.setattr(DDPStrategy, "configure_ddp", lambda self: made.append("wrapped"))
    monkeypatch.setattr(ddp, "_sync_module_states", made.append)
    return made


def configured(module: LightningModule) -> None:
    strategy = DDP(parallel_devices=[torch.device("cpu")])
    strategy.connect(module)
    strategy.configure_ddp()


@pytest.mark.parametrize("estimator", ["residual", "leave_one_out"])
def test_a_model_without_gradients_only_gets_the_first_ranks_values(
    estimator: str, calls: list[Any]
) -> None:
    module = SparseCausalLM(make_strategy("maskpro", prior="magnitude", estimator=estimator))
    configured(module)
    assert calls == [module]


@pytest.mark.parametrize(
    "module",
    [
        SparseCausalLM(make_strategy("maskllm")),
        SparseCausalLM(make_strategy("magnitude")),
        SparseCausalLM(make_strategy("maskpro", prior="magnitude", estimator="mean_gradient")),
        LightningModule(),
    ],
    ids=["learned", "one-shot", "with gradients", "not ours"],
)
def test_every_other_model_is_wrapped(module: LightningModule, calls: list[Any]) -> None:
    configured(module)
    assert calls == ["wrapped"]


@pytest.mark.parametrize("name", ["ddp", "auto"])
def test_several_processes_train_with_it_by_name_and_by_default(name: str, tmp_path: Path) -> None:
    assert type(quiet_trainer(tmp_path, devices=2, strategy=name).strategy) is DDP
