"""Compiles the kernels of ``sparsify.serving.decode_kernels`` for six GPUs, on a machine without
one, and reads what came out: registers, spills, the widths of loads.

    python benchmarks/decode_compile.py --save benchmarks/results

takes some minutes and needs Triton (``pip install triton``), which brings NVIDIA's assembler.
"""

import argparse
import datetime
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsify.serving import decode_kernels as kernels

CAPABILITIES = (80, 86, 89, 90, 100, 120)
TYPES = ("bf16", "fp16")
TOKENS = (1, 2, 4, 16)
VARIANTS = [*((tokens, s) for tokens in TOKENS for s in (False, True)), (None, False)]
INPUTS = 4096
WIDTHS = {"": 1, "v2.": 2, "v4.": 4}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SOURCE = Path(kernels.__file__).read_text(encoding="utf-8").splitlines()
FLOATS = ("y_TO", "x_TI", "weight_OI", "values_OV", "bias_O")
INLINED = ("metadata", "values")
"""What ``load_panel`` loads, in its order; the kernels themselves load x first, then the bias."""


def compile_one(
    capability: int, dtype: str, tokens: int | None, sixteens: bool = False
) -> dict[str, Any]:
    """Compile one kernel; ``tokens`` None is the one that unpacks.

    Triton compiles a kernel again where sizes are multiples of 16, as those of models are: that one
    if ``sixteens``, else the one that takes any.

    Returns:
        A row of the report. ``bits_per_weight`` counts what all threads of a program load of values
        and metadata for one tile.
    """
    if tokens is None:
        kernel, rows, constants, warps = kernels.unpack_panel, 8, {"BLOCK_C": 64}, 2
    else:
        kernel, rows, constants, warps = kernels.configure(tokens, INPUTS)
        constants = {**constants, "BIAS": True, "EVEN": True}
    types = dict.fromkeys(constants, "constexpr") | dict.fromkeys(FLOATS, "*" + dtype)
    types["metadata_PCE"] = "*i16"
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if "*" in kind or (sixteens and name in ("rows", "groups"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, **kernels.OPTIONS}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    loads = widths(made.asm["ptx"])
    tile = rows * constants["BLOCK_C"] * 16
    held = sum(w * n for kind in ("values", "metadata") for w, n in loads[kind].items())
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "dtype": dtype,
        "tokens": tokens,
        "sizes": "multiples of 16" if sixteens else "any",
        "warps": warps,
        **resources(made.asm["cubin"]),
        "dynamic_shared_bytes": made.metadata.shared,
        "load_bytes": {kind: dict(found) for kind, found in loads.items()},
        "bits_per_weight": 8 * held * 32 * warps / tile,
    }


def widths(ptx: str) -> dict[str, Counter[int]]:
    """How many loads of how many bytes a thread makes of each operand, in one pass of the loop."""
    loads: dict[tuple[bool, int], Counter[int]] = {}
    where = False, 0
    for text in ptx.splitlines():
        if place := re.match(r"\s*\.loc\s+\d+\s+(\d+)", text):
            where = "inlined_at" in text, int(place[1])
        elif load := re.search(r"\bld\.global\.(v\d\.)?[a-z](\d+)", text):
            width = WIDTHS[load[1] or ""] * int(load[2]) // 8
            loads.setdefault(where, Counter())[width] += 1
    found = {kind: Counter[int]() for kind in (*INLINED, "x", "bias")}
    inlined = sorted(line for inside, line in loads if inside)
    for (inside, line), counts in loads.items():
        own = "bias" if "bias_O" in SOURCE[line - 1] else "x"
        found[INLINED[inlined.index(line)] if inside else own] += counts
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, bytes of stack, and instructions that read or write local memory, which
    is where registers are spilled to.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(file))
        code = _run("nvdisasm", "-c", str(file))
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spill_instructions": len(re.findall(r"\b(?:STL|LDL)\b", code)),
    }


def _run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(row: dict[str, Any]) -> list[str]:
    """What the row breaks of: no spills, 16 bytes a load, 9 bits a weight."""
    found = [kind for kind in ("values", "metadata") if row["load_bytes"][kind].keys() != {16}]
    found += ["spills"] * bool(row["stack_bytes"] or row["spill_instructions"])
    return found + ["bits"] * (row["bits_per_weight"] != 9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="a folder for decode_compile-DATE.json")
    arguments = parser.parse_args()
    rows = []
    for capability in CAPABILITIES:
        for dtype in TYPES:
            for tokens, sixteens in VARIANTS:
                rows.append(compile_one(capability, dtype, tokens, sixteens))
                print(json.dumps(rows[-1]), flush=True)
    wrong = [row for row in rows if problems(row)]
    print(f"{len(rows)} kernels, {len(wrong)} with spills, narrow loads or more than 9 bits")
    if arguments.save:
        date = datetime.date.today().isoformat()
        report = {"date": date, "triton": triton.__version__, "kernels": rows}
        file = arguments.save / f"decode_compile-{date}.json"
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
