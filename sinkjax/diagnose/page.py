"""One self-contained HTML page: numbers and pictures that open anywhere, offline, for years."""

import base64
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sinkjax.diagnose.report import Report, number
from sinkjax.files import write_whole

_DPI = 160  # twice a plain screen's 80 dots per inch: sharp on dense screens, small in bytes

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --paper: #ffffff;
  --line: #e5e7eb; --wash: #f6f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af;
  --paper: #111827; --line: #374151; --wash: #1a2333; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 66rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--accent); }
p { max-width: 48rem; } p.lead { color: var(--soft); margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
th { font-weight: 600; background: var(--wash); white-space: nowrap; }
td.n, th.n { text-align: right; }
td.d { color: var(--soft); min-width: 18rem; } tbody tr:hover { background: var(--wash); }
figure { margin: 1.25rem 0 2rem; } figcaption { color: var(--soft); font-size: .92rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .5rem; display: block; margin-bottom: .4rem; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--accent); }
pre { overflow: auto; max-height: 28rem; background: var(--wash); padding: 1rem;
  border-radius: 8px; font-size: .82rem; }
@media print { details { display: none; } figure { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page that the caller writes.

    Args:
        title: heading.
        text: plain text; empty lines separate paragraphs.
        table: rows of one table, column -> value; all rows have the columns of the first.
        figures: caption -> figure.
    """

    title: str
    text: str = ""
    table: Sequence[Mapping[str, Any]] = ()
    figures: Mapping[str, Figure] = dataclasses.field(default_factory=dict)


def write_report(
    report: Report | None,
    figures: Mapping[str, Figure],
    path: str | Path,
    sections: Sequence[Section] = (),
    *,
    title: str = "Attention sinks",
) -> Path:
    """Write one HTML file with everything inlined: it opens offline and loads nothing.

    Light or dark follows the reader's system; wide tables scroll; all text is escaped. The file is
    written under a temporary name and renamed.

    Args:
        report: numbers from `analyze`; None for a page of sections only.
        figures: caption -> figure of the report.
        path: of the HTML file.
        sections: what comes before the report's own numbers.
        title: of the page.
    Returns:
        The path.
    """
    heading = "" if report is None else f'<p class="lead">{escape(report.heading)}</p>'
    body = [f"<h1>{escape(title)}</h1>", heading]
    for section in sections:
        body.append(_section(section))
    if report is not None and report.scalars:
        rows = [
            {"metric": name, "value": value, "definition": report.definition(name)}
            for name, value in report.scalars.items()
        ]
        body.append(_section(Section("Numbers", table=rows)))
    if figures:
        body.append(_section(Section("Pictures", figures=figures)))
    if report is not None:
        columns = report.by_layer()
        if columns:
            rows = [
                {"layer": layer} | dict(zip(columns, values, strict=True))
                for layer, values in enumerate(zip(*columns.values(), strict=True))
            ]
            body.append(_section(Section("Layers", table=rows)))
        dump = json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False)
        body.append(
            "<details><summary>All numbers and settings as JSON</summary>"
            f"<pre>{escape(dump)}</pre></details>"
        )
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
    return write_whole(path, page)


def _section(section: Section) -> str:
    parts = [f"<section><h2>{escape(section.title)}</h2>"]
    parts += [
        f"<p>{escape(text.strip())}</p>" for text in section.text.split("\n\n") if text.strip()
    ]
    if section.table:
        parts.append(_table(section.table))
    parts += [_figure(caption, figure) for caption, figure in section.figures.items()]
    return "\n".join(parts) + "</section>"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    numeric = {c: all(_is_number(row.get(c)) for row in rows) for c in columns}
    style = {c: ' class="n"' if numeric[c] else "" for c in columns}
    if "definition" in style:
        style["definition"] = ' class="d"'
    head = "".join(f"<th{style[c]}>{escape(str(c))}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = "".join(f"<td{style[c]}>{escape(_text(row.get(c)))}</td>" for c in columns)
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file, sharp on dense screens."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _figure(caption: str, figure: Figure) -> str:
    data = base64.b64encode(png(figure)).decode("ascii")
    # Shown at its size in inches, so that text in all figures is equally large.
    width = round(figure.get_size_inches()[0] * 96)
    alt = escape(caption, quote=True)
    return (
        f'<figure><img width="{width}" alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool | str)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return number(value) if _is_number(value) else str(value)
