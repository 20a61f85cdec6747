"""Runs the kernels of ``sparsify.serving.decode_kernels`` in Triton's interpreter, on a CPU, and
holds their products to sums in float64.

    python benchmarks/decode_exact.py --save benchmarks/results

takes some minutes; ``--quick`` leaves out the layers of models. Where all numbers are small
integers every sum is exact, and so must be every product. Elsewhere one unit in the last place of
the output is allowed, and what float32 loses where terms cancel.

Of a model's layer the first, a middle and the last program run, over tensors of the full size: the
others differ from them by nothing but the rows that they read.
"""

import argparse
import datetime
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from sparsify.serving import decode_kernels as kernels
from sparsify.serving.decode import MOST_TOKENS
from sparsify.serving.packed import PackedWeight, join_nibbles

TYPES = (torch.bfloat16, torch.float16)
#: hidden size, outputs of q, of k and v, and of gate and up
MODELS = {
    "SmolLM2-135M": (576, 576, 192, 1536),
    "Qwen2.5-0.5B": (896, 896, 128, 4864),
    "Llama-3.2-1B": (2048, 2048, 512, 8192),
    "Gemma-2-2B": (2304, 2048, 1024, 9216),
    "Phi-3-mini": (3072, 3072, 3072, 8192),
    "Gemma-7B": (3072, 4096, 4096, 24576),
    "Qwen2.5-7B": (3584, 3584, 512, 18944),
    "Llama-2-7B": (4096, 4096, 4096, 11008),
    "Mistral-7B": (4096, 4096, 1024, 14336),
    "Llama-3-70B": (8192, 8192, 1024, 28672),
}
TAILS = [(1, 4), (7, 8), (8, 12), (9, 16), (15, 20), (16, 60), (17, 132), (8, 516), (5, 1028)]
NIBBLES = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)


@dataclass(frozen=True)
class Case:
    """One product. ``exact``: of small integers; ``sampled``: three programs only."""

    shape: tuple[int, int]
    tokens: int
    dtype: torch.dtype
    bias: bool
    exact: bool
    sampled: bool = False


def quick_cases() -> list[Case]:
    """All tails with both kernels and both types, and every number of tokens."""
    cases = []
    for i, shape in enumerate(TAILS):
        for j, tokens in enumerate((1 + i % kernels.MOST_OF_FEW, MOST_TOKENS - i)):
            n = i + j
            cases.append(Case(shape, tokens, TYPES[n % 2], bias=i % 3 != 0, exact=n % 4 < 2))
    cases += [Case((8, 40), n, TYPES[n % 2], True, exact=True) for n in range(1, MOST_TOKENS + 1)]
    return cases


def model_cases() -> list[Case]:
    """Every shape of a layer of the models, with both kernels."""
    shapes = set()
    for hidden, q, kv, gate in MODELS.values():
        shapes |= {(q, hidden), (kv, hidden), (hidden, q), (gate, hidden), (hidden, gate)}
    cases = []
    for i, shape in enumerate(sorted(shapes)):
        for j, tokens in enumerate((1 + i % kernels.MOST_OF_FEW, MOST_TOKENS - i % 8)):
            n = i + j
            cases.append(Case(shape, tokens, TYPES[n % 2], n % 3 != 0, i % 4 < 2, sampled=True))
    return cases


def run(case: Case) -> dict[str, Any]:
    """Multiply, and compare.

    Returns:
        A row of the report; ``ulps`` is the largest error, in units of the output's last place.
    """
    generator = torch.Generator().manual_seed(0)
    packed = random_weight(case, generator)
    x_TI = numbers(case, generator, case.tokens, case.shape[1])
    bias_O = numbers(case, generator, case.shape[0]) if case.bias else None
    programs.wanted = 3 if case.sampled else None
    begin = time.perf_counter()
    y_TO = kernels.multiply(
        x_TI, packed.values_OV, packed.metadata_PCE, bias_O, case.shape[0]
    ).double()
    seconds = time.perf_counter() - begin
    step = programs.last_rows
    rows = [i for p in programs.ran for i in range(p * step, min((p + 1) * step, case.shape[0]))]
    panels = sorted({row // 8 for row in rows})
    part = PackedWeight(
        packed.values_OV[rows], packed.metadata_PCE[panels], packed.in_features
    ).unpack()
    terms = x_TI.double() @ part.double().T, x_TI.abs().double() @ part.abs().double().T
    wanted = terms[0] if bias_O is None else terms[0] + bias_O[rows].double()
    error = (y_TO[:, rows] - wanted).abs()
    if case.exact:
        right = torch.equal(y_TO[:, rows], wanted.to(case.dtype).double())
    else:
        error = (error - 2**-22 * terms[1]).clamp(min=0)
    ulps = float((error / last_place(wanted, case.dtype)).max())
    return {
        "shape": list(case.shape),
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bias": case.bias,
        "integers": case.exact,
        "rows_checked": len(rows),
        "ulps": round(ulps, 4),
        "right": right if case.exact else ulps <= 1,
        "unpacked_right": case.sampled or unpacks(packed),
        "seconds": round(seconds, 2),
    }


def unpacks(packed: PackedWeight) -> bool:
    """Whether the kernel that unpacks does what PyTorch's operations do."""
    found = kernels.unpack(packed.values_OV, packed.metadata_PCE, *packed.shape)
    return torch.equal(found, packed.unpack())


def random_weight(case: Case, generator: torch.Generator) -> PackedWeight:
    """Any places are kept, and every eighth kept value is zero."""
    rows, inputs = case.shape
    drawn = torch.randint(6, (rows, inputs // 4), generator=generator)
    values = numbers(case, generator, rows, inputs // 2)
    values[torch.rand(values.shape, generator=generator) < 1 / 8] = 0
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % 8))
    return PackedWeight(values, join_nibbles(NIBBLES[drawn]), inputs)


def numbers(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    if case.exact:
        return torch.randint(-8, 9, shape, generator=generator).to(case.dtype)
    return torch.randn(shape, generator=generator).to(case.dtype)


def last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of two neighbouring numbers of the type, around these values."""
    exponent = torch.frexp(values).exponent - 1
    info = torch.finfo(dtype)
    return (info.eps * torch.exp2(exponent.double())).clamp(min=info.smallest_normal * info.eps)


class Programs:
    """Runs all programs of a launch, or some of them.

    Attributes:
        wanted: how many; None for all.
        ran: which of them ran last.
        last_rows: how many rows each of them had.
    """

    def __init__(self) -> None:
        self.wanted: int | None = None
        self.ran: list[int] = []
        self.last_rows = 0
        interpreter.interpreter_builder.set_grid_idx = self._place  # type: ignore[method-assign]
        for name, rows in (("few_tokens", 8), ("many_tokens", kernels.ROWS_OF_MANY)):
            setattr(kernels, name, _Launches(getattr(kernels, name), rows, self))

    def choose(self, count: int, rows: int) -> int:
        chosen = {0, count // 2, count - 1} if self.wanted else range(count)
        self.ran, self.last_rows = sorted(chosen), rows
        return len(self.ran)

    def _place(self, x: int, y: int, z: int) -> None:
        x = self.ran[x] if x < len(self.ran) else x
        interpreter.interpreter_builder.grid_idx = (x, y, z)


@dataclass
class _Launches:
    kernel: Any
    rows: int
    programs: Programs

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.kernel[(self.programs.choose(grid[0], self.rows),)]


def mend_bfloat16() -> None:
    """Triton 3.9's interpreter keeps bfloat16 as 16-bit integers, multiplies them as such in
    ``tl.dot``, and cuts float32 off to them. A GPU rounds to the nearest, as PyTorch does.
    """
    kind = interpreter.InterpreterBuilder
    dot, cast = kind.create_dot, kind.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.create_fp_ext(side, tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            data = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(data, tl.bfloat16)
        return cast(self, source, kind)

    kind.create_dot, kind.cast_impl = create_dot, cast_impl


mend_bfloat16()
programs = Programs()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the layers of models")
    parser.add_argument("--save", type=Path, help="a folder for decode_exact-DATE.json")
    arguments = parser.parse_args()
    rows = []
    for case in quick_cases() + ([] if arguments.quick else model_cases()):
        rows.append(run(case))
        print(json.dumps(rows[-1]), flush=True)
    wrong = [row for row in rows if not (row["right"] and row["unpacked_right"])]
    print(f"{len(rows)} products, {len(wrong)} wrong")
    if arguments.save:
        date = datetime.date.today().isoformat()
        report = {"date": date, "triton": triton.__version__, "torch": torch.__version__}
        file = arguments.save / f"decode_exact-{date}.json"
        file.write_text(json.dumps({**report, "products": rows}, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
