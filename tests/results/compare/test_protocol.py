import copy
import re
from pathlib import Path
from typing import Any

import pytest

from sparsify import SparsifyError
from sparsify.results.compare.loading import Run
from sparsify.results.compare.protocol import check_protocol
from tests.results.compare.made import PROTOCOL, result


def runs(change: Any) -> list[Run]:
    other = copy.deepcopy(PROTOCOL)
    change(other)
    paths = ("one", "two", "three")
    protocols: tuple[Any, ...] = (PROTOCOL, PROTOCOL, other)
    return [
        Run(Path(path) / "result.json", result(protocol=protocol), None)
        for path, protocol in zip(paths, protocols, strict=True)
    ]


def test_equal_protocols_are_one() -> None:
    assert check_protocol(runs(lambda protocol: None)) == PROTOCOL


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("base", "hash", "ffff", "protocol.base.hash: c3f59e483b27aa in one and 1 more, ffff in"),
        ("base", "dtype", "bfloat16", "protocol.base.dtype: float32 in one and 1 more, bfloat16"),
        (
            "data",
            "block_size",
            512,
            "protocol.data.block_size: 256 in one and 1 more, 512 in three",
        ),
        (
            "data",
            "bos",
            ["<s>"],
            'protocol.data.bos: nothing in one and 1 more, ["<s>"] in three',
        ),
        ("windows", "a", 3, "protocol.windows.a: 10 in one and 1 more, 3 in three"),
        ("windows", "c", 3, "protocol.windows.c: nothing in one and 1 more, 3 in three"),
    ],
)
def test_the_field_that_differs_is_named(part: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(SparsifyError, match=re.escape(message)):
        check_protocol(runs(lambda protocol: protocol[part].__setitem__(key, value)))


def test_another_text_is_another_protocol() -> None:
    with pytest.raises(SparsifyError, match=r"data\.sources\.a\.sha256: 1 in one"):
        check_protocol(runs(lambda p: p["data"]["sources"]["a"].update(sha256="9")))


def test_validation_does_not_stand_beside_test() -> None:
    with pytest.raises(SparsifyError, match="protocol.split: test in one and 1 more, validation"):
        check_protocol(runs(lambda p: p.update(split="validation")))


def test_names_of_what_is_hashed_may_differ() -> None:
    def change(protocol: Any) -> None:
        protocol["base"]["name"] = "elsewhere"
        protocol["data"]["sources"]["a"]["file"] = "copy.txt"

    check_protocol(runs(change))

    def without_hash(protocol: Any) -> None:
        protocol["data"]["sources"]["a"] = {"file": "copy.txt"}

    with pytest.raises(SparsifyError, match=r"sources\.a"):
        check_protocol(runs(without_hash))


def test_many_differences_are_counted() -> None:
    def change(protocol: Any) -> None:
        protocol["data"] = {"block_size": 1}
        protocol["base"] = {"hash": "x" * 64}

    with pytest.raises(SparsifyError, match="xxxxxxxxxxxx... in three.*; and 2 more fields"):
        check_protocol(runs(change))


def test_texts_without_a_score_are_named() -> None:
    some = runs(lambda protocol: None)
    del some[2].result["scores"]["a"]
    with pytest.raises(SparsifyError, match="texts with a score: a, b, overall in one and 1 more"):
        check_protocol(some)
