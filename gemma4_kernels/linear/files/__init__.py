"""Whole files of weights: what is in them, and one QuantizedWeight at a time.

A file from elsewhere may be damaged or made to do harm. Every number in it is compared with the size of the file before it
is used, nothing in it is run, and each fault is one WeightFileError that names the file and the tensor.
"""

from __future__ import annotations

import os
from pathlib import Path

from gemma4_kernels.checks import FormatError, WeightFileError
from gemma4_kernels.linear.files.gguf import open_gguf
from gemma4_kernels.linear.files.listing import TensorInfo, WeightFiles
from gemma4_kernels.linear.files.safetensors import open_safetensors
from gemma4_kernels.linear.files.stores import is_name, locate

__all__ = ["TensorInfo", "WeightFiles", "open_weights"]

OLD = {b"ggml", b"ggmf", b"ggjt", b"lmgg", b"fmgg", b"tjgg"}
"""The magic numbers of ggml's files before GGUF, in either order of bytes."""


def open_weights(path: str | os.PathLike[str]) -> WeightFiles:
    """Open a model's weights: reads headers only.

    Args:
        path: a GGUF file (one shard stands for all), a safetensors file, a folder of safetensors files or with one GGUF
            file; or a model that another program has downloaded, "ollama:gemma4:12b" or "lmstudio:publisher/model".
    Returns: WeightFiles: `.tensors` lists them with scheme, shape and bytes, `.load(name)` reads one, `.weights()` yields
        all quantised ones, one at a time. Memory holds one tensor beside what the caller keeps.
    Raises: WeightFileError for a file that is damaged, is no file of weights or is not there; FormatError for a format
        that is known and not read; OSError where the system refuses to read.
    """
    if isinstance(path, str) and is_name(path):
        path = locate(path)
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: is neither a file nor a folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return open_gguf(path)
    if magic in OLD:
        raise FormatError(f"{path}: is a file of ggml from before GGUF; use a GGUF file of the same model")
    return open_safetensors(path)


def _open_folder(path: Path) -> WeightFiles:
    if any(path.glob("*.safetensors")):
        return open_safetensors(path)
    # The projector for images lies beside a model, and the later shards of a split model after its first.
    models = [
        file
        for file in sorted(path.glob("*.gguf"))
        if "mmproj" not in file.name and ("-of-" not in file.name or "-00001-of-" in file.name)
    ]
    if len(models) == 1:
        return open_gguf(models[0])
    if models:
        names = ", ".join(file.name for file in models[:20])
        raise WeightFileError(f"{path}: holds {len(models)} GGUF models; name one of {names}")
    if any(path.glob("*.bin")) or any(path.glob("*.pt")):
        raise FormatError(f"{path}: holds pickles (.bin, .pt), which are never loaded; use safetensors or GGUF")
    raise WeightFileError(f"{path}: holds no .gguf or .safetensors file")
