"""The notebooks that newcomers open first, run in JupyterLab in a real browser.

Executing a copy shows neither widgets nor what a change of a menu draws. This does, on copies in a
folder of its own. It needs Playwright and a Chromium (Debian, Ubuntu: apt install chromium).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from djinn_lib.paths import NOTEBOOKS, python_path

pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")
pytestmark = pytest.mark.slow

OPENED = ("00_start_here.ipynb", "explore.ipynb")
STARTED_S, RUN_S = 60, 120
OWN_FOLDERS = (
    "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as of a user who has cloned the repository, with copies of the notebooks."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    for name in OPENED:
        shutil.copy(NOTEBOOKS / name, root / "notebooks" / name)
    return root


@pytest.fixture(scope="module")
def lab(
    browser: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What a running JupyterLab says of itself: its address and its token."""
    settings = tmp_path_factory.mktemp("settings")
    own = {name: str(settings / name.lower()) for name in OWN_FOLDERS}
    environment = {**os.environ, **own, "PYTHONPATH": python_path()}
    environment.pop("MPLBACKEND", None)  # of these tests: figures would not be shown
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--LabApp.expose_app_in_browser=True",
        f"--ServerApp.root_dir={folder}", *(["--allow-root"] if os.geteuid() == 0 else []),
    ]  # fmt: skip
    said = settings / "server.log"
    with said.open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield address_of(server, Path(own["JUPYTER_RUNTIME_DIR"]), said)
    finally:
        server.terminate()  # ends its kernels as well
        server.wait(timeout=30)


def address_of(server: subprocess.Popen[Any], runtime: Path, said: Path) -> dict[str, Any]:
    """Wait until a server listens; return its address and token."""
    about, end_s = runtime / f"jpserver-{server.pid}.json", time.monotonic() + STARTED_S
    while server.poll() is None and time.monotonic() < end_s:
        if about.exists() and (text := about.read_text()):
            return json.loads(text)
        time.sleep(0.1)
    server.kill()
    pytest.fail(f"JupyterLab did not start: {said.read_text()[-2000:]}")


@pytest.fixture
def page(browser: Any, lab: dict[str, Any], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A notebook that was opened and run with "Run All Cells"."""
    view = browser.new_page(viewport={"width": 1300, "height": 1000})
    view.set_default_timeout(1000 * RUN_S)
    view.goto(f"{lab['url']}lab/tree/notebooks/{request.param}?token={lab['token']}&reset")
    view.wait_for_function(IS_READY)
    assert view.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')"), (
        "a cell failed: " + json.dumps(outputs(view))[-2000:]
    )
    yield view
    view.close()


IS_READY = """() => {
  const open = window.jupyterapp?.shell.currentWidget?.sessionContext;
  return open?.session?.kernel?.status === "idle";
}"""


def outputs(page: Any) -> list[dict[str, Any]]:
    """The outputs of all cells of the open notebook."""
    cells = page.evaluate("jupyterapp.shell.currentWidget.content.model.toJSON().cells")
    return [output for cell in cells for output in cell.get("outputs", [])]


def assert_nothing_was_printed(page: Any) -> None:
    """What is printed on stderr has a pink background; none of our notebooks prints."""
    assert [one for one in outputs(page) if one["output_type"] in ("error", "stream")] == []


@pytest.mark.parametrize("page", OPENED[:1], indirect=True)
def test_the_first_notebook_shows_its_pictures(page: Any):
    assert_nothing_was_printed(page)
    kinds = [kind for output in outputs(page) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 3 and kinds.count("text/html") == 3
    assert outputs(page)[-1]["data"]["text/plain"] == "True"  # the same tokens


@pytest.mark.parametrize("page", OPENED[1:], indirect=True)
def test_the_explorer_draws_what_its_menus_say(page: Any, folder: Path):
    assert_nothing_was_printed(page)
    picture = page.locator(".jp-OutputArea img.widget-image")
    page.wait_for_function(IS_DRAWN)
    before = picture.get_attribute("src")
    assert picture.bounding_box()["width"] < 1300
    menus = page.locator(".widget-dropdown")
    menu = {menus.nth(i).inner_text().split("\n")[0]: menus.nth(i) for i in range(menus.count())}
    assert set(menu) >= {"traffic", "number of models", "policy"}
    assert menu["number of models"].locator("select").is_disabled()
    menu["traffic"].locator("select").select_option("sessions")
    page.wait_for_function(IS_ANOTHER, arg=before)
    assert menu["number of models"].locator("select").is_enabled()
    page.get_by_role("button", name="keep this picture").click()
    page.get_by_text("kept: ").wait_for()
    assert (folder / "data" / "runs" / "explore" / "explore.png").stat().st_size > 10_000


IS_DRAWN = "document.querySelector('img.widget-image')?.naturalWidth > 100"
IS_ANOTHER = "before => document.querySelector('img.widget-image').src !== before"
