"""The Triton kernels without a GPU: in the interpreter, and through the compiler.

Both run in processes of their own: the interpreter is chosen before Triton is imported.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def newest(name: str) -> dict[str, Any]:
    return json.loads(max((BENCHMARKS / "results").glob(f"{name}-*.json")).read_text())


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check_products(products: list[dict[str, Any]]) -> None:
    assert {row["tokens"] for row in products} == set(range(1, 17))
    assert {(row["dtype"], row["bias"], row["integers"]) for row in products} == {
        (dtype, bias, integers)
        for dtype in ("bfloat16", "float16")
        for bias in (False, True)
        for integers in (False, True)
    }
    assert all(row["right"] and row["unpacked_right"] and row["ulps"] <= 1 for row in products)


def check_compiled(row: dict[str, Any]) -> None:
    assert row["spill_instructions"] == row["stack_bytes"] == 0
    assert {int(width) for kind in ("values", "metadata") for width in row["load_bytes"][kind]} == {
        16
    }
    assert row["bits_per_weight"] == 9


def test_products_are_exact_in_the_interpreter() -> None:
    check_products(run("decode_exact", "--quick"))


@pytest.mark.slow
def test_products_of_models_are_exact_in_the_interpreter() -> None:
    check_products(run("decode_exact"))


@pytest.mark.slow
def test_the_kernels_compile_for_every_gpu() -> None:
    for row in run("decode_compile"):
        check_compiled(row)


def test_the_recorded_products_are_exact() -> None:
    products = newest("decode_exact")["products"]
    check_products(products)
    assert len({tuple(row["shape"]) for row in products}) > 40


def test_the_recorded_kernels_do_not_spill_and_load_16_bytes() -> None:
    kernels = newest("decode_compile")["kernels"]
    found = {(row["capability"], row["dtype"], row["tokens"], row["sizes"]) for row in kernels}
    assert len(found) == len(kernels) == 6 * 2 * (4 * 2 + 1)
    assert {capability for capability, *_ in found} == {80, 86, 89, 90, 100, 120}
    for row in kernels:
        check_compiled(row)
