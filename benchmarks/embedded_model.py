"""Train the embedded default: a Llama of three million parameters, and its tokenizer.

It learns the text that is shipped beside it::

    python benchmarks/embedded_model.py sparsify/models/embedded

About an hour on two cores; an interrupted run continues from its last checkpoint. Matrices are
trained with Muon and the rest with AdamW, under a learning rate that rises for 100 steps and then
falls linearly to zero. The weights are stored in fp16 (6 MB); everything in this project loads them
as fp32.
"""

import argparse
import gzip
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

BLOCK = 256
BATCH = 16
EOS = "<|endoftext|>"


def documents(text: Path, split: str) -> list[str]:
    rows = []
    for path in sorted(text.glob(f"*/{split}.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line)["text"] for line in lines]
    return rows


def train_tokenizer(rows: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 4,096 entries, digits apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=[EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, model_max_length=BLOCK
    )


def blocks(tokenizer: PreTrainedTokenizerFast, rows: list[str]) -> torch.Tensor:
    """Pack the documents, an end-of-text token after each, into ``[blocks, BLOCK]``."""
    ids = [i for row in tokenizer(rows)["input_ids"] for i in (*row, tokenizer.eos_token_id)]
    count = len(ids) // BLOCK
    return torch.tensor(ids[: count * BLOCK]).view(count, BLOCK)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=BLOCK,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in data.split(BATCH)]
    model.train()
    return math.exp(sum(losses) / len(losses))


def train(
    model: PreTrainedModel,
    opts: list[torch.optim.Optimizer],
    data: torch.Tensor,
    validation: torch.Tensor,
    steps: int,
    state_file: Path,
    every: int = 500,
    **forward: Any,
) -> None:
    """``every`` so many steps the model is validated and stored. ``forward`` has arguments that the
    model gets in training alone.
    """
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: min((step + 1) / 100, 1 - step / steps))
        for o in opts
    ]
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        for part, saved in zip(opts + schedules, state["parts"], strict=True):
            part.load_state_dict(saved)
    per_epoch = len(data) // BATCH
    start = time.monotonic()
    for step in range(first, steps):
        order = torch.randperm(
            len(data), generator=torch.Generator().manual_seed(step // per_epoch)
        )
        batch = data[order[step % per_epoch * BATCH :][:BATCH]]
        loss = model(input_ids=batch, labels=batch, **forward).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in opts + schedules:
            part.step()
        model.zero_grad()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - first) * BATCH * BLOCK / (time.monotonic() - start)
            print(f"step {step + 1} loss {loss.item():.3f} tokens/s {rate:.0f}", flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            print(
                f"step {step + 1} validation perplexity {perplexity(model, validation):.2f}",
                flush=True,
            )
            parts = [part.state_dict() for part in opts + schedules]
            state = {"step": step + 1, "model": model.state_dict(), "parts": parts}
            # A run that is killed while it stores leaves the state before.
            torch.save(state, new := state_file.with_suffix(".new"))
            new.replace(state_file)


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Path) -> None:
    test = blocks(tokenizer, documents(text, "test"))
    print(f"test perplexity of the stored weights {perplexity(model.float(), test):.2f}")
    model.eval()
    for prompt in ("KING.\n", "1 And it came to pass", "def read_lines(path):\n"):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, max_new_tokens=80, do_sample=True, top_p=0.9, temperature=0.8)
        print("---", tokenizer.decode(out[0]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, help="folder that holds text/ and gets the model and tokenizer"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("embedded_model.ckpt"),
        help="checkpoint to continue from",
    )
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    rows = documents(args.out / "text", "train")
    tokenizer = train_tokenizer(rows)
    data = blocks(tokenizer, rows)
    validation = blocks(tokenizer, documents(args.out / "text", "validation"))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {data.numel():,} training tokens", flush=True)
    train(model, optimizers(model), data, validation, args.steps, args.state)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report(model, tokenizer, args.out / "text")


if __name__ == "__main__":
    main()
