"""Writes the files that kernels/tuned.py reads: sorted, so that a change shows as what it is."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from twilight_tilelang.kernels.tuned import CONFIGS, Bucket, Configs, Entry, read_configs


def path_of(gpu: str, folder: Path = CONFIGS) -> Path:
    """Where the configs of a GPU are kept."""
    return folder / f"{gpu}.json"


def open_configs(gpu: str, arch: str, folder: Path = CONFIGS) -> Configs:
    """What is stored for a GPU, or nothing yet."""
    path = path_of(gpu, folder)
    return read_configs(path) if path.exists() else Configs(gpu, arch, {})


def with_entry(configs: Configs, kernel: str, bucket: Bucket, entry: Entry) -> Configs:
    """The same with one entry added or replaced."""
    own = {**configs.entries.get(kernel, {}), bucket: entry}
    return replace(configs, entries={**configs.entries, kernel: own})


def write_configs(configs: Configs, folder: Path = CONFIGS) -> Path:
    """Write the file of a GPU at once or not at all."""
    kernels = {
        kernel: {str(bucket): asdict(own[bucket]) for bucket in sorted(own)}
        for kernel, own in sorted(configs.entries.items())
    }
    data = {"arch": configs.arch, "gpu": configs.gpu, "kernels": kernels}
    path = path_of(configs.gpu, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(partial, path)
    return path
