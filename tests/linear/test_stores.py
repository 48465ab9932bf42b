"""Models that Ollama and LM Studio have downloaded are found by their names, and by nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from weight_files import small_gguf

from gemma4_kernels import FormatError, WeightFileError, open_weights

DIGEST = "ab" * 32
MODEL = "application/vnd.ollama.image.model"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    return tmp_path


def ollama_model(models: Path, name: str, layers: object = None, digest: str = f"sha256:{DIGEST}") -> Path:
    manifest = models / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    if layers is None:
        layers = [
            {"mediaType": "application/vnd.ollama.image.license", "digest": "x"},
            {"mediaType": MODEL, "digest": digest},
        ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = models / "blobs" / f"sha256-{DIGEST}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(small_gguf())
    return blob


@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("gemma4:12b", "registry.ollama.ai/library/gemma4/12b"),
        ("gemma4", "registry.ollama.ai/library/gemma4/latest"),
        ("someone/gemma4:12b-it-qat", "registry.ollama.ai/someone/gemma4/12b-it-qat"),
        ("hf.co/someone/gemma-4-12b-GGUF:Q4_0", "hf.co/someone/gemma-4-12b-GGUF/Q4_0"),
    ],
)
def test_ollama_models_are_found_by_their_names(home, name, manifest):
    blob = ollama_model(home / ".ollama" / "models", manifest)
    files = open_weights(f"ollama:{name}")
    assert files.path == blob
    assert files.tensors["token_embd.weight"].scheme == "Q6_K"


def test_ollama_models_names_the_only_folder_that_is_looked_at(home, monkeypatch):
    ollama_model(home / ".ollama" / "models", "registry.ollama.ai/library/gemma4/12b")
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    with pytest.raises(WeightFileError, match=r"ollama:gemma4:12b: is not in .*elsewhere$"):
        open_weights("ollama:gemma4:12b")
    blob = ollama_model(home / "elsewhere", "registry.ollama.ai/library/gemma4/12b")
    assert open_weights("ollama:gemma4:12b").path == blob


def test_a_model_that_is_not_there_is_answered_with_those_that_are(home):
    ollama_model(home / ".ollama" / "models", "registry.ollama.ai/library/gemma3/270m")
    ollama_model(home / ".ollama" / "models", "hf.co/someone/model/Q4_0")
    with pytest.raises(WeightFileError, match=r"there are ollama:hf\.co/someone/model:Q4_0, ollama:gemma3:270m"):
        open_weights("ollama:gemma4:12b")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "google/..",
        "../../etc/passwd",
        "a/b/c/d:e",
        "m:../../x",
        "/etc/passwd",
        "a//b",
        "x\\..\\y",
        "a\0b",
    ],
)
def test_names_cannot_lead_out_of_the_folder(home, name):
    lmstudio_model(home / ".lmstudio" / "models", "google/gemma", "a.gguf")
    ollama_model(home / ".ollama" / "models", "registry.ollama.ai/library/m/latest")
    for store in ("ollama", "lmstudio"):
        with pytest.raises(WeightFileError, match=rf"{store}:.*must look like"):
            open_weights(f"{store}:{name}")


@pytest.mark.parametrize("digest", ["sha256:../../../x", "sha256:" + "g" * 64, "md5:" + DIGEST, "", 3])
def test_a_digest_is_a_digest(home, digest):
    ollama_model(home / ".ollama" / "models", "registry.ollama.ai/library/m/latest", digest=digest)
    with pytest.raises(WeightFileError, match="digest must be sha256 and 64 hexadecimal digits"):
        open_weights("ollama:m")


def test_broken_manifests_are_named(home):
    models = home / ".ollama" / "models"
    for layers in ("x", [3], {"a": 1}):
        ollama_model(models, "registry.ollama.ai/library/m/latest", layers=layers)
        with pytest.raises(WeightFileError, match="layers must be a list of objects"):
            open_weights("ollama:m")
    ollama_model(models, "registry.ollama.ai/library/m/latest", layers=[{"mediaType": "other"}])
    with pytest.raises(FormatError, match="has no GGUF model"):
        open_weights("ollama:m")
    ollama_model(models, "registry.ollama.ai/library/m/latest").unlink()
    with pytest.raises(WeightFileError, match="pull the model again"):
        open_weights("ollama:m")
    (models / "manifests/registry.ollama.ai/library/m/latest").write_bytes(b"[" * 5000)
    with pytest.raises(WeightFileError, match="is not JSON"):
        open_weights("ollama:m")


def lmstudio_model(models: Path, name: str, *files: str) -> Path:
    folder = models / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes(small_gguf())
    return folder


def test_lm_studio_models_are_found_in_each_folder_it_may_use(home):
    folder = lmstudio_model(home / ".lmstudio" / "models", "google/gemma-a", "a-Q4_0.gguf", "mmproj-a.gguf")
    assert open_weights("lmstudio:google/gemma-a").path == folder / "a-Q4_0.gguf"
    assert open_weights("lmstudio:google/gemma-a/mmproj-a.gguf").path == folder / "mmproj-a.gguf"
    folder = lmstudio_model(home / ".cache" / "lm-studio" / "models", "google/gemma-b", "b.gguf")
    assert open_weights("lmstudio:google/gemma-b").path == folder / "b.gguf"
    folder = lmstudio_model(home / "disk", "google/gemma-c", "c.gguf")
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "disk")}))
    assert open_weights("lmstudio:google/gemma-c").path == folder / "c.gguf"
    folder = lmstudio_model(home / "moved" / "models", "google/gemma-d", "d.gguf")
    (home / ".lmstudio-home-pointer").write_text(f"{home / 'moved'}\n")
    assert open_weights("lmstudio:google/gemma-d").path == folder / "d.gguf"


def test_several_models_in_a_folder_are_named(home):
    lmstudio_model(home / ".lmstudio" / "models", "google/gemma", "a-Q4_0.gguf", "a-Q8_0.gguf")
    with pytest.raises(WeightFileError, match=r"holds 2 GGUF models; name one of a-Q4_0\.gguf, a-Q8_0\.gguf"):
        open_weights("lmstudio:google/gemma")
    with pytest.raises(WeightFileError, match="there are lmstudio:google/gemma"):
        open_weights("lmstudio:google/gemma4")


def test_settings_of_lm_studio_that_cannot_be_read_do_no_harm(home):
    folder = lmstudio_model(home / ".lmstudio" / "models", "google/gemma", "a.gguf")
    for settings in (b"{", b"\xff", b'{"downloadsFolder": 3}', b'{"downloadsFolder": "a\\u0000b"}'):
        (home / ".lmstudio" / "settings.json").write_bytes(settings)
        (home / ".lmstudio-home-pointer").write_bytes(b"" if settings == b"{" else bytes(9))
        assert open_weights("lmstudio:google/gemma").path == folder / "a.gguf"
