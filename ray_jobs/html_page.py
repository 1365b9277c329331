"""An HTML page that needs nothing else: readable in light and dark, on a phone and on paper."""

import base64
import html
from collections.abc import Collection, Sequence
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; break-after: avoid; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem 1rem .3rem 0; }
th { border-bottom: 2px solid; } td { border-bottom: 1px solid #8884; } .number { text-align: right; }
img { max-width: 100%; background: white; } code { background: #8882; padding: .1rem .3rem; border-radius: .2rem; }
.wide { overflow-x: auto; } .wide img { max-width: none; } summary { cursor: pointer; }
.strips { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; } .strips figcaption { font-size: .85rem; }
figure { margin: 0 0 1.2rem; break-inside: avoid; } figcaption { margin-bottom: .3rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 1.5rem; }
.right { color: #2a7d3f; } .wrong { color: #c0392b; }
@media (prefers-color-scheme: dark) { .right { color: #6fcf8a; } .wrong { color: #ff8a7a; } }
@media print { body { max-width: none; margin: 0; font-size: 11pt; } .right, .wrong { color: inherit; } }
"""


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write a page of sections that are HTML already; it appears whole."""
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `numbers` are set to the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = (f'<{tag} class="number">' if place in numbers else f"<{tag}>" for place in range(len(cells)))
        return "<tr>" + "".join(f"{mark}{cell}</{tag}>" for mark, cell in zip(marked, cells, strict=True)) + "</tr>"

    head = line("th", [html.escape(column) for column in columns])
    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def image(data: bytes, kind: str, name: str) -> str:
    """A picture inside the page; `kind` is png or jpeg, `name` what it shows."""
    return f'<img alt="{html.escape(name)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def percent(share: float) -> str:
    """A share from 0 to 1 with one decimal."""
    return f"{100 * share:.1f}&nbsp;%"
