"""Compressed masters: models that come back, damage that is found, memory given back."""

import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_files import n_open
from tiny import PROMPT, spec
from weights import fill_with, layout_of, weights_of

import djinn_lib as dj
from djinn_lib.engine.memory import opening
from djinn_lib.engine.memory.compressed import compress
from djinn_lib.engine.memory.compressed.encode import encode
from djinn_lib.engine.memory.compressed.form import Sections
from djinn_lib.engine.memory.compressed.masters import CompressedMasters
from djinn_lib.engine.memory.compressed.page import CompressedPage
from djinn_lib.engine.memory.disk_tier import DiskTier
from djinn_lib.engine.memory.layout import Layout
from djinn_lib.engine.memory.masters import HostMasters
from djinn_lib.engine.memory.opening import open_masters
from djinn_lib.errors import CapacityError, ConfigError, DjinnError, PlatformError

PAGE = 16 << 10
CPU = torch.device("cpu")


LAYOUTS = st.lists(
    st.tuples(
        st.integers(1, 3 * PAGE),
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64]),
        st.booleans(),  # random bits, which do not shrink
    ),
    min_size=1,
    max_size=6,
)


def filled(drawn, n_tables):
    """A layout of tensors of so many bytes each, and its bytes."""
    shaped = [
        (f"t{i}", (max(1, n_bytes // dtype.itemsize),), dtype)
        for i, (n_bytes, dtype, _) in enumerate(drawn)
    ]
    n_paged = max(1, len(shaped) - n_tables)
    layout = Layout.pack(shaped[:n_paged], shaped[n_paged:])
    content = torch.zeros(layout.n_bytes, dtype=torch.uint8)
    for i, (slot, (_, _, is_random)) in enumerate(zip(layout.slots, drawn, strict=True)):
        view = slot.view(content)
        if slot.dtype.is_floating_point and not is_random:
            view.normal_(0, 0.02)
        else:
            generator = torch.Generator().manual_seed(i)
            view.view(torch.uint8).random_(0, 256, generator=generator)
    return layout, content


@given(drawn=LAYOUTS, n_tables=st.integers(0, 2))
def test_models_of_mixed_dtypes_come_back(drawn, n_tables):
    layout, content = filled(drawn, n_tables)
    masters, plain = CompressedMasters(HostMasters(), PAGE), HostMasters()

    def fill(views):
        for name, view in layout.views(content).items():
            views[name].copy_(view)

    for each in (masters, plain):
        each.add("m", layout, fill)
    for begin in range(0, layout.paged_bytes, PAGE):
        end = min(begin + PAGE, layout.paged_bytes)
        assert torch.equal(plain_page(masters, "m", begin, end), content[begin:end])
    tables = masters.tables("m", CPU)
    for name, view in layout.table_views(content).items():
        assert torch.equal(tables[name].view(torch.uint8), view.view(torch.uint8))
        assert tables[name].data_ptr() % 64 == 0
    assert masters.sha256("m") == plain.sha256("m")
    assert masters.n_bytes == masters.sizes()["m"].stored <= plain.n_bytes
    masters.close()


def plain_page(masters, model, begin, end):
    page = masters.read(model, begin, end)
    if isinstance(page, CompressedPage):
        page.copy_to(target := torch.empty(end - begin, dtype=torch.uint8))
        return target
    return page


@pytest.mark.parametrize("section", Sections._fields)
def test_what_does_not_decode_to_the_same_is_never_kept(section, monkeypatch):
    normal = torch.empty(PAGE, dtype=torch.float16).normal_(0, 0.02)
    weights = normal.view(torch.uint8).numpy()  # two pages
    layout, fill = Layout.pack([("w", (PAGE,), torch.float16)]), fill_with(torch.tensor(weights))

    def wrong(words, bits):
        compressed, form = encode(words, bits)
        at = getattr(form.sections, section)
        compressed[at] ^= 0x55
        return compressed, form

    monkeypatch.setattr(compress, "encode", wrong)
    pool = CompressedMasters(HostMasters(), PAGE)
    with pytest.raises(DjinnError, match=r"do not decode to the same bytes: use masters='plain'"):
        pool.add("m", layout, fill)
    assert pool.n_bytes == 0 and pool.sizes() == {}
    monkeypatch.undo()
    pool.add("m", layout, fill)
    assert np.array_equal(plain_page(pool, "m", 0, PAGE).numpy(), weights[:PAGE])


def test_threads_end_with_the_work():
    pool = CompressedMasters(HostMasters(), PAGE)
    pool.add("m", layout_of(8 * PAGE), fill_with(weights_of(8 * PAGE)))
    assert not [t for t in threading.enumerate() if t.name.startswith("djinn-compressor")]


@pytest.mark.parametrize(("dtype", "shrinks"), [("bfloat16", True), ("float32", False)])
def test_auto_compresses_what_gets_smaller(dtype, shrinks):
    with dj.Djinn("1MiB", "cpu", page=PAGE, masters="auto") as djinn:
        djinn.add("m", spec("llama", dtype))
        plain, stored = djinn.stats().masters["m"]
        assert (stored < 0.9 * plain) == shrinks
        assert (stored == plain) == (not shrinks)
        assert (", masters of " in repr(djinn)) == shrinks


def test_auto_leaves_plain_what_saves_too_little():
    shaped = [("w", (PAGE // 2,), torch.bfloat16), ("x", (10 * PAGE,), torch.float32)]
    content = weights_of(41 * PAGE)
    pool = CompressedMasters(HostMasters(), PAGE, if_worthwhile=True)
    pool.add("m", Layout.pack(shaped), fill_with(content))
    assert pool.sizes()["m"].stored == pool.sizes()["m"].plain
    assert torch.equal(pool.read("m", 0, PAGE), content[:PAGE])


# -- damage --------------------------------------------------------------------------------------


def damaged(pool, model, page):
    """Change one byte in the middle of a stored page."""
    stored = pool.read(model, page * PAGE, (page + 1) * PAGE).pieces[0]
    stored[len(stored) // 2] ^= 4


def test_damage_is_found_and_named():
    pool = CompressedMasters(HostMasters(), PAGE)
    pool.add("m", layout_of(4 * PAGE), fill_with(weights_of(4 * PAGE)))
    damaged(pool, "m", 2)
    plain_page(pool, "m", PAGE, 2 * PAGE)
    with pytest.raises(DjinnError, match=r"page 2 of 'm' has changed in host memory .* add it"):
        plain_page(pool, "m", 2 * PAGE, 3 * PAGE)
    with pytest.raises(DjinnError, match="page 2 of 'm'"):
        pool.sha256("m")


def test_a_request_that_needs_damaged_weights_fails_and_others_go_on():
    with dj.Djinn("2MiB", "cpu", page=PAGE, masters="compressed") as djinn:
        for name in ("good", "bad"):
            djinn.add(name, spec("llama", "bfloat16"))
        expected = djinn.generate("bad", PROMPT, 4, ignore_eos=True).token_ids
        djinn.evict("bad")
        damaged(djinn.masters, "bad", 1)
        with pytest.raises(DjinnError, match="page 1 of 'bad' has changed in host memory"):
            djinn.generate("bad", PROMPT, 4, ignore_eos=True)
        assert djinn.generate("good", PROMPT, 4, ignore_eos=True).token_ids == expected
        djinn.check()  # of the damaged model only what is resident, which is good
        damaged(djinn.masters, "good", 0)
        with pytest.raises(DjinnError, match="page 0 of 'good' has changed in host memory"):
            djinn.check()
        djinn.remove("bad")
        djinn.add("bad", spec("llama", "bfloat16"))
        assert djinn.generate("bad", PROMPT, 4, ignore_eos=True).token_ids == expected


# -- on disk -------------------------------------------------------------------------------------


@pytest.fixture
def on_disk(tmp_path):
    tier = DiskTier(8 * PAGE, PAGE, tmp_path)
    yield CompressedMasters(tier, PAGE), tier
    tier.close()


def test_the_disk_tier_keeps_compressed_pages(on_disk):
    pool, tier = on_disk
    contents = {name: weights_of(10 * PAGE, seed) for seed, name in enumerate("ab")}
    for name, content in contents.items():
        pool.add(name, layout_of(10 * PAGE), fill_with(content))
    assert [tier.ring.n_pages(name) for name in "ab"] == [7, 7]
    for name in "abab":
        before = tier.bytes_read
        pool.hold(name)
        assert tier.bytes_read - before <= 7 * PAGE
        for begin in range(0, 10 * PAGE, PAGE):
            page = plain_page(pool, name, begin, begin + PAGE)
            assert torch.equal(page, contents[name][begin : begin + PAGE])
        pool.let_go(name)
        tier.ring.check()
    assert max(len(pool.read("b", i * PAGE, (i + 1) * PAGE).pieces) for i in range(10)) == 2
    assert pool.sha256("a") != pool.sha256("b")


def test_a_model_that_fits_host_memory_only_when_it_is_compressed(on_disk, tmp_path):
    pool, _ = on_disk
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CapacityError, match=r"host_capacity of at least 144\.0 KiB for"):
        pool.add("large", layout_of(13 * PAGE), fill_with(weights_of(13 * PAGE)))
    assert len(os.listdir("/proc/self/fd")) == n_open and not list(tmp_path.iterdir())
    pool.add("m", layout_of(11 * PAGE), fill_with(weights_of(11 * PAGE)))
    assert pool.sizes()["m"].stored <= 8 * PAGE < pool.sizes()["m"].plain


# -- the option ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("qwen2-tied", "bfloat16"), ("gpt2", "float16")])
def test_tokens_are_those_of_plain_masters(name, dtype):
    model = spec(name, dtype)
    tokens, hashes = [], []
    for masters in ("plain", "compressed"):
        with dj.Djinn("1MiB", "cpu", page=PAGE, masters=masters) as djinn:
            djinn.add("m", model)
            tokens.append(djinn.generate("m", PROMPT, 8, ignore_eos=True).token_ids)
            hashes.append(djinn.sha256("m"))
            djinn.check()
    assert tokens[0] == tokens[1] and hashes[0] == hashes[1]


@pytest.mark.parametrize("host_capacity", [None, "2MiB"])
def test_an_audit_while_a_model_is_compressed(host_capacity, tmp_path):
    audits = []

    def audit(step):
        djinn.check()
        audits.append(step)

    options = {"host_capacity": host_capacity, "swap_dir": tmp_path, "progress": audit}
    with dj.Djinn("1MiB", "cpu", page=PAGE, masters="compressed", **options) as djinn:
        djinn.add("m", spec("llama", "bfloat16"))
    assert len(audits) >= 2


@pytest.mark.parametrize("host_capacity", [None, "2MiB"])
def test_closing_while_a_model_is_compressed(host_capacity, tmp_path):
    options = {"host_capacity": host_capacity, "swap_dir": tmp_path}
    djinn = dj.Djinn("1MiB", "cpu", page=PAGE, masters="compressed", **options,
                     progress=lambda step: djinn.close())  # fmt: skip
    masters = djinn.masters
    with pytest.raises(DjinnError, match="this Djinn was closed"):
        djinn.add("m", spec("llama", "bfloat16"))
    assert masters.n_bytes == 0 and masters.sizes() == {} and n_open(tmp_path) == 0


def test_options_that_cannot_be(monkeypatch):
    with pytest.raises(ConfigError, match="masters to be one of"):
        dj.Djinn("1MiB", "cpu", page=PAGE, masters="zip")
    with pytest.raises(ConfigError, match="multiple of 256 bytes for compressed masters"):
        open_masters(None, 64, form="compressed")  # some would lie between two tensors
    monkeypatch.setattr(opening, "find_spec", lambda name: None)
    cuda = torch.device("cuda")
    with pytest.raises(PlatformError, match="needs the package triton"):
        opening.choose_masters("compressed", cuda)
    assert opening.choose_masters("auto", cuda) == "plain"
    assert opening.choose_masters("compressed", CPU) == "compressed"


def test_only_whole_pages_are_read():
    pool = CompressedMasters(HostMasters(), PAGE)
    pool.add("m", layout_of(2 * PAGE), fill_with(weights_of(2 * PAGE)))
    for begin, end in ((0, 2 * PAGE), (0, PAGE - 1), (64, PAGE)):
        with pytest.raises(ConfigError, match="expected one page of 16384 bytes of 'm'"):
            pool.read("m", begin, end)


def test_a_model_that_is_still_being_added_cannot_be_read():
    seen = []

    def look(step):
        with pytest.raises(ConfigError, match="not in host memory: add it"):
            pool.read("m", 0, PAGE)
        seen.append(step)

    pool = CompressedMasters(HostMasters(), PAGE)
    pool.add("m", layout_of(2 * PAGE), fill_with(weights_of(2 * PAGE)), look)
    assert seen[0].startswith("compressing; ") and seen[-1].startswith("compressed 32.0 KiB of ")
    assert isinstance(pool.read("m", 0, PAGE), CompressedPage)
    pool.discard("m")
    for ask in (lambda: pool.read("m", 0, PAGE), lambda: pool.sha256("m")):
        with pytest.raises(ConfigError, match="not in host memory: add it"):
            ask()
