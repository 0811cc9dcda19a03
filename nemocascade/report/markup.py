"""HTML of the report: the page, tables that are written as CSV too, links. All text is escaped."""

import csv
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from nemocascade.state_files import whole

# Colours of Okabe and Ito, which the colour-blind can tell apart; as text, darker ones with a contrast above 4.5.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#00795c", "#595959"
STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;margin:0 auto;max-width:1120px;padding:16px;
color:#1b1b1b;background:#fff;overflow-wrap:break-word}
h1{font-size:1.7em;line-height:1.2;margin:.3em 0}h2{font-size:1.3em;margin:2.2em 0 .6em;padding-top:.4em;border-top:2px solid #d9d9d9}
h3{font-size:1.05em;margin:1.5em 0 .4em}p{margin:.5em 0;max-width:75ch}a{color:#00538a}
.note{color:#595959;font-size:.9em}.banner{padding:.7em 1em;border-left:5px solid;margin:1em 0;max-width:none}
.smoke{background:#fff3d6;border-color:#8a5a00}.live{background:#e4f1fa;border-color:#00538a}
dl.facts{display:grid;grid-template-columns:minmax(5.5em,max-content) minmax(0,1fr);gap:.25em 1em;margin:1em 0}
.command span{display:inline-block;max-width:100%;overflow-wrap:anywhere}dl.facts dt{color:#595959}dl.facts dd{margin:0}
.five{background:#f4f6f8;padding:.2em 1.2em 1em;border-radius:8px}.five h3{margin:1em 0 .2em}
.five ul{margin:.3em 0;padding-left:1.2em}
nav li{break-inside:avoid}nav ol{columns:16em;column-gap:2.5em;padding-left:1.4em;margin:.5em 0}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.88em}
pre{background:#f6f6f4;padding:.7em .8em;white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0;border-radius:4px}
pre.wide{white-space:pre;overflow-x:auto}
.scroll{overflow-x:auto;margin:.6em 0}table{border-collapse:collapse;font-size:.9em}caption{text-align:left;color:#595959;padding:.3em 0}
td,th{padding:.3em .6em;border-bottom:1px solid #e3e3e3;text-align:right;}
th{font-weight:600;vertical-align:bottom}
td:first-child,th:first-child{text-align:left}th.text,td.text{text-align:left}td:not(.text):not(:first-child){white-space:nowrap}
table.heat{width:100%;table-layout:fixed}table.heat td,table.heat th{padding:.25em 0;text-align:center;border:2px solid #fff}
table.heat th:first-child{width:8.5em;text-align:left;font-weight:400;overflow-wrap:anywhere}
table.heat td{font-weight:600}table.heat td small{display:block;font-weight:400;font-size:.82em;line-height:1.1}
table.heat td.own{outline:3px solid #d55e00;outline-offset:-3px}
table.heat tr.part th{font-weight:600;padding-top:.8em;width:auto}
.grid{display:grid;gap:14px 18px}.panels{grid-template-columns:repeat(auto-fill,minmax(210px,1fr))}
.strips{grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr))}
figure{margin:0}figcaption{font-size:.88em;font-weight:600}svg{display:block;width:100%;height:auto}
.key{font-size:.88em}.key span{display:inline-block;margin-right:1.2em}
.good{color:#00614a;font-weight:600}.bad{color:#a33600;font-weight:600}.quiet{color:#595959}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:0 14px;margin:0 0 1.2em}.pair>*{min-width:0}.pair .prompt{grid-column:1/-1}
.bar{display:inline-block;height:.7em;background:#0072b2;vertical-align:middle}
mark{background:#d6ecfb;color:inherit}details{margin:.4em 0}summary{cursor:pointer;padding:.3em 0}
@media(max-width:640px){dl.facts{grid-template-columns:1fr;gap:0}dl.facts dt{margin-top:.5em;font-size:.9em}body{padding:12px}.pair{grid-template-columns:1fr}.panels{grid-template-columns:1fr 1fr;gap:12px 8px}
table.heat th.domain{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;padding:.3em 0}
table.heat{font-size:.82em}table.heat th:first-child{width:6.6em}td,th{padding:.3em .25em}pre.wide{font-size:.8em}}
@media print{body{font-size:11px;max-width:none}nav,.live{display:none}h2,h3,.key{break-after:avoid}figure,tr,.pair{break-inside:avoid}
.scroll{overflow:visible}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


OPEN_ALL = "document.querySelectorAll('details').forEach(of => of.open = true)"  # A printed page shows everything.


def page(title: str, body: str, *, reload_s: int = 0) -> str:
  """A whole page. With `reload_s` the browser reads it again after so many seconds."""
  again = f"<meta http-equiv=refresh content={reload_s}>" if reload_s else ""
  return (
    "<!doctype html><html lang=en><head><meta charset=utf-8>"
    f"<meta name=viewport content='width=device-width,initial-scale=1'>{again}<title>{text(title)}</title>"
    f'<style>{STYLE}</style></head><body onbeforeprint="{OPEN_ALL}">\n{body}\n</body></html>\n'
  )


def text(value: object) -> str:
  """The value as escaped text."""
  return html.escape(str(value))


def section(name: str, title: str, *parts: str) -> str:
  return f"<section id={name}><h2>{text(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def note(line: str) -> str:
  return f"<p class=note>{text(line)}</p>"


def link(there: str, words: str) -> str:
  return f"<a href='{text(there)}'>{text(words)}</a>"


def command(line: str) -> str:
  """A command line that breaks between its words, and is copied as it is."""
  return " ".join(f"<span>{text(word)}</span>" for word in line.split(" "))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
  with whole(path) as partial, partial.open("w", newline="") as file:
    csv.writer(file).writerows([header, *rows])


def table(
  path: Path, header: Sequence[str], rows: Sequence[Sequence], *, left: Sequence[int] = (),
  shown: tuple[Sequence[str], Sequence[Sequence]] | None = None,
) -> str:  # fmt: skip
  """Writes the rows to a CSV file and returns them as an HTML table with a link to the file.

  Args:
    left: the shown columns, besides the first, that hold text.
    shown: (header, rows) of the HTML table, if it is narrower than the file.
  """
  write_csv(path, header, rows)
  header, rows = shown or (header, rows)
  kind = lambda i: " class=text" if i in left else ""
  cell = lambda tag, i, value: f"<{tag}{kind(i)}>{text(value)}</{tag}>"
  line = lambda tag, row: "<tr>" + "".join(cell(tag, i, value) for i, value in enumerate(row)) + "</tr>"
  body = "".join(line("td", row) for row in rows)
  return f"<div class=scroll><table>{line('th', header)}{body}</table></div>" + csv_link(path)


def csv_link(path: Path) -> str:
  return f"<p class=note>As a file: {link(path.name, path.name)}</p>"
