"""Models that Ollama or LM Studio have downloaded already, found by the names that those programs use.

    ollama:gemma4:12b                         <models>/manifests/registry.ollama.ai/library/gemma4/12b
    ollama:someone/model:tag                  <models>/manifests/registry.ollama.ai/someone/model/tag
    ollama:hf.co/someone/model:Q4_0           <models>/manifests/hf.co/someone/model/Q4_0
    lmstudio:publisher/model                  <models>/publisher/model/, a folder with a GGUF file or safetensors
    lmstudio:publisher/model/file.gguf        one file of it

A manifest of Ollama is JSON that names the model's blob by its digest: <models>/blobs/sha256-<digest>, a GGUF file.
"""

from __future__ import annotations

import re
from pathlib import Path

from gemma4_kernels import environment
from gemma4_kernels.checks import FormatError, WeightFileError
from gemma4_kernels.linear import safetensors_file

# A part of a name: no separators and no leading dot, so that it cannot lead out of its folder.
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:+@ -]*")
DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
MODEL_LAYER = "application/vnd.ollama.image.model"
SHOWN = 20
"""Names that a message lists at most."""


def locate(name: str) -> Path:
    """The file or folder that "ollama:..." or "lmstudio:..." means. Raises WeightFileError, FormatError."""
    store, _, rest = name.partition(":")
    return {"ollama": _ollama, "lmstudio": _lmstudio}[store](rest)


def is_name(path: str) -> bool:
    return path.startswith(("ollama:", "lmstudio:"))


# Ollama -------------------------------------------------------------------------------------------------------------


def _ollama(name: str) -> Path:
    *leading, last = name.split("/")
    model, _, tag = last.partition(":")
    # [host/][namespace/]model[:tag], filled up as Ollama does it
    host, namespace, *excess = ["registry.ollama.ai", "library"][: max(0, 2 - len(leading))] + leading
    parts = (host, namespace, model, tag or "latest")
    if excess or not all(PART.fullmatch(part) for part in parts):
        raise WeightFileError(f"ollama:{name}: must look like ollama:model:tag or ollama:host/namespace/model:tag")
    folders = _ollama_folders()
    for folder in folders:
        manifest = folder.joinpath("manifests", *parts)
        if manifest.is_file():
            return _ollama_blob(folder, manifest)
    looked = ", ".join(map(str, folders))
    raise WeightFileError(f"ollama:{name}: is not in {looked}{_listed(_ollama_models(folders), 'ollama:')}")


def _ollama_folders() -> list[Path]:
    """Where Ollama keeps its models: OLLAMA_MODELS, or the user's home and those of the service on Linux."""
    chosen = environment.ollama_models()
    if chosen is not None:
        return [chosen]
    homes = (Path.home(), Path("/usr/share/ollama"), Path("/var/lib/ollama"))
    return [home / ".ollama" / "models" for home in homes]


def _ollama_blob(folder: Path, manifest: Path) -> Path:
    layers = safetensors_file.read_json(manifest).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise WeightFileError(f"{manifest}: layers must be a list of objects")
    digests = [layer.get("digest") for layer in layers if layer.get("mediaType") == MODEL_LAYER]
    if not digests:
        raise FormatError(f"{manifest}: has no GGUF model ({MODEL_LAYER}); pull a GGUF tag of the model")
    match = DIGEST.fullmatch(str(digests[0]))
    if not match:
        raise WeightFileError(
            f"{manifest}: digest must be sha256 and 64 hexadecimal digits, got {str(digests[0])[:80]!r}"
        )
    blob = folder / "blobs" / f"sha256-{match[1]}"
    if not blob.is_file():
        raise WeightFileError(f"{manifest}: names {blob.name}, which is not in {blob.parent}: pull the model again")
    return blob


def _ollama_models(folders: list[Path]) -> list[str]:
    names = []
    for folder in folders:
        root = folder / "manifests"
        for manifest in _sorted(root, "*/*/*/*"):
            host, namespace, model, tag = manifest.relative_to(root).parts
            where = [] if host == "registry.ollama.ai" else [host]
            where += [] if namespace == "library" and not where else [namespace]
            names.append("/".join([*where, f"{model}:{tag}"]))
    return names


# LM Studio ----------------------------------------------------------------------------------------------------------


def _lmstudio(name: str) -> Path:
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(PART.fullmatch(part) for part in parts):
        raise WeightFileError(
            f"lmstudio:{name}: must look like lmstudio:publisher/model or lmstudio:publisher/model/file"
        )
    folders = _lmstudio_folders()
    for folder in folders:
        if folder.joinpath(*parts).exists():
            return folder.joinpath(*parts)
    names = [
        "/".join(found.relative_to(folder).parts) for folder in folders for found in _sorted(folder, "*/*") if found.is_dir()
    ]  # fmt: skip
    looked = ", ".join(map(str, folders))
    raise WeightFileError(f"lmstudio:{name}: is not in {looked}{_listed(names, 'lmstudio:')}")


def _lmstudio_folders() -> list[Path]:
    """The folder for downloads that its settings name, the default one, and that of older versions."""
    home = Path.home()
    own = home / ".lmstudio"
    pointer = home / ".lmstudio-home-pointer"
    if pointer.is_file():
        with pointer.open("rb") as file:
            named = file.read(4096).decode(errors="replace").strip()
        if named and "\0" not in named:
            own = Path(named)
    folders = [own / "models", home / ".cache" / "lm-studio" / "models"]
    settings = own / "settings.json"
    if settings.is_file():
        try:
            downloads = safetensors_file.read_json(settings).get("downloadsFolder")
        except WeightFileError:
            downloads = None  # another program's file; what it says is a help, not a need
        if isinstance(downloads, str) and downloads and "\0" not in downloads:
            folders.insert(0, Path(downloads))
    return folders


def _sorted(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _listed(names: list[str], prefix: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; there are {', '.join(prefix + name for name in names[:SHOWN])}{more}"
