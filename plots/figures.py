"""Every figure by its file's name. A figure's docstring is its sentence in index.md."""

from collections.abc import Callable

from matplotlib.figure import Figure

from . import accuracy_figures, latency_figures, stage_figures
from .frames import Frames
from .style import styled

Make = Callable[[Frames], Figure]


def _named(*functions: Make) -> dict[str, Make]:
    return {make.__name__: styled(make) for make in functions}


FIGURES = _named(
    latency_figures.attention_budget,
    latency_figures.pipeline_length,
    latency_figures.pipeline_speedup,
    stage_figures.pipeline_share,
    stage_figures.stage_floor,
    stage_figures.stage_roofline,
)
FULL_FIGURES = _named(  # of the tables and sweeps that `make bench FULL=1` adds
    latency_figures.pipeline_budget,
    latency_figures.pipeline_paper,
    stage_figures.stage_timeline,
    accuracy_figures.accuracy_top_p,
    accuracy_figures.kept_heads,
    accuracy_figures.cache_memory,
)
TUNED_FIGURES = _named(stage_figures.tuned_gain)
