"""How the harness' results are read, in cases that the command's own test has not."""

import math
from typing import Any

import pytest

from sparsify.results.downstream.harness import Model, _metrics
from sparsify.results.downstream.paired import Metric
from tests.conftest import tiny_llama
from tests.data.tokenizers import FORMS, like


def sample(doc: int, chosen: str, match: float) -> dict[str, Any]:
    return {"doc_id": doc, "filter": chosen, "exact_match": match, "score": (match, 2)}


def test_filters_are_told_apart_and_examples_sorted() -> None:
    results = {
        "name": "sums",
        "alias": "sums",
        "sample_len": 2,
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.25,
        "exact_match,none": 1.0,
        "exact_match_stderr,none": "N/A",
        "score,strict": 0.5,
        "by_kind,strict": {"a": 1},
    }
    result = {
        "results": {"sums": results},
        "higher_is_better": {"sums": {"exact_match": True}},
    }
    samples = [sample(1, "strict", 1), sample(1, "none", 1), sample(0, "strict", 0)]
    assert _metrics("sums", result, [*samples, sample(0, "none", 1)]) == {
        "exact_match,strict": Metric(0.5, 0.25, True, [0, 1]),
        "exact_match": Metric(1.0, None, True, [1, 1]),
        "score,strict": Metric(0.5, None, None, None),  # no number in each example
    }


def test_a_value_that_is_no_mean_has_no_examples() -> None:
    result = {"results": {"t": {"ppl,none": math.exp(1)}}, "higher_is_better": {"t": {}}}
    samples = [{"doc_id": i, "filter": "none", "ppl": -1.0} for i in range(3)]
    assert _metrics("t", result, samples)["ppl"].examples is None


@pytest.mark.parametrize("name", FORMS)
def test_requests_begin_as_the_tokenizer_begins_a_text(name: str) -> None:
    tokenizer = like(name)
    model = Model(tiny_llama(), tokenizer, 1)
    assert model.bos == FORMS[name][0]
    request = model._lm.tok_encode("the cat")
    assert request == tokenizer("the cat")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(request)[: len(model.bos)] == model.bos
