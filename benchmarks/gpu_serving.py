"""The parts of ``gpu_check.py`` that run layers and whole models, dense and on each backend.

A model of LLaMA-2-7B's shape with random bf16 weights, 2:4 in its blocks, made on the GPU. Decoding
is also run as a CUDA graph, as at small batches PyTorch otherwise waits for Python.

Shapes: O out, I in, T tokens, B batch, S sequence.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from sparsify import NMPattern
from sparsify.masking.select import decoder_blocks
from sparsify.serving.backends import BACKENDS
from sparsify.serving.measure import LayerKind, measure

DENSE = "dense"
PATTERN = NMPattern(2, 4)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


class Report(Protocol):
    """Takes what a part found, at once."""

    def add(self, *path_and_value: Any) -> None: ...


class Plain:
    """Stands in for a backend where there is none: dense layers."""

    name = "none"

    def available(self, device: torch.device) -> bool:
        return True

    def compress(self, weight_OI: Tensor, bias_O: Tensor | None) -> nn.Module:
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight_OI, requires_grad=False)
        return layer


class Settings:
    """What is run, and where."""

    def __init__(self, tiny: bool) -> None:
        self.device = torch.device("cpu" if tiny else "cuda")
        self.config = TINY if tiny else LLAMA_2_7B
        self.tokens = [1, 8] if tiny else [1, 8, 16, 128, 2048]
        self.prompt, self.new = (8, 4) if tiny else (2048, 128)
        self.batches = [1, 2] if tiny else [1, 8]
        self.backends: dict[str, Any] = {b.name: b for b in ([Plain()] if tiny else BACKENDS)}


def random_24(shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """A weight ``[O, I]`` with the two largest of every four of random values."""
    generator = torch.Generator(device).manual_seed(seed)
    weight_OI = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.02
    return torch.where(PATTERN.top(weight_OI.abs()), weight_OI, 0)


def random_model(settings: Settings) -> LlamaForCausalLM:
    """The dense model, made tensor by tensor on the device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(settings.config).to(torch.bfloat16)
    blocks = tuple(f"{name}." for name in decoder_blocks(model))
    for seed, (name, old) in enumerate(list(model.named_parameters())):
        if old.ndim == 1:
            value = torch.ones(old.shape, dtype=old.dtype, device=settings.device)
        else:
            value = random_24(tuple(old.shape), seed, settings.device)
            if not name.startswith(blocks):
                value = torch.randn_like(value) * 0.02
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, nn.Parameter(value, requires_grad=False))
    # Buffers have no values on the meta device: make them again.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings.config).to(settings.device)
    return model.eval()


def compress(model: LlamaForCausalLM, backend: Any) -> None:
    """Put every linear layer of the blocks on a backend."""
    for prefix, block in decoder_blocks(model).items():
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                sparse = backend.compress(layer.weight.detach(), None)
                model.set_submodule(f"{prefix}.{name}", sparse)


@torch.inference_mode()
def layers(settings: Settings, report: Report, name: str) -> None:
    """Every distinct layer, alone and as servers join them: seconds by tokens on one backend and
    dense, and the errors of both against the product in fp64.
    """
    wide, narrow = settings.config.intermediate_size, settings.config.hidden_size
    backend = settings.backends[name]
    # o, gate or up, down; then q, k and v in one, and gate and up in one.
    shapes = [(narrow, narrow), (wide, narrow), (narrow, wide), (3 * narrow, narrow)]
    for shape in [*shapes, (2 * wide, narrow)]:
        kind = LayerKind(shape, torch.bfloat16, False)
        report.add(str(kind), "relative_error", errors(shape, backend, settings))
        for count in settings.tokens:
            report.add(str(kind), "seconds", str(count), times(kind, backend, count, settings))


def times(kind: LayerKind, backend: Any, count: int, settings: Settings) -> dict[str, Any]:
    """Of one layer at a number of tokens; a backend may refuse that number alone."""
    try:
        dense, sparse = measure(kind, backend, [count], settings.device)[count]
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    return {"dense": dense, "sparse": sparse, "speedup": dense / sparse}


def errors(shape: tuple[int, int], backend: Any, settings: Settings) -> dict[str, float]:
    """Of 16 tokens: the norm of the error, relative to that of the product in fp32."""
    weight_OI = random_24(shape, 0, settings.device)
    x_TI = torch.randn(16, shape[1], device=settings.device, dtype=torch.bfloat16)
    exact_TO = x_TI.double() @ weight_OI.double().T
    outputs = {
        "dense": torch.nn.functional.linear(x_TI, weight_OI),
        "sparse": backend.compress(weight_OI, None)(x_TI),
    }
    return {
        name: float((output.double() - exact_TO).norm() / exact_TO.norm())
        for name, output in outputs.items()
    }


@torch.inference_mode()
def whole(settings: Settings, report: Report, name: str) -> None:
    """Prefill and decoding of the whole model, dense or on one backend."""
    model = random_model(settings)
    if name != DENSE:
        tokens = random_tokens(1, min(64, settings.prompt), settings)
        before = model(tokens).logits.float()
        compress(model, settings.backends[name])
        after = model(tokens).logits.float()
        report.add("logits_relative_error", float((after - before).norm() / before.norm()))
        del before, after
    cuda = settings.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        report.add("model_bytes", torch.cuda.memory_allocated())
    for label, run in (("plain", prefill_and_decode), ("graph", decode_graph)):
        for batch in settings.batches:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            for what, value in run(model, batch, settings).items():
                report.add(label, f"batch {batch}", what, value)
            if cuda:
                report.add(label, f"batch {batch}", "peak_bytes", torch.cuda.max_memory_allocated())


def random_tokens(batch: int, length: int, settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(settings.config.vocab_size, (batch, length), generator=generator)
    return tokens_BS.to(settings.device)


def seconds(call: Callable[[], object], settings: Settings) -> float:
    """Wall time until the device is done."""
    wait = torch.cuda.synchronize if settings.device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def prefill_and_decode(model: Any, batch: int, settings: Settings) -> dict[str, float]:
    """PyTorch's plain execution."""
    prompt_BS = random_tokens(batch, settings.prompt, settings)

    def prefill() -> Any:
        return model(prompt_BS, use_cache=True, logits_to_keep=1)

    def decode(count: int) -> None:
        output = state["output"]
        for _ in range(count):
            next_B1 = output.logits[:, -1:].argmax(-1)
            output = model(next_B1, past_key_values=output.past_key_values, use_cache=True)

    prefill()
    times = [seconds(prefill, settings) for _ in range(3)]
    state = {"output": prefill()}
    decode(3)  # the cache grows by as much
    took = seconds(lambda: decode(settings.new), settings)
    return {"prefill_seconds": statistics.median(times), "decode_seconds": took / settings.new}


def decode_graph(model: Any, batch: int, settings: Settings) -> dict[str, float]:
    """One step of decoding, captured once and replayed: no launches from Python."""
    length = settings.prompt + settings.new + 8  # steps before the clock runs
    cache = StaticCache(settings.config, max_cache_len=length)
    prompt_BS = random_tokens(batch, settings.prompt, settings)
    logits = model(prompt_BS, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    next_B1 = logits[:, -1:].argmax(-1).clone()
    # The cache moves on by itself; that the position does not changes no time.
    place_B1 = torch.full((batch, 1), settings.prompt, device=settings.device)

    def step() -> None:
        output = model(next_B1, past_key_values=cache, position_ids=place_B1, use_cache=True)
        next_B1.copy_(output.logits[:, -1:].argmax(-1))

    if settings.device.type != "cuda":
        step()
        return {"decode_seconds": seconds(step, settings)}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()

    def replays() -> None:
        for _ in range(settings.new):
            graph.replay()

    return {"decode_seconds": seconds(replays, settings) / settings.new}
