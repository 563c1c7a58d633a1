"""Pages as one HTML file: no network, no script, light and dark.

Everything that is put into a page is escaped by markupsafe unless it is `Markup` already, and of what comes from outside
nothing is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

STYLE = """
:root { --ink:#22262b; --gray:#6b737c; --faint:#e3e6e9; --paper:#ffffff; --panel:#f6f7f8; --accent:#2f6fb0; --warn:#a8560f;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink:#e4e7ea; --gray:#98a1ab; --faint:#343a41; --paper:#16191d; --panel:#1e2227;
  --accent:#79b0e8; --warn:#e0a05a; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif; }
main { max-width:1120px; margin:0 auto; padding:40px 28px 80px; }
h1 { font-size:34px; line-height:1.15; margin:0 0 6px; letter-spacing:-.01em; }
h2 { font-size:22px; margin:52px 0 10px; padding-top:14px; border-top:1px solid var(--faint); }
h3 { font-size:16px; margin:26px 0 6px; }
p { max-width:76ch; margin:6px 0 12px; } .muted, figcaption { color:var(--gray); font-size:14px; }
nav { font-size:14px; margin:14px 0 0; display:flex; flex-wrap:wrap; gap:4px 16px; }
a { color:var(--accent); text-decoration:none; } a:hover { text-decoration:underline; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:24px 0 8px; }
.tile { background:var(--panel); border-radius:8px; padding:12px 14px; }
.tile b { display:block; font-size:24px; line-height:1.25; font-variant-numeric:tabular-nums; }
.tile span { color:var(--gray); font-size:13px; }
.findings { padding-left:20px; max-width:82ch; } .findings li { margin:7px 0; }
figure { margin:18px 0 8px; } figure svg { display:block; width:100%; height:auto; }
figcaption { max-width:90ch; margin-top:6px; } .scroll { overflow-x:auto; margin:10px 0; }
table { border-collapse:collapse; font-size:14px; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:5px 12px 5px 0; border-bottom:1px solid var(--faint); }
th, td { white-space:nowrap; vertical-align:top; }
th:first-child, td:first-child { text-align:left; }
thead th { color:var(--gray); font-weight:600; } tbody th { font-weight:400; }
.wide { white-space:normal; text-align:left; width:46ch; }
tr:target :is(td,th) { background:color-mix(in srgb,var(--accent) 18%,transparent); }
details { margin:8px 0; } summary { cursor:pointer; color:var(--accent); font-size:14px; } td details { margin:0; }
td details p { max-width:36ch; white-space:normal; font-size:12px; line-height:1.5; }
.warn { color:var(--warn); } .dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:7px; }
code { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; }
@media print { details { display:none; } h2 { break-after:avoid; } figure { break-inside:avoid; } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""No script runs and nothing is loaded, whatever stands in the page."""


def html(template: str, *values: object) -> Markup:
    """HTML with `values` in its `{}`, each escaped unless it is `Markup`."""
    return Markup(template).format(*values)


def document(title: str, parts: Iterable[Markup | str], style: str = "") -> str:
    """A whole page with `parts` one below the other; empty ones are left out. style: rules of its own, none from outside."""
    body = Markup("\n").join(part for part in parts if part)
    return str(
        html(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="{}">\n<title>{}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{}</style>\n</head>\n'
            "<body>\n<main>\n{}\n</main>\n</body>\n</html>\n",
            POLICY,
            title,
            Markup(STYLE + style),
            body,
        )
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], anchors: Sequence[str] = (), *, row_heads: bool = False
) -> Markup:
    """A table; cells that are not `Markup` are text. anchors: an id for each row. row_heads: its first cell names a row."""
    top = Markup("").join(html('<th scope="col">{}</th>', head) for head in heads)
    lines = []
    for number, row in enumerate(rows):
        anchor = html(' id="{}"', anchors[number]) if anchors else ""
        heads_of_row = 1 if row_heads else 0
        cells = [html('<th scope="row">{}</th>', cell) for cell in row[:heads_of_row]]
        cells += [html("<td>{}</td>", cell) for cell in row[heads_of_row:]]
        lines.append(html("<tr{}>{}</tr>", anchor, Markup("").join(cells)))
    body = Markup("").join(lines)
    return html('<div class="scroll"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>', top, body)


def bullets(items: Iterable[str]) -> Markup:
    """A list of lines."""
    return html('<ul class="findings">{}</ul>', Markup("").join(html("<li>{}</li>", item) for item in items))
