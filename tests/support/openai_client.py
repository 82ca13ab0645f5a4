"""Asks an address with OpenAI's own client, run in vLLM's environment; prints JSON.

``openai_client.py URL``.
"""

import json
import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
HI = [{"role": "user", "content": "Hi"}]
EXACT = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}


def error_of(says, ask):
    """The class of the error, and what it says, as far as that is known."""
    try:
        ask()
    except openai.APIStatusError as error:
        return [type(error).__name__, says if says in str(error) else str(error)]
    return ["none", ""]


chat = client.chat.completions.create(model="qwen3", messages=HI, **EXACT)
streamed = "".join(
    part.choices[0].delta.content or ""
    for part in client.chat.completions.create(model="qwen3", messages=HI, stream=True, **EXACT)
)
of_list = client.completions.create(
    model="llama", prompt=["Hello", "you"], n=2, max_tokens=3, temperature=0.8, seed=1
)
complete = client.completions.create
said = {
    "models": [one.id for one in client.models.list()],
    "retrieved": client.models.retrieve("qwen3").id,
    "chat": chat.choices[0].message.content,
    "streamed": streamed,
    "n_of_list": len(of_list.choices),
    "errors": {
        "unknown model": error_of(
            "models ['llama', 'qwen3'], got 'none'",
            lambda: complete(model="none", prompt="x"),
        ),
        "too long": error_of(
            "maximum context length", lambda: complete(model="llama", prompt="x" * 5000)
        ),
        "wrong value": error_of(
            "temperature", lambda: complete(model="llama", prompt="x", temperature=-3)
        ),
        "wrong role": error_of(
            "unknown role alien",
            lambda: client.chat.completions.create(
                model="llama", messages=[{"role": "alien", "content": "x"}]
            ),
        ),
        "not served": error_of("404", lambda: client.embeddings.create(model="llama", input="x")),
    },
}
print(json.dumps(said))
