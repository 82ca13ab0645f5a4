"""The public object: tokens and bytes never depend on residency."""

import json
import random
import time

import pytest
import torch
from tiny import CONFIGS, PROMPT, VOCAB, ordinary_tokens, saved, spec

import djinn_lib as dj
from djinn_lib import ModelSpec
from djinn_lib.engine.memory.devices import base
from djinn_lib.engine.memory.layout import ALIGNMENT_BYTES
from djinn_lib.engine.memory.policies import POLICIES
from djinn_lib.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    LeaseError,
)
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
        for _ in range(24):
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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(dtype):
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        djinn.add("m", saved("mistral"), dtype=dtype)
        g = djinn.generate("m", PROMPT, 8, ignore_eos=True)
        with djinn.lease("m") as model:
            assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert g.token_ids == ordinary_tokens(saved("mistral"), 8, dtype)


def test_sharded_checkpoints(tmp_path):
    spec("qwen2-tied").build().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        djinn.add("m", tmp_path)
        g = djinn.generate("m", PROMPT, 8, ignore_eos=True)
    assert g.token_ids == ordinary_tokens(saved("qwen2-tied"), 8)


def test_tied_weights_are_stored_once():
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        djinn.add("m", saved("qwen2-tied"))
        with djinn.lease("m") as model:
            assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
            n_bytes = sum(p.numel() * 4 for p in model.parameters())
        assert abs(int(djinn.residency().bytes[0]) - n_bytes) < 256 * 50


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
    with pytest.raises(ConfigError, match=r"one of \('host', 'ring'\), got 'disk'"):
        dj.Djinn("2MiB", page=PAGE, embeddings="disk")
    with pytest.raises(ConfigError, match="cannot be combined with host_capacity"):
        dj.Djinn("2MiB", page=PAGE, embeddings="host", host_capacity="2MiB", swap_dir=tmp_path)
    with dj.Djinn("2MiB", page=PAGE, host_capacity="2MiB", swap_dir=tmp_path) as djinn:
        djinn.add("m", saved("phi"))
        n_bytes = sum(p.numel() * 4 for p in spec("phi").build().parameters())
        assert int(djinn.residency().bytes[0]) >= n_bytes


def test_plain_weights_do_not_depend_on_where_tables_are():
    plain = ModelSpec(CONFIGS["phi"], seed=3, init="plain")
    logits = []
    for embeddings in ("host", "ring"):
        with dj.Djinn("2MiB", page=PAGE, embeddings=embeddings) as djinn:
            djinn.add("m", plain)
            with djinn.lease("m") as model, torch.no_grad():
                logits.append(model(torch.tensor([PROMPT])).logits)
    assert torch.equal(*logits)


def test_a_spec_gives_the_same_model_as_its_saved_folder():
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        djinn.add("spec", spec("phi"))
        djinn.add("folder", saved("phi"))
        assert djinn.sha256("spec") == djinn.sha256("folder")
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


def test_generation_stops_at_eos_unless_told_not_to():
    with dj.Djinn("1MiB", page=PAGE) as djinn:
        djinn.add("m", saved("llama"))
        tokens = djinn.generate("m", PROMPT, 8, ignore_eos=True).token_ids
        third = tokens[2]
        with djinn.lease("m") as model:
            model.generation_config.eos_token_id = third
        assert djinn.generate("m", PROMPT, 8).token_ids == tokens[: tokens.index(third) + 1]
        assert djinn.generate("m", PROMPT, 8, ignore_eos=True).token_ids == tokens


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
        for model in rng.choices(FEW, k=10):  # that a repeat which starts cold knows nothing of
            djinn.generate(model, PROMPT, 1)
        for _ in range(2):
            djinn.reset()
            loaded = [djinn.generate(model, PROMPT, 1).loaded_bytes for model in requests]
            assert loaded == foretold[policy]["loaded_bytes"].tolist()
        as_lru = loaded == foretold["lru"]["loaded_bytes"].tolist()
        assert as_lru == (policy in ("lru", "lookahead"))  # nothing waits
        djinn.check()


def test_reset_does_nothing_while_a_model_is_leased():
    with dj.Djinn("2MiB", page=PAGE) as djinn:
        for name in ("llama", "phi"):
            djinn.add(name, saved(name))
            djinn.generate(name, PROMPT, 1)
        before = djinn.residency()
        with djinn.lease("phi"), pytest.raises(LeaseError, match="'phi'"):
            djinn.reset()
        assert djinn.residency().equals(before)
        djinn.reset()
        assert djinn.residency()["resident_bytes"].sum() == 0
        assert djinn.generate("phi", PROMPT, 1).loaded_bytes == before["bytes"][1]


class TestBadInput:
    @pytest.fixture(scope="class")
    def djinn(self):
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
    def test_prompts(self, djinn, prompt, n, message):
        with pytest.raises(ConfigError, match=message):
            djinn.generate("m", prompt, n)
        assert len(djinn.generate("m", PROMPT, 2, ignore_eos=True).token_ids) == 2

    def test_names(self, djinn):
        with pytest.raises(ConfigError, match=r"expected one of the models \['m'\]"):
            djinn.generate("nobody", PROMPT)
        with pytest.raises(ConfigError, match="already exists"):
            djinn.add("m", saved("phi"))

    def test_a_model_larger_than_the_ring(self, djinn):
        with dj.Djinn("128KiB", page=PAGE) as small:
            with pytest.raises(CapacityError, match="raise the capacity"):
                small.add("m", saved("llama"))
            assert small.residency().empty
        with pytest.raises(CapacityError, match="at least one page"):
            dj.Djinn("8KiB", page=PAGE)

    @pytest.mark.parametrize(
        "options",
        [
            {"capacity": "25GB"},
            {"capacity": -1},
            {"capacity": "1MiB", "page": "100B"},
            {"capacity": "1MiB", "page": PAGE, "policy": "best"},
            {"capacity": "1MiB", "page": PAGE, "eviction": "none"},
            {"capacity": "1MiB", "page": PAGE, "decode": "fast"},
        ],
        ids=str,
    )
    def test_parameters(self, options):
        with pytest.raises(ConfigError, match="expected"):
            dj.Djinn(**options)

    def test_folders(self, djinn, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            djinn.add("x", tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="got an empty folder: check the path"):
            djinn.add("x", tmp_path)
        (tmp_path / "readme.md").touch()
        with pytest.raises(CheckpointError, match=r"has no config\.json: check the folder"):
            djinn.add("x", tmp_path)
        with pytest.raises(ConfigError, match="dtype"):
            djinn.add("x", spec("llama"), dtype="int8")
        with pytest.raises(ConfigError, match="model_type"):
            djinn.add("x", dj.ModelSpec({"model_type": "no-such-model"}))

    def test_an_encoder(self, djinn):
        with pytest.raises(ConfigError, match="decoder-only"):
            djinn.add("x", dj.ModelSpec({"model_type": "vit"}))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("truncated", r"model-00002.*is truncated or corrupt.*download it again"),
            ("corrupt", r"model-00002.*is truncated or corrupt.*download it again"),
            (
                "missing tensor",
                r"no tensors for 1 weights of a llama, such as \['model.norm.weight'",
            ),
            ("misshapen", "config and weights do not belong together"),
            ("missing shard", r"lists shards that do not exist: \['model-00001"),
            ("pickle", r"pickled weights \(pytorch_model.bin\)"),
            ("quantised", r"a quantised checkpoint \(gptq, config.json\): serve it with vLLM"),
        ],
    )
    def test_weights(self, djinn, tmp_path, damage, message):
        spec("llama").build().save_pretrained(tmp_path, max_shard_size="100KB")
        shards = sorted(tmp_path.glob("*.safetensors"))
        match damage:
            case "truncated":
                shards[1].write_bytes(shards[1].read_bytes()[:-100])
            case "corrupt":
                shards[1].write_bytes(b"\xff" * 200)
            case "missing tensor":
                drop_tensor(tmp_path, "model.norm.weight")
            case "misshapen":
                change_config(tmp_path, intermediate_size=100)
            case "missing shard":
                shards[0].unlink()
            case "pickle":
                for path in [*shards, *tmp_path.glob("*.index.json")]:
                    path.unlink()
                torch.save({}, tmp_path / "pytorch_model.bin")
            case "quantised":
                change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
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
    from safetensors.torch import load_file, save_file

    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
