"""What every rank of a run of two does in ``test_distributed.py``, all cases in one launch.

torchrun --nproc_per_node 2 shard_run.py FOLDER
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsify import SparseCausalLM, TextDataModule
from sparsify.calibration import Calibration, Hessian
from sparsify.callbacks.annealing import Annealing
from sparsify.callbacks.mask_logging import MaskLogging
from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import from_rank_zero, leave_process_group, together
from sparsify.export.folder import export
from sparsify.masking.inject import fold, hard_masks
from sparsify.masking.layer import masked_layers
from sparsify.masking.registry import make_strategy
from sparsify.masking.sharded_rows import whole
from sparsify.masking.strategy import Block, LayerResult
from sparsify.strategies.fixed_mask import FixedMask
from sparsify.strategies.maskllm import MaskLLM
from sparsify.strategies.sparsegpt import SparseGPT
from sparsify.training.parallel import Sharded
from tests.conftest import SIZES, quiet_trainer, tiny_llama, word_tokenizer
from tests.tiny_models import tiny_gpt2, tiny_gpt_oss, tiny_mixtral

# Words of train.txt: twelve batches of two blocks, which are six steps.
WORDS, BLOCK = 24 * 16, 16
STEPS, SAVED_AT = 8, (2, 6)  # in the middle of the first epoch, and at its end


def odd_llama() -> LlamaForCausalLM:
    """Layers of 63 rows, so that two ranks hold different numbers."""
    config = LlamaConfig(**SIZES | {"intermediate_size": 63})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(config).eval()


class Watch(Callback):
    """Notes losses, keeps checkpoints of some steps, and exports at the end."""

    def __init__(self, folder: Path, saved_at: Iterable[int]) -> None:
        self.folder, self.saved_at = folder, saved_at
        self.out: dict[str, Any] = {"losses": []}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:  # type: ignore[no-untyped-def]
        if module.learns:
            self.out["losses"].append(float(module.task_loss))
        if trainer.global_step in self.saved_at and module.ends_step(batch_idx):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")

    def on_train_end(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
        self.out["learned"] = {
            f"{name}.{key}": whole(p).clone()
            for name, layer in masked_layers(module.lm).items()
            for key, p in layer.masker.named_parameters()
        }
        self.out["learned"] |= {
            name: whole(p).clone()
            for name, p in module.lm.named_parameters()
            if p.requires_grad and ".masker." not in name
        }
        self.out["masks"] = dict(hard_masks(module.lm))
        self.out["calibrated"] = module.calibrated
        shown = trainer.callback_metrics.items()
        self.out["metrics"] = {k: float(v) for k, v in shown if k.startswith("masks/")}
        export(module.masked, self.folder / "export", {}, overwrite=True)


def learn(
    folder: Path,
    strategy: Any,
    ranks: int,
    how: Any = "auto",
    model: Callable[[], PreTrainedModel] = tiny_llama,
    saved_at: Iterable[int] = (),
    resume: Path | None = None,
    steps: int = STEPS,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train a model as one of ``ranks`` processes that see four windows a step in all."""
    options = {"calibration": Calibration(samples=8, cache=False)} | (options or {})
    strategy = make_strategy(strategy) if isinstance(strategy, str) else strategy
    module = SparseCausalLM.from_model(model(), word_tokenizer(), strategy, **options)
    watch = Watch(folder, saved_at)
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "accumulate_grad_batches": 2 // ranks,
    } | settings
    trainer = quiet_trainer(
        folder,
        devices=ranks,
        strategy=how,
        callbacks=[Annealing(), MaskLogging(every_n_steps=2), watch],
        **settings,
    )
    text = TextDataModule(train=str(folder.parent / "train.txt"), block_size=BLOCK, batch_size=2)
    trainer.fit(module, datamodule=text, ckpt_path=None if resume is None else str(resume))
    return watch.out


CLIP = {"gradient_clip_val": 1e-3, "steps": 20}  # norms are some hundred times as large
MODELS = {"odd": {"model": odd_llama, "options": {"exclude": "*down_proj"}}}
CASES: dict[str, dict[str, Any]] = {
    "maskllm": {"strategy": lambda: MaskLLM("sparsegpt")},
    "selfmask": {"strategy": lambda: make_strategy("selfmask", prior="magnitude")},
    "sr_ste": {"strategy": lambda: make_strategy("sr_ste")},
    "magnitude": {"strategy": lambda: make_strategy("magnitude")},
    "clipped": {"strategy": lambda: MaskLLM("magnitude"), **CLIP},
    "free": {"strategy": lambda: MaskLLM("magnitude"), "steps": 20},
    "proxsparse": {"strategy": lambda: make_strategy("proxsparse")},
    "lora": {"strategy": lambda: FixedMask("magnitude", lora_rank=2)},
    "odd": {"strategy": lambda: MaskLLM("magnitude"), **MODELS["odd"]},
    "updated": {"strategy": lambda: SparseGPT(update_weights=True)},
    "gpt2": {"strategy": lambda: MaskLLM("magnitude"), "model": tiny_gpt2},
    "mixtral": {"strategy": lambda: MaskLLM("wanda"), "model": tiny_mixtral},
    "gpt_oss": {"strategy": lambda: MaskLLM("magnitude"), "model": tiny_gpt_oss},
}
UNDER = {
    "ddp": ["maskllm", "selfmask", "sr_ste", "magnitude", "mixtral"],
    "fsdp": [
        "maskllm",
        "selfmask",
        "sr_ste",
        "magnitude",
        "clipped",
        "proxsparse",
        "lora",
        "odd",
        "updated",
    ]
    + ["gpt2", "mixtral", "gpt_oss"],
}


def case(name: str, folder: Path, ranks: int, **more: Any) -> dict[str, Any]:
    """Run one of the cases in its own folder."""
    settings = dict(CASES[name])
    return learn(folder, settings.pop("strategy")(), ranks, **settings, **more)


class CountedGPT(SparseGPT):
    """Counts how often this process computes it."""

    computed = 0

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for block in blocks:
            block.collect(Hessian)
            type(self).computed += 1
            one = Block(block.name, block.layers, block.text)
            yield from super().calibrate([one])


class FailingGPT(SparseGPT):
    """Fails in the second block, after results of the first have reached the other ranks."""

    kind: type[Exception] = SparsifyError

    def calibrate(self, blocks: Iterable[Block]) -> Iterator[tuple[str, LayerResult]]:
        for number, block in enumerate(blocks):
            if number and not int(os.environ["RANK"]):
                raise self.kind("no luck with this block")
            yield from super().calibrate([block])


def message(work: Callable[[], Any]) -> str:
    """What ``work`` failed with."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def checkpoints(root: Path) -> dict[str, Any]:
    """Runs that save, and runs that go on from what they and one process saved."""
    how = {"ddp": lambda: "ddp", "full": lambda: "fsdp"}
    how["folder"] = lambda: Sharded(save_distributed_checkpoint=True)  # type: ignore[assignment,return-value]
    found = {}
    for name, make in how.items():
        found[f"{name}"] = case("maskllm", root / name, 2, how=make(), saved_at=SAVED_AT)
    for at in SAVED_AT:
        for name, make in how.items():
            for source in {"single", name}:
                out = root / f"{name} from {source} at {at}"
                saved = root / source / f"{at}.ckpt"
                found[out.name] = case("maskllm", out, 2, how=make(), resume=saved)
    return found


def calibrations(root: Path) -> dict[str, Any]:
    """Counts of what is computed, and failures."""
    counts = []
    for cache in (False, True, True):
        before = CountedGPT.computed
        options = {"calibration": Calibration(samples=8, seed=1, cache=cache)}
        out = learn(root / "count", CountedGPT(), 2, "fsdp", options=options)
        counts.append((CountedGPT.computed - before, out["calibrated"]["cached"]))
    failures = [message(lambda: learn(root / "fails", FailingGPT(), 2, "ddp"))]
    FailingGPT.kind = RuntimeError
    failures.append(message(lambda: learn(root / "fails", FailingGPT(), 2, "fsdp")))
    return {"counts": counts, "failures": failures}


def refusals(root: Path) -> dict[str, str]:
    """Messages of what cannot be done."""

    def split() -> None:
        parallel = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
        trainer = LightningTrainer(
            accelerator="cpu",
            devices=2,
            strategy=parallel,
            logger=False,
            use_distributed_sampler=False,
        )
        module = SparseCausalLM.from_model(tiny_llama(), word_tokenizer(), make_strategy("dense"))
        trainer.fit(module, datamodule=TextDataModule(train=str(root / "train.txt"), block_size=16))

    def one_fails() -> None:
        with together():
            if dist.get_rank() == 1:
                raise OSError("disk full")

    def first_fails() -> None:
        for _ in from_rank_zero(1 // n for n in (1, 0)):
            pass

    def folded() -> None:
        class Fold(Callback):
            def on_train_start(self, trainer, module) -> None:  # type: ignore[no-untyped-def]
                fold(module.lm)

        module = SparseCausalLM.from_model(tiny_llama(), word_tokenizer(), make_strategy("dense"))
        trainer = quiet_trainer(root, devices=2, strategy="fsdp", callbacks=[Fold()], max_steps=1)
        text = TextDataModule(train=str(root / "train.txt"), block_size=16)
        trainer.fit(module, datamodule=text)

    other_steps = {"resume": root / "single" / "2.ckpt", "accumulate_grad_batches": 2}
    return {
        "tensor parallel": message(split),
        "gpt2 weights": message(
            lambda: learn(root / "no", make_strategy("sr_ste"), 2, "fsdp", model=tiny_gpt2)
        ),
        "other steps": message(lambda: learn(root / "no", "maskllm", 2, "ddp", **other_steps)),
        "one": message(one_fails),
        "first": message(first_fails),
        "fold": message(folded),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    root, rank = Path(folder), int(os.environ["RANK"])
    for how, names in UNDER.items():
        for name in names:
            out = case(name, root / f"{how} {name}", 2, how=how)
            torch.save(out, root / f"{how} {name}.{rank}")
    for name, out in checkpoints(root).items():
        torch.save(out, root / f"{name}.{rank}")
    notes = {"calibration": calibrations(root), "refusals": refusals(root)}
    (root / f"notes.{rank}.json").write_text(json.dumps(notes))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
