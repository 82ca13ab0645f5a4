"""Streams, stop texts and what a generation says of its end, in every way of decoding."""

import asyncio
import gc
import time
from dataclasses import replace

import pytest
from byte_tokenizer import bytes_as_characters, save
from tiny import PROMPT, spec

import djinn_lib as dj
from djinn_lib.engine.models.spec import ModelSpec
from djinn_lib.errors import ConfigError, LeaseError, RequestCancelled

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 258, "initializer_range": 0.4,
         "eos_token_id": 257, "bos_token_id": 256}  # fmt: skip
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    ModelSpec(SHAPE, seed=3).build().save_pretrained(folder)
    save(bytes_as_characters(), folder)
    return folder


@pytest.fixture(scope="module", params=["eager", "graph"])
def djinn(request, folder):
    with dj.Djinn("1MiB", "cpu", page="16KiB", decode=request.param, progress=lambda _: None) as it:
        it.add("m", folder)
        it.add("by ids", spec("llama"))
        assert it.decode_modes["m"] == request.param
        yield it


def is_idle(djinn):
    until_s = time.perf_counter() + 20
    while djinn.stats().leased and time.perf_counter() < until_s:
        time.sleep(0.01)
    return not djinn.stats().leased


def test_the_pieces_are_the_text(djinn):
    whole = djinn.generate("m", "hello", 40, True)
    with djinn.stream("m", "hello", 40, True) as stream:
        assert repr(stream) == "Stream('m': iterate over it, or call result())"
        pieces = list(stream)
    assert "".join(pieces) == whole.text and len(pieces) > 5
    assert stream.result().token_ids == whole.token_ids
    assert list(stream) == []
    ids = list(djinn.stream("by ids", PROMPT, 6, True))
    assert tuple(ids) == djinn.generate("by ids", PROMPT, 6, True).token_ids


def test_pieces_come_while_the_model_computes(djinn):
    stream = djinn.stream("m", "hello", 400, True)
    next(stream)
    assert not stream._pending.done()
    stream.close()
    assert is_idle(djinn)


@pytest.mark.parametrize("leave", ["close", "break", "collect", "interrupt"])
def test_leaving_gives_the_request_up(djinn, leave, monkeypatch):
    stream = djinn.stream("m", "hello", 450, True)
    pending = stream._pending
    if leave == "break":
        for _ in stream:
            break
        del stream
    elif leave == "collect":
        del stream
    elif leave == "interrupt":
        next(stream)

        class Interrupting:
            def empty(self):
                return False

            def get(self):
                raise KeyboardInterrupt

        monkeypatch.setattr(stream, "_pieces", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    else:
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
    gc.collect()
    assert isinstance(pending.exception(20), RequestCancelled)
    assert is_idle(djinn)
    assert djinn.generate("m", "hello", 3, True).n_new_tokens == 3


def test_a_stream_that_waits_is_taken_out_of_the_queue(djinn):
    with djinn.lease("m"):
        pending = djinn.submit("m", "a", 2)
        with pytest.raises(LeaseError, match="inside a lease"):
            djinn.stream("m", "hello")
    assert pending.result().n_new_tokens


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("m", ["a", "b"]), "several prompts cannot be streamed"),
        (("n", "a"), "expected one of the models"),
        (("m", "a", 0), "max_new_tokens"),
        (("by ids", "a"), "no tokenizer"),
        (("by ids", MESSAGES), "no tokenizer"),
    ],
)
def test_what_cannot_be_streamed(djinn, asked, said):
    with pytest.raises(ConfigError, match=said):
        djinn.stream(*asked)
    with pytest.raises(ConfigError, match="stop needs a tokenizer"):
        djinn.generate("by ids", [1], stop="a")


def test_a_request_that_fails_fails_its_stream(djinn, monkeypatch):
    def fail(*_, **__):
        raise dj.DjinnError("the link is gone")

    monkeypatch.setattr(djinn._models["m"].decoder, "generate", fail)
    with pytest.raises(dj.DjinnError, match="the link is gone"):
        list(djinn.stream("m", "hello", 4))


def test_a_conversation_is_streamed_as_it_is_answered(djinn):
    said = djinn.chat("m", MESSAGES, 12, True)
    assert "".join(djinn.stream("m", MESSAGES, 12, True)) == said.text
    assert djinn.chat("m", "hi", 12, True).token_ids == said.token_ids
    assert said.n_prompt_tokens == len("[user]hi") + 1  # and one start token, not two


async def listen(djinn, *asked, n=None):
    pieces = []
    stream = djinn.astream("m", *asked)
    async for piece in stream:
        pieces.append(piece)
        if len(pieces) == n:
            await stream.aclose()
    return "".join(pieces)


def test_streams_of_asyncio(djinn):
    whole = djinn.generate("m", "hello", 20, True).text

    async def several():
        return await asyncio.gather(*(listen(djinn, "hello", 20, True) for _ in range(3)))

    assert asyncio.run(several()) == [whole] * 3
    asyncio.run(listen(djinn, "hello", 450, True, n=2))
    assert is_idle(djinn)

    async def cancelled():
        task = asyncio.create_task(listen(djinn, "hello", 450, True))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert is_idle(djinn)

    async def refused():
        async for _ in djinn.astream("m", "hello", temperature=-1):
            pass

    with pytest.raises(ConfigError, match="temperature"):
        asyncio.run(refused())


# -- the end of a continuation ---------------------------------------------------------------


def test_a_stop_text_ends_the_text_and_the_work(djinn):
    whole = djinn.generate("m", "hello", 40, True)
    middle = whole.text[10:13]
    place = whole.text.index(middle)
    for stop in (middle, ["never, ever", middle]):
        g = djinn.generate("m", "hello", 40, True, stop=stop)
        assert g.text == whole.text[:place] and middle not in g.text
        assert g.finish_reason == "stop" and g.n_new_tokens < 40
        assert g.token_ids == whole.token_ids[: g.n_new_tokens]
        assert "".join(djinn.stream("m", "hello", 40, True, stop=stop)) == g.text
    same = djinn.generate("m", "hello", 40, True, stop="never, ever")
    assert (same.text, same.token_ids, same.finish_reason) == (
        whole.text, whole.token_ids, "length",
    )  # fmt: skip
    last = djinn.generate("m", "hello", g.n_new_tokens, True, stop=middle)
    assert (last.text, last.finish_reason) == (g.text, "stop")  # not by its length


def test_the_end_of_the_sequence_is_a_stop(djinn, monkeypatch):
    whole = djinn.generate("by ids", PROMPT, 10, True)
    assert whole.finish_reason == "length"
    end = whole.token_ids[4]
    n = whole.token_ids.index(end) + 1
    monkeypatch.setattr(djinn._models["by ids"].module.generation_config, "eos_token_id", end)
    for limit in (10, n):
        g = djinn.generate("by ids", PROMPT, limit)
        assert (g.token_ids, g.finish_reason) == (whole.token_ids[:n], "stop")
        assert tuple(djinn.stream("by ids", PROMPT, limit)) == g.token_ids
    assert djinn.generate("by ids", PROMPT, n, True).finish_reason == "length"


def test_counts_and_how_a_generation_shows(djinn):
    g = djinn.generate("by ids", PROMPT, 20, True)
    assert (g.n_prompt_tokens, g.n_new_tokens) == (len(PROMPT), 20)
    assert g.tokens_per_s == pytest.approx(20 / g.total_ms * 1e3)
    assert "20 tokens in " in repr(g) and "finish_reason='length'" in repr(g)
    g = replace(djinn.generate("m", "hello", 2, sampling=dj.Sampling()), text="<b>&\n1 < 2")
    assert repr(g.text) in repr(g)
    assert "&lt;b&gt;&amp;\n1 &lt; 2</div>" in g._repr_html_() and "<b>" not in g._repr_html_()
