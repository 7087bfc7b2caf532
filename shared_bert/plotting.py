"""What all plots have in common."""

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def tidy(axes: Axes, grid: str = "both"):
    """Leave out the frame's upper and right side, and draw the grid ("both", "x" or "y") behind the lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def legend(figure: Figure, columns: int = 3):
    """Draw one legend for all axes below them, with each label once."""
    handles = labelled(figure)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)


def labelled(figure: Figure) -> dict[str, Artist]:
    """Return what a legend of all axes explains, by label."""
    return {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
