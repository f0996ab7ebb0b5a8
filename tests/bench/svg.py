"""What the pictures share: SVG text, colours, and an axis of time.

The text in them can be selected, they follow the reader's light or dark
scheme, and hold no script. Colours are Okabe and Ito's, which colour-blind
people can tell apart, or near them.
"""

from xml.sax.saxutils import escape, quoteattr

# name: (in light, in dark). A class of that name fills or strokes with it.
COLOURS = {
    "waits": ("#e69f00", "#b87f00"),
    "talks": ("#0072b2", "#56b4e9"),
    "s1": ("#7a5195", "#c39bd3"),  # the four servers
    "s2": ("#0072b2", "#56b4e9"),
    "s3": ("#d55e00", "#ff9440"),
    "s4": ("#00805e", "#2dc99d"),
}
PAGE = "#ffffff", "#0d1117"
INK = "#1f2328", "#f0f6fc"
PALE = "#59636e", "#9198a1"  # ticks
GRID = "#d1d9e0", "#3d444d"


def style():
    """Return the style sheet of all pictures."""

    def colours(scheme):
        lines = [
            f".page {{ fill: {PAGE[scheme]}; }}",
            f"text {{ fill: {INK[scheme]}; }}",
            f".tick {{ fill: {PALE[scheme]}; }}",
            f".grid {{ stroke: {GRID[scheme]}; }}",
        ]
        for name, colour in COLOURS.items():
            lines.append(f".{name} {{ fill: {colour[scheme]}; }}")
            lines.append(f".curve.{name} {{ stroke: {colour[scheme]}; }}")
        return "\n".join(lines)

    return f"""
text {{ font: 13px system-ui, sans-serif; }}
.head {{ font-size: 17px; font-weight: 600; }}
.title {{ font-weight: 600; }}
.tick {{ font-size: 11px; }}
{colours(0)}
.curve, .grid {{ fill: none; stroke-width: 2; }}
.grid {{ stroke-width: 1; }}
@media (prefers-color-scheme: dark) {{
{colours(1)}
.curve {{ fill: none; }}
}}
"""


class Picture:
    """An SVG picture to which one adds from top to bottom. Sizes: pixels."""

    def __init__(self, title, width):
        self.title = title
        self.width = width
        self.height = 0  # it grows with what is added
        self.parts = []

    def add(self, element):
        """Add an element, given as SVG text."""
        self.parts.append(element)

    def reach(self, y):
        """Make the picture at least so high."""
        self.height = max(self.height, y)

    def text(self, x, y, words, kind="", anchor="start"):
        self.reach(y + 8)
        self.add(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"'
            f' text-anchor="{anchor}">{escape(words)}</text>'
        )

    def bar(self, kind, x, y, width, height, says=""):
        """Draw a bar of at least half a pixel; `says` shows on hovering."""
        self.reach(y + height)
        size = f'width="{max(width, 0.5):.1f}" height="{height:.1f}"'
        bar = f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}'
        hint = f"><title>{escape(says)}</title></rect>" if says else "/>"
        self.add(bar + hint)

    def grid(self, x1, y1, x2, y2):
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self.add(f'<line class="grid" {ends}/>')

    def curve(self, kind, spots):
        """Draw a line through spots, pairs of x and y."""
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        self.add(f'<polyline class="curve {kind}" points="{points}"/>')

    def dot(self, kind, x, y):
        """Mark a spot with the shape of a server, s1 to s4."""
        shapes = {
            "s1": f"M{x:.1f} {y - 6:.1f} l6 6 l-6 6 l-6 -6 z",
            "s2": f"M{x - 4.5:.1f} {y - 4.5:.1f} h9 v9 h-9 z",
            "s3": f"M{x:.1f} {y - 6:.1f} l6 10.5 h-12 z",
            "s4": f"M{x - 5:.1f} {y:.1f} a5 5 0 1 0 10 0 a5 5 0 1 0 -10 0 z",
        }
        self.add(f'<path class="{kind}" d="{shapes[kind]}"/>')

    def time_axis(self, left, right, top, bottom, seconds):
        """Draw an axis of time from 0 to `seconds`, with its grid."""
        step = next(
            mantissa * 10.0**power
            for power in range(-6, 6)
            for mantissa in (1, 2, 5)
            if seconds <= 8 * mantissa * 10.0**power
        )
        for number in range(int(seconds / step + 1e-9) + 1):
            x = left + number * step / seconds * (right - left)
            self.grid(x, top, x, bottom)
            self.text(x, bottom + 15, f"{number * step:g} s", "tick", "middle")

    def lines(self):
        """Return the whole picture, as lines of text."""
        width, height = self.width, self.height + 10
        size = f'width="{width}" height="{height:.0f}"'
        name = quoteattr(self.title)
        return [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"'
            f' viewBox="0 0 {width} {height:.0f}" aria-label={name}>\n',
            f"<title>{escape(self.title)}</title>\n",
            f"<style>{style()}</style>\n",
            f'<rect class="page" width="{width}" height="{height:.0f}"/>\n',
            *[f"{part}\n" for part in self.parts],
            "</svg>\n",
        ]
