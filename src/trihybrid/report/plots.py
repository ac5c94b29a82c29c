"""The figures of the report: each function takes plain numbers and returns the bytes of one PNG.

matplotlib's Figure and Agg canvas are used directly: no window, no pyplot state, nothing global. All figures have one
size, so that two stand side by side on a desk and one fills a phone with its letters still readable.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trihybrid.report.cache_bytes import CacheBytes, break_even
from trihybrid.report.stages import in_stage_order, stage_style

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 4.8, 3.7, 200
GRID, INK, MARK = "#dddddd", "#333333", "#777777"
LINE_STYLES = ("-", "--", "-.", ":")
MOST_LAYER_LABELS = 12
FEWEST_TO_SMOOTH = 80
LONGEST_CONTEXT = 2**24


@dataclass(frozen=True)
class RecallBin:
    """Answers whose fact lies low <= distance < high tokens back; accuracy in [0, 1] over `count` answers."""

    low: int
    high: int
    accuracy: float
    count: int

    @property
    def distance(self) -> float:
        """Where the bin is drawn: the geometric middle, at least one token."""
        return math.sqrt(max(self.low, 1) * max(self.high - 1, self.low, 1))

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy (E. B. Wilson, 1927), z = 1.96."""
        square = 1.96**2
        middle = (self.accuracy + square / (2 * self.count)) / (1 + square / self.count)
        variance = self.accuracy * (1 - self.accuracy) / self.count + square / (4 * self.count**2)
        half = 1.96 * math.sqrt(variance) / (1 + square / self.count)
        return min(middle - half, self.accuracy), max(middle + half, self.accuracy)


def loss_curve(
    stage: str, points: Sequence[tuple[float, float]], divergence: Sequence[tuple[float, float]]
) -> bytes:
    """Training loss of one stage against the step.

    points: finite (step, loss). divergence: finite (step, KL in nats per token), possibly empty. From
    FEWEST_TO_SMOOTH points on they are drawn pale, and their running mean over a fortieth of them in full colour.
    """
    style = stage_style(stage)
    figure, axes = _figure(style.training)
    _curve(axes, points, "loss", style.colour, "-")
    if divergence:
        _curve(axes, divergence, "KL alone", MARK, "--")
        _legend(figure, axes)
    axes.set_xlabel("step")
    axes.set_ylabel(style.unit)
    _integer_steps(axes)
    _logarithmic_when_wide(axes, [value for _, value in [*points, *divergence]])
    return _png(figure)


def alignment_curves(stage: str, layers: Mapping[int, Sequence[tuple[float, float]]]) -> bytes:
    """Alignment error of every converted slot against the step, the colour growing paler with depth.

    layers: layer -> finite (step, relative squared error). Of many layers every second, third, ... one is named.
    """
    figure, axes = _figure(f"{stage_style(stage).training}, by layer")
    colours = colormaps["viridis"]
    every = math.ceil(len(layers) / MOST_LAYER_LABELS)
    for rank, (layer, points) in enumerate(sorted(layers.items())):
        # The palest fifth of the colour map does not show on white.
        colour = colours(0.8 * rank / max(len(layers) - 1, 1))
        axes.plot(
            *zip(*points, strict=True),
            label=f"layer {layer}" if rank % every == 0 else None,
            color=colour,
            linestyle=LINE_STYLES[rank % 4],
            linewidth=1.6,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("relative squared error")
    _integer_steps(axes)
    _logarithmic_when_wide(axes, [value for points in layers.values() for _, value in points])
    _legend(figure, axes, columns=4 if len(layers) > 6 else 3)
    return _png(figure)


def recall_curves(by_stage: Mapping[str, Sequence[RecallBin]], window: int | None) -> bytes:
    """Recall against the distance to the fact, one line a stage. Every bin needs count >= 1. window: tokens, marked."""
    figure, axes = _figure("Recall by distance")
    for stage in in_stage_order(by_stage):
        bins = sorted(by_stage[stage], key=lambda entry: entry.distance)
        style = stage_style(stage)
        distances = [entry.distance for entry in bins]
        intervals = [entry.interval() for entry in bins]
        axes.vlines(
            distances,
            [100 * low for low, _ in intervals],
            [100 * high for _, high in intervals],
            style.colour,
            alpha=0.35,
            linewidth=2.5,
        )
        _stage_line(axes, stage, distances, [100 * entry.accuracy for entry in bins])
    axes.set_ylim(-4, 104)
    axes.set_xlabel("distance to the fact (tokens)")
    axes.set_ylabel("answers right (%)")
    _token_axis(axes, window, "window")
    _legend(figure, axes)
    return _png(figure)


def position_curves(by_stage: Mapping[str, Sequence[tuple[float, float]]], window: int | None) -> bytes:
    """Loss against the position in the document, one line a stage. by_stage: (position from 0, nats per token)."""
    figure, axes = _figure("Loss by position")
    for stage in in_stage_order(by_stage):
        points = sorted(by_stage[stage])
        # A logarithmic axis has no zero: the first token stands at 1.
        _stage_line(axes, stage, [position + 1 for position, _ in points], [loss for _, loss in points])
    axes.set_xlabel("position in the document (tokens, the first is 1)")
    axes.set_ylabel("loss (nats per token)")
    _token_axis(axes, window, "window")
    _legend(figure, axes)
    return _png(figure)


def cache_curves(teacher: CacheBytes, student: CacheBytes) -> bytes:
    """Cache bytes of one sequence against its context, both axes logarithmic, with the break-even context marked.

    At least one of the two must hold bytes. Drawn from 64 to 131,072 tokens, and further where the break-even lies
    outside, up to LONGEST_CONTEXT.
    """
    figure, axes = _figure("Cache of one sequence")
    crossing = break_even(teacher, student)
    if crossing is not None and crossing > LONGEST_CONTEXT:
        crossing = None
    power = math.log2(crossing) if crossing is not None else 8
    contexts = [
        2**place for place in range(min(8, max(0, math.floor(power) - 2)), max(17, math.ceil(power) + 2) + 1)
    ]
    for label, cache, stage, line in (
        ("Teacher", teacher, "teacher", "-"),
        ("Student", student, "matched", "--"),
    ):
        # Nothing kept cannot stand on a logarithmic axis and is left out.
        sizes = [cache.at(context) or math.nan for context in contexts]
        axes.plot(contexts, sizes, color=stage_style(stage).colour, linestyle=line, linewidth=2, label=label)
    _token_axis(axes, crossing, "break-even")
    _byte_axis(axes)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("bytes kept between tokens")
    _legend(figure, axes)
    return _png(figure)


def context_curves(title: str, unit: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """What is measured against the context, one line a name, both axes logarithmic.

    lines: name -> (context in tokens, value above 0), at least one point.
    """
    figure, axes = _figure(title)
    colours = colormaps["viridis"]
    for rank, (name, points) in enumerate(lines.items()):
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=colours(0.8 * rank / max(len(lines) - 1, 1)),
            linestyle=LINE_STYLES[rank % 4],
            linewidth=1.8,
            marker="o",
            markersize=4,
        )
    _token_axis(axes, None, "")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel(unit)
    _legend(figure, axes)
    return _png(figure)


def byte_bars(parts: Sequence[tuple[str, int]], limit: int | None) -> bytes:
    """Bytes of a file by what they are for, one bar each in the order given, with the limit on their sum in words.

    parts: (name, bytes), at least one with bytes above 0.
    """
    total = sum(size for _, size in parts)
    share = "" if limit is None else f" of {limit:,}"
    figure, axes = _figure(f"{total:,} bytes{share}")
    places = list(range(len(parts)))
    sizes = [size / 1000 for _, size in parts]
    bars = axes.barh(places, sizes, color=stage_style("train").colour, height=0.65)
    axes.bar_label(
        bars, [f"{100 * size / total:.1f} %" for _, size in parts], padding=3, fontsize=9, color=INK
    )
    axes.set_yticks(places, [name for name, _ in parts])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("kB (1,000 bytes)")
    return _png(figure)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(
        figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    figure.suptitle(title, x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.xaxis.label.set(size=10, color=INK)
    axes.yaxis.label.set(size=10, color=INK)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the library in its metadata the same data gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Below the axes, where it can cover no line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        handlelength=2.8,
    )


def _stage_line(axes: Axes, stage: str, x: Sequence[float], y: Sequence[float]) -> None:
    style = stage_style(stage)
    # A student that reaches its teacher covers it; the teacher's line is wider, so that its rim still shows.
    width = 3.4 if stage == "teacher" else 1.8
    axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=width, zorder=2)
    axes.plot(
        [],
        [],
        color=style.colour,
        linestyle=style.line,
        marker=style.marker,
        linewidth=width,
        label=style.title,
    )
    axes.plot(x, y, color=style.colour, linestyle="", marker=style.marker, markersize=5, zorder=3)


def _curve(axes: Axes, points: Sequence[tuple[float, float]], label: str, colour: str, line: str) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    if len(points) < FEWEST_TO_SMOOTH:
        marker = "o" if len(points) == 1 else ""
        axes.plot(steps, values, color=colour, linestyle=line, marker=marker, linewidth=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(
        steps,
        _running_mean(values, len(values) // 40),
        color=colour,
        linestyle=line,
        linewidth=1.8,
        label=label,
    )


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values, or of as many as there are."""
    total, means = 0.0, []
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        means.append(total / min(place + 1, width))
    return means


def _integer_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _logarithmic_when_wide(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic loss axis when the values span more than a factor of 20; labels at 1, 2 and 5 of each decade."""
    low, high = min(values), max(values)
    if low <= 0 or high / low <= 20:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _power_axis(limits: tuple[float, float], most: int) -> tuple[tuple[float, float], list[float]]:
    """Limits that span at least a factor of four around the given ones, and the powers of two within: every second,
    third, ... one, so that at most `most` remain."""
    low, high = limits
    if high / low < 4:
        low, high = low / 2, high * 2
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    stride = max(1, math.ceil((last - first + 1) / most))
    return (low, high), [2.0**power for power in range(first, last + 1, stride)]


def _token_axis(axes: Axes, mark: float | None, mark_name: str) -> None:
    """A logarithmic axis of tokens; `mark` (tokens) gets a dashed line over the whole height."""
    axes.set_xscale("log", base=2)
    if mark is not None:
        axes.axvline(mark, color=MARK, linestyle=(0, (4, 3)), linewidth=1.2)
    limits, ticks = _power_axis(axes.get_xlim(), 6)
    axes.set_xlim(limits)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if mark is not None:
        _label_mark(axes, mark, f"{mark_name} {mark:,.0f}")


def _label_mark(axes: Axes, x: float, text: str) -> None:
    """Above the axes, clear of the lines, and leaning inwards where the mark stands near an edge."""
    low, high = (math.log2(edge) for edge in axes.get_xlim())
    share = (math.log2(x) - low) / (high - low)
    side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
    axes.annotate(
        text, (x, 1), (0, 3), axes.get_xaxis_transform(), "offset points", ha=side, fontsize=9, color=INK
    )


def _byte_axis(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    limits, ticks = _power_axis(axes.get_ylim(), 7)
    axes.set_ylim(limits)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_bytes(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _short_bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:g} {unit}"
        value /= 1024
    return f"{value:g} TiB"
