"""What `add` shows: a bar of bytes, the steps, or nothing."""

import pytest
from tiny import spec
from tqdm import notebook, tqdm

import djinn_lib as dj
from djinn_lib.engine.serving import progress as module
from djinn_lib.engine.serving.progress import progress_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    spec("llama", "float32").build().save_pretrained(folder)
    return folder


def added(folder, source, **options):
    with dj.Djinn("1MiB", "cpu", "16KiB", decode="graph", max_model_len=40, **options) as djinn:
        djinn.add("m", source)
        return djinn.masters.n_bytes


@pytest.mark.parametrize("kind", ["folder", "plain"])
def test_the_bar_counts_every_byte_of_the_weights(folder, kind, monkeypatch, capfd):
    bars, read = [], []

    class Bar(tqdm):
        def update(self, n=1):
            read.append(n)
            return super().update(n)

        def close(self):
            bars.append((self.desc, self.n, self.total))
            super().close()

    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(module, "_SHOWN_AFTER_S", 0)
    plain = dj.ModelSpec(spec("llama").config, init="plain")
    n_bytes = added(folder, {"folder": folder, "plain": plain}[kind])
    assert bars[0] == ("m: recording the decode step: ", n_bytes, n_bytes)
    assert 0.99 * n_bytes <= sum(read) <= n_bytes  # all but what aligns them
    shown = capfd.readouterr()
    assert "m: reading weights" in shown.err and not shown.out
    assert "Loading weights" not in shown.err  # transformers' own


def test_silence_and_a_function_that_is_told(folder, capfd):
    added(folder, folder, progress=False)
    assert capfd.readouterr() == ("", "")
    steps = []
    added(folder, folder, progress=steps.append)
    assert steps[0].startswith("m: ") and steps[-1] == "m: recording the decode step"
    assert capfd.readouterr() == ("", "")


def test_a_failure_closes_the_bar(monkeypatch, capfd):
    monkeypatch.setattr(module, "_SHOWN_AFTER_S", 0)
    with pytest.raises(OSError), progress_of(True, "m", 10) as progress:
        progress.advance(5)
        raise OSError
    assert not tqdm._instances


def test_in_a_notebook_the_bar_disappears_and_stays_red_only_after_a_failure(folder, monkeypatch):
    bars = []

    class Bar(notebook.tqdm):
        def close(self):
            super().close()
            bars.append(self)

    monkeypatch.setattr(module, "tqdm", Bar)
    added(folder, folder)
    (done,) = bars
    assert done.container.children[1].bar_style != "danger"
    assert done.container.layout.visibility == "hidden"
    with pytest.raises(OSError), progress_of(True, "m", 10) as progress:
        progress.advance(5)
        raise OSError
    assert bars[1].container.children[1].bar_style == "danger"
