"""What llama.cpp is asked for when it loads a file."""

from pathlib import Path

import llama_cpp
import pytest
from structlog.testing import capture_logs

from shared.runtimes.llama_cpp import LlamaModel

pytestmark = pytest.mark.models


@pytest.mark.parametrize(
    ("built_for", "is_repacked"), [(b"AVX512_VNNI = 1 | AMX_INT8 = 1 | ", False), (b"AVX512_VNNI = 1 | ", True)]
)
def test_no_weights_are_repacked_for_amx(
    default_model_path: Path, monkeypatch: pytest.MonkeyPatch, built_for: bytes, is_repacked: bool
) -> None:
    """Kernels of gcc's builds for it end the process: on a Xeon with AMX the Q8_0 draft was ended by SIGILL."""
    asked = list[bool]()
    load = llama_cpp.llama_model_load_from_file

    def watched(path: bytes, params: llama_cpp.llama_model_params) -> object:
        asked.append(params.use_extra_bufts)
        return load(path, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", watched)
    monkeypatch.setattr(llama_cpp, "llama_print_system_info", lambda: built_for)
    with capture_logs() as logs:
        LlamaModel(default_model_path).close()
        LlamaModel(default_model_path, vocabulary_only=True).close()
    assert asked == [is_repacked] * 2
    assert ["built for AMX" in entry["event"] for entry in logs] == [True] * (not is_repacked)
