"""README.md says what the reference rows say."""

from pathlib import Path

from djinn_lib import readme

README = Path(__file__).parent.parent / "README.md"


def test_tables_are_those_of_the_reference():
    text = README.read_text()
    assert readme.render(text) == text, "run python -m djinn_lib.readme"


def test_every_table_stands_in_the_readme():
    text = README.read_text()
    for name, table in readme.TABLES.items():
        assert f"<!-- begin {name} -->\n{table()}<!-- end {name} -->" in text


def test_a_stale_table_is_made_anew():
    stale = "before\n<!-- begin engine pages -->\n| old |\n<!-- end engine pages -->\nafter\n"
    made = readme.render(stale)
    assert "| old |" not in made and made.startswith("before\n") and made.endswith("after\n")
    assert readme.engine_pages() in made
