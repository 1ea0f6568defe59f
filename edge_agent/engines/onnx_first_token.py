"""What a text's first token leaves in the cache, in float32: part of an ONNX folder.

Attention has to go somewhere, and where it has no use for any token it goes to the first one, whatever that is
(StreamingLLM: Xiao et al., arXiv 2309.17453, section 3): often more than half of it. So its keys and values must be
right, while its activations are those that 8 bits can express least: a few are hundreds of times as large as the
others, and unlike all other tokens' (`onnx_activations` takes off what those have in common). But a first token's keys
and values depend on nothing but the token, and nearly every text of a model begins with the same one: its begin token,
or that of a chat. So they are computed once, by the float32 graph. Behind any other first token a draft is a little
worse.
"""

import contextlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.chat import chat_prompt
from edge_agent.engines.onnx_activations import FullGraph
from edge_agent.engines.onnx_folder import FIRST_ENTRIES_FILE, PAST, PRESENT
from shared.engine import EngineError

_IDS = "ids"

FirstTokens = dict[int, dict[str, NDArray[np.float32]]]
"""By the token, then by the name of a cache: its entry (heads, D)."""


def write_first_tokens(full: FullGraph, folder: Path) -> None:
    """Compute those that texts of this model begin with, for the folder made of it."""
    starts = [full.model.tokenize("", add_special=True)]
    with contextlib.suppress(EngineError):  # no template, or one that refuses this: whoever chats is told then
        starts.append(chat_prompt(full.model, [{"role": "user", "content": "Hello."}]))
    ids = sorted({tokens[0] for tokens in starts if tokens})
    entries = {name: list[NDArray[np.float32]]() for name in full.caches}
    for token in ids:
        for name, cache in zip(full.caches, full.run([token], full.caches), strict=True):
            entries[name].append(cache[:, 0])
    names = {PAST + name.removeprefix(PRESENT): rows for name, rows in entries.items()}
    np.savez(folder / FIRST_ENTRIES_FILE, allow_pickle=False, **{_IDS: np.array(ids)}, **names)


def read_first_tokens(folder: Path) -> FirstTokens:
    """Those that the folder has; none in folders that others made. Raises `EngineError` where the file is damaged."""
    file = folder / FIRST_ENTRIES_FILE
    if not file.is_file():
        return {}
    try:
        with np.load(file) as arrays:
            ids = arrays[_IDS].tolist()
            caches = {name: arrays[name] for name in arrays.files if name != _IDS}
        return {token: {name: entries[index] for name, entries in caches.items()} for index, token in enumerate(ids)}
    except (OSError, ValueError, LookupError) as error:
        raise EngineError(f"{file}: {' '.join(str(error).split())}; make the folder again") from error
