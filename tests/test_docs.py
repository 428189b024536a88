"""Pages lead somewhere: links, anchors, the navigation of the site, and the files and modules that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = (ROOT / "examples").rglob("*.md")
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *EXAMPLES])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
FOLDERS = "gac|gac_kernels|csrc|tests|benchmarks|docs|examples|\\.ci|\\.github"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link may name within a page: its headings, spelled as GitHub and the site do."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def navigation() -> list[str]:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [leaf for part in parts for leaf in leaves(part)]

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in LINK.findall(prose(page)):
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{name} links to {target}#{anchor}"


def test_every_page_is_in_the_navigation_once():
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(navigation()) == sorted([*pages, "index.md"])  # the README is the index


def test_the_readme_leads_to_every_question():
    """Of the pages at the top of docs/, that is: the others have pages that lead to them."""
    linked = {target for target, _ in LINK.findall(prose(ROOT / "README.md"))}
    assert {f"docs/{page.name}" for page in DOCS.glob("*.md")} <= linked


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])  # which names the past too
def test_files_that_pages_name_exist(name):
    named = re.findall(rf"`((?:{FOLDERS})/(?:[\w./-]*/|[\w/-]+\.[\w.]+))`", prose(ROOT / name))  # `gac/mu` is a metric
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_pages_name_packages_of_today(name):
    """``gac.a.b`` and ``gac/a/b``: their first part is a module, or a name of the package."""
    known = {path.stem for path in (ROOT / "gac").iterdir()} | {"gac"}
    dotted = re.findall(r"\bfrom gac\.(\w+)|\bimport gac\.(\w+)", (ROOT / name).read_text())
    assert [part for pair in dotted for part in pair if part and part not in known] == []
