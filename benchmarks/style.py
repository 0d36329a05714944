"""How figures look: a colour for every variant, ticks, and what stands above them. The rest is in flaxmpc.mplstyle."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = Path(__file__).parent / "flaxmpc.mplstyle"

# An attention has the same colour in all figures; what others published has that of its attention.
_COLOURS = {
    "softmax": "#000000",
    "softmax_puma": "#999999",
    "softmax_nimbus": "#882255",
    "softmax_shaft": "#661100",
    "2relu": "#56B4E9",
    "2quad": "#0072B2",
    "2quad_fixed": "#CC79A7",
    "softmax_freediv": "#E69F00",
    "2quad_freediv": "#D55E00",
    "power5_batch": "#332288",
    "square_freediv": "#117733",
    "relu_freediv": "#8C6D1F",
    "scaling": "#009E73",
}
_ATTENTION = {
    "flax_bert": "softmax",
    "flax_bert_embedded": "softmax",
    "puma": "softmax_puma",
    "mpcformer": "2quad",
    "secformer": "2quad",
    "2quad_freediv_planned": "2quad_freediv",
    "softmax, pade": "softmax",
}


def colour(variant: str) -> str:
    """The colour of a variant: that of its attention."""
    return _COLOURS[_ATTENTION.get(variant, variant)]


def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    figsize: tuple[float, float],
    sharex: bool = False,
    sharey: bool | Literal["row"] = False,
) -> tuple["Figure", Any]:
    """A figure and its axes (2-D array), for a file; `figsize` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=figsize, layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def log(axis: Any) -> None:
    """Makes one axis (`axes.xaxis`, `axes.yaxis`) logarithmic, with few ticks, as plain numbers that do not collide."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis._set_axes_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 30 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def titled(made: "Figure", what: str, records: Sequence[dict[str, Any]]) -> "Figure":
    """Writes above a figure what it shows, and of which run: protocol, tokens, versions, machine and date."""
    first = records[0]
    facts = []
    for field, form in (("protocol", "{}"), ("ring", "{}"), ("num_tokens", "{} tokens")):
        values = list(dict.fromkeys(record[field] for record in records if field in record))
        if len(values) == 1 or (values and field == "protocol"):
            facts.append(form.format(" and ".join(map(str, values))))
    if "machine" in first:
        machine = first["machine"]
        facts.append(f"SPU {first['versions']['spu']}, {machine['cpus']} cores of an {machine['processor']}")
        facts.append(max(record["date"] for record in records)[:10])
    made.suptitle(what + "\n" * bool(facts) + ", ".join(facts), fontsize="medium")
    return made


def draw(plot: Callable[[Any], "Figure"], records: Any, stem: str | Path) -> None:
    """Saves what `plot` makes of records as STEM.svg."""
    from matplotlib import style

    with style.context(_STYLE):
        made = plot(records)
        made.savefig(io.BytesIO(), dpi=150)  # a layout settles with its second drawing
        made.savefig(f"{stem}.svg", metadata={"Date": None})
