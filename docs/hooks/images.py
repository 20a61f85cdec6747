"""Puts drawings into their page, so that they take its colours in light and dark.

As files they follow the reader's system, which is what GitHub shows.
"""

import re
from pathlib import Path
from typing import Any

IMAGE = re.compile(r'<img alt="([^"]*)" src="([^"]*/)?images/([\w-]+\.svg)"\s*/?>')
FOLDER = Path(__file__).parent.parent / "images"


def on_page_content(content: str, **_: Any) -> str:
    return IMAGE.sub(_inline, content)


def _inline(found: re.Match[str]) -> str:
    drawing = (FOLDER / found[3]).read_text(encoding="utf-8")
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{found[1]}" ', 1)
