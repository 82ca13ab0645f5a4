"""Publish a finished GPU run as the reference run: `djinn publish data/runs/gpu`.

Rows, manifests, traces and executed notebooks of the run are copied to `data/reference/h100`.
Everything that is derived from rows is generated again from the copies: notebooks, figures (also in
`figures/`), claims.json and comparison_summary.json. So published results always agree with their
rows. Paths of the machine are removed.

A run of another profile can be published beside the reference run (`--beside h100-bf16`). Then only
its measurements are copied, and figures and claims remain those of the reference run.

A run is refused if cells are missing (`--unfinished` accepts it, and their results are shown as not
measured), if it ran without a GPU, or from a changed working tree (`--allow-dirty` accepts it). An
existing reference run is kept, unless `--replace` is given.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from djinn_lib.analysis.run import REPLICATES, Run, load_run
from djinn_lib.errors import ConfigError, RecordError
from djinn_lib.experiment import large_results
from djinn_lib.experiment.execution.notebook_logs import copy_with_log
from djinn_lib.experiment.manifest import read_manifest, write_manifest
from djinn_lib.experiment.profile import load_profile
from djinn_lib.files import replace_folders, write_json
from djinn_lib.paths import FIGURES, REFERENCE
from djinn_lib.publishing.merge import missing_cells
from djinn_lib.publishing.redraw import copy_figures, new_figures, read_again
from djinn_lib.rows import read_rows, write_rows

PUBLISHED = ("requests", REPLICATES, "traces", "notebooks", "figures", "machine.json",
             "claims.json", "comparison_summary.json", *large_results.FILES)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
NOTEBOOK_BYTES = 4 << 20  # code hosts do not render much larger ones
# An absolute path of two parts or more. What comes before keeps URLs, rates (GB/s), HTML tags and
# paths relative to something, `{folder}/a/b` among them, out of it.
_ABSOLUTE = re.compile(r"(?<![\w./:<}\]-])/(?:[\w.+@{}\[\]-]+/)+([\w.+@{}\[\]-]+)/?")


def publish(
    run_dir: Path,
    replace: bool = False,
    allow_dirty: bool = False,
    unfinished: bool = False,
    reference: Path = REFERENCE,
    figures: Path = FIGURES,
) -> None:
    """Make a run the reference run; after an error nothing has changed.

    Both folders are replaced together: even if the process is killed, both are the old ones or both
    the new ones, at the latest after the next run.

    Raises:
        ConfigError: there already is a published run.
        RecordError: the run does not qualify, or cannot be read.
        OSError: writing failed, for example on a full disk.
    """
    run = _publishable(run_dir, reference, replace, allow_dirty, unfinished)
    reference.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix=".publish-", dir=reference.parent) as name,
        new_figures(figures) as drawn,
    ):
        made, new = Path(name).resolve() / "made", Path(name) / reference.name
        made.mkdir()
        _copy(run, made)
        _read(made, reference)
        _tidy_all(made, reference.name)
        for file in ("claims.json", "comparison_summary.json"):
            write_json(made / file, scrub(json.loads((made / file).read_text())))
        copy_figures(made / "figures", drawn)
        _assemble(new, made, reference)
        replace_folders({reference: new, figures: drawn})


def publish_rows(
    run_dir: Path,
    name: str,
    replace: bool = False,
    allow_dirty: bool = False,
    unfinished: bool = False,
    parent: Path = REFERENCE.parent,
) -> Path:
    """Keep the measurements of a run beside the reference run; return their folder.

    These are rows, manifests, traces, the machine's facts and the executed notebooks of cells.

    Args:
        run_dir: a run, usually of another profile than the reference run.
        name: of the folder, which may already hold such a run.
        replace, allow_dirty, unfinished: see `publish`.
        parent: where the reference runs are.

    Raises:
        ConfigError: the name cannot be used, or there already is a published run.
        RecordError: the run does not qualify, or cannot be read.
        OSError: writing failed, for example on a full disk.
    """
    folder = parent / name
    kept = folder.exists() and not (folder / "requests").exists()
    if not _NAME.fullmatch(name) or name == REFERENCE.name or kept:
        raise ConfigError(
            f"expected a name for a folder of rows in {parent}, such as h100-bf16, got {name!r}: "
            "choose letters, digits and dashes, and none that is used for something else"
        )
    run = _publishable(run_dir, folder, replace, allow_dirty, unfinished)
    with TemporaryDirectory(prefix=".publish-", dir=parent) as temporary:
        made = Path(temporary).resolve() / name
        made.mkdir()
        _copy(run, made)
        _tidy_all(made, name)
        replace_folders({folder: made})
    return folder


def _publishable(
    run_dir: Path, reference: Path, replace: bool, allow_dirty: bool, unfinished: bool
) -> Run:
    run = load_run(run_dir)
    if problems := list(_problems(run, allow_dirty, unfinished)):
        raise RecordError(
            f"expected a finished run on a GPU in {run_dir}, got:\n  " + "\n  ".join(problems)
        )
    taken = [name for name in PUBLISHED if (reference / name).exists()]
    if taken and not replace:
        raise ConfigError(
            f"expected nothing published in {reference}, got {', '.join(taken)}: replace it with "
            "--replace, or keep it"
        )
    return run


def _problems(run: Run, allow_dirty: bool, unfinished: bool) -> Iterator[str]:
    """Yield the reasons not to publish a run."""
    if run.machine.get("device") != "cuda":
        yield f"a run on the device {run.machine.get('device')!r}"
    profiles = sorted({manifest["profile"] for manifest in run.manifests.values()})
    if len(profiles) != 1:
        yield f"cells of the profiles {profiles}"
        return
    profile = load_profile(profiles[0])
    if not unfinished and (missing := missing_cells(profile, run.folder)):
        yield f"{len(missing)} cells missing: {' '.join(f'cell:{name}' for name in missing)}"
    for cell in profile.all_cells():
        repeats = run.manifests.get(cell.id, {}).get("parameters", {}).get("repeats", cell.repeats)
        if repeats < cell.repeats:
            yield f"{repeats} repeats of {cell.id}, the profile asks for {cell.repeats}"
    if open_cells := sorted(path.name for path in run.folder.glob("requests/*.journal.jsonl")):
        yield f"cells that have not ended: {', '.join(open_cells)}"
    changed = sorted(c for c, m in run.manifests.items() if m["git_dirty"])
    if changed and not allow_dirty:
        yield f"{len(changed)} cells from a changed working tree, among them {changed[0]}"


def _copy(run: Run, made: Path) -> None:
    """Copy the measurements, without paths of the machine."""
    for folder in ("requests", REPLICATES):
        for path in sorted((run.folder / folder).glob("*.parquet")):
            rows = read_rows(path)
            rows[["error", "note"]] = rows[["error", "note"]].map(scrub_text)
            write_rows(rows, made / folder / path.name)
            manifest = path.with_suffix(".manifest.json")
            write_manifest(scrub(read_manifest(manifest)), made / folder / manifest.name)
        for path in (run.folder / folder).glob("*.ipynb"):
            copy_with_log(path, made / folder / path.name)
    shutil.copytree(run.folder / "traces", made / "traces")
    state = json.loads((run.folder / "machine.json").read_text())
    models = {  # the folder that a model has in any checkout
        name: {**facts, "folder": f"data/models/{name}"} if isinstance(facts, dict) else facts
        for name, facts in state["models"].items()
    }
    write_json(made / "machine.json", scrub({**state, "models": models}))
    if (run.folder / large_results.ROWS).exists():
        manifest = json.loads((run.folder / large_results.MANIFEST).read_text())
        large_results.write_large(large_results.read_large(run.folder), scrub(manifest), made)
    (made / "notebooks").mkdir()
    for stem in ("00_start_here", "00_setup", "01_trace", "02_run_system"):
        for path in (run.folder / "notebooks").glob(f"{stem}*.ipynb"):
            if not path.name.endswith(".partial.ipynb"):
                copy_with_log(path, made / "notebooks" / path.name)


def _read(made: Path, reference: Path) -> None:
    """Execute the notebooks that read rows on the copies."""
    for path in reference.glob("engine*.json"):
        shutil.copy(path, made)
    if failed := [status for status in read_again(made, made) if status.state != "ok"]:
        raise RecordError(
            "expected every notebook that reads rows to go through, got "
            + "; ".join(f"{status.task}: {status.error}" for status in failed)
        )


def _tidy_all(made: Path, name: str) -> None:
    """Remove paths of the machine from executed notebooks and their logs."""
    for folder in ("notebooks", REPLICATES):
        for path in sorted((made / folder).glob("*.ipynb")):
            _tidy(path, made, f"../data/reference/{name}")  # as seen from `notebooks/`
        for path in (made / folder).glob("*.log"):
            path.write_text(scrub_text(path.read_text()))


def _tidy(path: Path, made: Path, read_from: str) -> None:
    """Remove paths of the machine from an executed notebook.

    Papermill records the paths of the run's folder and of the repository.
    """
    content, known = json.loads(path.read_text()), {str(made): read_from}
    papermill = content.get("metadata", {}).get("papermill", {})
    if executed := papermill.get("parameters", {}).get("run_dir"):
        known[executed] = read_from
    if source := papermill.get("input_path"):
        known[str(Path(source).parent.parent)] = "."
    path.write_text(json.dumps(scrub(content, known), indent=1, ensure_ascii=False) + "\n")
    if (size := path.stat().st_size) > NOTEBOOK_BYTES:
        raise RecordError(
            f"expected executed notebooks of at most {NOTEBOOK_BYTES >> 20} MiB, which code hosts "
            f"render, got {path.name} with {size >> 20} MiB: look for long outputs in it"
        )


def _assemble(new: Path, made: Path, reference: Path) -> None:
    """Fill a folder with the new files, and keep engine.json and other published files."""
    new.mkdir()
    for path in reference.iterdir():
        if path.name not in PUBLISHED:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, new / path.name)
    for name in PUBLISHED:
        if (made / name).exists():  # not every run has models larger than the ring
            shutil.move(made / name, new / name)


def scrub(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """Return plain data with every text in it scrubbed; pictures (keys "image/...") stay."""
    if isinstance(value, str):
        return scrub_text(value, known)
    if isinstance(value, list):
        return [scrub(item, known) for item in value]
    if isinstance(value, dict):
        return {
            key: item if str(key).startswith("image/") else scrub(item, known)
            for key, item in value.items()
        }
    return value


def scrub_text(text: str, known: Mapping[str, str] | None = None) -> str:
    """Rename known folders in a text, and cut every other absolute path to its last part.

    Of known folders, with their replacements, longer ones are replaced first.
    """
    text = text.replace("file:///", "/")
    for folder, instead in sorted((known or {}).items(), key=lambda item: -len(item[0])):
        text = re.sub(rf"{re.escape(folder)}(?=/|\b)", lambda _, new=instead: new, text)
    return _ABSOLUTE.sub(lambda found: found[1], text)
