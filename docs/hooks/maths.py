"""Turns equations into MathML while the site is built, so that no script has to be fetched to show
them. In Markdown they are written as GitHub shows them too: ``$x$`` and ``$$x$$``.
"""

import html
import re

from latex2mathml.converter import convert

# As pymdownx.arithmatex marks them.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: object) -> str:
    content = BLOCK.sub(lambda found: _mathml(found[1], "block"), content)
    return INLINE.sub(lambda found: _mathml(found[1], "inline"), content)


def _mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex), display=display)
