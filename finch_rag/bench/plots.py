"""Benchmark results as figures. Needs matplotlib, of the extra ``bench``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingExtraError
from ..paths import replacing, told_where
from .grading import METRICS
from .methods import WITHOUT_BUDGET
from .tables import METRIC_NAMES

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        FixedLocator,
        LogLocator,
        NullFormatter,
        NullLocator,
        PercentFormatter,
        StrMethodFormatter,
    )
except ModuleNotFoundError as missing:
    raise MissingExtraError.of(missing.name or "matplotlib", "bench") from missing

KINDS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which the colour-blind can tell apart; each has a mark of its own as well.
_STYLES = {
    "finch": ("#D55E00", "o"),
    "full": ("#000000", "s"),
    "top-k": ("#0072B2", "^"),
    "gold": ("#999999", "*"),
    "finch-paper": ("#CC79A7", "D"),
    "truncate": ("#999999", "P"),
    "refine": ("#009E73", "v"),
    "map-reduce": ("#009E73", "<"),
    "finch-scan": ("#E69F00", "h"),
    "finch-loop": ("#E69F00", "X"),
    "finch-store": ("#009E73", "d"),
    "finch-store-best": ("#0072B2", "p"),
}
_OTHERS = (("#56B4E9", "X"), ("#E69F00", "p"), ("#CC79A7", ">"), ("#0072B2", "d"))  # for peers, in their order
_GREY = "#555555"
_MOST_TICKS = 7
_QUESTIONS = (1, 2, 4, 8, 16, 32, 64)  # over the same passages, one after another
_ASIDE = 0.012  # of the axis, so that the intervals at one place do not hide each other


def check(file: Path) -> None:
    """Raises an InputError if figures cannot be stored as ``file``, before anything is run.

    Args:
        file: What a user asked for.
    """
    if file.suffix.lower() not in KINDS:
        raise InputError(
            f"the plot {file} is of no kind that can be drawn: name a file that ends in {', '.join(KINDS)}"
        )
    if file.is_dir():
        raise InputError(f"the plot {file} is a folder: name a file")


def plot_quality(summary: Mapping[str, Any], file: Path) -> None:
    """Draws accuracy and F1 against the size of the cache, a line for each method.

    Args:
        summary: What the JSON line of `finch_rag.bench.quality` holds.
        file: Where to store the figure.
    """
    settings = summary["settings"]
    figure, axes = _figure(2, _title(summary, f"{settings['retriever']} top {settings['top_k']}"))
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for label, row in summary["methods"].items():
        if row["n"]:
            rows.setdefault(_method(label), []).append(row)
    sizes = [row["kv_tokens"] for of_method in rows.values() for row in of_method]
    for metric, axis in zip(METRICS, axes, strict=True):
        axis.set_title(METRIC_NAMES[metric], loc="left")
        axis.set_xlabel("passage tokens in the cache")
        axis.set_xscale("log")
        _label_powers_of_two(axis, sizes)
        for method, style in _styles(rows).items():
            of_method = sorted(rows[method], key=lambda row: float(row["kv_tokens"]))
            _draw(axis, method, style, [row["kv_tokens"] for row in of_method], [row[metric] for row in of_method])
    _store(figure, axes, file)


def plot_positions(summary: Mapping[str, Any], file: Path) -> None:
    """Draws accuracy against the place of the answer's passage, a panel for each number of passages.

    Args:
        summary: What the JSON line of `finch_rag.bench.positions` holds.
        file: Where to store the figure.
    """
    settings = summary["settings"]
    passages = summary["passages"]
    title = _title(summary, f"{settings['retriever']}, budget {settings['budget']}")
    figure, axes = _figure(len(passages), title)
    for (count, methods), axis in zip(passages.items(), axes, strict=True):
        axis.set_title(f"accuracy, {count} passages", loc="left")
        axis.set_xlabel("place of the answer's passage")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        for number, (label, style) in enumerate(_styles(methods).items()):
            aside = _ASIDE * (number - (len(methods) - 1) / 2)
            ran = {int(place): row["accuracy"] for place, row in methods[label]["places"].items() if row["n"]}
            _draw(axis, _method(label), style, [place / (int(count) - 1) + aside for place in ran], list(ran.values()))
    _store(figure, axes, file)


def plot_speed(summary: Mapping[str, Any], file: Path) -> None:
    """Draws seconds to the first token, and memory, against the length of the passages.

    Where a store was measured, also how long several questions over the same passages wait: what the store took to read
    them before the first one counts there.

    Args:
        summary: What the JSON line of `finch_rag.bench.speed` holds.
        file: Where to store the figure.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in summary["cases"]:
        if "skipped" not in row:
            rows.setdefault(row["method"], []).append(row)
    title = f"{summary['model']}, {summary['device']}, budget {summary['budget']:,}, medians of {summary['repeats']}"
    repeated = any("add_seconds" in row for of_method in rows.values() for row in of_method)
    figure, axes = _figure(3 if repeated else 2, title, share_y=False)
    panels = {"first_token_seconds": "seconds to the first token", "peak_mib": "peak memory beyond the model (MiB)"}
    lengths = [row["tokens"] for of_method in rows.values() for row in of_method]
    for (name, heading), axis in zip(panels.items(), axes, strict=False):
        _log_axes(axis, heading, "passage tokens", lengths)
        for method, style in _styles(rows).items():
            of_method = sorted(rows[method], key=lambda row: int(row["tokens"]))
            _line(axis, method, style, [row["tokens"] for row in of_method], [row[name] for row in of_method])
    if repeated:
        longest = max(lengths)
        _log_axes(axes[-1], "seconds until all have begun", f"questions over {longest:,} tokens", _QUESTIONS)
        for method, style in _styles(rows).items():
            for row in rows[method]:
                if row["tokens"] == longest:
                    first, reading = row["first_token_seconds"], row.get("add_seconds", 0.0)
                    _line(axes[-1], method, style, _QUESTIONS, [reading + n * first for n in _QUESTIONS])
    _store(figure, axes, file)


def _log_axes(axis: Axes, title: str, label: str, places: Sequence[float]) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    _label_powers_of_two(axis, places)


def _line(axis: Axes, method: str, style: tuple[str, str], places: Sequence[float], values: Sequence[float]) -> None:
    colour, mark = style
    width, front = (2.4, 3) if method == "finch" else (1.4, 2)
    axis.plot(places, values, label=method, color=colour, marker=mark, linewidth=width, zorder=front)


def _method(label: str) -> str:
    """A method's name in a label, which may have a budget behind it."""
    return label.rpartition("@")[0] or label


def _styles(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each label's method, the known ones in a fixed order and first."""
    known = list(_STYLES)
    by_rank = sorted(labels, key=lambda label: known.index(_method(label)) if _method(label) in known else len(known))
    styles = {}
    unknown = 0
    for label in by_rank:
        if _method(label) in _STYLES:
            styles[label] = _STYLES[_method(label)]
        else:
            styles[label] = _OTHERS[unknown % len(_OTHERS)]
            unknown += 1
    return styles


def _title(summary: Mapping[str, Any], setting: str) -> str:
    settings = summary["settings"]
    model, questions = Path(settings["model"]).name, summary["cases"]
    return f"{model}; {settings['data']}, {setting}; {questions:,} questions, 95% intervals"


def _figure(panels: int, title: str, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(4.4 * panels, 6.5), 4.2), layout="constrained")
    grid = figure.subplots(1, panels, sharey=share_y, squeeze=False)
    figure.suptitle(title, fontsize=10, color=_GREY)
    axes: list[Axes] = list(grid[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.yaxis.set_tick_params(labelleft=True)
    return figure, axes


def _draw(
    axis: Axes, name: str, style: tuple[str, str], places: Sequence[float], estimates: Sequence[Mapping[str, float]]
) -> None:
    """A method's means with their intervals."""
    colour, mark = style
    means = [estimate["mean"] for estimate in estimates]
    below = [max(0.0, estimate["mean"] - estimate["low"]) for estimate in estimates]
    above = [max(0.0, estimate["high"] - estimate["mean"]) for estimate in estimates]
    axis.errorbar(
        places,
        means,
        yerr=[below, above],
        label=name,
        color=colour,
        marker=mark,
        markersize=9 if mark == "*" else 6,
        linestyle="--" if name in WITHOUT_BUDGET else "-",
        linewidth=2.4 if name == "finch" else 1.4,
        elinewidth=1,
        zorder=3 if name == "finch" else 2,
    )


def _label_powers_of_two(axis: Axes, sizes: Sequence[float]) -> None:
    low, high = min(sizes, default=1.0) / 1.25, max(sizes, default=2.0) * 1.25
    ticks = [2**power for power in range(40) if low <= 2**power <= high]
    ticks = ticks[:: -(-len(ticks) // _MOST_TICKS) or 1]
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def _store(figure: Figure, axes: Sequence[Axes], file: Path) -> None:
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3 + len(axes)) or 1, frameon=False)
    with told_where("the plot", file, InputError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as new:
            figure.savefig(new, dpi=150)
