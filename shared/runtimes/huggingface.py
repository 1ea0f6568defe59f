"""Causal language models in Hugging Face's formats: weights for torch, and what a model's token ids mean.

A GGUF file is converted once (float32, dequantized by transformers) and kept in a cache folder, because that takes some
20 s and a start from the copy about two. torch and transformers are imported only where a model is loaded.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.engine import EngineError
from shared.runtimes.gguf_file import GgufFile
from shared.runtimes.hub import cached_copy, check_is_gguf, default_cache_dir
from shared.vocabulary import Vocabulary, token_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Progress = Callable[[str, float | None], None]
"""Told the stage (a few words for people) and how much of it is done, 0 to 1, or None where that is not known."""

# Their attention goes through transformers' attention interface, and nothing else in them keeps a cache or depends on
# the other rows of a forward; `tests/models/test_torch_target.py` holds each against plain transformers.
SUPPORTED_ARCHITECTURES = ("gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
_ROPE_BY_LENGTH = ("dynamic", "longrope")

VOCABULARY_FILE = "outrider_vocabulary.json"
_CONVERSION = "1"  # change it when converted copies change


@dataclass(frozen=True, slots=True)
class CausalLM:
    """A loaded model, on the CPU, in evaluation mode, and what its ids mean."""

    name: str
    model: "PreTrainedModel"
    vocabulary: Vocabulary
    stop_ids: frozenset[int]
    max_context: int


def load_causal_lm(
    path: Path, dtype: str = "float32", cache_dir: Path | None = None, progress: Progress | None = None
) -> CausalLM:
    """Load a GGUF file, or a folder with config.json, safetensors and tokenizer.json, in `dtype` (a torch name).

    The copy of a GGUF file is kept in `cache_dir` (default `default_cache_dir()`). Raises `EngineError` for what is not
    there, damaged, or of an architecture that packed rows are not known to work with.
    """
    report = progress or no_progress
    folder = path if path.is_dir() else convert_gguf(path, cache_dir or default_cache_dir(), report)
    vocabulary, stop_ids = read_vocabulary(folder)
    report("loading the weights", None)
    with _transformers_errors(path):
        model = _from_pretrained(folder, dtype)
    return CausalLM(path.name, model.eval(), vocabulary, stop_ids, model.config.max_position_embeddings)


def convert_gguf(path: Path, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The folder in `cache_dir` with this GGUF file in safetensors, made first where it is not there yet.

    The copy belongs to the file's name, size and modification time. It appears at once when it is complete: what a
    killed conversion left behind is cleared by the next, and two processes do not convert at the same time. Raises
    `EngineError`.
    """
    if path.suffix != ".gguf" or not path.is_file():
        raise EngineError(f"{path}: not a model; give a GGUF file or a folder with config.json and safetensors")
    check_is_gguf(path)
    folder = cached_copy(path, cache_dir, _CONVERSION)
    if folder.is_dir():
        return folder
    report = progress or no_progress
    report(f"converting {path.name}, once", None)
    with _transformers_errors(path):
        from filelock import FileLock

        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                _convert(path, partial, report)
                partial.rename(folder)
    return folder


def read_vocabulary(folder: Path) -> tuple[Vocabulary, frozenset[int]]:
    """The bytes of each token id, and the ids that end a text, of a converted copy or a Hugging Face folder.

    Raises `EngineError` with the name of the file that is not there or damaged.
    """
    converted, tokenizer = folder / VOCABULARY_FILE, folder / "tokenizer.json"
    if converted.is_file():
        with _parsing(converted):
            stored = json.loads(converted.read_text())
            return Vocabulary(tuple(text.encode("latin-1") for text in stored["tokens"])), frozenset(stored["stop_ids"])
    if not tokenizer.is_file():
        raise EngineError(
            f"{folder}: no tokenizer.json; write one with AutoTokenizer.from_pretrained(...).save_pretrained"
        )
    with _parsing(tokenizer):
        vocabulary = _tokenizer_vocabulary(json.loads(tokenizer.read_text(encoding="utf-8")))
    stop_ids: set[int] = set()
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            with _parsing(file):
                eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
                stop_ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return vocabulary, frozenset(stop_ids)


def write_vocabulary(folder: Path, vocabulary: Vocabulary, stop_ids: frozenset[int]) -> None:
    """Write what `read_vocabulary` reads into a folder made of a GGUF file."""
    texts = [token.decode("latin-1") for token in vocabulary.tokens]
    (folder / VOCABULARY_FILE).write_text(json.dumps({"tokens": texts, "stop_ids": sorted(stop_ids)}))


def refusal(config: "PretrainedConfig") -> str:
    """Why a model of this configuration cannot be the torch target, in a few words; empty where it can."""
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        return f"architecture {config.model_type!r} is not one of {', '.join(SUPPORTED_ARCHITECTURES)}"
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if layer_types != {"full_attention"} or (window and window < config.max_position_embeddings):
        return "it attends through a sliding window, whose cache cannot be rolled back"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _ROPE_BY_LENGTH:
        return f"{rope_type!r} position embeddings depend on the longest row, so a token would depend on its neighbours"
    return ""


@contextlib.contextmanager
def _parsing(file: Path) -> Iterator[None]:
    """Whatever text that is not JSON, or JSON of another shape, makes its reader raise, as `EngineError`."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EngineError(f"{file}: damaged or of an unknown kind ({reason}); fetch the model again") from error


def _tokenizer_vocabulary(tokenizer: dict[str, Any]) -> Vocabulary:
    """From a parsed tokenizer.json. Added tokens are literal text and overrule the model's table."""
    table = tokenizer["model"]["vocab"]
    # BPE and WordPiece hold {text: id}, Unigram [[text, score], ...].
    pairs = (
        ((token, text) for text, token in table.items()) if isinstance(table, dict) else enumerate(t for t, _ in table)
    )
    texts: dict[int, str] = dict(pairs)
    texts |= {added["id"]: added["content"] for added in tokenizer.get("added_tokens") or ()}
    # The post-processor also has a type of that name in tokenizers that are not byte-level.
    steps = json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")], separators=(",", ":"))
    byte_level = '"type":"ByteLevel"' in steps
    size = max(texts, default=-1) + 1
    return Vocabulary(tuple(token_bytes(texts[token], byte_level) if token in texts else b"" for token in range(size)))


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    """Write the model of a GGUF file, in float32, and its vocabulary into an empty folder."""
    from safetensors.torch import save_model

    file = GgufFile(path)
    vocabulary = file.vocabulary  # before the weights, in case it is of an unknown kind
    with _dequantization_progress(progress):
        model = _from_pretrained(path.parent, "float32", gguf_file=path.name)
    progress("writing the converted copy", None)
    del model.config.quantization_config  # the copy is not quantized
    model.config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_vocabulary(folder, vocabulary, file.stop_ids)


def _from_pretrained(folder: Path, dtype: str, **options: Any) -> "PreTrainedModel":
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    if reason := refusal(config):
        raise EngineError(f"{options.get('gguf_file') or folder}: {reason}")
    # Typed as the model alone, whatever is asked for.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True, **options
    )
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise EngineError(
            f"{folder}: {len(missing)} weights are missing, {missing[0]} the first; fetch the model again"
        )
    return model


@contextlib.contextmanager
def _dequantization_progress(progress: Progress) -> Iterator[None]:
    """Progress in place of the bar that transformers draws while it dequantizes, whatever its settings say."""
    from transformers import modeling_gguf_pytorch_utils as module

    def tensors(items: Sequence[Any], **_: Any) -> Iterator[Any]:
        for index, item in enumerate(items):
            progress("dequantizing", index / len(items))
            yield item

    bar = getattr(module, "tqdm", None)
    module.tqdm = tensors
    try:
        yield
    finally:
        module.tqdm = bar


@contextlib.contextmanager
def _transformers_errors(path: Path) -> Iterator[None]:
    """Transformers in silence, its errors on one line and as `EngineError`."""
    try:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from transformers.utils import logging
    except ImportError as error:
        raise EngineError(f"{path}: needs the Python package {error.name!r}; pip install 'outrider[cloud]'") from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about transformers' own internals
            yield
    except ImportError as error:
        raise EngineError(f"{path}: needs the Python package {error.name!r}; pip install 'outrider[cloud]'") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines()
        raise EngineError(f"{path}: cannot be loaded: {lines[0] if lines else type(error).__name__}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def no_progress(stage: str, fraction: float | None) -> None:
    """Nobody watches."""
