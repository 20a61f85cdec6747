"""The licence of a base model, as far as it can be read without a network."""

from pathlib import Path

import huggingface_hub
import pytest

from sparsify.models.licence import licence_of

OTHER = "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.org/l\n---\n# Model\n"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"README.md": "---\nlicense: llama2\ntags: [a]\n---\n"}, {"license": "llama2"}),
        (
            {"README.md": OTHER, "LICENSE": "MIT License\nPermission is hereby granted"},
            {"license": "other", "license_name": "qwen", "license_link": "https://x.org/l"},
        ),
        ({"README.md": "---\nlicense: [a\n---\n", "LICENSE": "My terms"}, {"license": "other"}),
        ({"README.md": "no metadata"}, {}),
        ({"LICENSE": "  Apache License\n Version 2.0, January 2004"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "MIT License\n\nPermission is hereby granted,"}, {"license": "mit"}),
        ({}, {}),
    ],
)
def test_a_folder(files: dict[str, str], found: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert licence_of(str(tmp_path)) == found


def test_of_the_hub_only_what_is_here_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: gemma\n---\n")
    asked = []

    def cached(repo_id: str, name: str) -> str | None:
        asked.append((repo_id, name))
        return str(tmp_path / "card.md") if name == "README.md" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert licence_of("google/gemma") == {"license": "gemma"}
    assert asked == [("google/gemma", "README.md")]


def test_names_that_are_no_model_have_none() -> None:
    assert licence_of("LlamaForCausalLM") == licence_of("a/b/c.gguf") == licence_of("") == {}
    assert licence_of("embedded") == {"license": "apache-2.0"}
