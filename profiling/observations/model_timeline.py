"""What a token of a whole model is spent on: the model's own kernels, what is appended, the layers
that attend to every token, and the stages of the others.

A layer's launches follow its append, so that the attention of dense layers is told from the rest.
"""

from collections.abc import Callable, Iterable, Mapping

from ..providers.whole_model import WholeModel
from ..tables.rows import Origin, TimelineRow
from ..timing import capture
from ..workloads.workload import METHOD
from .timeline import Share, Span, device_spans, host_span, shares

TOKENS = 3  # the first does not count
DENSE = "dense layers"


def labelled(
    spans: Iterable[Span], kernels: Mapping[str, set[str]], num_dense: int, num_layers: int
) -> list[Span]:
    """Spans by what they belong to, in the place of their kernels.

    Args:
        spans: of whole tokens, by start.
        kernels: of "append", of "dense layers", and of each stage of the others.
        num_dense, num_layers: dense layers, which are the first, and layers.
    """
    others = {stage: own for stage, own in kernels.items() if stage not in ("append", DENSE)}
    found, layer = [], -1
    for span in spans:
        label = next((stage for stage, own in others.items() if span.kernel in own), "model")
        if span.kernel in kernels["append"]:
            label, layer = "append", (layer + 1) % num_layers
        elif 0 <= layer < num_dense and span.kernel in kernels[DENSE]:
            label = DENSE
        found.append(span._replace(kernel=label))
    return found


def model_timeline_rows(builder: WholeModel, gpu: str, origin: Origin) -> list[TimelineRow]:
    """Rows for each part of a token, and for the whole as `model step`."""
    parts = builder.parts()
    sizes = builder.num_dense(METHOD), builder.num_layers
    if builder.backend.device == "cuda":
        timeline = "graph"
        token = parts.pop("token")
        names = {name: {span.kernel for span in device_spans(own)} for name, own in parts.items()}
        spans = labelled(device_spans(capture([token], TOKENS).replay), names, *sizes)
    else:
        timeline = "host"
        spans = [span for _ in range(TOKENS) for span in _on_host(parts, *sizes)]
    labels = dict.fromkeys(span.kernel for span in spans)
    found = shares(spans, {label: [label] for label in labels}, TOKENS)
    whole = Share(*map(sum, zip(*found.values(), strict=True)))
    return [
        TimelineRow(
            **builder.workload.labels(METHOD, gpu),
            timeline=timeline,
            stage=stage,
            **share._asdict(),
            num_steps=TOKENS - 1,
            **origin,
        )
        for stage, share in {**found, "model step": whole}.items()
    ]


def _on_host(
    parts: Mapping[str, Callable[[], object]], num_dense: int, num_layers: int
) -> list[Span]:
    """Each part by the wall clock; of the model's own nothing can be told apart."""
    stages = [name for name in parts if name not in ("append", DENSE, "token")]
    names = ["append", DENSE] * num_dense + ["append", *stages] * (num_layers - num_dense)
    return [host_span(name, parts[name]) for name in names]
