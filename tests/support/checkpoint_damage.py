"""Damage to the files of a checkpoint folder, drawn by hypothesis: cut, garbled, swapped, huge."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

DrawFn = Any
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 2**70, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "../x", "{{", [], [None], [-1], [0, 1], ["x"], [[[]]], {},
    {"x": {}}, {"": None},
]  # fmt: skip


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to the values of a JSON tree, the whole of it first; of long ones to the first few."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if is_list(tree) else ()
    for key, value in list(items)[:40]:
        yield from places(value, (*path, key))


def is_list(tree: Any) -> bool:
    return isinstance(tree, list)


def at(tree: Any, path: tuple) -> Any:
    """What stands at a path."""
    for key in path:
        tree = tree[key]
    return tree


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    """The tree with another value at a path."""
    if not path:
        return value
    tree = json.loads(json.dumps(tree))
    at(tree, path[:-1])[path[-1]] = value
    return tree


def without(tree: Any, path: tuple) -> Any:
    """The tree without what stands at a path."""
    if not path:
        return {}
    tree = json.loads(json.dumps(tree))
    del at(tree, path[:-1])[path[-1]]
    return tree


@st.composite
def damaged_json(draw: DrawFn, tree: Any) -> Any:
    """A JSON tree with one to three values that are other, missing, or swapped for another's."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(tree))))
        how = draw(st.sampled_from(["junk", "junk", "missing", "copied"]))
        if how == "junk":
            tree = replaced(tree, path, draw(st.sampled_from(JUNK)))
        elif how == "missing":
            tree = without(tree, path)
        else:
            tree = replaced(tree, path, at(tree, draw(st.sampled_from(list(places(tree))))))
    return tree


@st.composite
def damaged_bytes(draw: DrawFn, content: bytes) -> bytes:
    """Bytes that are cut, overwritten, doubled, or something else altogether."""
    place = draw(st.integers(0, len(content)))
    how = draw(st.sampled_from(["cut", "overwritten", "doubled", "other"]))
    if how == "cut":
        return content[:place]
    if how == "overwritten":
        patch = draw(st.binary(min_size=1, max_size=8))
        return content[:place] + patch + content[place + len(patch) :]
    if how == "doubled":
        return content + content
    return draw(st.binary(max_size=64))


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what stands behind it."""
    (n_bytes,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n_bytes]), content[8 + n_bytes :]


def with_header(header: Any, data: bytes, n_bytes: int | None = None) -> bytes:
    """A safetensors file of a header, which may say a wrong length of itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if n_bytes is None else n_bytes) + text + data


@st.composite
def damaged_safetensors(draw: DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header or bytes are not what they should be."""
    header, data = header_of(content)
    how = draw(st.sampled_from(["header", "header", "length", "offsets", "bytes", "text"]))
    if how == "header":
        return with_header(draw(damaged_json(header)), data)
    if how == "length":
        lengths = [0, 1, len(content), len(content) - 9, 2**20, 100 << 20, 2**32, 2**63, 2**64 - 1]
        return with_header(header, data, draw(st.sampled_from(lengths)))
    if how == "offsets":
        name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        ends = st.sampled_from([0, 1, 4, len(data), len(data) + 4, 2**40, 2**63, 2**64, -4])
        return with_header(replaced(header, (name, "data_offsets"), [draw(ends), draw(ends)]), data)
    if how == "text":
        return with_header(draw(damaged_bytes(json.dumps(header).encode())), data)
    return draw(damaged_bytes(content))


@st.composite
def damaged_file(draw: DrawFn, file: Path) -> bytes:
    """What else could be in a file of a checkpoint."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return draw(damaged_safetensors(content))
    if file.suffix == ".json" and draw(st.integers(0, 3)):
        return json.dumps(draw(damaged_json(json.loads(content)))).encode()
    return draw(damaged_bytes(content))


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file, and neither its size nor its time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
