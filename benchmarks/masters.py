"""Measure savings and costs of compressed masters: `python benchmarks/masters.py`.

A full miss takes at least the time of its bytes on the link. Compressed masters have fewer bytes,
and the device decompresses them. The benchmark measures each dtype, model and form of masters. The
measures are the time to add the model, its stored bytes, a full miss (from nothing resident to all
weights) and a hit. The same hit is also measured while the next model is prefetched, which uses
part of the device. Results are medians of several repeats, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from typing import Any

from engine_cases import Cases, spread, timed
from masters_plot import full_misses, result_rows

from djinn_lib.analysis.plots.style import save_figure
from djinn_lib.engine.djinn import Djinn
from djinn_lib.errors import DjinnError
from djinn_lib.experiment.bench import MODELS_DIR
from djinn_lib.experiment.locks import gpu_lock
from djinn_lib.experiment.profile import Profile, load_profile
from djinn_lib.experiment.setup import machine
from djinn_lib.experiment.setup.weights import files_sha256, prepare_models, prompt_ids
from djinn_lib.files import write_json
from djinn_lib.paths import REPO, user_path
from djinn_lib.provenance import git_state
from djinn_lib.systems.base import ModelFiles
from djinn_lib.units import parse_bytes

FORMS = ("plain", "compressed")
COVERED = 0.8  # of a load; the rest allows for the time until it begins, and for its prefill
SHOWN = ["dtype", "model", "form", "share", "add_s", "load_ms", "by_link", "ttft_ms",
         "ms_per_token", "ms_per_token_beside"]  # fmt: skip


def main() -> int:
    """Measure, print, write and draw the results; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="cpu", help="a file of params/, without .yml")
    parser.add_argument("--models", nargs="*", help="of the profile; default all")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models-dir", type=user_path, default=MODELS_DIR)
    parser.add_argument("--out", type=user_path, default=REPO / "data" / "runs" / "masters.json")
    options = parser.parse_args()
    try:
        profile = chosen(load_profile(options.profile), options.models)
        alone = gpu_lock(options.out.parent) if profile.device == "cuda" else nullcontext()
        with alone:
            result = measure(profile, options)
    except DjinnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = result_rows(result)
    print(rows[SHOWN].round(3).to_string(index=False, na_rep="-"))
    paths = save_figure(full_misses(rows), options.out.parent, options.out.stem)
    print(f"written: {options.out}", *paths)
    return 0


def chosen(profile: Profile, models: list[str] | None) -> Profile:
    """Return the profile with a subset of its models.

    Raises:
        DjinnError: a model is not in the profile.
    """
    kept = {m: entry for m, entry in profile.models.items() if not models or m in models}
    if not kept:
        raise DjinnError(f"choose --models out of {list(profile.models)}, got {models}")
    return profile.model_copy(update={"models": kept})


def measure(profile: Profile, options: argparse.Namespace) -> dict[str, Any]:
    """Measure, write what is there after each form, and return it with its origin as plain data.

    An interrupted run keeps its rows: to add a large model can take minutes.
    """
    facts = machine.describe_machine(profile.device)
    commit, dirty = git_state(REPO)
    result = {
        "command": "python benchmarks/masters.py",
        "git_commit": commit,
        "git_dirty": dirty,
        "machine": facts,
        "profile": profile.name,
        "page_bytes": parse_bytes(profile.page),
        "repeats": options.repeats,
        "weights_sha256": {},
        "rows": [],
    }
    for dtype in options.dtypes:
        same = profile.model_copy(update={"dtype": dtype})
        files = prepare_models(same, options.models_dir)
        result["weights_sha256"] |= {f"{n}, {dtype}": files_sha256(f) for n, f in files.items()}
        for form in FORMS:
            link = facts["link_rate_bytes_per_s"]
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                rows = fresh.submit(measured, same, files, form, options.repeats, link).result()
            result["rows"] += [{"dtype": dtype, **row} for row in rows]
            write_json(options.out, result)
            print(f"{dtype}, {form}: measured", flush=True)
    return result


def measured(
    profile: Profile, files: dict[str, ModelFiles], form: Any, repeats: int, link: float
) -> list[dict[str, Any]]:
    """Return one row for each model with one form of masters; all models fit into the ring."""
    page_bytes = parse_bytes(profile.page)
    capacity = sum(f.n_bytes + page_bytes for f in files.values())
    prompts = {name: prompt_ids(f, profile.prompt_tokens, 0) for name, f in files.items()}
    rows = []
    with Djinn(capacity, profile.device, page=profile.page, masters=form) as djinn:
        add_s = {n: timed(lambda f=f: djinn.add(f.name, f.folder)) for n, f in files.items()}
        cases = Cases(djinn, prompts, profile.new_tokens, repeats)
        for name in files:
            plain, stored = djinn.stats().masters[name]
            n_bytes = djinn.masters.layout(name).paged_bytes
            loads_ms = [cases.load_ms(name) for _ in range(repeats + 1)][1:]
            hit = cases.hit(name, djinn.decode_modes[name])
            link_ms = n_bytes / link * 1e3
            row = {
                "model": name,
                "form": form,
                "plain_bytes": plain,
                "stored_bytes": stored,
                "share": stored / plain,
                "add_s": add_s[name],
                "loaded_bytes": n_bytes,
                "link_ms": link_ms,
                **spread("load_ms", loads_ms),
                "by_link": statistics.median(loads_ms) / link_ms,
                "ttft_ms": hit["ttft_ms"],
                "ms_per_token": hit["ms_per_token"],
            }
            rows.append(row)
        for row in rows:
            row |= beside(cases, row, rows)
        djinn.check()
    return rows


def beside(cases: Cases, row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return milliseconds per token of a model while the largest other model is loaded.

    Only as many tokens are generated as that load covers.
    """
    others = [other for other in rows if other is not row]
    if not others:
        return {}
    other = max(others, key=lambda other: other["loaded_bytes"])
    model, loaded, done = row["model"], other["model"], []
    n_tokens = int(COVERED * other["load_ms"] / row["ms_per_token"])
    n_tokens = max(2, min(n_tokens, cases.new_tokens))
    for _ in range(cases.repeats):
        cases.request(model, 1)
        cases.djinn.evict(loaded)
        first = cases.djinn.submit(model, cases.prompts[model], n_tokens, ignore_eos=True)
        second = cases.djinn.submit(loaded, cases.prompts[loaded], 1, ignore_eos=True)
        done.append(first.result().decode_ms / (n_tokens - 1))
        second.result()
    return {"tokens_beside": n_tokens, **spread("ms_per_token_beside", done)}


if __name__ == "__main__":
    sys.exit(main())
