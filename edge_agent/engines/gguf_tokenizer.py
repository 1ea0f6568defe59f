"""The text side of a GGUF file as an ONNX folder carries it: tokenizer.json and what belongs to it.

Byte-level BPE whose texts are cut into words as `tokenizer.ggml.pre` says. Source of the cuts: llama.cpp
`llama-vocab.cpp`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from shared.runtimes.gguf_file import GgufFile
from shared.runtimes.huggingface import write_vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
_LLAMA3 = "llama-bpe"
_GPT4_WORDS = (  # with how many digits make a word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = {  # by `tokenizer.ggml.pre`: whether digits stand alone, and the pattern of words (None: GPT-2's)
    "smollm": (True, None),
    _LLAMA3: (False, _GPT4_WORDS % "{1,3}"),
    "qwen2": (False, _GPT4_WORDS % ""),
}


def can_write_tokenizer(file: GgufFile) -> bool:
    """Whether its texts are cut in a way that is known here."""
    return file.get("tokenizer.ggml.model") == "gpt2" and file.get("tokenizer.ggml.pre") in _WORDS


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer, chat template and vocabulary into the folder."""
    _tokenizer(file).save(str(folder / "tokenizer.json"))
    spelled = {f"{name}_token": _spelled(file, name) for name in ("bos", "eos")}
    (folder / "tokenizer_config.json").write_text(json.dumps(spelled), encoding="utf-8")
    if template := file.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_vocabulary(folder, file.vocabulary, file.stop_ids)


def _tokenizer(file: GgufFile) -> "Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    kind = file.get("tokenizer.ggml.pre")
    digits_alone, words = _WORDS[kind]
    merges = [tuple(pair.split(" ")) for pair in file.get("tokenizer.ggml.merges", ())]
    ids = {text: token for token, text in enumerate(file.token_texts)}
    # A whole word that is a token is one, whatever its merges are: Llama 3.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=kind == _LLAMA3))
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if digits_alone else []
    if words:
        cuts.append(pre_tokenizers.Split(Regex(words), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(cuts), decoders.ByteLevel()
    if file.get("tokenizer.ggml.add_bos_token", kind == _LLAMA3):
        first = _spelled(file, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, ids[first])]
        )
    for text, type_ in zip(file.token_texts, file.token_types, strict=True):
        if type_ == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif type_ == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    return tokenizer


def _spelled(file: GgufFile, name: str) -> str:
    token = file.get(f"tokenizer.ggml.{name}_token_id")
    return "" if token is None else file.token_texts[token]
