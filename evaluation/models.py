"""A model's folder, loaded for a back end; nothing is downloaded."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .configurations import Configuration
from .decode import Engine
from .torch_engine import OBSERVED, TorchEngine
from .upstream import Upstream

PAGE_SIZE = 16  # where no configuration names one
BACK_ENDS = ("kernels", "torch", "exact_upstream")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder.

    Raises:
        ValueError: it is no folder of a model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: expected a folder with config.json, got {folder}")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model, on the GPU where there is one."""
    options = {"dtype": DTYPES[dtype], "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def load_engine(
    folder: Path,
    back_end: str,
    dtype: str,
    configurations: Iterable[Configuration],
    top_p_start: str = "first_token",
    measure_every: int = 1,
    rooms: int = 1,
) -> Engine:
    """The model, on the GPU where there is one, in what decodes with it.

    Args:
        top_p_start: of exact_upstream.
        measure_every, rooms: of the kernels.

    Raises:
        ValueError: the back end needs a GPU or another dtype.
        NotImplementedError: it does not run one of the configurations.
    """
    every = list(configurations)
    sizes = (each.page_size for each in every)
    page_size = next(filter(None, sizes), PAGE_SIZE)
    on_gpu = torch.cuda.is_available()
    if back_end == "kernels" and not on_gpu:
        raise ValueError("--back-end: 'kernels' needs a GPU; expected 'torch' or 'exact_upstream'")
    if back_end == "kernels" and dtype == "fp32":
        raise ValueError("--dtype: the kernels take 'bf16' or 'fp16', got 'fp32'")
    if back_end == "exact_upstream" and any(e.config.selector.type == "signs" for e in every):
        raise NotImplementedError(
            "selector.type: the original has no 'signs'; --back-end kernels or torch runs it"
        )
    if back_end == "kernels":
        from .kernel_engine import KernelEngine, decode_options  # plain PyTorch needs no kernels

        for each in every:
            decode_options(each, page_size)
    model = load_model(folder, dtype)
    if back_end == "kernels":
        return KernelEngine(model, page_size, measure_every, rooms)
    compressors = (each.config.compressor.arguments for each in every)
    observed = max((each["window_size"] for each in compressors if each), default=OBSERVED)
    if back_end == "torch":
        return TorchEngine(model, page_size=page_size, observed=observed)
    chooser = Upstream(top_p_start).choose
    return TorchEngine(model, chooser, page_size, model_dtype=True, observed=observed)


def default_dtype(task: str) -> str:
    """The original's: fp16 for the passkey, else bf16; fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "fp32"
    return "fp16" if task == "passkey" else "bf16"


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the tokenizer's, as in the original."""
    return {tokenizer.eos_token_id} - {None}
