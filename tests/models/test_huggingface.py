import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.engine import EngineError
from shared.runtimes import hub, huggingface
from shared.runtimes.huggingface import convert_gguf, load_causal_lm, read_vocabulary, refusal
from shared.vocabulary import Vocabulary

SIZE = 93  # real tokens; the model's tables are padded to 96


def tiny_config(architecture: str = "llama", **options: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "sliding_window": None,
    }
    return AutoConfig.for_model(architecture, **settings | options)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config("gpt2"), "architecture 'gpt2' is not one of"),
        (tiny_config("mistral", sliding_window=64), "sliding window"),
        (tiny_config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0), "sliding window"),
        (tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "longest row"),
    ],
)
def test_models_that_packed_rows_do_not_work_with_are_refused(config: Any, reason: str) -> None:
    assert reason in refusal(config)


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert refusal(tiny_config("mistral", sliding_window=256)) == ""


def write_model(folder: Path, tokenizer: dict[str, Any] | None = None) -> None:
    AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder)
    vocabulary = {"model": {"type": "BPE", "vocab": {f"t{token}": token for token in range(SIZE)}}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or vocabulary))


def test_a_folder_is_loaded_with_what_its_ids_mean(tmp_path: Path) -> None:
    write_model(tmp_path)
    lm = load_causal_lm(tmp_path, "bfloat16")
    assert lm.model.dtype == torch.bfloat16
    assert lm.max_context == 256
    assert lm.stop_ids == {1}
    assert lm.vocabulary.tokens[:2] == (b"t0", b"t1")
    assert lm.vocabulary.fingerprint.size == SIZE


def test_missing_and_damaged_weights_are_one_line_errors(tmp_path: Path) -> None:
    write_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    torch_model = AutoModelForCausalLM.from_config(tiny_config())
    state = {name: tensor for name, tensor in torch_model.state_dict().items() if "layers.1.mlp" not in name}
    torch_model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(EngineError, match=r"3 weights are missing, model\.layers\.1\.mlp"):
        load_causal_lm(tmp_path)
    weights.write_bytes(b"not safetensors")
    with pytest.raises(EngineError, match="cannot be loaded: ") as caught:
        load_causal_lm(tmp_path)
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(EngineError, match="cannot be loaded: "):
        load_causal_lm(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(EngineError, match=r"no tokenizer\.json"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (
            {
                "model": {"vocab": {"Ġa": 0, "é": 2}},
                "decoder": {"type": "ByteLevel"},
                "added_tokens": [{"id": 4, "content": "<|end|>"}],
            },
            (b" a", b"", b"\xe9", b"", b"<|end|>"),
        ),
        (
            {
                "model": {"vocab": {"▁a": 0, "<0x0A>": 1, "é": 2}},
                "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
                "post_processor": {"type": "ByteLevel"},
            },
            (b" a", b"\n", "é".encode()),
        ),
        ({"model": {"vocab": [["<unk>", 0.0], ["▁b", -1.5]]}, "pre_tokenizer": None}, (b"<unk>", b" b")),
    ],
    ids=["byte-level", "sentencepiece", "unigram"],
)
def test_the_vocabulary_of_a_folder_is_read_from_its_tokenizer(
    tokenizer: dict[str, Any], tokens: tuple[bytes, ...], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    assert read_vocabulary(tmp_path) == (Vocabulary(tokens), frozenset({2, 4}))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"model": '),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"vocab": 5}}'),
        ("config.json", "[]"),
        ("generation_config.json", "no JSON"),
        ("outrider_vocabulary.json", "{}"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (tmp_path / file).write_text(text)
    with pytest.raises(EngineError, match="damaged or of an unknown kind") as caught:
        read_vocabulary(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")
    assert "\n" not in str(caught.value)


def test_what_is_not_a_model_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(EngineError, match="not a model; give a GGUF file or a folder"):
        load_causal_lm(tmp_path / "notes.txt")
    (tmp_path / "archive.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(EngineError, match=r"archive\.gguf is not GGUF \(it begins with b'PK"):
        load_causal_lm(tmp_path / "archive.gguf", cache_dir=tmp_path / "cache")
    with pytest.raises(EngineError, match=r"damaged\.gguf: damaged \(ValueError: .*\); fetch the model again"):
        load_causal_lm(tmp_path / "damaged.gguf", cache_dir=tmp_path / "cache")


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = tmp_path / "model.gguf", tmp_path / "cache"
    file.write_bytes(b"GGUF weights")
    calls: list[str] = []

    def killed(_path: Path, folder: Path, _progress: huggingface.Progress) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    def complete(path: Path, folder: Path, _progress: huggingface.Progress) -> None:
        calls.append(path.name)
        assert list(folder.iterdir()) == []  # what the killed one left is gone
        (folder / "whole").touch()

    monkeypatch.setattr(huggingface, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(file, cache)
    monkeypatch.setattr(huggingface, "_convert", complete)
    stages: list[str] = []
    folder = convert_gguf(file, cache, lambda stage, _: stages.append(stage))
    assert [found.name for found in folder.iterdir()] == ["whole"]
    assert stages == ["converting model.gguf, once"]
    assert convert_gguf(file, cache) == folder
    assert calls == ["model.gguf"]
    file.write_bytes(b"GGUF other weights")
    assert convert_gguf(file, cache) != folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert hub.default_cache_dir() == Path("/somewhere/outrider")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert hub.default_cache_dir() == Path.home() / ".cache" / "outrider"
