"""The public object: tokens and bytes never depend on residency."""

import json
import random
import time

import pytest
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, PROMPT, VOCAB, ordinary_tokens, saved, spec

import djinn_lib as dj
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES
from djinn_lib.engine.memory.policies import POLICIES
from djinn_lib.errors import CapacityError, CheckpointError, ConfigError, DjinnError, LeaseError
from djinn_lib.simulator.simulate import simulate

PAGE = "16KiB"


def addresses(module):
    return {name: p.data_ptr() for name, p in module.named_parameters()}


FEW = ["gpt2", "llama", "opt", "qwen2-tied"]


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (FEW, {}),
        pytest.param(sorted(CONFIGS), {}, marks=pytest.mark.slow),
        (FEW, {"overlap": False, "embeddings": "ring"}),
        (FEW, {"eviction": "models", "decode": "graph", "max_model_len": 40}),
    ],
    ids=str,
)
def test_tokens_and_bytes_after_any_evictions(names, options):
    rng = random.Random(1)
    expected = {name: ordinary_tokens(saved(name), 8) for name in names}
    assert len({len(set(tokens)) for tokens in expected.values()}) > 1  # not one repeated token
    with dj.Djinn("1MiB", page=PAGE, **options) as djinn:
        pointers = {}
        for name in names:
            djinn.add(name, saved(name))
            with djinn.lease(name) as model:
                pointers[name] = addresses(model)
        hashes = {name: djinn.sha256(name) for name in names}
        partial_hits = 0
        for _ in range(4 * len(names)):
            name = rng.choice(names)
            g = djinn.generate(name, PROMPT, 8, ignore_eos=True)
            assert g.token_ids == expected[name]
            djinn.check()
            partial_hits += g.resident_before_bytes > 0 and g.loaded_bytes > 0
        assert (partial_hits > 0) == (options.get("eviction") != "models")
        assert all(djinn.sha256(name) == hashes[name] for name in names)
        for name in names:
            with djinn.lease(name) as model:
                assert addresses(model) == pointers[name]


def test_lookup_tables_stay_in_the_host():
    """Nobody loads them, they are read where the master has them, and it makes no difference."""
    table_bytes = VOCAB * 64 * 4
    with (
        dj.Djinn("2MiB", page=PAGE) as host,
        dj.Djinn("2MiB", page=PAGE, embeddings="ring") as ring,
    ):
        for djinn in (host, ring):
            djinn.add("m", saved("phi"))
        less = int(ring.residency().bytes[0]) - int(host.residency().bytes[0])
        assert table_bytes <= less < table_bytes + 256
        expected = ordinary_tokens(saved("phi"), 8)
        for djinn in (host, ring):
            g = djinn.generate("m", PROMPT, 8, ignore_eos=True)
            assert g.token_ids == expected
            assert g.loaded_bytes == int(djinn.residency().resident_bytes[0])
        with host.lease("m") as model:
            table = model.get_input_embeddings().weight
            master = host.masters.layout("m").views(host.masters.master("m"))
            assert table.data_ptr() == master["model.embed_tokens.weight"].data_ptr()
            assert model.lm_head.weight.data_ptr() != master["lm_head.weight"].data_ptr()
        assert abs(host.masters.n_bytes - ring.masters.n_bytes) < ALIGNMENT_BYTES


def test_places_of_lookup_tables(tmp_path):
    with pytest.raises(ConfigError, match="cannot be combined with host_capacity"):
        dj.Djinn("2MiB", page=PAGE, embeddings="host", host_capacity="2MiB", swap_dir=tmp_path)
    with dj.Djinn("2MiB", page=PAGE, host_capacity="2MiB", swap_dir=tmp_path) as djinn:
        djinn.add("m", saved("phi"))
        n_bytes = sum(p.numel() * 4 for p in spec("phi").build().parameters())
        assert int(djinn.residency().bytes[0]) >= n_bytes


def test_a_spec_gives_the_same_model_as_its_folder_in_one_file_or_several(tmp_path):
    spec("phi").build().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        sources = {"spec": spec("phi"), "folder": saved("phi"), "shards": tmp_path}
        assert len({djinn.add(name, source) and djinn.sha256(name)
                    for name, source in sources.items()}) == 1  # fmt: skip
        djinn.add("other seed", spec("phi", seed=6))
        assert djinn.sha256("spec") != djinn.sha256("other seed")


def test_a_generation_tells_what_it_cost():
    with dj.Djinn("1MiB", page=PAGE) as djinn:
        djinn.add("m", saved("llama"))
        n_bytes = int(djinn.residency().bytes[0])
        miss = djinn.generate("m", PROMPT, 4, ignore_eos=True)
        hit = djinn.generate("m", PROMPT, 4, ignore_eos=True)
    assert (miss.resident_before_bytes, miss.loaded_bytes) == (0, n_bytes)
    assert (hit.resident_before_bytes, hit.loaded_bytes, hit.stall_ms) == (n_bytes, 0, 0.0)
    for g in (miss, hit):
        assert 0 < g.ttft_ms < g.total_ms
        assert g.total_ms == pytest.approx(g.ttft_ms + g.decode_ms)
        assert g.stall_ms <= g.switch_ms <= g.ttft_ms


@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_what_a_prefill_waits_for_is_part_of_the_switch(monkeypatch, decode):
    real = base.copy_page

    def slow(target, source):
        time.sleep(0.004)
        real(target, source)

    with dj.Djinn("1MiB", page=PAGE, decode=decode, max_model_len=40) as djinn:
        djinn.add("m", saved("llama"))
        djinn.evict("m")
        monkeypatch.setattr(base, "copy_page", slow)
        g = djinn.generate("m", PROMPT, 4, ignore_eos=True)
    assert 0 < g.stall_ms <= g.switch_ms <= g.ttft_ms
    assert g.switch_ms > 20  # of 34 pages; how much of it is stall hangs on who else computes


def test_evict_remove_and_residency():
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        for name in ("llama", "phi"):
            djinn.add(name, saved(name))
            djinn.generate(name, PROMPT, 1)
        table = djinn.residency()
        assert list(table.columns) == ["model", "bytes", "resident_bytes", "frames"]
        assert (table.bytes == table.resident_bytes).all()
        assert (table.frames == -(-table.bytes // djinn.page_bytes)).all()
        assert djinn.evict("llama") == table.bytes[0]
        assert djinn.residency().frames.tolist()[0] == 0
        with djinn.lease("phi"), pytest.raises(LeaseError):
            djinn.remove("phi")
        djinn.remove("llama")
        assert djinn.residency().model.tolist() == ["phi"]
        djinn.add("llama", saved("llama"))
        assert djinn.generate("llama", PROMPT, 2).loaded_bytes > 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_decides_as_the_simulator_foretells(policy):
    rng = random.Random(2)
    requests = rng.choices(FEW, [1 / (i + 1) for i in range(len(FEW))], k=30)
    with dj.Djinn("1MiB", page=PAGE, policy=policy) as djinn:
        for name in FEW:
            djinn.add(name, saved(name))
        table = djinn.residency().set_index("model")["bytes"]
        foretold = {
            p: simulate(requests, table.to_dict(), "1MiB", p, page_bytes=djinn.page_bytes)
            for p in {policy, "lru"}
        }
        for model in rng.choices(FEW, k=5):  # that what starts cold knows nothing of
            djinn.generate(model, PROMPT[:1], 1)
        djinn.reset()
        loaded = [djinn.generate(model, PROMPT[:1], 1).loaded_bytes for model in requests]
        assert loaded == foretold[policy]["loaded_bytes"].tolist()
        as_lru = loaded == foretold["lru"]["loaded_bytes"].tolist()
        assert as_lru == (policy in ("lru", "lookahead"))  # nothing waits
        djinn.check()


@pytest.fixture(scope="module")
def djinn():
    with dj.Djinn("1MiB", page=PAGE) as djinn:
        djinn.add("m", saved("llama"))
        yield djinn


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [
        ([], 4, "at least 1 token"),
        ([VOCAB], 4, "tokenised for another model"),
        ([-1], 4, "token ids from 0"),
        ([1], 0, "max_new_tokens"),
        ("text", 4, "no tokenizer"),
    ],
)
def test_prompts_that_are_refused(djinn, prompt, n, message):
    with pytest.raises(ConfigError, match=message):
        djinn.generate("m", prompt, n)
    assert len(djinn.generate("m", PROMPT, 2, ignore_eos=True).token_ids) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "does not exist"),
        (".", "got an empty folder"),
        (dj.ModelSpec({"model_type": "no-such-model"}), "model_type"),
        (dj.ModelSpec({"model_type": "vit"}), "decoder-only"),
    ],
    ids=["no folder", "an empty folder", "no architecture", "an encoder"],
)
def test_sources_that_are_no_model(djinn, tmp_path, source, message):
    with pytest.raises(DjinnError, match=message):
        djinn.add("x", tmp_path / source if isinstance(source, str) else source)


def test_names_and_sizes_that_are_refused(djinn):
    with pytest.raises(ConfigError, match=r"expected one of the models \['m'\]"):
        djinn.generate("nobody", PROMPT)
    with pytest.raises(ConfigError, match="already exists"):
        djinn.add("m", saved("phi"))
    with dj.Djinn("128KiB", page=PAGE) as small:
        with pytest.raises(CapacityError, match="raise the capacity"):
            small.add("m", saved("llama"))
        assert small.residency().empty


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards: shards[1].write_bytes(shards[1].read_bytes()[:-100]), "is truncated or"),
        (lambda shards: drop_tensor(shards[0].parent, "model.norm.weight"), "no tensors for 1 w"),
        (lambda shards: change_config(shards[0].parent, intermediate_size=100), "do not belong"),
    ],
    ids=["truncated", "missing tensor", "misshapen"],
)
def test_damaged_weights_leave_nothing(djinn, tmp_path, damage, message):
    spec("llama").build().save_pretrained(tmp_path, max_shard_size="100KB")
    damage(sorted(tmp_path.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match=message):
        djinn.add("x", tmp_path)
    assert djinn.residency().model.tolist() == ["m"]  # nothing half added
    assert djinn.generate("m", PROMPT, 2).token_ids
    djinn.add("x", saved("phi"))  # the name is free
    djinn.remove("x")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop_tensor(folder, name):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
