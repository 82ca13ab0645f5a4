"""A `Djinn` and its models as people hold them in a notebook: handles, containers, pictures."""

import asyncio
import copy
from xml.etree import ElementTree

import pytest
from forked import in_a_child
from tiny import PROMPT, spec

import djinn_lib as dj
from djinn_lib.engine.pictures import ModelState, picture
from djinn_lib.errors import ConfigError, DjinnError


@pytest.fixture
def djinn():
    with dj.Djinn(
        "1MiB", "cpu", "16KiB", decode="graph", max_model_len=40, progress=False
    ) as djinn:
        djinn.add("a", spec("llama"))
        djinn.add("b", spec("phi"))
        yield djinn


def test_a_handle_does_what_the_djinn_does(djinn):
    a = djinn["a"]
    want = djinn.generate("a", PROMPT, 5, True).token_ids
    assert a.generate(PROMPT, 5, True).token_ids == want
    assert [g.token_ids for g in a.generate([PROMPT, PROMPT], 5, True)] == [want, want]
    assert a.submit(PROMPT, sampling=dj.Sampling(max_new_tokens=5, ignore_eos=True)).result(
    ).token_ids == want  # fmt: skip
    assert tuple(a.stream(PROMPT, 5, True)) == want

    async def awaited():
        pieces = [piece async for piece in a.astream(PROMPT, 5, True)]
        return (await a.agenerate(PROMPT, 5, True)).token_ids, tuple(pieces)

    assert asyncio.run(awaited()) == (want, want)
    for ask in (a.chat, a.tokenize):
        with pytest.raises(ConfigError, match=r"'a'.*no tokenizer"):
            ask("hi")
    with a.lease() as model:
        assert model.config.model_type == "llama"
    assert (a.name, a.decode_mode) == ("a", djinn.decode_modes["a"])


def test_what_a_handle_says_of_its_pages(djinn):
    a = djinn["a"]
    table = djinn.residency().set_index("model")
    a.generate(PROMPT, 2)
    assert a.n_bytes == table.bytes["a"] == a.resident_bytes and a.residency == 1
    assert ", 100% resident, " in repr(a)
    assert a.evict() == a.n_bytes
    assert a.resident_bytes == a.residency == 0
    assert ", 0% resident, " in repr(a) and "0 B of " in str(a._repr_html_())


def test_the_table_of_residency_while_a_model_is_removed(djinn, monkeypatch):
    seen = []
    monkeypatch.setattr(djinn.masters, "discard", lambda name: seen.append(djinn.residency()))
    djinn.remove("a")  # its pages are freed before its master
    assert list(seen[0].model) == ["b"]


def test_a_handle_while_its_model_is_removed_or_its_djinn_closed(djinn, monkeypatch):
    a, seen = djinn["a"], []

    def look(name):
        with pytest.raises(ConfigError, match="the model 'a' of this handle was removed"):
            a.residency  # noqa: B018
        seen.append((repr(a), a._repr_html_()))

    monkeypatch.setattr(djinn.masters, "discard", look)  # its pages are gone, it is still listed
    djinn.remove("a")
    assert seen == [("Model('a', removed)", None)]
    b = djinn["b"]
    shown = in_a_child(lambda: f"{b!r} {b._repr_html_()}")
    assert shown == ("Model('b', of another process) None", 0)
    with monkeypatch.context() as patch:  # another thread closes it between a look and the next
        patch.setattr(type(djinn), "closed", False)
        djinn.close()
        assert repr(djinn) == "Djinn(closed)" and djinn._repr_html_() is None
        assert b._repr_html_() is None


def test_a_djinn_holds_models_by_name(djinn):
    assert "a" in djinn and "c" not in djinn and 5 not in djinn and [] not in djinn
    assert len(djinn) == 2 and list(djinn) == ["a", "b"] == djinn._ipython_key_completions_()
    assert djinn["a"] == djinn["a"] != djinn["b"] and len({djinn["a"], djinn["a"]}) == 1
    with pytest.raises(ConfigError, match=r"one of the models \['a', 'b'\], got 'c'"):
        djinn["c"]
    with pytest.raises(ConfigError, match=r"did you mean 'temperature'"):
        djinn["a"].generate(PROMPT, **{"temprature": 1})
    c = djinn.add("c", spec("gpt2"))
    assert c == djinn["c"] and c.generate([5], 2).n_new_tokens
    for name in djinn:  # the names as they were, while models go
        djinn.remove(name)
    assert len(djinn) == 0 and djinn


def test_a_handle_of_a_removed_model_is_of_no_other(djinn):
    before = djinn["a"]
    before.remove()
    djinn.add("a", spec("gpt2"))
    assert repr(before) == "Model('a', removed)" and before._repr_html_() is None
    assert before != djinn["a"]
    for ask in (lambda: before.generate([5]), before.evict, before.remove, before.lease):
        with pytest.raises(ConfigError, match="'a' of this handle was removed"):
            ask()
    assert djinn["a"].generate([5], 2).n_new_tokens


def test_what_a_djinn_says_of_itself(djinn):
    djinn.reset()
    assert "2 models, 0 B resident" in repr(djinn)
    with djinn.lease("a"):
        assert "in use" in djinn._repr_html_()
    a = djinn["a"]
    djinn.close()
    assert repr(djinn) == "Djinn(closed)" and djinn._repr_html_() is None
    assert repr(a) == "Model('a', closed)" and a._repr_html_() is None
    for ask in (lambda: len(djinn), lambda: "a" in djinn, lambda: djinn["a"]):
        with pytest.raises(DjinnError, match="closed"):
            ask()


def test_a_handle_is_not_copied_with_its_memory(djinn):
    with pytest.raises(DjinnError, match="cannot be copied"):
        copy.deepcopy(djinn["a"])


def test_the_picture():
    drawn = picture(
        [ModelState("<b>&", 400, 100), ModelState("half", 200, 200, is_used=True)], "1 < 2"
    )
    tree = ElementTree.fromstring(f"<div>{drawn}</div>")  # it is well formed
    bars = [[float(rect.get("width")) for rect in svg] for svg in tree.iter("svg")]
    assert bars == [[360, 90], [180, 180]]
    assert [name.text for name in tree.iter("b")] == ["<b>&", "half"]
    said = [one.text for one in tree.iter("span")]
    assert said == ["100 B of 400 B resident", "200 B of 200 B resident, in use"]
    assert picture([])
