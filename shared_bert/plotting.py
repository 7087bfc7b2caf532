"""What all plots have in common."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def tidy(axes: Axes, grid: str = "both"):
    """Leave out the frame's upper and right side, and draw the grid ("both", "x" or "y") behind the lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def legend(figure: Figure, place: str = "outside lower center", columns: int = 3):
    """Draw one legend for all axes, with each label once."""
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc=place, ncols=columns, frameon=False)
