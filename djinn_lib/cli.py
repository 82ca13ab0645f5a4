"""The command line: `djinn --help`.

Each command calls a function of the package that is imported only then, so that `djinn --help`
answers at once. An error of ours is one line, and exit status 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from djinn_lib import nvml
from djinn_lib.errors import ConfigError, DjinnError
from djinn_lib.fleet import commands
from djinn_lib.paths import RUNS

app = typer.Typer(
    name="djinn",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Several language models share one device whose memory does not hold them all.

    **The experiment:** `djinn reproduce` runs all of it, `djinn run` and `djinn sweep` a part that
    you describe, `djinn trace` writes requests, `djinn plot` draws.

    **For publishing:** `djinn merge`, `djinn publish`, `djinn figures`.

    **Serving:** `djinn serve` and `djinn ring` put the ring under vLLM.""",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import djinn_lib

        typer.echo(f"djinn {djinn_lib.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show it")
    ] = False,
) -> None:
    """Options of all commands."""


_EXPERIMENT, _PUBLISHING, _SERVING = "The experiment", "Publishing", "Serving"


_Mode = Literal["sequential", "concurrent", "both"]
_Executor = Literal["local", "ray"]

_Config = Annotated[
    str | None,
    typer.Option(
        help="profile: a name (smoke, cpu, gpu), a .yml file like params/gpu.yml, or a file of the "
        "paper's form [default: gpu where there is a GPU, else cpu]"
    ),
]
_TraceFile = Annotated[
    Path | None,
    typer.Option(help="requests: .jsonl of `djinn trace`, or .json of the paper's form "
                      "[default: the paper's 30]"),
]  # fmt: skip
_ModeOption = Annotated[_Mode, typer.Option(help="one request after another, or at their arrival")]
_Repeats = Annotated[int, typer.Option(min=1, help="how often each system serves the trace")]
_Speed = Annotated[float, typer.Option(help="with `concurrent`: arrive so many times as fast")]
_ExecutorOption = Annotated[_Executor, typer.Option(help="where cells run")]
_BASELINES = (
    "comma-separated: djinn, pytorch_pinned, pytorch_pageable, serverless, vllm, or a label of the "
    "profile's systems; `all` for those of these five that the profile has"
)


def _in_words(command: Callable[..., int | None]) -> Callable[..., None]:
    """Turn an error of ours or of a disk into one line, and what is returned into the status."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except (DjinnError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted: the same command continues where it stopped", file=sys.stderr)
            raise typer.Exit(130) from error
        raise typer.Exit(code or 0)

    return wrapped


def default_config() -> str:
    """Return the profile of this machine: "gpu" where the driver lists a GPU, else "cpu"."""
    return "gpu" if nvml.n_gpus() else "cpu"


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def run(
    output_dir: Annotated[Path, typer.Option(help="results go here; a second call continues")],
    buffer_gb: Annotated[float, typer.Option(help="device memory for weights, in GiB")] = 25.0,
    baselines: Annotated[str, typer.Option(help=_BASELINES)] = "all",
    mode: _ModeOption = "sequential",
    trace_file: _TraceFile = None,
    config_file: _Config = None,
    repeats: _Repeats = 1,
    speed: _Speed = 1.0,
    executor: _ExecutorOption = "local",
) -> int:
    """Compare systems on one trace at one capacity.

    The output folder then has `index.html`, rows and executed notebooks, and in the paper's form
    `comparison_summary.json`, `<system>_<mode>_results.json` and the trace. Without a GPU the
    capacity is a share of the models: 25 stands for 25/31.3 of their bytes.
    """
    from djinn_lib.experiment.comparison import compare, describe

    config, names = config_file or default_config(), baselines.split(",")
    profile = describe(config, [buffer_gb], names, mode, trace_file, repeats, speed)
    return compare(profile, output_dir, executor)


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def sweep(
    output_dir: Annotated[Path, typer.Option(help="results go here; a second call continues")],
    buffer_sizes: Annotated[str, typer.Option(help="capacities in GiB")] = "20,25,32,40",
    baselines: Annotated[str, typer.Option(help=_BASELINES)] = "djinn,pytorch_pinned",
    trace_file: _TraceFile = None,
    config_file: _Config = None,
    repeats: _Repeats = 1,
    executor: _ExecutorOption = "local",
) -> int:
    """Compare systems at several capacities, each in a process of its own."""
    from djinn_lib.experiment.comparison import compare, describe, parse_sizes

    config, names = config_file or default_config(), baselines.split(",")
    profile = describe(config, parse_sizes(buffer_sizes), names, "sequential", trace_file, repeats)
    return compare(profile, output_dir, executor)


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def trace(
    output: Annotated[Path, typer.Option(help=".jsonl, or .json for the paper's form")],
    n_agents: Annotated[int, typer.Option(help="number of requests")] = 30,
    seed: Annotated[int, typer.Option(help="the same seed gives the same trace")] = 42,
    kind: Annotated[
        Literal["paper", "zipf"], typer.Option(help="40/40/20 percent, or Zipf's law")
    ] = "paper",
    alpha: Annotated[float | None, typer.Option(help="with `zipf`: the skew [default: 1]")] = None,
    rate: Annotated[
        float | None, typer.Option(help="with `zipf`: requests a second [default: 0.5]")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="replace the output file")] = False,
) -> None:
    """Write a trace: each request's model (one of the paper's three) and arrival time.

    Missing folders are created. An existing file is kept, unless `--replace` is given.
    """
    from djinn_lib.experiment.paper_form import save_trace
    from djinn_lib.trace import PAPER_MODELS, paper_trace, zipf_trace

    if output.exists() and not replace:
        raise ConfigError(f"{output} already exists: choose another --output, or add --replace")
    if kind == "paper":
        if alpha is not None or rate is not None:
            raise ConfigError("the paper's trace has no --alpha and no --rate: add --kind zipf")
        made = paper_trace(n=n_agents, seed=seed)
    else:
        skew, per_s = (1.0 if alpha is None else alpha), (0.5 if rate is None else rate)
        made = zipf_trace(n_agents, skew, PAPER_MODELS, seed, per_s)
    save_trace(made, output)
    print(f"{len(made)} requests for {len(made.models)} models: {output}")


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def plot(
    figure: Annotated[
        Literal["cdf", "sensitivity"],
        typer.Argument(help="the latency CDF, or speed-up and reuse against the capacity"),
    ],
    run_dir: Annotated[
        Path | None, typer.Option(help="a run's folder [default: the published run]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=".pdf or .png [default: the run's figures/]")
    ] = None,
) -> None:
    """Draw a figure from the rows of a run."""
    from djinn_lib.publishing.redraw import draw_one

    print(draw_one(figure, run_dir, output))


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="`cell:paper-25-djinn`, or a notebook such as `figures` [default: all]"
        ),
    ] = None,
    profile: _Config = None,
    run_dir: Annotated[Path | None, typer.Option(help="[default: data/runs/PROFILE]")] = None,
    executor: _ExecutorOption = "local",
) -> int:
    """Run the whole experiment, or what is missing or changed of it; see also `make reproduce`."""
    from djinn_lib.experiment.reproduce import reproduce as run_all

    return run_all(profile or default_config(), run_dir, executor, names or [])


@app.command(rich_help_panel=_EXPERIMENT)
@_in_words
def study(
    grid: Annotated[Literal["small", "full"], typer.Option(help="the size of the study")] = "full",
    out: Annotated[
        Path, typer.Option(help="the study's folder", show_default="data/runs/study")
    ] = RUNS / "study",
    executor: _ExecutorOption = "local",
) -> None:
    """Simulate policies, capacities and fleets of models."""
    from djinn_lib.experiment.study import save_study

    save_study(grid, out.expanduser(), executor)


@app.command(rich_help_panel=_PUBLISHING)
@_in_words
def figures(
    run_dir: Annotated[
        Path | None, typer.Argument(help="a run's folder [default: the published run]")
    ] = None,
) -> int:
    """Draw the figures of a run, or the published ones, again from rows.

    The exit status is 1 if a notebook failed.
    """
    from djinn_lib.publishing import redraw

    return redraw.redraw(run_dir.expanduser() if run_dir else None)


@app.command(rich_help_panel=_PUBLISHING)
@_in_words
def merge(
    run_dir: Annotated[Path, typer.Argument(help="the folder to make")],
    parts: Annotated[list[Path], typer.Argument(help="run folders, in any order")],
    allow_commits: Annotated[
        bool, typer.Option("--allow-commits", help="parts may come from different commits")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace the folder, if it exists")
    ] = False,
    newest_of: Annotated[
        list[str] | None,
        typer.Option(help="take only the newest run of a cell: its system changed; repeatable"),
    ] = None,
) -> int:
    """Put the cells of several run folders into one; see docs/maintaining.md.

    The exit status is 1 if cells are missing, which are listed.
    """
    from djinn_lib.publishing.merge import merge_parts

    return merge_parts(run_dir, parts, allow_commits, replace, newest_of or ())


@app.command(rich_help_panel=_PUBLISHING)
@_in_words
def publish(
    run_dir: Annotated[Path, typer.Argument(help="a finished run")],
    replace: Annotated[bool, typer.Option("--replace", help="replace what is published")] = False,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="take a changed working tree")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="take a run that misses cells")
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="keep only its rows, as data/reference/NAME"),
    ] = None,
) -> None:
    """Make a finished run the reference; see docs/maintaining.md."""
    from djinn_lib.publishing import publish as publishing

    run_dir, how = run_dir.expanduser().resolve(), (replace, allow_dirty, unfinished)
    if beside is not None:
        print(f"published: {publishing.publish_rows(run_dir, beside, *how)}")
        return
    publishing.publish(run_dir, *how)
    print("published; next: python -m djinn_lib.publishing.pages, then the tests")


for _served in (commands.serve, commands.ring):
    app.command(rich_help_panel=_SERVING)(_served)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
