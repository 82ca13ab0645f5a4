"""Check that model files have not changed since the set-up.

The set-up stores a digest of each file. Every cell checks all files before it starts, byte by byte,
because sizes and modification times do not show a flipped bit. One core hashes about 1.3 GB/s, and
all cores hash in parallel. So the check takes about half a second for the 0.6 GB of the CPU profile
on two cores, and two to three seconds for 31 GB on sixteen. While a cell runs, only sizes and
times of the files are compared, which takes microseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from djinn_lib.errors import CheckpointError

if TYPE_CHECKING:
    from djinn_lib.systems.base import ModelFiles

_BLOCK_BYTES = 64 << 20  # what one thread hashes at a time
_READ_BYTES = 4 << 20
Stamps = dict[str, tuple[int, int, int]]


def file_digests(folder: Path) -> dict[str, str]:
    """Return a digest of config.json and of each weights file, by name.

    A digest is the SHA-256 of the SHA-256s of a file's blocks of 64 MiB.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    return dict(_digests(folder))


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield names and digests, config.json first: it says which files the weights are in."""
    with _threads() as threads:
        for path in _files(folder):
            try:
                yield path.name, _digest(path, threads)
            except OSError as error:
                raise _unreadable(path, error) from error


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _digest(path: Path, threads: Executor) -> str:
    begins = range(0, max(path.stat().st_size, 1), _BLOCK_BYTES)
    blocks = threads.map(lambda begin: _block_digest(path, begin), begins)
    return hashlib.sha256(b"".join(blocks)).hexdigest()


def weights_digest(digests: Mapping[str, str]) -> str:
    """Return one digest for all weights files, in the order of their names."""
    weights = [digests[name] for name in sorted(digests) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(weights).encode()).hexdigest()


def ensure_same_files(folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    """Make sure that the files of a model's folder have the digests of `file_digests`.

    Raises:
        CheckpointError: a file differs, is missing or is new; the message names it, and the
            `remedy`.
    """
    missing = dict(expected)
    for name, digest in _digests(folder):  # config.json first, which names the others
        if digest != missing.pop(name, None):
            raise _changed(folder / name, expected.get(name), digest, remedy)
    for name, digest in missing.items():
        raise _changed(folder / name, digest, None, remedy)


def files_are_as_set_up(machine_json: Path) -> bool:
    """Whether all model files are the ones that the set-up recorded, byte by byte.

    The set-up also recorded which files a model has, so this needs neither checkpoints nor torch.
    """
    try:
        models = json.loads(machine_json.read_text())["models"]
        with _threads() as threads:
            return all(
                digest == _digest(Path(files["folder"]) / name, threads)
                for files in models.values()
                for name, digest in files["digests"].items()
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


class WeightsWatch:
    """Notices files that change after they were checked, by size, time and inode.

    Raises:
        CheckpointError: a file differs from the digests of the set-up, or there are none.
    """

    def __init__(self, models: Mapping[str, ModelFiles]) -> None:
        self._folders = {name: files.folder for name, files in models.items()}
        self._stamps = {name: _stamps(folder) for name, folder in self._folders.items()}
        for files in models.values():
            if not files.digests:
                raise CheckpointError(
                    f"expected digests of the files of {files.name!r} from the set-up, got none: "
                    "run notebook 00_setup again"
                )
            ensure_same_files(files.folder, files.digests, "run notebook 00_setup again")

    def ensure_unchanged(self, model: str) -> None:
        """Make sure that the files of a model have not changed since the check.

        Raises:
            CheckpointError: a file was replaced, written to or deleted.
        """
        before, now = self._stamps[model], _stamps(self._folders[model])
        if before != now:
            names = sorted(name for name in before if now.get(name) != before[name])
            raise CheckpointError(
                f"expected the files of {model!r} in {self._folders[model]} to stay as they are "
                f"during a cell, got changes of {names or sorted(now)}: restore them, and run the "
                "cell again"
            )


def _files(folder: Path) -> Iterator[Path]:
    from djinn_lib.engine.models.checkpoint import weight_files  # which imports torch

    yield folder / "config.json"
    yield from weight_files(folder)


def _block_digest(path: Path, begin: int) -> bytes:
    digest, end = hashlib.sha256(), begin + _BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while begin < end and (data := file.read(min(_READ_BYTES, end - begin))):
            digest.update(data)
            begin += len(data)
    return digest.digest()


def _stamps(folder: Path) -> Stamps:
    stamps = {}
    for path in _files(folder):
        try:
            stat = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        stamps[path.name] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return stamps


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"expected {path}, got {error.strerror}: restore the file, or run notebook 00_setup again"
    )


def _changed(path: Path, expected: str | None, got: str | None, remedy: str) -> CheckpointError:
    wanted, found = (f"{digest[:12]}..." if digest else "no file" for digest in (expected, got))
    return CheckpointError(
        f"expected {path} with digest {wanted}, got {found}: the file was changed or damaged; "
        f"{remedy}"
    )
