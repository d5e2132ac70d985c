"""figures.html: pictures with their captions in one file that needs nothing else, for phones and dark screens too."""

from base64 import b64encode
from collections.abc import Sequence
from html import escape

from tnt_lightning.pictures.draw import Picture


def page(pictures: Sequence[Picture], notes: Sequence[str], *, title: str, about: str) -> str:
    """Names that come from files are text in it, never markup."""
    left_out = f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(about)}</p></header>
<main>
{"".join(map(_section, pictures))}
{left_out}
</main></body></html>
"""


def _section(picture: Picture) -> str:
    """Wider than a phone it would be too small to read there: it is moved sideways, by the keyboard too."""
    source = f"data:image/png;base64,{b64encode(picture.png).decode()}"
    width = picture.figure.get_figwidth()
    sizes = f"max-width:{6.3 * width:.1f}rem;min-width:{4.5 * width:.1f}rem"
    return (
        f'<section><h2 id="{picture.name}">{escape(picture.title)}</h2><figure>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(picture.title)}">'
        f'<img src="{source}" alt="{escape(picture.alt)}" style="{sizes}"></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure></section>\n"
    )


STYLE = """
:root{color-scheme:light dark;--ink:#1c2230;--soft:#5a6270;--paper:#fff;--line:#dde1e8;--accent:#2f6fde}
@media (prefers-color-scheme:dark){:root{--ink:#e7eaf0;--soft:#a9b1bf;--paper:#12151c;--line:#2b313d;--accent:#7aa7ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:56rem;padding:1rem;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.5rem 0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.25rem 0;color:var(--soft)}
h1,h2,p,li,figcaption{overflow-wrap:anywhere}
figure{margin:0}figcaption{margin:.5rem 0;color:var(--soft)}
.wide{overflow-x:auto;background:#fff;border:1px solid var(--line);border-radius:.4rem}
img{display:block;width:100%;height:auto;margin:0 auto}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
"""
