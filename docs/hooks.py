"""Hooks of mkdocs: the README is the first page, files outside the pages are named instead of linked."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?")


def on_files(files: Any, config: Any) -> Any:
    """Adds the README as ``index.md``."""
    from mkdocs.structure.files import File

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository become their names: a site on its own does not have them."""
    home = page.file.src_uri == "index.md"
    folder = ROOT if home else (ROOT / "docs" / page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        text, target = match.group(1), match.group(2)
        path = (folder / target).resolve()
        if (home and (ROOT / "docs" / target).exists()) or path.is_relative_to(ROOT / "docs") or not path.exists():
            return match.group(0)
        return f"{text} (`{path.relative_to(ROOT).as_posix()}`)"

    return _LINK.sub(named, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings name what they refer to by roles (``:class:``), which Markdown would show."""
    return _ROLE.sub("<code>", html)
