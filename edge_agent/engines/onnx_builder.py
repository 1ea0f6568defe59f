"""From a model to an ONNX folder: a graph in float32 first, then the ones that draft.

`onnx_activations` sees how large its numbers get. `onnx_quantize` makes its weights small for drafting, `onnx_prefill`
adds a second graph that reads prompts, `onnx_first_token` what their first token leaves in the cache.

Of a GGUF file of a Llama or a Qwen `onnx_llama` writes the float32 graph, with what an edge has installed. Of any
other model onnxruntime-genai's builder does. It wants a Hugging Face folder; of a GGUF file one is made, its weights
dequantized by transformers. That takes torch, transformers and the builder, here only: not where the result drafts.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_agent.engines.onnx_activations import FullGraph, watch
from edge_agent.engines.onnx_first_token import write_first_tokens
from edge_agent.engines.onnx_folder import MODEL_FILE
from edge_agent.engines.onnx_llama import can_write_llama, write_llama
from edge_agent.engines.onnx_prefill import write_prefill
from edge_agent.engines.onnx_quantize import quantize_graph
from shared.engine import EngineError
from shared.runtimes.gguf_file import GgufFile
from shared.runtimes.hub import cached_copy, default_cache_dir
from shared.runtimes.huggingface import VOCABULARY_FILE, Progress, convert_gguf, no_progress

_BUILDER = "onnxruntime_genai.models.builder"
_EDGE_NEEDS = ("gguf", "onnx", "onnxruntime", "tokenizers")
_BUILDER_NEEDS = ("accelerate", "onnx_ir", "onnxruntime_genai", "safetensors", "torch", "transformers")
# Gate and up projection in one, where the model has them apart: 0.6 ms of 10 for SmolLM2.
_OPTIONS = (("--extra_options", "fuse_mlp_gate_up=true"), ())
_CONVERSION = "onnx-11"  # counts up whenever the same model would give another folder
_COPIED = ("genai_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", VOCABULARY_FILE)


def with_onnx(model: Path, cache_dir: Path) -> Path:
    """The model as an ONNX folder with small weights, which `cache_dir` keeps; made first where it is not there yet.

    It appears at once when it is complete. Raises `EngineError`.
    """
    folder = cached_copy(model, cache_dir, _CONVERSION)
    if folder.is_dir():
        return folder
    from filelock import FileLock

    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=cache_dir) as work:
                small, _ = build(model, Path(work), no_progress)
                small.rename(folder)
    return folder


def build(model: Path, work: Path, progress: Progress) -> tuple[Path, Path]:
    """Make ONNX folders of a GGUF file or a Hugging Face folder inside `work`: with small weights, and in float32.

    Raises `EngineError`.
    """
    _check_packages(_EDGE_NEEDS, "edge-onnx")
    full, small = work / "float32", work / "small"
    progress("building the graph", None)
    if model.is_file() and can_write_llama(file := GgufFile(model)):
        write_llama(file, full)
    else:
        _build_any(model, full, work, progress)
    progress("watching it read", None)
    small.mkdir()
    graph = FullGraph(full)
    activations = watch(graph)
    write_first_tokens(graph, small)
    del graph
    quantize_graph(
        full / MODEL_FILE, small / MODEL_FILE, activations, lambda done: progress("making the weights small", done)
    )
    progress("making the graph that reads prompts", None)
    write_prefill(full, small, activations)
    for name in _COPIED:
        if (full / name).is_file():
            shutil.copy(full / name, small)
    return small, full


def is_installed() -> bool:
    """Whether the packages are here that make an ONNX folder of a GGUF file of such a model, and run it."""
    return not any(map(_is_missing, _EDGE_NEEDS))


def can_be_onnx(file: Path, cache_dir: Path) -> bool:
    """Whether `with_onnx` has a folder of this GGUF file, or makes one with what `is_installed` asks for."""
    return cached_copy(file, cache_dir, _CONVERSION).is_dir() or can_write_llama(GgufFile(file))


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _check_packages(names: tuple[str, ...], extra: str) -> None:
    missing = next(filter(_is_missing, names), None)
    if missing is not None:
        raise EngineError(f"making an ONNX model of this one needs {missing!r}; install it with: "
                          f"pip install 'outrider[{extra}]', here or where you run edge-agent prepare; "
                          "or let llama.cpp draft: pip install 'outrider[edge]'")  # fmt: skip


def _build_any(model: Path, full: Path, work: Path, progress: Progress) -> None:
    """The float32 folder by onnxruntime-genai's builder."""
    _check_packages(_BUILDER_NEEDS, "prepare")
    source = model if model.is_dir() else _from_gguf(model, work / "source", progress)
    progress("building the graph", None)
    _run_builder(source, full, work)
    if (source / VOCABULARY_FILE).is_file():
        shutil.copy(source / VOCABULARY_FILE, full)


def _from_gguf(file: Path, folder: Path, progress: Progress) -> Path:
    """A Hugging Face folder as the builder wants it: the converted copy, its architecture named, and a tokenizer."""
    copy = convert_gguf(file, default_cache_dir(), progress)
    progress("converting the tokenizer", None)
    from transformers import AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    except (ImportError, OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise EngineError(f"{file}: transformers cannot read its tokenizer ({reason}); name its HF folder") from error
    for path in copy.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _run_builder(source: Path, destination: Path, work: Path) -> None:
    """In a process of its own: it prints, and it imports its parts by names that could be anybody's."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        _BUILDER,
        "-i",
        source,
        "-o",
        destination,
        "-p",
        "fp32",
        "-e",
        "cpu",
    ]
    complaint = ""
    for options in _OPTIONS:
        shutil.rmtree(destination, ignore_errors=True)
        done = subprocess.run(  # noqa: S603 # our own interpreter on our own folders
            [*command, "-c", work / "cache", *options],
            env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return
        lines = done.stderr.strip().splitlines()
        complaint = complaint or (lines[-1] if lines else f"exit code {done.returncode}")
    raise EngineError(f"{source}: onnxruntime-genai's builder failed: {complaint}")
