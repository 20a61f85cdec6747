"""Perplexity, against a loop over tokens."""

import json
import math
from pathlib import Path

import pytest
import torch

from sparsify.common.errors import SparsifyError
from sparsify.common.files import write_json
from sparsify.models.perplexity import OVERALL, NotFinite, PerplexityMeter, token_losses
from sparsify.results.result import make_result


def slow_losses(logits: torch.Tensor, tokens: torch.Tensor) -> list[list[float]]:
    """Minus the log-probability of every next token."""
    result = []
    for window, ids in zip(logits.tolist(), tokens.tolist(), strict=True):
        row = []
        for scores, target in zip(window[:-1], ids[1:], strict=True):
            row.append(math.log(sum(math.exp(s) for s in scores)) - scores[target])
        result.append(row)
    return result


def test_token_losses() -> None:
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    losses = token_losses(logits, tokens)
    assert losses.shape == (3, 4)
    assert losses.tolist() == [pytest.approx(row, rel=1e-5) for row in slow_losses(logits, tokens)]
    assert token_losses(logits.bfloat16(), tokens).dtype == torch.float32


def test_scores_with_uneven_batches_and_texts() -> None:
    torch.manual_seed(0)
    windows = {"long": [], "short": []}
    meter = PerplexityMeter(windows, torch.device("cpu"))
    for name, batch in (("long", 4), ("short", 2), ("long", 4), ("long", 1)):
        logits, tokens = 3 * torch.randn(batch, 6, 7), torch.randint(0, 7, (batch, 6))
        meter.update(name, token_losses(logits, tokens))
        windows[name] += [sum(row) / len(row) for row in slow_losses(logits, tokens)]
    scores = meter.scores()
    assert list(scores) == ["long", "short", OVERALL]
    windows[OVERALL] = windows["long"] + windows["short"]
    for name, means in windows.items():
        loss = sum(means) / len(means)
        assert scores[name].loss == pytest.approx(loss, rel=1e-6)
        assert scores[name].perplexity == pytest.approx(math.exp(loss), rel=1e-6)
        assert scores[name].windows == len(means)
        assert scores[name].targets == 5 * len(means)
    unweighted = (scores["long"].loss + scores["short"].loss) / 2
    assert abs(scores[OVERALL].loss - unweighted) > 1e-3


def test_the_mean_of_many_windows_keeps_its_digits() -> None:
    meter = PerplexityMeter(["text"], torch.device("cpu"))
    for _ in range(3000):
        meter.update("text", torch.full((8, 2), 3.1))
    assert meter.scores()["text"].loss == pytest.approx(torch.tensor(3.1).item(), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_a_window_that_is_not_finite_is_named(value: float, masked: bool) -> None:
    meter = PerplexityMeter(["fine", "text"], torch.device("cpu"))
    tokens = torch.arange(12).view(4, 3)
    targets = torch.ones(2, 3, dtype=torch.bool) if masked else None
    meter.update("fine", torch.ones(1, 2), None, tokens[:1])
    meter.update("text", torch.ones(2, 2), targets, tokens[:2])
    meter.update("text", torch.tensor([[1.0, 2.0], [1.0, value]]), targets, tokens[2:])
    meter.update("text", torch.tensor([[value, value], [1.0, 1.0]]), targets, tokens[:2])
    with pytest.raises(NotFinite, match="text: the loss of window 4 is not finite") as error:
        meter.scores()
    assert error.value.tokens_T is not None
    assert error.value.tokens_T.tolist() == [9, 10, 11]


def test_a_perplexity_above_all_floats_is_refused() -> None:
    meter = PerplexityMeter(["text"], torch.device("cpu"))
    meter.update("text", torch.full((1, 2), 710.0))
    with pytest.raises(NotFinite, match=r"a loss of 710 nats a token is above 700"):
        meter.scores()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(SparsifyError, match=r"result.json was not written: a.b.1 is not finite"):
        write_json(path, {"c": [1.0], "a": {"b": (0, value)}})
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_result_is_plain_json(tmp_path: Path) -> None:
    meter = PerplexityMeter(["text"], torch.device("cpu"))
    meter.update("text", torch.ones(2, 3))
    path = tmp_path / "new" / "result.json"
    write_json(path, make_result({"steps": 1}, {"split": "test"}, meter.scores()))
    found = json.loads(path.read_text())
    assert found["scores"]["text"] == {
        "loss": 1.0,
        "perplexity": math.e,
        "windows": 2,
        "targets": 6,
    }
    assert found["run"] == {"steps": 1}
    assert found["protocol"] == {"split": "test", "windows": {"text": 2, "overall": 2}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_former_result_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device", str(self))

    write_json(tmp_path / "result.json", {"former": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "result.json", {"new": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    assert "former" in (tmp_path / "result.json").read_text()
