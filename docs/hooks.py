"""Builds the site's first page from the README, and makes links to files of the repository lead to it."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/gac-kernels/gac/blob/main/"


def on_files(files: Any, config: Any) -> Any:
    """Adds the README as ``index.md``."""
    from mkdocs.structure.files import File

    text = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links that leave ``docs/`` go to the repository, where those files are read."""
    source = Path("docs") / page.file.src_uri if page.file.src_uri != "index.md" else Path("README.md")

    def outside(match: re.Match[str]) -> str:
        target, anchor = match.group(1), match.group(2) or ""
        path = (ROOT / source.parent / target).resolve()
        if not path.is_relative_to(ROOT) or path.is_relative_to(ROOT / "docs") or not path.exists():
            return match.group(0)
        return f"]({REPOSITORY}{path.relative_to(ROOT).as_posix()}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", outside, markdown)
