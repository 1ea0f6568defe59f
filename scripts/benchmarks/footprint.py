"""What an ONNX edge needs on a device: installed into a clean environment, made to answer, and weighed.

Wheels only, so no compiler; and the environment is looked through for torch, which an edge must not need. It is given
the draft's GGUF file and no settings: it makes the ONNX folder by itself.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.processes import BenchError, machine
from edge_agent.config import load_edge_config
from shared.runtimes.hub import resolve_model

EXTRA = "edge-onnx"
_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("pyproject.toml", "constraints.txt", "README.md", "edge_agent", "cloud_verifier", "shared")
_TOOLS = ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources")  # the environment's own
_LARGEST = 6
_MAX_NEW_TOKENS = 24


def footprint(progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `bench footprint`. Raises `BenchError` where a step fails."""
    draft = resolve_model(load_edge_config(environ=os.environ, overrides={}).draft.model, "draft.model")
    with tempfile.TemporaryDirectory(prefix="outrider-") as work:
        source, environment = Path(work, "source"), Path(work, "environment")
        source.mkdir()
        for name in _SOURCES:
            copy = shutil.copytree if (_ROOT / name).is_dir() else shutil.copy
            copy(_ROOT / name, source / name)
        _run([sys.executable, "-m", "venv", environment], {})
        python = environment / "bin" / "python"
        progress(f"installing .[{EXTRA}] into a clean environment")
        began = time.monotonic()
        pip: list[str | Path] = [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        _run([*pip, "--only-binary=:all:", "-c", source / "constraints.txt", f"{source}[{EXTRA}]"], {})
        install_s = time.monotonic() - began
        settings = {"OUTRIDER_EDGE_DRAFT__MODEL": str(draft), "XDG_CACHE_HOME": str(Path(work, "cache"))}
        progress("answering, the first time")
        began = time.monotonic()
        _answer(environment / "bin" / "edge-agent", settings)
        first_s = time.monotonic() - began
        progress("answering again")
        answer, statistics = _answer(environment / "bin" / "edge-agent", settings)
        model_mb = _megabytes(Path(work, "cache"))
        packages = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], {}).strip())
        sizes = {path.name: _megabytes(path) for path in packages.iterdir() if not path.name.startswith(_TOOLS)}
        imports_torch = _ran([python, "-c", "import torch"], {}).returncode == 0
    largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:_LARGEST]
    return {
        "extra": EXTRA,
        "installed_mb": round(sum(sizes.values()), 1),
        "largest_mb": {name: round(sizes[name], 1) for name in largest},
        "model_mb": round(model_mb, 1),
        "install_s": round(install_s, 1),
        "first_answer_s": round(first_s, 1),
        "imports_torch": imports_torch,
        "answer": answer,
        "local_tpot_ms": statistics["tpot_ms"],
        **machine(0, "onnxruntime"),
    }


def _answer(agent: Path, settings: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """What the installed agent says without a verifier, and its statistics."""
    tokens = ["--max-new-tokens", str(_MAX_NEW_TOKENS)]
    printed = _run([agent, "run", "Why is the sky blue?", "--local", "--json", *tokens], settings)
    lines = [json.loads(line) for line in printed.splitlines()]
    text = "".join(piece for line in lines for piece in line.get("text", ()))
    return text, lines[-1]


def _run(command: list[str | Path], variables: Mapping[str, str]) -> str:
    done = _ran(command, variables)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BenchError(f"{Path(command[0]).name} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


def _ran(command: list[str | Path], variables: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Outside of this project and its environment."""
    environ = {**os.environ, "PYTHONPATH": "", **variables}
    return subprocess.run(
        command, env=environ, cwd=Path(command[0]).parent, capture_output=True, text=True, check=False
    )


def _megabytes(path: Path) -> float:
    """10^6 bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
