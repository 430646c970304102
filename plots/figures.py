"""Every figure by its file's name, in the order of the page that shows them. A figure's docstring
is its sentence there."""

from collections.abc import Callable

from matplotlib.figure import Figure

from . import (
    accuracy_figures,
    latency_figures,
    mass_figures,
    model_figures,
    quality_figures,
    stage_figures,
)
from .frames import Frames
from .style import styled

FIGURES: dict[str, Callable[[Frames], Figure]] = {
    make.__name__: styled(make)
    for make in (
        latency_figures.pipeline_error,
        latency_figures.pipeline_length,
        latency_figures.pipeline_batch,
        latency_figures.pipeline_budget,
        accuracy_figures.accuracy_top_p,
        stage_figures.pipeline_share,
        stage_figures.stage_floor,
        latency_figures.attention_budget,
        accuracy_figures.kept_heads,
        latency_figures.pipeline_paper,
        model_figures.model_length,
        quality_figures.quality_tokens,
        quality_figures.quality_bytes,
        quality_figures.quality_time,
        quality_figures.model_time,
        mass_figures.selector_mass,
    )
}
# Drawn as far as there is any: what `make bench FULL=1` and MODEL=1, `make evaluate` and
# evaluation.selector_mass add, and numbers of requests.
FULL = {
    "pipeline_batch",
    *("pipeline_error", "pipeline_budget", "accuracy_top_p", "kept_heads", "pipeline_paper"),
    *("model_length", "quality_tokens", "quality_bytes", "quality_time", "model_time"),
    "selector_mass",
}
