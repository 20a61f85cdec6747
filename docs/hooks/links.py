"""Files of the repository outside the documentation: a link on GitHub, their name on the site."""

import re
from typing import Any

from mkdocs.structure.pages import Page

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    depth = page.file.src_uri.count("/")

    def name(found: re.Match[str]) -> str:
        outside = found[2].count("../") > depth
        return f"{found[1]} (`{found[3]}`)" if outside else found[0]

    return LINK.sub(name, markdown)
