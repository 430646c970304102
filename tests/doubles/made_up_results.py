"""Rows of every table as a run on a GPU would write them, with numbers made up from the bytes."""

import itertools
from pathlib import Path

from twilight_tilelang.plots.tables import SIGN_PARTS
from twilight_tilelang.profiling.observations import accuracy
from twilight_tilelang.profiling.observations.memory import PARTS
from twilight_tilelang.profiling.tables.rows import (
    OBSERVED,
    TABLES,
    AccuracyRow,
    AnyRow,
    KeptRow,
    MemoryRow,
    Row,
    TimelineRow,
    table_of,
)
from twilight_tilelang.profiling.tables.store import write_rows
from twilight_tilelang.profiling.workloads import traffic
from twilight_tilelang.profiling.workloads.models import GPU_MODELS, GPU_MODELS_FULL
from twilight_tilelang.profiling.workloads.standard import GPU_WORKLOADS, SIGNS
from twilight_tilelang.profiling.workloads.sweeps import GPU_FULL
from twilight_tilelang.profiling.workloads.workload import Workload
from twilight_tilelang.reference.inputs import LAYER_BUDGETS

ORIGIN = {"torch": "2.13.0", "commit": "0123456789", "date": "2026-01-31"}
READ_TBPS = 4.4
BASELINES = dict.fromkeys(("label_scores", "top_tokens"), ("doublesparse",))  # of labels
EVERY = (*GPU_WORKLOADS, *GPU_FULL, *GPU_MODELS, *GPU_MODELS_FULL)


def make_row(workload, stage, method, provider, work, slowness=1.3) -> Row:
    """A timed row: a multiple of its floor, and 3 us."""
    num_bytes = traffic.bytes_moved(stage, method, work)
    floor_us = num_bytes / READ_TBPS * 1e-6
    median_us = slowness * floor_us + 3.0
    tokens = work.kept_tokens // (work.shape.batch_size * work.shape.num_kv_heads)
    return Row(
        **workload.key(stage, method, provider, "h200"),
        kept_mean=float(tokens),
        kept_min=tokens // 4,
        kept_max=4 * tokens,
        median_us=median_us,
        p20_us=0.97 * median_us,
        p80_us=1.05 * median_us,
        bytes=num_bytes,
        flops=traffic.flops(stage, method, work),
        floor_us=floor_us,
        reached=floor_us / median_us,
        read_tbps=READ_TBPS,
        error=1.234e-4,
        num_sets=1,
        timer="graph-rotate",
        tilelang="0.1.15",
        sm_mhz=1980,
        **ORIGIN,
    )


def made_up_rows(workloads=EVERY) -> list[AnyRow]:
    """Every row of a run, without a GPU."""
    rows = [row for workload in workloads for row in _rows_of(workload)]
    return list({_key(row): row for row in rows}.values())


def write_frames(rows: list[AnyRow], folder: Path) -> None:
    """Write rows of any tables."""
    for _, own in itertools.groupby(sorted(rows, key=table_of), key=table_of):
        write_rows(list(own), folder)


def _key(row: AnyRow) -> tuple:
    name = table_of(row)
    return (name, *(getattr(row, column) for column in TABLES[name].key))


def _rows_of(workload: Workload) -> list[AnyRow]:
    if workload.random_tokens:
        return _random_rows(workload)
    rows: list[AnyRow] = []
    for stage in workload.stages:
        if stage in OBSERVED:
            rows += MADE_UP[stage](workload)
            continue
        for variant, method, (place, provider) in itertools.product(
            workload.variants(),
            workload.methods(stage),
            enumerate(("tilelang", *(BASELINES.get(stage) or workload.dense_baselines))),
        ):
            has_others = method == "dense" or stage in BASELINES and traffic.label_size(method)
            if place > 0 and not has_others:
                continue
            slowness = 1.02 + 0.3 * (place == 3) if stage == "dense" else 1.25
            work = variant.work(method)
            rows.append(make_row(variant, stage, method, provider, work, slowness))
    return rows


def _random_rows(workload: Workload) -> list[Row]:
    rows = []
    for variant, provider in itertools.product(workload.variants(), ("tilelang", "flashinfer")):
        kept = variant.shape.batch_size * sum(variant.head_counts())
        work = variant.work("random", kept_tokens=kept)
        slowness = 1.25 if provider == "tilelang" else 1.5
        slowness += 0.2 * (len(variant.head_budgets) > 1)
        rows.append(make_row(variant, "attention", "random", provider, work, slowness))
    return rows


def _accuracy_rows(workload: Workload) -> list[AccuracyRow]:
    """Masses from p, a part lost to coarse estimates and to the selector."""
    lost = {"2": 0.12, "3": 0.04, "4": 0.01, "8": 0.001, "exact": 0.0}
    return [
        AccuracyRow(
            **variant.labels(method, "h200"),
            bits=bits,
            num_requests=4,
            kept_mean=workload.kept_mean * variant.top_p**4,
            kept_min=1,
            kept_max=4 * workload.kept_mean,
            kept_mass=variant.top_p,
            captured_mean=variant.top_p - lost[bits] - 0.03 * (method != "full+twilight"),
            captured_min=variant.top_p - 0.2,
            error=1 - variant.top_p + lost[bits],
            **ORIGIN,
        )
        for method, bits, variant in itertools.product(
            accuracy.METHODS, accuracy.BITS, workload.variants()
        )
    ]


def _kept_rows(workload: Workload) -> list[KeptRow]:
    heads = workload.shape.num_kv_heads
    means = [workload.kept_mean * LAYER_BUDGETS[head] / 565 for head in range(heads)]
    shares = (0.5, 0.8, 1.0, 1.2, 2.0)
    names = ("kept_min", "kept_p20", "kept_median", "kept_p80", "kept_max")
    return [
        KeptRow(
            **workload.labels("quest+twilight", "h200"),
            kv_head=kv_head,
            kept_mean=mean,
            **{name: share * mean for name, share in zip(names, shares, strict=True)},
            **ORIGIN,
        )
        for kv_head, mean in enumerate(means)
    ]


def _memory_rows(workload: Workload) -> list[MemoryRow]:
    head_dim, page_size = workload.shape.head_dim, workload.shape.page_size
    sizes = (2 * head_dim, 2 * head_dim, head_dim / 2, 4, 2 * head_dim / page_size, 8 / page_size)
    others = {} if workload.model is None else {"weights": head_dim}
    if workload.method == SIGNS:
        sign_sizes = (head_dim / 8, 2, head_dim / page_size, 4 / page_size)
        others = dict(zip(SIGN_PARTS, sign_sizes, strict=True))
    return [
        MemoryRow(
            **workload.labels(workload.method, "h200"),
            part=part,
            bytes_per_token=size,
            share=size / (4 * head_dim),
            **ORIGIN,
        )
        for part, size in (dict(zip(PARTS, sizes, strict=True)) | others).items()
    ]


def _timeline_rows(workload: Workload) -> list[TimelineRow]:
    method = workload.method
    launches = {"selector": 2, "estimator": 1, "pruner": 1, "attention": 2}
    busy = {
        stage: 1.2e-6 * traffic.bytes_moved(stage, method, workload.work(method)) / READ_TBPS
        for stage in launches
    }
    gaps = {stage: 1.5 * count for stage, count in launches.items()}
    totals = [sum(own.values()) for own in (launches, busy, gaps)]
    every = [(stage, launches[stage], busy[stage], gaps[stage]) for stage in launches]
    return [
        TimelineRow(
            **workload.labels(method, "h200"),
            timeline="graph",
            stage=stage,
            launches=float(count),
            busy_us=busy_us,
            gap_us=gap_us,
            num_steps=11,
            **ORIGIN,
        )
        for stage, count, busy_us, gap_us in (*every, ("pipeline", *totals))
    ]


MADE_UP = {
    "accuracy": _accuracy_rows,
    "kept": _kept_rows,
    "memory": _memory_rows,
    "timeline": _timeline_rows,
}
