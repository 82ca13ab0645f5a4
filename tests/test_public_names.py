"""What `import djinn_lib as dj` offers, as people find it: by completion, `dir` and `help`."""

import subprocess
import sys
from importlib import metadata

import djinn_lib as dj
from djinn_lib import errors


def test_every_name_that_is_listed_is_there():
    assert dir(dj) == sorted(dj.__all__)
    for name in dj.__all__:
        assert getattr(dj, name) is not None
    assert dj.__version__ == metadata.version("djinn-lib")


def test_every_error_is_exported():
    classes = {n: e for n, e in vars(errors).items() if isinstance(e, type)}
    ours = {n for n, e in classes.items() if issubclass(e, dj.DjinnError)}
    assert ours <= set(dj.__all__)


def test_listing_names_imports_no_torch():
    code = "import sys, djinn_lib as dj; dir(dj); dj.DjinnError; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
