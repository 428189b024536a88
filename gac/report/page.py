"""A page of HTML that needs nothing beside itself: text, tables and pictures in one file, light or dark."""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gac.plots import COLOURS

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns and rows."""


class Fact(NamedTuple):
    """A number at the top of the page: its name, itself, and a few words below."""

    name: str
    value: str
    note: str = ""


def page(
    title: str,
    *,
    about: str = "",
    facts: Sequence[Fact] = (),
    reading: Sequence[str] = (),
    pictures: Mapping[str, str] | None = None,
    maps: Mapping[str, str] | None = None,
    tables: Sequence[Table] = (),
    notes: Sequence[str] = (),
    command: str = "",
    versions: Mapping[str, str] | None = None,
) -> str:
    """The text of the page; all of it is escaped but the pictures.

    Args:
        title: of the run. about: a line below.
        facts: numbers at the top.
        reading: what the run says, a paragraph each.
        pictures, maps: SVG by what they show: of the run, and of its modules.
        tables: below the maps.
        notes: small print on them.
        command: that made the run. versions: of packages.
    """
    parts = [f"<header><h1>{_text(title)}</h1>"]
    parts += [f"<p class='about'>{_text(about)}</p>"] if about else []
    parts.append("</header>")
    if facts:
        parts.append("<dl class='facts'>" + "".join(map(_fact, facts)) + "</dl>")
    if reading:
        found = "".join(f"<li>{_text(sentence)}</li>" for sentence in reading)
        parts.append(f"<section class='reading'><h2>What the gradients say</h2><ul>{found}</ul></section>")
    if pictures:
        parts.append(f"<section><h2>The run</h2>{_figures(pictures)}</section>")
    if maps or tables:
        parts.append(f"<section><h2>Module by module</h2>{_figures(maps or {})}")
        parts += [f"<p class='note'>{_text(note)}</p>" for note in notes]
        parts += [_table(*table) for table in tables]
        parts.append("</section>")
    elif notes:
        parts += [f"<p class='note'>{_text(note)}</p>" for note in notes]
    if command or versions:
        inside = f"<pre>{_text(command)}</pre>" if command else ""
        listed = ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
        parts.append(f"<details><summary>How it was made</summary>{inside}<p>{_text(listed)}</p></details>")
    return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(parts))


def _text(text: str) -> str:
    return html.escape(text).replace("^2", "\u00b2")


def _fact(fact: Fact) -> str:
    note = f"<dd class='note'>{_text(fact.note)}</dd>" if fact.note else ""
    return f"<div><dt>{_text(fact.name)}</dt><dd>{_text(fact.value)}</dd>{note}</div>"


def _figures(pictures: Mapping[str, str]) -> str:
    found = "".join(f"<figure>{picture}</figure>" for picture in pictures.values())
    return f"<div class='figures'>{found}</div>" if found else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{_text(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope='row'>{_text(first)}</th>" + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


_DARK = ("#58A6E0", "#F0803C", "#2DC79B", "#DB93BE", "#EDB02E", "#7CC7F2")
"""The first colours of the pictures, lighter, for a dark page."""


def _colours(values: Sequence[str]) -> str:
    return " ".join(f"--c{index}: {value};" for index, value in enumerate(values))


_STYLE = f"""
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1c2024; --muted: #5b646d; --faint: #9aa2a9;
  --grid: #e6e6e6; --unknown: #d5d8da; --card: #f4f6f7; {_colours(COLOURS[:6])} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171a; --ink: #e4e7ea; --muted: #a3abb3; --faint: #6d757d;
    --grid: #2b3035; --unknown: #3a4046; --card: #1e2327; {_colours(_DARK)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2.5rem) 3rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .6rem; }}
.about, .note {{ color: var(--muted); }}
.about {{ margin: .2rem 0 0; overflow-wrap: anywhere; }}
.note {{ font-size: .85rem; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .7rem;
  margin: 1.3rem 0; }}
.facts div {{ background: var(--card); border-radius: .4rem; padding: .6rem .8rem; }}
.facts dt {{ color: var(--muted); font-size: .85rem; }}
.facts dd {{ margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }}
.facts dd.note {{ font-size: .8rem; }}
.reading ul {{ margin: 0; padding-left: 1.2rem; max-width: 62rem; }}
.reading li {{ margin: .35rem 0; overflow-wrap: anywhere; }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr));
  gap: 1.2rem 1.6rem; }}
figure {{ margin: 0; }}
svg {{ display: block; width: 100%; height: auto; max-height: 90vh; }}
svg * {{ stroke-linejoin: round; stroke-linecap: butt; }}
svg text {{ fill: currentColor; font-family: inherit !important; }}
svg image {{ image-rendering: pixelated; }}
.wide {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
th, td {{ padding: .25rem .7rem; text-align: right; }}
th {{ font-weight: 500; }}
thead th {{ color: var(--muted); border-bottom: 1px solid var(--faint); vertical-align: bottom; }}
th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--paper); }}
tbody tr + tr > * {{ border-top: 1px solid var(--grid); }}
details {{ margin-top: 2.2rem; color: var(--muted); font-size: .88rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 40rem) {{ .facts {{ grid-template-columns: 1fr 1fr; }} }}
@media print {{ body {{ max-width: none; padding: 0; }} figure, table {{ break-inside: avoid; }} }}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
