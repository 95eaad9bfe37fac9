"""The few shapes that the pages' pictures are made of, as SVG text.

A picture has its own background and colours for light and for dark, by the reader's system, so it can be read on any
page. Numbers are pixels of the picture. It knows no picture.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

STYLE = """
.bg{fill:#fbfbfd;stroke:#d9dce6}.box{fill:#fff;stroke:#5b6bb5}.soft{fill:#eef1fb;stroke:#b9c3ea}
.warm{fill:#fff3e0;stroke:#d08a2e}.cool{fill:#e3f4ec;stroke:#3d9970}
.line{stroke:#6b7280;fill:none}.head{fill:#6b7280}.bold{font-weight:600}
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:#1f2433;font-size:14px}
.small{font-size:12px;fill:#565d70}.mono{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:12.5px}
@media(prefers-color-scheme:dark){
.bg{fill:#1c1f2b;stroke:#363b4f}.box{fill:#262a3a;stroke:#8c9be0}.soft{fill:#2a3050;stroke:#56639f}
.warm{fill:#40311b;stroke:#d9a050}.cool{fill:#1d3a2e;stroke:#5dbb91}.line{stroke:#a3abbd}.head{fill:#a3abbd}
text{fill:#e8eaf2}.small{fill:#b3b9ca}}
"""


class Picture:
    """Shapes in the order in which they are drawn; `svg` is the file's text. `title` is what a screen reader says."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "box") -> None:
        """A rounded box whose first line is bold; the lines stand in its middle."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7"/>')
        top = y + h / 2 - 9 * (len(lines) - 1) + 5
        for i, line in enumerate(lines):
            self.text(x + w / 2, top + 18 * i, line, "bold" if i == 0 else "small", anchor="middle")

    def bar(self, x: float, y: float, w: float, h: float, kind: str) -> None:
        """A plain bar."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2"/>')

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """A line of text; `anchor` is start, middle or end."""
        extra = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], both: bool = False, dashed: bool = False) -> None:
        """A line through points with a head at its end, or at both."""
        path = " ".join(f"{'M' if i == 0 else 'L'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        start = ' marker-start="url(#back)"' if both else ""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(f'<path class="line" d="{path}" stroke-width="1.5" marker-end="url(#tip)"{start}{dash}/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, dashed: bool = False) -> None:
        """A line without a head."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(f'<path class="line" d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke-width="1.2"{dash}/>')

    def svg(self) -> str:
        """The file's text."""
        w, h = self.width, self.height
        size = 'markerWidth="9" markerHeight="8" refY="4" orient="auto"'
        tip = f'<marker id="tip" refX="8" {size}><path class="head" d="M0 0L9 4L0 8z"/></marker>'
        back = f'<marker id="back" refX="1" {size}><path class="head" d="M9 0L0 4L9 8z"/></marker>'
        frame = f'<rect class="bg" x="0.5" y="0.5" width="{w - 1}" height="{h - 1}" rx="10"/>'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style><defs>{tip}{back}</defs>"
        )
        return "\n".join([head, frame, *self._parts, "</svg>", ""])
