"""A report as one HTML file: pictures and style are in it, and nothing is fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from itertools import groupby

from wise_fast.document import Block, Grid, Heading, Paragraph, Picture

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; } h3 { margin-top: 1.8rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
td { overflow-wrap: break-word; max-width: 24rem; } th { vertical-align: bottom; background: #f6f6f6; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } td.n { white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem;
  margin: 1.5rem 0; }
figure { margin: 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
"""


def html(title: str, blocks: Sequence[Block]) -> str:
    """The document as a complete page, in UTF-8."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
    )
    series = groupby(blocks, lambda block: isinstance(block, Picture))
    parts = [_part(pictures, list(some)) for pictures, some in series]
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _part(pictures: bool, blocks: Sequence[Block]) -> str:
    """Pictures that follow each other stand side by side."""
    inside = "\n".join(map(_block, blocks))
    return f'<div class="pictures">{inside}</div>' if pictures else inside


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Picture):
        data, caption = base64.b64encode(block.png).decode("ascii"), escape(block.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return _grid(block)


def _grid(block: Grid) -> str:
    kinds = [' class="n"' if name in block.numbers else "" for name in block.columns]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, block.columns, strict=True))
    # bdi keeps right-to-left text inside its own cell
    rows = "\n".join(
        "<tr>" + "".join(f"<td{kind}><bdi>{escape(c)}</bdi></td>" for kind, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in block.rows
    )
    caption = f"<caption>{escape(block.title)}</caption>" if block.title and not block.folded else ""
    table = f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    if not block.folded:
        return table
    return f"<details><summary>{escape(block.title)}</summary>{table}</details>"
