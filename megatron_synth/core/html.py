"""Pages as one HTML file: no network, light and dark, on paper; no script but one that is named by its digest.

Everything that is put into a page is escaped by markupsafe unless it is `Markup` already, and of what comes from outside
nothing is. A page's own script is a constant: the policy allows the script of that digest, and no other.
"""

from __future__ import annotations

import base64
import hashlib
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
.tile { min-width:0; } .tile b { display:block; overflow-wrap:anywhere; font-size:24px; line-height:1.25;
  font-variant-numeric:tabular-nums; }
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
.place { white-space:normal; min-width:12ch; max-width:22ch; margin-left:auto; }
tr:target :is(td,th) { background:color-mix(in srgb,var(--accent) 18%,transparent); }
details { margin:8px 0; } summary { cursor:pointer; color:var(--accent); font-size:14px; } td details { margin:0; }
td details p { max-width:36ch; white-space:normal; font-size:12px; line-height:1.5; }
.warn { color:var(--warn); } .dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:7px; }
code { font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace; }
.sort { all:unset; cursor:pointer; } .sort:hover { color:var(--accent); }
.sort:focus-visible, .tools button:focus-visible { outline:2px solid var(--accent); outline-offset:2px; }
.sort::after { content:"↕"; opacity:.35; margin-left:4px; font-size:11px; }
[aria-sort=ascending] > .sort::after { content:"↑"; opacity:1; }
[aria-sort=descending] > .sort::after { content:"↓"; opacity:1; }
.tools { display:flex; flex-wrap:wrap; gap:8px; margin:4px 0; align-items:baseline; }
.tools button { font:13px system-ui,sans-serif; color:var(--accent); background:none; border:1px solid var(--faint);
  border-radius:6px; padding:2px 10px; cursor:pointer; }
.data pre { max-height:240px; overflow:auto; font:12px/1.4 ui-monospace,Menlo,monospace; background:var(--panel); padding:8px; }
.question { color:var(--gray); font-size:14px; margin:26px 0 0; } .question + h3 { margin-top:0; }
.mark { display:inline-block; width:1.2em; text-align:center; margin-right:5px; }
@media (max-width: 700px) { main { padding:22px 14px 60px; } h1 { font-size:26px; } h2 { margin-top:38px; }
  figure .wide-figure { overflow-x:auto; } figure .wide-figure svg { min-width:640px; }
  .wide { min-width:30ch; width:auto; } }
@media print { :root { --ink:#000; --gray:#444; --faint:#bbb; --paper:#fff; --panel:#fff; --accent:#000; --warn:#7a3d00;
  color-scheme:light; } body { font-size:10.5pt; } main { max-width:none; padding:0; } nav, .tools, .data { display:none; }
  h2, h3, .question { break-after:avoid; } figure, tr { break-inside:avoid; } thead { display:table-header-group; }
  .scroll { overflow:visible; } table { font-size:7.5pt; width:100%; } th, td { white-space:normal; padding:2px 5px 2px 0; }
  td details, .sort::after { display:none; } .tile { border:1px solid var(--faint); } }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""No script runs and nothing is loaded, whatever stands in the page."""

TOOLS = """
"use strict";
const UNITS = {k: 1e3, m: 1e6, M: 1e6, b: 1e9, B: 1e9, T: 1e12, x: 1, "%": 1};
function valueOf(row, column) {
  const text = (row.cells[column]?.textContent || "").replace(/^[^\\p{L}\\p{N}<≤~+.-]+/u, "").trim();
  if (/^\\d{4}-\\d\\d-\\d\\d/.test(text)) return [1, text];
  const found = text.match(/^[<≤~+]?\\s*(-?[\\d,]*\\.?\\d+(?:e[-+]?\\d+)?)(?:\\/(\\d+))?\\s*([kmMbBTx%](?![a-zA-Z]))?/);
  if (!found) return [text === "" || text === "n/a" ? 2 : 1, text];
  return [0, Number(found[1].replaceAll(",", "")) / Number(found[2] || 1) * (UNITS[found[3]] || 1)];
}
function compare(first, second) {
  if (first[0] !== second[0]) return first[0] - second[0];
  return first[0] === 0 ? first[1] - second[1] : first[1].localeCompare(second[1], undefined, {numeric: true});
}
function sort(table, head, column) {
  const down = head.getAttribute("aria-sort") === "ascending";
  const body = table.tBodies[0], rows = [...body.rows].map(row => [valueOf(row, column), row]);
  rows.sort((first, second) => {
    if (first[0][0] === 2 || second[0][0] === 2) return first[0][0] - second[0][0];
    return down ? compare(second[0], first[0]) : compare(first[0], second[0]);
  });
  for (const [, row] of rows) body.append(row);
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}
for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button"; button.className = "sort";
    button.append(...head.childNodes);
    if (!button.textContent.trim()) button.setAttribute("aria-label", "verdict");
    button.addEventListener("click", () => sort(table, head, column));
    head.append(button);
  });
}
function save(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
function drawing(svg) {
  const copy = svg.cloneNode(true), style = getComputedStyle(document.documentElement);
  const values = ["--ink", "--gray", "--faint", "--paper"].map(name => name + ":" + style.getPropertyValue(name)).join(";");
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("style", values + ";background:" + style.getPropertyValue("--paper"));
  const box = svg.viewBox.baseVal;
  copy.setAttribute("width", box.width); copy.setAttribute("height", box.height);
  return new XMLSerializer().serializeToString(copy);
}
for (const figure of document.querySelectorAll("figure")) {
  const name = figure.id.replace(/^figure-/, ""), svg = figure.querySelector("svg");
  const data = figure.querySelector(".data pre"), tools = document.createElement("div");
  tools.className = "tools";
  const add = (words, action) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = words;
    button.setAttribute("aria-label", words + " of figure " + name);
    button.addEventListener("click", action);
    tools.append(button);
  };
  if (svg) add("Save SVG", () => save(name + ".svg", "image/svg+xml", drawing(svg)));
  if (data) add("Save CSV", () => save(name + ".csv", "text/csv", data.textContent));
  figure.append(tools);
}
"""
"""Tables that sort, with the keyboard too, and figures that save themselves and their data. A page is whole without it."""


def html(template: str, *values: object) -> Markup:
    """HTML with `values` in its `{}`, each escaped unless it is `Markup`."""
    return Markup(template).format(*values)


def document(title: str, parts: Iterable[Markup | str], style: str = "", script: str = "") -> str:
    """A whole page with `parts` one below the other; empty ones are left out.

    Args:
        title: of the page.
        parts: its content.
        style: rules of its own, none from outside.
        script: a constant such as `TOOLS`, nothing of it from outside; the only one that the page's policy allows.
    """
    policy, own = POLICY, Markup("")
    if script:
        assert "</" not in script, "a script cannot hold the end of its element"
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, own = f"{POLICY}; script-src 'sha256-{digest}'", Markup(f"<script>{script}</script>\n")
    body = Markup("\n").join(part for part in parts if part)
    return str(
        html(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta http-equiv="Content-Security-Policy" content="{}">\n<title>{}</title>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{}</style>\n</head>\n'
            "<body>\n<main>\n{}\n</main>\n{}</body>\n</html>\n",
            policy,
            title,
            Markup(STYLE + style),
            body,
            own,
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
