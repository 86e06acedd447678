"""Figures: one look for all, as PNG and SVG, and as SVG that follows a page's light or dark theme.

Source: none.  Figures are drawn on nothing, with two ink colours that stand for "the text's" and
"the grid's"; where an SVG goes into the report these two become the page's own.
Invariant: the same table gives the same bytes.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import matplotlib
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

matplotlib.use("agg")

INK: Final = "#1b1f24"
GRID: Final = "#d5d8dc"
KINDS: Final = ("#8a5fb0", "#2b9484", "#c2513b", "#4274b9", "#d99a2b", "#6d7782", "#a7b36a")
COLORS: Final = {"eager": "#c2513b", "lazy": "#d99a2b", "vtlb": "#2b9484", "ept": "#4274b9"}
OTHERS: Final = ("#4274b9", "#c2513b", "#2b9484", "#d99a2b", "#8a5fb0", "#6d7782")
SIZE: Final = (8.4, 4.2)
STYLE: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def color(name: str, n: int = 0) -> str:
    """A technique's colour, or the n-th of the others."""
    return COLORS.get(name, OTHERS[n % len(OTHERS)])


def render(draw: Any, table: Any, salt: str) -> tuple[bytes, str]:
    """Let an experiment's `draw` fill a figure: the PNG and the SVG."""
    style: Any = {**STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(table, figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def save(folder: Path, name: str, png: bytes, svg: str) -> None:
    """NAME.png and NAME.svg (on white, for anywhere)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(png)
    on_white = re.sub(r"(<svg [^>]*)>", r'\1 style="background:#fff">', svg, count=1)
    (folder / f"{name}.svg").write_text(on_white, encoding="utf-8")


def inline(svg: str, title: str) -> str:
    """The SVG as a part of the report: scales with the page, in the page's colours."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = body.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    return body.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")


def luminance(rgb: Sequence[float]) -> float:
    """How bright a colour looks, 0 to 1."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def heat(
    figure: Figure,
    cells: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
) -> None:
    """A map of numbers, each written into its cell."""
    axes = figure.add_subplot()
    shades = matplotlib.colormaps["YlGnBu"]
    numbers = [n for row in cells for n in row if n is not None]
    top = max(numbers, default=1) or 1
    for y, row in enumerate(cells):
        for x, n in enumerate(row):
            if n is None:
                continue
            shade = shades(0.08 + 0.8 * n / top)
            axes.add_patch(
                matplotlib.patches.Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=shade, lw=0)
            )
            ink = "#101418" if luminance(shade) > 0.55 else "#ffffff"
            axes.text(x, y, f"{n:g}", ha="center", va="center", color=ink, fontweight="bold")
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(label)
    axes.xaxis.set_label_position("bottom")


def bars(
    axes: "Axes",
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    label: str,
    *,
    log: bool = False,
) -> None:
    """Groups of bars side by side, each with its number on top."""
    width = 0.8 / max(len(series), 1)
    for n, (name, heights) in enumerate(series.items()):
        places = [x - 0.4 + width * (n + 0.5) for x in range(len(groups))]
        shown = [(x, h) for x, h in zip(places, heights, strict=True) if h is not None]
        axes.bar(
            [x for x, _ in shown], [h for _, h in shown], width * 0.92,
            color=color(name, n), label=name,
        )  # fmt: skip
        for x, h in shown:
            axes.annotate(
                short(h), (x, max(h, 0)), (0, 2), textcoords="offset points", ha="center",
                va="bottom", fontsize=8,
            )  # fmt: skip
    if log:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
    plain(axes)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(label)
    if len(series) > 1:
        axes.legend(ncols=min(len(series), 6), loc="upper center", bbox_to_anchor=(0.5, 1.14))


def series(
    rows: Iterable[Mapping[str, Any]], line: str, x: str, y: str
) -> dict[str, list[tuple[float, float]]]:
    """The points (x, y) of the rows, a line for each value of the column `line`."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        out.setdefault(row[line], []).append((row[x], row[y]))
    return out


def lines(
    axes: "Axes",
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
) -> None:
    """One line for each series of points; lines that coincide stay visible by their markers."""
    marks = "osD^vPX"
    for n, (name, points) in enumerate(series.items()):
        thick = 1.6 ** max(len(series) - 1 - n, 0)  # what lies below shows at the rim
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker=marks[n % len(marks)],
            color=color(name, n), label=name, linewidth=1.2 * thick, markersize=4.5 + 2 * thick,
            clip_on=False,
        )  # fmt: skip
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_ylim(bottom=-0.25)  # room for the markers of what costs nothing
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    plain(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.14))


def plain(axes: "Axes") -> None:
    """Write the numbers at the y axis as they are read: 0, 10, 100, 50k."""
    axes.yaxis.set_major_formatter(lambda n, _: short(n))


def short(n: float) -> str:
    """A number in at most five characters or so."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(n) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{n / scale:.3g}{unit}"
    return f"{n:.4g}"


def stacks(
    figure: Figure,
    panels: Sequence[str],
    bars: Sequence[tuple[str, str, Mapping[str, float]]],
    label: str,
) -> None:
    """A panel for each of `panels`, in it a bar for each (panel, name, parts), parts stacked."""
    panels = list(dict.fromkeys(panels))
    kinds = list(dict.fromkeys(kind for _, _, parts in bars for kind in parts))
    grid = figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=False):
        mine = [(name, parts) for of, name, parts in bars if of == panel]
        base = [0.0] * len(mine)
        for n, kind in enumerate(kinds):
            heights = [parts.get(kind, 0.0) for _, parts in mine]
            axes.bar(range(len(mine)), heights, 0.72, bottom=base, color=KINDS[n], label=kind)
            base = [b + h for b, h in zip(base, heights, strict=True)]
        for x, top in enumerate(base):
            axes.annotate(short(top), (x, top), (0, 2), textcoords="offset points", ha="center",
                          va="bottom", fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(mine)), [name for name, _ in mine])
        axes.set_title(panel, fontsize=10)
        axes.grid(axis="x", visible=False)
    highest = max((sum(parts.values()) for _, _, parts in bars), default=1.0) or 1.0
    grid[0].set_ylim(0, highest * 1.12)  # room for the numbers
    plain(grid[0])
    grid[0].set_ylabel(label)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, names, ncols=len(kinds), loc="outside upper center", fontsize=9,
        handlelength=1.0, handleheight=0.9, handletextpad=0.5, columnspacing=1.3,
    )  # fmt: skip
