"""The Lightning data module, which makes batches of token blocks from named text sources.

Shapes: B batch, T tokens of a block.
"""

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsify.common.errors import SparsifyError
from sparsify.common.ranks import data_parallel
from sparsify.data import loaders, windows
from sparsify.data.blend import BatchesOfRank, BlendSampler, apportion, check_weights, draw
from sparsify.data.documents import read_documents
from sparsify.data.packing import PackedText, pack, unmarked
from sparsify.data.sources import BadRows, BadRowsPolicy, Source
from sparsify.data.splits import (
    Sources,
    Split,
    at_least,
    check_shares,
    embedded_sources,
    named_sources,
)
from sparsify.data.streaming import Streaming
from sparsify.models.token_batch import TokenBatch

SPLITS_OF_STAGE: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
}


class TextDataModule(LightningDataModule):
    """Batches of token blocks [B, T], int64, from text files and data sets.

    A batch is a Tensor, or a `TokenBatch` where a source has tokens that are context only. Each
    block is one window: the special tokens that the tokenizer puts before a text, then T less so
    many tokens of the text.

    A split is one path, a list of paths, or a mapping of names to paths or `Source`. In a list,
    each source is named after its file, with the folder's name in front where two would be equal.
    ``embedded:NAME`` is one of the texts that come with the package. Without `train`, every split
    that is not given is the package's text; with `train`, it is absent.

    Args:
        train: Sources of the training split, read as one blend.
        validation: Sources of the validation split, one loader each.
        test: Sources of the test split, one loader each.
        block_size: Tokens per block, T; at least 2, for a token and the next one.
        batch_size: Training blocks per batch on each process.
        eval_batch_size: Validation and test blocks per batch. None takes 16, or as many fewer as
            keep their logits in fp32 (blocks x T x vocabulary x 4 bytes) within 1 GiB.
        bad_rows: Whether a row without a usable text stops the run ("error") or is counted and
            left out ("skip").
        seed: Seed of the order of the training blocks; not negative.
        tokenizer: Turns text into token ids. None takes the ``tokenizer`` of the trainer's module.
        bos: The special tokens that every block begins with. None takes those that the tokenizer
            itself puts before a text; true its bos_token, even if it puts none; false none.

    Raises:
        SparsifyError: A number is out of range, a split is given without a source, or settings of a
            source contradict each other.
    """

    def __init__(
        self,
        train: Sources = None,
        validation: Sources = None,
        test: Sources = None,
        block_size: int = 256,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        bad_rows: BadRowsPolicy = "error",
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bos: bool | None = None,
    ) -> None:
        super().__init__()
        at_least("block_size", block_size, 2)
        at_least("batch_size", batch_size, 1)
        if eval_batch_size is not None:
            at_least("eval_batch_size", eval_batch_size, 1)
        at_least("seed", seed, 0)
        self.block_size = block_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.bos = bos
        self.bad_rows: BadRowsPolicy = bad_rows
        self.seed = seed
        self.tokenizer = tokenizer
        splits: dict[Split, Sources] = {"train": train, "validation": validation, "test": test}
        self.sources = {
            split: embedded_sources(split)
            if train is None and value is None
            else named_sources(split, value)
            for split, value in splits.items()
        }
        for sources in self.sources.values():
            for name, source in sources.items():
                source.check(name)
        self.weights = check_weights(
            list(self.sources["train"]), [s.weight for s in self.sources["train"].values()]
        )
        check_shares(self.sources["train"], self.weights)
        self._packed: dict[Split, dict[str, PackedText]] = {}
        self._packed_with: PreTrainedTokenizerBase | None = None

    @property
    def embedded(self) -> bool:
        """Whether the training text is the package's own."""
        return self.sources["train"] == embedded_sources("train")

    @property
    def endless(self) -> bool:
        """Whether training reads a stream, which has no end and no epochs."""
        return any(source.endless for source in self.sources["train"].values())

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sources, in the order of `val_dataloader`."""
        return list(self.sources["validation"])

    @property
    def test_names(self) -> list[str]:
        """Names of the test sources, in the order of `test_dataloader`."""
        return list(self.sources["test"])

    def setup(self, stage: str) -> None:
        """Reads and packs the splits that a stage needs, unless that was done before.

        Args:
            stage: "fit", "validate" or "test".

        Raises:
            SparsifyError: A source cannot be read or is less than one block, there is no tokenizer,
                or the trainer would distribute the data over processes a second time.
        """
        loaders.check_sampler_of_trainer(self.trainer)
        # Lightning warns of no workers and of an empty split. Both are meant: blocks lie in memory,
        # where a worker would only copy them, and a split may be absent.
        for message in ("The '.*' does not have many workers", "Total length of `list` across"):
            warnings.filterwarnings("ignore", message=message)
        self._pack(*SPLITS_OF_STAGE[stage])

    def train_dataloader(self) -> loaders.TrainLoader | loaders.StreamLoader:
        """This process's training batches [B, T], int64; the loader can save its position.

        Raises:
            SparsifyError: There are too few blocks for one batch on every process, or a setting of
                the trainer needs the end of a stream.
        """
        packed = self._pack("train")["train"]
        marked = self._marked(*self.sources["train"].values())
        rank, world = data_parallel(self.trainer)
        if self.endless:
            loaders.check_trainer_of_stream(self.trainer)
            return self._streaming().loader(
                packed, self.weights, marked, self.batch_size, rank, world
            )
        sampler = BlendSampler([len(p.blocks) for p in packed.values()], self.weights, self.seed)
        if len(sampler) < self.batch_size * world:
            raise SparsifyError(
                f"train: {len(sampler)} blocks are less than one batch of {self.batch_size} on "
                f"each of {world} processes; add text, or lower --data.batch_size or "
                "--data.block_size"
            )
        batches = BatchesOfRank(sampler, self.batch_size, rank, world)
        return loaders.train_loader(packed.values(), marked, batches, self._start())

    def val_dataloader(self) -> list[DataLoader[Tensor | TokenBatch]]:
        """One loader of batches [B, T], int64, for each of `validation_names`."""
        return self._eval_dataloaders("validation")

    def test_dataloader(self) -> list[DataLoader[Tensor | TokenBatch]]:
        """One loader of batches [B, T], int64, for each of `test_names`."""
        return self._eval_dataloaders("test")

    def calibration(self, samples: int, seed: int = 0) -> Tensor:
        """Draws different training blocks for calibration, in the proportions of the blend.

        Args:
            samples: Number of blocks, at least 1.
            seed: Chooses the blocks; not negative. A stream always gives its first blocks.

        Returns:
            Token ids [samples, T], int64.

        Raises:
            SparsifyError: A source has fewer blocks than its share of `samples`.
        """
        at_least("samples", samples, 1)
        packed = self._pack("train")["train"]
        names = list(self.sources["train"])
        # Without weights a stream is the only source, and takes all.
        sizes = [len(packed[name].blocks) if name in packed else 1 for name in names]
        shares = dict(zip(names, apportion(samples, self.weights or sizes), strict=True))
        blocks = {
            name: packed[name].blocks
            if name in packed
            else self._streaming().first_blocks(name, share)
            for name, share in shares.items()
        }
        return unmarked(draw(blocks, shares, seed))

    def describe(self, split: Split) -> dict[str, Any]:
        """Describes the content of a split for the record of a run, without absolute paths.

        Returns:
            ``block_size``; under ``bos`` the special tokens that every block begins with, if there
            are any; and under ``sources`` for each name the file name, the numbers of documents,
            tokens, blocks and dropped tokens, and the digest of the token ids; for a stream, which
            has no such numbers, ``"streaming": True`` instead.
        """
        packed, start = self._pack(split)[split], self._start()
        bos = {"bos": self._tokenizer().convert_ids_to_tokens(start)} if start else {}
        return {
            "block_size": self.block_size,
            **bos,
            "sources": {
                name: source.describe()
                | (packed[name].describe() if name in packed else {"streaming": True})
                for name, source in self.sources[split].items()
            },
        }

    def _pack(self, *splits: Split) -> dict[Split, dict[str, PackedText]]:
        tokenizer = self._tokenizer()
        if tokenizer is not self._packed_with:
            self._packed, self._packed_with = {}, tokenizer
        report = BadRows()
        try:
            for split in splits:
                if split not in self._packed:
                    self._packed[split] = {
                        name: pack(
                            read_documents(source, self.bad_rows, report, tokenizer),
                            tokenizer,
                            self.block_size,
                            name,
                            self._start(),
                        )
                        for name, source in self.sources[split].items()
                        if split != "train" or not source.endless
                    }
        finally:  # also on failure: the rows left out may be why there is too little text
            report.warn()
        return self._packed

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer
        if tokenizer is None and self.trainer is not None:
            tokenizer = getattr(self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise SparsifyError(
                "the data module's tokenizer is None and there is no trainer whose module has one; "
                "text needs a tokenizer: set TextDataModule(tokenizer=...)"
            )
        return tokenizer

    def _start(self) -> list[int]:
        return windows.window_start(self._tokenizer(), self.bos, self.block_size)

    def _marked(self, *sources: Source) -> bool:
        # The first token of a window is never predicted; a second special one must not be either.
        return len(self._start()) > 1 or any(source.masked for source in sources)

    def _streaming(self) -> Streaming:
        sources, start = self.sources["train"], self._start()
        return Streaming(
            sources, self._tokenizer(), self.bad_rows, self.block_size, start, self.seed
        )

    def _eval_dataloaders(self, split: Split) -> list[DataLoader[Tensor | TokenBatch]]:
        # Every process reads all blocks. So each gets the same exact sum without communication, and
        # FSDP gets the same number of forward passes on every process.
        size, sources = self._eval_batch_size(), self.sources[split]
        return [
            loaders.eval_loader(packed, self._marked(sources[name]), size)
            for name, packed in self._pack(split)[split].items()
        ]

    def _eval_batch_size(self) -> int:
        if self.eval_batch_size is not None:
            return self.eval_batch_size
        model = getattr(self.trainer and self.trainer.lightning_module, "model", None)
        if isinstance(model, PreTrainedModel):  # another's module may have any attributes
            words = windows.vocabulary_of(model)
        else:
            words = len(self._tokenizer())
        return windows.fitting_windows(self.block_size, words)
