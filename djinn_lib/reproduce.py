"""`make reproduce`: runs the tasks of `dodo.py` for one profile and says how it went.

The exit status is 0 when every request of every cell that can run here was served and every
notebook went through; 1 when something failed, which the last lines then name; 2 for bad input.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from djinn_lib.bench import ensure_writable
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.notebooks import Status, read_statuses
from djinn_lib.profile import REPO, Profile, load_profile


def main(arguments: list[str] | None = None) -> int:
    """Run a profile; returns the exit status."""
    parser = argparse.ArgumentParser(prog="djinn_lib.reproduce", description=__doc__)
    parser.add_argument("--profile", default="cpu", help="a file of params/, without .yml")
    parser.add_argument("--run-dir", type=Path, help="where results go; default data/runs/PROFILE")
    parser.add_argument("tasks", nargs="*", help="tasks of dodo.py; default all")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        _ensure_device(profile)
        run_dir = (options.run_dir or REPO / "data" / "runs" / profile.name).resolve()
        ensure_writable(run_dir)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    begin_s = time.perf_counter()
    code = _doit(profile, run_dir, options.tasks)
    print(f"finished in {time.perf_counter() - begin_s:.0f} s", flush=True)
    return max(code, _summary(run_dir))


def _ensure_device(profile: Profile) -> None:
    if profile.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"expected a usable CUDA device for profile {profile.name!r}, got none: "
                "use PROFILE=cpu, or install a driver"
            )


def _doit(profile: Profile, run_dir: Path, tasks: list[str]) -> int:
    os.environ["DJINN_PROFILE"], os.environ["DJINN_RUN_DIR"] = profile.name, str(run_dir)
    from doit.cmd_base import ModuleTaskLoader
    from doit.doit_cmd import DoitMain

    sys.path.insert(0, str(REPO))
    import dodo

    return DoitMain(ModuleTaskLoader(dodo)).run(
        ["run", "--continue", "--reporter", "error-only", *tasks]
    )


def _summary(run_dir: Path) -> int:
    statuses = read_statuses(run_dir / "status")
    for status in statuses:
        if status.state != "ok":
            print(f"{status.state}: {_line(status)}")
    failed = [status for status in statuses if status.state == "failed"]
    page = run_dir / "index.html"
    print(f"{len(statuses)} notebooks, {len(failed)} failed; results: {page}", flush=True)
    return 1 if failed else 0


def _line(status: Status) -> str:
    return f"{status.task} ({status.error_kind}: {status.error})"


if __name__ == "__main__":
    sys.exit(main())
