"""Lent models: whole while they are leased, refused in words afterwards, and never changed."""

import copy
import io
import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from forked import run_script
from safetensors.torch import load_file
from tiny import PROMPT, spec
from torch import nn

import djinn_lib as dj
from djinn_lib.engine.memory.devices import base
from djinn_lib.errors import LeaseError
from djinn_lib.paths import REPO

IDS = torch.tensor([PROMPT])
PAGE = "16KiB"


@pytest.fixture(scope="module")
def plain():
    """What transformers itself makes of the model; its lookup table is not tied to the head."""
    return spec("phi").build()


@pytest.fixture(scope="module")
def shared():
    """A `Djinn` for tests that leave it as it was; `served` makes sure of that."""
    with dj.Djinn("2MiB", "cpu", PAGE) as djinn:
        djinn.add("m", spec("phi"))
        djinn.add("tied", spec("qwen2-tied"))
        yield djinn


@pytest.fixture(scope="module")
def expected(shared):
    return shared.generate("m", PROMPT, 6, ignore_eos=True).token_ids


@pytest.fixture(scope="module")
def logits(plain):
    return plain(IDS).logits


@pytest.fixture
def djinn(shared, expected, plain, logits):
    yield shared
    shared.check()
    assert shared.generate("m", PROMPT, 6, ignore_eos=True).token_ids == expected
    with shared.lease("m") as model:
        assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
        assert torch.equal(model(IDS).logits, logits)


def head(model):
    return model.lm_head.weight


def table(model):
    return model.get_input_embeddings().weight


# -- outside a lease -------------------------------------------------------------------------

READINGS = {
    "repr": repr,
    "index": lambda w: w[0],
    "matmul": lambda w: w.T @ w,
    "sum": lambda w: w.sum(),
    "stack of views": lambda w: torch.stack(tuple(w)),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "numpy": lambda w: w.numpy(),
    "dlpack": torch.from_dlpack,
    "tolist": lambda w: w.tolist(),
    "address": lambda w: w.data_ptr(),
    "storage": lambda w: w.untyped_storage(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda w: torch.save(w, io.BytesIO()),
    "parameter": nn.Parameter,
    "write": lambda w: w.zero_(),
}
USES = {
    "forward": lambda model: model(IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=2),
    "a layer": lambda model: model.model.layers[0](torch.zeros(1, 3, 64)),
    "the head": lambda model: model.lm_head(torch.zeros(1, 64)),
    "state_dict": lambda model: model.state_dict(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "to": lambda model: model.to(torch.float16),
}


@pytest.mark.parametrize("weight", [head, table], ids=["paged", "in the host"])
def test_weights_cannot_be_read_outside_a_lease(djinn, weight):
    with djinn.lease("m") as model:
        pass
    for read in READINGS.values():
        with pytest.raises(LeaseError, match=r"only be read while it is leased: .*inside `with dj"):
            read(weight(model))


def test_a_model_cannot_be_used_outside_a_lease(djinn, tmp_path):
    with djinn.lease("m") as model:
        pass
    djinn.evict("m")
    for use in (*USES.values(), lambda model: model.save_pretrained(tmp_path)):
        with pytest.raises(LeaseError, match="inside `with djinn"):
            use(model)


@pytest.mark.parametrize(("end", "words"), [("remove", "it was removed"), ("close", "was closed")])
def test_the_model_of_a_name_that_is_gone(end, words):
    with dj.Djinn("1MiB", "cpu", PAGE) as djinn:
        djinn.add("m", spec("phi"))
        with djinn.lease("m") as model:
            kept = head(model).detach()
        getattr(djinn, end)(*["m"] * (end == "remove"))
        for use in (model, lambda _: repr(head(model)), model.model.layers[0]):
            with pytest.raises(LeaseError, match=words):
                use(IDS)
        with pytest.raises(LeaseError, match="outlived"):
            kept.sum()


def test_what_is_no_weight_can_be_looked_at(djinn, plain):
    with djinn.lease("m") as model:
        inside = head(model)
    djinn.evict("m")
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() >= plain.num_parameters() * 4
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    assert repr(model) == repr(plain)
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    for weight, ordinary in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(weight, nn.Parameter)
        assert not weight.requires_grad
        for fact in ("shape", "dtype", "device", "nbytes"):
            assert getattr(weight, fact) == getattr(ordinary, fact)
        assert (len(weight), weight.stride()) == (len(ordinary), ordinary.stride())
    assert inside in {inside} and head(model) is inside


def test_the_same_model_works_in_the_next_lease(djinn, plain):
    with djinn.lease("m") as model:
        weight = head(model)
    djinn.evict("m")
    with djinn.lease("m") as again:
        assert again is model and head(again) is weight
        assert torch.equal(weight, head(plain))


ALIASES = {
    "detach": lambda model: head(model).detach(),
    "data": lambda model: head(model).data,
    "view": lambda model: head(model).view(-1)[5:9].unsqueeze(0),
    "split": lambda model: head(model).split(100)[1],
    "no copy": lambda model: head(model).to(torch.float32).contiguous().detach(),
    "parameter": lambda model: nn.Parameter(head(model), requires_grad=False),
    "state_dict": lambda model: model.state_dict()["lm_head.weight"],
    "table": lambda model: table(model).data,
}


def test_what_shares_memory_with_a_weight_ends_with_the_lease(djinn):
    for derive in ALIASES.values():
        with djinn.lease("m") as model:
            alias = derive(model)
            copied = alias.clone()
            assert torch.equal(alias, copied)
        djinn.evict("m")
        for read in (torch.Tensor.sum, lambda alias: alias[..., 0].tolist()):
            with pytest.raises(LeaseError, match="outlived the lease"):
                read(alias)
        with djinn.lease("m"), pytest.raises(LeaseError, match="make it again in a new lease"):
            repr(alias)  # nor can it be read in another one
        assert type(copied) is torch.Tensor and copied.isfinite().all()


def test_what_leaves_torch_is_a_copy(djinn, plain):
    with djinn.lease("m") as model:
        arrays = [head(model).numpy(), np.asarray(head(model)), np.asarray(model.state_dict()
                  ["lm_head.weight"]), np.from_dlpack(head(model))]  # fmt: skip
        exported = [*map(torch.tensor, arrays), torch.from_dlpack(head(model))]
        with pytest.raises(ValueError, match="read-only"):
            arrays[0][0] = 0
    djinn.evict("m")
    for tensor in exported:
        assert torch.equal(tensor, head(plain))


def test_a_graph_that_outlives_its_lease_does_not_read_weights(djinn):
    with djinn.lease("m") as model:
        inputs = model.get_input_embeddings()(IDS).requires_grad_()
        loss = model(inputs_embeds=inputs, labels=IDS).loss
    djinn.evict("m")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_storage_that_outlives_its_lease_cannot_be_read(djinn):
    with djinn.lease("m") as model:
        storages = [weight(model).untyped_storage() for weight in (head, table)]
    djinn.evict("m")
    with pytest.raises((IndexError, RuntimeError)):
        storages[0][0]
    assert storages[1][0] is not None  # a copy


@pytest.mark.slow
def test_no_operation_on_an_unmapped_weight_ends_the_process():
    """In a process of its own: what is tried here crashes where it is not refused."""
    done = run_script(REPO / "tests" / "support" / "unmapped_weights.py")
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    assert "refused" in done.stdout


# -- inside a lease --------------------------------------------------------------------------


def slowly(monkeypatch):
    """Copies take a moment, so that what does not wait for them reads what is not there yet."""
    real = base.copy_page
    monkeypatch.setattr(base, "copy_page", lambda to, of: (time.sleep(0.005), real(to, of)))


def test_a_lent_model_is_whole(djinn, plain, tmp_path, monkeypatch):
    slowly(monkeypatch)
    expected, saved = plain.state_dict(), io.BytesIO()
    djinn.evict("m")
    with djinn.lease("m") as model:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected[name])
    djinn.evict("m")
    with djinn.lease("m") as model:
        model.save_pretrained(tmp_path)
    djinn.evict("m")
    with djinn.lease("m") as model:
        torch.save(model.state_dict(), saved)
    saved.seek(0)
    for read in (load_file(tmp_path / "model.safetensors"), torch.load(saved)):
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_tied_weights_are_saved_once(shared, tmp_path):
    with shared.lease("tied") as model:
        model.save_pretrained(tmp_path)
        assert head(model) is table(model)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_users_own(djinn, plain, how):
    with djinn.lease("m") as model:
        mine = how(model)
    djinn.evict("m")
    assert torch.equal(mine(IDS).logits, plain(IDS).logits)
    assert {type(parameter) for parameter in mine.parameters()} == {nn.Parameter}
    nn.init.zeros_(head(mine))
    mine.load_state_dict(plain.state_dict())
    assert torch.equal(mine(IDS).logits, plain(IDS).logits)


def test_a_model_can_be_lent_before_it_is_whole(djinn, plain, monkeypatch):
    slowly(monkeypatch)
    djinn.evict("m")
    with djinn.lease("m", wait=False) as model:
        with pytest.raises(LeaseError, match=r"call djinn\.wait\('m'\)"):
            head(model).sum()
        assert torch.equal(table(model), table(plain))  # it is where its master is
        djinn.wait("m")
        assert torch.equal(head(model), head(plain))
    djinn.evict("m")
    with djinn.lease("m", wait=False) as model:
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert torch.equal(head(model), head(plain))  # every unit has run


def test_layers_of_a_model_larger_than_the_ring_cannot_be_read_by_hand(plain, tmp_path):
    with dj.Djinn("300KiB", "cpu", PAGE) as djinn:
        djinn.add("m", spec("phi"))
        assert "m" in djinn.stats().streamed
        tokens, kept = djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids, []
        for wait in (True, False):
            with djinn.lease("m", wait=wait) as model, torch.no_grad():
                djinn.wait("m")
                kept.clear()
                for use in (
                    lambda: head(model).sum(),
                    lambda: [p.sum() for p in model.parameters()],
                    model.state_dict,
                    lambda: model.save_pretrained(tmp_path),
                    lambda: copy.deepcopy(model),
                ):
                    with pytest.raises(LeaseError, match="larger than the ring"):
                        use()
                handle = model.model.layers[1].mlp.fc1.register_forward_hook(
                    lambda module, *_: kept.append(module.weight.detach())
                )
                assert torch.equal(model(IDS).logits, plain(IDS).logits)
                handle.remove()
                assert djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids == tokens
                assert torch.equal(model(IDS).logits, plain(IDS).logits)
                with pytest.raises(LeaseError, match="outlived the lease or the forward pass"):
                    kept[0].sum()
        djinn.check()


def test_a_lease_within_a_lease(djinn, plain):
    with djinn.lease("m") as model:
        with djinn.lease("tied") as other, djinn.lease("m", wait=False) as again:
            assert again is model
            assert head(other).isfinite().all()
        assert torch.equal(head(model), head(plain))
        with pytest.raises(LeaseError, match="'tied' can only be read while it is leased"):
            head(other).sum()


def test_leases_in_inference_mode(djinn, plain):
    with torch.inference_mode():
        with djinn.lease("m") as model:
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
            alias = head(model).detach()
            with pytest.raises(LeaseError, match="written"):
                alias.zero_()
        with pytest.raises(LeaseError):
            alias.sum()
    with djinn.lease("m") as model:
        assert torch.equal(head(model), head(plain))


@pytest.mark.slow
def test_a_user_may_compile_a_part_of_a_lent_model(djinn, plain):
    hidden = torch.randn(1, 3, 64)
    with djinn.lease("m") as model, torch.no_grad():
        compiled = torch.compile(model.model.layers[0].mlp, backend="aot_eager")
        assert torch.allclose(compiled(hidden), plain.model.layers[0].mlp(hidden), atol=1e-4)
    with pytest.raises(RuntimeError, match="only be read while it is leased"):
        compiled(hidden)


def test_gradients_can_be_computed_and_do_not_stay(djinn, plain):
    with djinn.lease("m") as model:
        model.requires_grad_(True)
        model(IDS, labels=IDS).loss.backward()
        gradient = head(model).grad.clone()
    reference = spec("phi").build()
    reference(IDS, labels=IDS).loss.backward()
    assert torch.allclose(gradient, head(reference).grad)
    assert head(model).grad is None and not head(model).requires_grad


# -- writes ----------------------------------------------------------------------------------


def optimise(model):
    model.requires_grad_(True).train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(model.parameters()).step()


def through_a_view(model):
    head(model).view(-1)[3:7] = 0


def add_in_place(model):
    weight = head(model)
    weight += 1


WRITES = {
    "zero_": lambda model: head(model).zero_(),
    "table": lambda model: table(model).zero_(),
    "data.zero_": lambda model: head(model).data.zero_(),
    "data=": lambda model: setattr(head(model), "data", torch.zeros(500, 64)),
    "item": lambda model: head(model).__setitem__(0, 0),
    "view": through_a_view,
    "state_dict": lambda model: model.state_dict()["lm_head.weight"].mul_(2),
    "+=": add_in_place,
    "out=": lambda model: torch.add(head(model), 1, out=head(model)),
    "inplace=": lambda model: nn.functional.relu(head(model), inplace=True),
    "optimiser": optimise,
    "vector": lambda model: nn.utils.vector_to_parameters(torch.zeros(9**6), model.parameters()),
    "aten overload": lambda model: torch.ops.aten.add.out(head(model), 1, out=head(model)),
    "to": lambda model: model.to(torch.bfloat16),
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "assign": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "share": lambda model: model.share_memory(),
}


def test_writes_are_refused(djinn):
    for write in WRITES.values():
        refused = pytest.raises(LeaseError, match=r"cannot be written to .*copy\.deepcopy")
        with djinn.lease("m") as model, refused:
            write(model)
        djinn.check()


def bypassing(model):
    with torch._C.DisableTorchFunctionSubclass():
        head(model).zero_()


UNNOTICED = {
    "below Python": bypassing,
    "storage": lambda model: head(model).untyped_storage().fill_(0),
    "typed storage": lambda model: head(model)._typed_storage()._untyped_storage.fill_(7),
}


@pytest.mark.parametrize("write", UNNOTICED.values(), ids=UNNOTICED)
def test_writes_that_cannot_be_refused_are_undone_and_said(djinn, write):
    with (
        pytest.raises(LeaseError, match=r"were written to .*loaded again"),
        djinn.lease("m") as model,
    ):
        write(model)
    assert djinn.residency().set_index("model").resident_bytes["m"] == 0


def test_reading_through_a_storage_costs_no_load(djinn):
    djinn.generate("m", PROMPT, 1)
    with djinn.lease("m") as model:
        assert head(model).untyped_storage().nbytes() == head(model).nbytes
    assert djinn.generate("m", PROMPT, 1).loaded_bytes == 0


def test_an_error_of_the_users_is_not_replaced(djinn):
    with (
        pytest.warns(UserWarning, match="were written to"),
        pytest.raises(ZeroDivisionError),
        djinn.lease("m") as model,
    ):
        bypassing(model)
        _ = 1 / 0


class LoRA(nn.Module):
    """What adapters do: a linear layer inside another module."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def adapt(model):
    for layer in model.model.layers:
        layer.mlp.fc1 = LoRA(layer.mlp.fc1)
    before = model(IDS).logits
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(trained, lr=10.0).step()
    assert not torch.equal(model(IDS).logits, before)


def zero_buffers(model):
    for buffer in model.buffers():
        buffer.data.zero_()


CHANGES = {
    "parameter": (
        lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(500, 64))),
        r"lm_head\.weight",
    ),
    "module": (lambda model: setattr(model, "lm_head", nn.Linear(64, 500)), "lm_head"),
    "removed": (lambda model: delattr(model.model, "final_layernorm"), "final_layernorm"),
    "adapters": (adapt, r"model\.layers\.0\.mlp\.fc1"),
    "buffers": (zero_buffers, "inv_freq"),
    "hooks": (
        lambda model: model.lm_head.register_forward_hook(lambda *_: torch.zeros(1, 1, 500)),
        "hooks of lm_head",
    ),
    "cleared hooks": (lambda model: model._forward_pre_hooks.clear(), "hooks of the model"),
    "forward": (lambda model: setattr(model.lm_head, "forward", torch.zeros), r"lm_head\.forward"),
    "weight norm": (
        lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
        "the class of lm_head",
    ),
    "generation config": (lambda model: setattr(model, "generation_config", None), "generation"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=CHANGES)
def test_changes_are_undone_and_said(djinn, change, named):
    with pytest.warns(UserWarning, match=f"were undone .*{named}"), djinn.lease("m") as model:
        change(model)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.train(),
        lambda model: model.requires_grad_(True),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.to("cpu").float().eval(),
        lambda model: model.tie_weights(),
        lambda model: model.generate(IDS, max_new_tokens=3),
        lambda model: model.model.rotary_emb.register_buffer(
            "inv_freq", torch.zeros(8), persistent=False
        ),
    ],
    ids=["train", "requires_grad", "attention", "to", "tie", "generate", "as dynamic rope does"],
)
def test_what_changes_nothing_for_others_is_put_back_without_a_word(djinn, use):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with djinn.lease("m") as model:
            attention = model.config._attn_implementation
            use(model)
        assert not model.training and model.config._attn_implementation == attention


def test_requests_inside_a_lease_see_nothing_of_its_changes(djinn, expected):
    with pytest.warns(UserWarning, match="were undone"), djinn.lease("m") as model:
        model.lm_head = nn.Linear(64, 500)
        model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
        assert djinn.generate("m", PROMPT, 6, ignore_eos=True).token_ids == expected
