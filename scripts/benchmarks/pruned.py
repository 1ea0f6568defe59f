"""A weak draft: the default model without some of its layers, as a file of its own."""

import os
from collections.abc import Collection
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

from shared.runtimes.hub import cached_copy


def without_layers(path: Path, dropped: Collection[int], cache_dir: Path) -> Path:
    """The copy of a GGUF file without these layers that `cache_dir` keeps; made first where it is not there yet."""
    name = "-".join(map(str, sorted(dropped)))
    copy = cached_copy(path, cache_dir, f"without-{name}", f".without-{name}.gguf")
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_suffix(f".{os.getpid()}.partial")
        try:
            _write(GGUFReader(path), frozenset(dropped), partial)
            partial.rename(copy)
        finally:
            partial.unlink(missing_ok=True)
    return copy


def _write(reader: GGUFReader, dropped: frozenset[int], out: Path) -> None:
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue  # the writer has its own
        value = field.contents()
        if name == f"{architecture}.block_count":
            value -= len(dropped)
        kind = field.types[0]
        writer.add_key_value(name, value, kind, sub_type=field.types[-1] if kind is GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        prefix, number, *rest = tensor.name.split(".")
        if prefix != "blk":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        elif int(number) not in dropped:
            layer = int(number) - sum(other < int(number) for other in dropped)
            writer.add_tensor(".".join((prefix, str(layer), *rest)), tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
