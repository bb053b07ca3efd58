"""The user documentation keeps pace with the code: settings, and links between pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stratakv.config import options, show_value

ROOT = Path(__file__).parents[3]
CONFIGURATION_PAGE = ROOT / "docs" / "reference" / "configuration.md"
INDEX_PAGE = ROOT / "docs" / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_ROW = re.compile(r"^\| `(?P<name>\w+\.\w+)` \| `(?P<env>\w+)` \| (?P<default>[^|]*) \|", re.MULTILINE)
_ENVIRONMENT = re.compile(r"\bSTRATAKV_[A-Z_]+\b")
_NO_SETTINGS = {"STRATAKV_NATIVE", "STRATAKV_CONFIG", "STRATAKV_SECTION_KEY", "STRATAKV_WRONG_KEY"}
"""The file's name, the general form, and the example of a mistake."""
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<section>[^)\s]*))?\)")
_PATH = re.compile(r"`((?:stratakv|dbnode|meta_server|dmp|workers|migrations|tests|examples|benchmarks)/[\w/.]+)`")
_EXAMPLE_PATH = "migrations/versions/0042_what_it_does.py"
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_the_configuration_page_lists_every_setting_with_its_environment_variable_and_default() -> None:
    rows = {match["name"]: (match["env"], match["default"].strip("` ")) for match in _ROW.finditer(_configuration())}
    settings = {f"{o.section}.{o.key}": (o.env, show_value(o, o.default)) for o in options()}
    assert rows == settings


def test_no_page_names_an_environment_variable_that_no_setting_has() -> None:
    named = {name for page in PAGES for name in _ENVIRONMENT.findall(page.read_text())}
    assert named - {option.env for option in options()} == _NO_SETTINGS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_documentation_lead_somewhere(page: Path) -> None:
    broken = []
    for match in _LINK.finditer(page.read_text()):
        target = (page.parent / match["path"]).resolve() if match["path"] else page
        if not target.exists() or (match["section"] and match["section"] not in _anchors(target)):
            broken.append(match[0])
    assert broken == []


def test_files_that_the_documentation_names_are_there() -> None:
    named = {path for page in PAGES for path in _PATH.findall(page.read_text())}
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == {_EXAMPLE_PATH}


def test_the_index_of_the_documentation_leads_to_every_page() -> None:
    listed = {(INDEX_PAGE.parent / match["path"]).resolve() for match in _LINK.finditer(INDEX_PAGE.read_text())}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page != INDEX_PAGE} <= listed


def _configuration() -> str:
    return CONFIGURATION_PAGE.read_text()


def _anchors(page: Path) -> set[str]:
    """Names that Markdown renderers give to headings."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(page.read_text())
    }
