import errno
import os

import pytest

from djinn_lib.files import write_atomically, write_json, write_text


def test_files_are_made_with_their_folders(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": [1, 2.5, None]})
    assert path.read_text() == '{\n  "x": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    write_text(path, "später")
    assert path.read_bytes() == "später".encode()


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")

    def half(partial):
        partial.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        OSError, match=r"file cannot be written \(No space .*: free space"
    ) as caught:
        write_atomically(path, half)
    assert caught.value.errno == 28
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EACCES, errno.ENOENT], ids=errno.errorcode.get
)
def test_an_error_keeps_its_class_and_names_the_path_that_was_given(tmp_path, number):
    path = tmp_path / "file"

    def refused(partial):
        raise OSError(number, os.strerror(number), str(partial))

    with pytest.raises(OSError, match=r"choose another path or correct its permi") as caught:
        write_atomically(path, refused)
    assert type(caught.value) is type(OSError(number, "")) and caught.value.errno == number
    said = str(caught.value)
    assert said.startswith(f"{path} cannot be written ({os.strerror(number)})")
    assert ".partial" not in said
