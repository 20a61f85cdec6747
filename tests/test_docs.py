"""The documentation builds, refers to no other host, and says what the code says."""

import contextlib
import inspect
import json
import logging
import re
import shlex
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

from sparsify import SparsifyError
from sparsify.cli import dispatch as tools
from sparsify.cli.commands.plan import PlanCLI
from sparsify.cli.main import main
from sparsify.cli.parser import Parser
from sparsify.cli.short_forms import expand
from sparsify.cli.table import TOOLS
from sparsify.cli.trainer_cli import NOT_OPTIONS, SparsifyCLI
from sparsify.masking.registry import STRATEGIES, find_strategy, plugins
from tests.browser import browser, open_page
from tests.conftest import Cli, Scripts

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MAGNITUDE = 4.7579  # its loss on the tiny model
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = sorted(plugins(STRATEGIES))

mkdocs_build = pytest.importorskip("mkdocs.commands.build")
pytest.importorskip("latex2mathml")


# -- the site --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The site, built strictly: a warning would end the build."""
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    level = logging.getLogger("mkdocs").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        mkdocs_build.build(config)
    yield folder
    logging.getLogger("mkdocs").setLevel(level)


class _Page(HTMLParser):
    """Collects what a browser would fetch, the cells of tables, and what equations hold."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self.equations: list[str] = []
        self._open: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.fetched += [v for k, v in attrs if k in ("src", "href", "srcset", "data") and v]
        if tag in ("td", "math"):
            self._open.append(tag)
            (self.cells if tag == "td" else self.equations).append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "math" in self._open:
            self.equations[-1] += data
        elif "td" in self._open:
            self.cells[-1] += data


def test_no_page_makes_a_browser_ask_another_host(site: Path) -> None:
    pages = {file: _Page(file).fetched for file in site.rglob("*.html")}
    assert len(pages) >= len(PAGES)
    assert {url for urls in pages.values() for url in urls if "//" in url} == set()
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import\s*)[\"']?(https?:)?//", sheet.read_text()), sheet
    for file, urls in pages.items():
        for url in urls:
            if not url.startswith(("data:", "#")) and file.name != "404.html":
                assert (file.parent / url.partition("?")[0].partition("#")[0]).exists(), (file, url)


def _headings(page: Path) -> set[str]:
    """The anchors that headings of a page have."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = [
        re.sub(r"[^\w\s-]", "", line).strip()
        for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    ]
    return {re.sub(r"[-\s]+", "-", heading).lower() for heading in words}


def _dead_links(page: Path) -> list[str]:
    """Those to files that are not there, or to headings that their page lacks."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    dead = []
    for url in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = url.partition("#")
        target = page.parent / name if name else page
        if "//" not in url and not (
            target.exists() and (not anchor or anchor in _headings(target))
        ):
            dead.append(url)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert _dead_links(page) == []


def test_a_dead_link_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One and two\n[a](page.md#one-and-two) [b](#two) [c](no.md) [d](page.md)\n")
    assert _dead_links(page) == ["#two", "no.md"]


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    assert named == {page.relative_to(DOCS).as_posix() for page in PAGES[1:]}


def test_equations_are_mathml(site: Path) -> None:
    equations = [e for file in site.rglob("*.html") for e in _Page(file).equations]
    assert len(equations) > len(NAMES)
    assert [e for e in equations if "\\" in e or "$" in e] == []
    for file in site.rglob("*.html"):
        assert "arithmatex" not in file.read_text(), file


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_has_a_page_that_names_every_setting(site: Path, name: str) -> None:
    cells = _Page(site / "strategies" / f"{name}.html").cells
    settings = inspect.signature(find_strategy(name)).parameters
    assert set(settings) <= set(cells)
    assert "test perplexity" in (site / "strategies" / f"{name}.html").read_text()
    assert f"strategies/{name}.md" in (ROOT / "mkdocs.yml").read_text()
    overview = (DOCS / "strategies" / "index.md").read_text()
    assert f"| [`{name}`]({name}.md) |" in overview


def test_drawings_stand_in_their_page(site: Path) -> None:
    html = (site / "concepts.html").read_text()
    assert html.count('<svg role="img" aria-label="') == html.count('class="drawing"') == 4
    assert not (site / "hooks").exists()


@pytest.mark.browser
def test_the_front_page_in_a_browser(site: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as driver:
        for width in (360, 1200):
            for dark in (False, True):
                page = open_page(driver, site / "index.html", width, dark)
                assert (page.console, page.foreign, page.overflow) == ([], [], [])
                page.screenshot(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")


# -- tables that are written into pages ------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((DOCS / "strategies").glob("*.md")), ids=lambda p: p.stem)
def test_tables_are_as_the_code_and_the_newest_results_say(path: Path, scripts: Scripts) -> None:
    page = path.read_text()
    assert page == scripts("fill_pages").filled(page), "run python docs/fill_pages.py"
    if path.stem != "index":
        kinds = re.findall(rf"<!-- (settings|result): {path.stem} -->", page)
        assert (kinds, page.count("<!-- end -->")) == (["settings", "result"], 2)


def test_a_settings_table_has_defaults_choices_and_meanings(
    scripts: Scripts,
) -> None:
    table = scripts("fill_settings").settings_table("sr_ste")
    assert "| `decay` | `10.0` | Lambda, of dropped weights, which keeps" in table
    assert "| `prior` | `null` |" in table
    assert "One of `every_step`, `never`. |" in table
    assert "| `tau` | `4` to `0.05`, linear |" in scripts("fill_settings").settings_table("maskllm")
    assert scripts("fill_settings").settings_table("wanda") == "It has no settings of its own.\n"
    with pytest.raises(SparsifyError, match="there is no strategy 'mask_llm'"):
        scripts("fill_settings").settings_table("mask_llm")


def _result(name: str, perplexity: float, seed: int = 0, windows: int = 5) -> dict[str, Any]:
    strategy = find_strategy(name)
    return {
        "run": {
            "strategy": {"class": f"{strategy.__module__}.{strategy.__qualname__}"},
            "pattern": "dense" if name == "dense" else "2:4",
            "calibration": {"seconds": 3.4} if name == "wanda" else None,
            "seed": seed,
            "tokens": 1000,
            "seconds": 12.0,
            "device": "cpu",
        },
        "protocol": {
            "base": {"name": "embedded", "hash": "0123456789abcdef", "dtype": "float32"},
            "data": {"block_size": 16, "sources": {"bible": {}}},
            "windows": {"overall": windows},
        },
        "scores": {"overall": {"perplexity": perplexity}},
    }


def test_a_result_table_has_all_rows_of_the_strategy(scripts: Scripts, tmp_path: Path) -> None:
    rows = {
        "dense": [_result("dense", 20)],
        "magnitude": [_result("magnitude", 60)],
        "wanda": [_result("wanda", 50.004)],
        "sr_ste": [_result("sr_ste", 24, 0), _result("sr_ste", 26, 1)],
        "sr_ste, distilled": [_result("sr_ste", 23)],
    }
    for day, dense in ((1, 99), (2, 20)):
        rows["dense"] = [_result("dense", dense)]
        (tmp_path / f"compare-2026-01-0{day}.json").write_text(json.dumps(rows))
    (table,) = scripts("fill_results").result_tables("sr_ste", tmp_path)
    assert "| dense | 20.00 | 1,000 | 12 |  |  |" in table
    assert "| **sr_ste** | 25.00 ± 1.41 | 1,000 | 12 |  |  |" in table
    assert "| **sr_ste, distilled** | 23.00 |" in table
    assert "wanda" not in table
    assert "hash `0123456789ab`), float32; 2:4; test text bible: 5 windows of 16 tokens" in table
    assert "up to 2 seeds ([results](../../benchmarks/results/compare-2026-01-02.json))" in table
    assert (
        "| **wanda** | 50.00 | 1,000 | 12 | 3 |"
        in scripts("fill_results").result_tables("wanda", tmp_path)[0]
    )
    assert "| **ria** | not measured |" in scripts("fill_results").result_tables("ria", tmp_path)[0]


def test_a_strategy_is_looked_for_in_earlier_tables_too(scripts: Scripts, tmp_path: Path) -> None:
    def write(kind: str, *names: str) -> None:
        rows = {name: [_result(name, 20)] for name in ("dense", *names)}
        (tmp_path / f"{kind}-2026-01-01.json").write_text(json.dumps(rows))

    write("smollm2_table", "wanda", "ria")
    write("real_models_smollm2", "wanda")
    for name, kind in (("wanda", "real_models_smollm2"), ("ria", "smollm2_table")):
        (table,) = scripts("fill_results").result_tables(name, tmp_path)
        assert f"results/{kind}-2026-01-01.json" in table
    (table,) = scripts("fill_results").result_tables("admm", tmp_path)
    assert "| **admm** | not measured |" in table


def test_each_text_of_a_real_model_has_its_column(scripts: Scripts, tmp_path: Path) -> None:
    result = _result("wanda", 52)
    result["scores"] |= {"wikitext": {"perplexity": 47.5}, "c4": {"perplexity": 65.25}}
    file = tmp_path / "real_models_smollm2-2026-01-01.json"
    file.write_text(json.dumps({"wanda": [result], "notes": {"windows": 3}}))
    table = scripts("fill_results").result_table("wanda", file)
    assert "| | WikiText-2 | held-out C4 | tokens trained on |" in table
    assert "| **wanda** | 47.50 | 65.25 | 1,000 |" in table


def test_results_of_two_protocols_share_no_table(scripts: Scripts, tmp_path: Path) -> None:
    rows = {"dense": [_result("dense", 20)], "wanda": [_result("wanda", 50, windows=4)]}
    file = tmp_path / "compare-2026-01-01.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(SparsifyError, match="measured under different protocols"):
        scripts("fill_results").result_table("wanda", file)


def test_links_out_of_the_documentation_become_names(site: Path) -> None:
    class Where:
        def __init__(self, src_uri: str) -> None:
            self.file = self
            self.src_uri = src_uri

    markdown = "[a](../benchmarks/a.json) [b](../b.md)"
    rename = sys.modules["docs/hooks/links.py"].on_page_markdown
    assert rename(markdown, page=Where("x.md")) == "a (`benchmarks/a.json`) b (`b.md`)"
    assert rename(markdown, page=Where("strategies/x.md")) == markdown


# -- commands and examples -------------------------------------------------------------------------


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def _commands(page: Path) -> Iterator[list[str]]:
    """What follows ``sparsify`` in each line of the page's bash blocks that starts with it, or with
    variables for it.
    """
    for block in _blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            first = next((i for i, word in enumerate(words) if "=" not in word), None)
            if first is not None and words[first] == "sparsify":
                yield words[first + 1 :]


class _Built(Exception):
    pass


class _Read(Exception):
    pass


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's strategies as the modules that it names."""
    folder = tmp_path_factory.mktemp("examples")
    one_shot, learner = _blocks(DOCS / "write_your_own.md", "python")
    (folder / "my_package.py").write_text(one_shot)
    (folder / "my_learner.py").write_text(learner)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    for name in ("my_package", "my_learner"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def parser() -> Parser:
    """That of the commands with a Trainer, as the command line builds it."""

    def stop(cli: SparsifyCLI, parser: Parser, args: Any) -> None:
        raise _Built(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sparsify"])
        patch.setattr("sys.path", list(sys.path))
        patch.setattr(SparsifyCLI, "parse_arguments", stop)
        patch.setattr(SparsifyCLI, "subcommands", lambda *_: NOT_OPTIONS)
        with pytest.raises(_Built) as built:
            main(["fit", "--strategy=wanda"])
    found: Parser = built.value.args[0]
    return found


def _read(function: Any, args: list[str], **options: Any) -> None:
    jsonargparse.auto_parser(function, as_positional=options["as_positional"]).parse_args(args)
    raise _Read


def _stop(cli: PlanCLI) -> None:
    raise _Read


def _parse(words: list[str], parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command as it would be read to be run."""
    if words[0] == "plan":
        monkeypatch.setattr(PlanCLI, "before_instantiate_classes", _stop)
        with contextlib.suppress(_Read):
            main(words)
        return
    if words[0] in TOOLS:
        monkeypatch.setattr(tools, "auto_cli", _read)
        with contextlib.suppress(_Read):
            main(words)
        return
    if "--ckpt_path" in words:  # there is no checkpoint to read; any settings do
        at = words.index("--ckpt_path")
        words = [*words[:at], "--strategy", "maskllm", *words[at + 2 :]]
    parser.parse_args(expand(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_in_the_documentation_can_be_read(
    page: Path, parser: Parser, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in _commands(page):
        _parse(words, parser, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "fit --strategy maskllm --model.strategy.taw.start 2",
        "fit --strategy wanda --model.nome x",
        "plan --strategi maskllm",
        "plan --strategy maskllm --model.nome x",
        "plan --strategy maskllm --batch_size 4",
        "masks show x",
        "verify x --bass y",
    ],
)
def test_a_command_that_does_not_exist_would_be_found(
    line: str, parser: Parser, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((SystemExit, SparsifyError)):
        _parse(shlex.split(line), parser, monkeypatch)


def test_the_readmes_commands_are_among_those_that_are_read() -> None:
    commands = [words for page in PAGES for words in _commands(page)]
    assert len(commands) > 50
    assert ["fit", "--strategy", "wanda"] in list(_commands(ROOT / "README.md"))


def test_the_pages_one_shot_strategy_is_the_one_that_is_tested(examples: Path) -> None:
    tested = (ROOT / "tests" / "assets" / "my_package.py").read_text()
    assert (examples / "my_package.py").read_text() == tested


def test_the_pages_strategies_are_short_and_use_public_names(examples: Path) -> None:
    for name, most in (("my_package.py", 20), ("my_learner.py", 40)):
        code = (examples / name).read_text()
        assert len(code.splitlines()) <= most
        assert re.findall(r"\b_(?!_)\w+", code) == []
        assert set(re.findall(r"from (\S+) import", code)) <= {"sparsify", "torch"}


def test_the_pages_learner_learns(cli: Cli, examples: Path) -> None:
    cli("fit", "--strategy=my_learner.MyLearner", "--model.optimizer.lr=0.1", steps=8)
    result = json.loads((cli.runs()[0] / "result.json").read_text())
    assert result["run"]["sparsity"] == 0.5
    assert result["run"]["strategy"]["settings"]["scale"] == 1.0
    assert result["scores"]["overall"]["loss"] < MAGNITUDE
