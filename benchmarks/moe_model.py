"""Train a small mixture of experts: a Mixtral of ten million parameters, eight experts in each
layer and two for each token, on the embedded text with the embedded tokenizer::

    python benchmarks/moe_model.py work/moe

3.3 million tokens, 25 minutes of one core; an interrupted run continues from its last checkpoint.
Transformers balances routers over all layers together, so that in a single layer a few experts get
hardly a token; the script prints how many each gets. The data, the schedule and the checkpoints
are those of ``embedded_model.py``. The folder that it writes (20 MB in fp16) is not shipped;
``real_models.py`` prunes it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from embedded_model import BLOCK, blocks, documents, report, train
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

import sparsify

EMBEDDED = Path(sparsify.__file__).parent / "models" / "embedded"


def build_model(tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """88 % of the parameters are those of experts."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=480,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=0.02,
            max_position_embeddings=BLOCK,
            sliding_window=None,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's five Newton-Schulz steps (Jordan et al., 2024), in fp32."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for stacks of matrices too, ``[experts, rows, columns]``. That one takes
    bf16, which is five times as slow on a CPU without instructions for it.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(mean, group["momentum"])
                matrices = update.view(-1, *update.shape[-2:])
                update = torch.stack([orthogonalized(m) for m in matrices]).view_as(weight)
                # Updates of the size of AdamW's.
                size = 0.2 * max(weight.shape[-2:]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * size)


def optimizers(model: MixtralForCausalLM) -> list[torch.optim.Optimizer]:
    """The routers learn with AdamW, as embeddings and norms do."""
    named = dict(model.named_parameters())
    matrices = {
        name: weight
        for name, weight in named.items()
        if "layers" in name and weight.ndim > 1 and not name.endswith("mlp.gate.weight")
    }
    others = [weight for name, weight in named.items() if name not in matrices]
    return [
        Muon(list(matrices.values()), lr=4e-3, weight_decay=0.1),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def router_loads(model: MixtralForCausalLM, data: torch.Tensor) -> list[list[float]]:
    """The share of tokens that each expert of each layer gets; they add up to two."""
    logits = model(input_ids=data, output_router_logits=True).router_logits
    return [
        layer.topk(2).indices.flatten().bincount(minlength=8).div(len(layer)).tolist()
        for layer in logits
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder that gets the model and the tokenizer")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--state", type=Path, help="checkpoint; the default lies beside the folder")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    text = EMBEDDED / "text"
    data = blocks(tokenizer, documents(text, "train"))
    validation = blocks(tokenizer, documents(text, "validation"))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {data.numel():,} training tokens", flush=True)
    state = args.state or args.out.with_suffix(".ckpt")
    # The loss of Mixtral's training has the routers' balance in it.
    train(
        model,
        optimizers(model),
        data,
        validation,
        args.steps,
        state,
        every=100,
        output_router_logits=True,
    )
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    report(model, tokenizer, text)
    for layer, loads in enumerate(router_loads(model, validation)):
        print(f"layer {layer}: tokens per expert", " ".join(f"{load:.2f}" for load in loads))


if __name__ == "__main__":
    main()
