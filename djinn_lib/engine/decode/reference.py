"""Compare faster ways of decoding with transformers' own `generate`.

A recorded step calls the same modules as `generate`, but with a fixed-length cache, a padded prompt
and its own kernels. An architecture's name does not tell whether it supports all that. So before a
way of decoding is used, it continues a few prompts with the tokens that `generate` chose, and its
logits are compared. Tokens alone do not suffice: even with a wrong cache the most likely token is
often the same, and rounding decides between two equally likely tokens.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from djinn_lib.engine.decode.eager import call_generate, vocabulary
from djinn_lib.engine.decode.generation_options import request_options
from djinn_lib.errors import DjinnError

N_TOKENS = 6  # of each continuation
# Allowed distance of logits from the reference, as a share of the reference's norm. Layers with
# sharp attention amplify rounding to more than that. Such a model is allowed what rounding does to
# it, but at most `AMPLIFIED` times as much: see `References`.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
AMPLIFIED = 3.0
# Prompts to try. Rounding may make a router choose another expert, and logits then differ by more,
# but not for three prompts in a row. A step that computes something else always differs.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Reference:
    """A prompt, its greedy continuation, and the logits (tokens, vocabulary)."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Followed:
    """The logits (tokens, vocabulary) and tokens of another way of decoding."""

    logits: torch.Tensor
    token_ids: tuple[int, ...]


class References:
    """The results of `generate` for a few prompts, to compare others with.

    What rounding does to a model is measured with its own forward pass, which is repeated with one
    more rounding error in each product. Every other way of decoding has such errors.

    Args:
        model: all of its weights are on the device.
        n_prompts: lengths of the prompts, in tokens.

    Raises:
        DjinnError: `generate` gives no logits.
    """

    def __init__(self, model: PreTrainedModel, n_prompts: Sequence[int]) -> None:
        self._model, self._n_prompts = model, tuple(n_prompts)
        self._taken: dict[tuple[int, int], Reference] = {}
        self._reference(self._n_prompts[0], 0)
        self._settled = dict(_buffers(model))  # some models move a table in the first call
        for n_prompt in self._n_prompts[1:]:
            self._reference(n_prompt, 0)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # makes room for the cache and recordings that come next

    def _reference(self, n_prompt: int, attempt: int) -> Reference:
        key = n_prompt, attempt
        if key not in self._taken:
            prompt = probe_prompt(self._model, n_prompt, seed=attempt)
            self._taken[key] = take_reference(self._model, prompt, N_TOKENS)
        return self._taken[key]

    def ensure_alike(self, follow: Callable[[Reference], Followed]) -> float:
        """Refuse a way of decoding that differs from `generate`; return how far its logits are.

        That is the greatest `distance` at any token of the continuations that were accepted. It is
        0 where all logits of a token are equal, and so have no distance.

        Args:
            follow: continues the prompt of a reference with the tokens of that reference.

        Raises:
            DjinnError: logits differ by more than rounding explains, or the forward pass changed a
                buffer of the model, which would affect the next request.
        """
        furthest = 0.0
        for n_prompt in self._n_prompts:
            for attempt in range(ATTEMPTS):
                reference = self._reference(n_prompt, attempt)
                try:
                    followed = follow(reference)
                    self._compare(followed, reference)
                    furthest = max(furthest, *_distances(followed, reference))
                    break
                except DjinnError:
                    if attempt == ATTEMPTS - 1:
                        raise
        now = _buffers(self._model)
        if changed := [name for name, state in now if self._settled.get(name) != state]:
            raise DjinnError(
                f"the forward pass changes buffers of the model ({', '.join(changed[:3])}), which "
                "would affect the next request"
            )
        return furthest

    def _compare(self, followed: Followed, reference: Reference) -> None:
        try:
            compare(followed, reference)
        except DjinnError:
            if (times := self._amplification(reference)) == 1:
                raise
            compare(followed, reference, times)

    def _amplification(self, reference: Reference) -> float:
        """Return how many times the usual tolerance a model needs, from 1 to `AMPLIFIED`."""
        ids = torch.tensor([[*reference.prompt_ids, *reference.token_ids]])
        ids = ids.to(self._model.device)
        try:
            with torch.no_grad():
                logits = self._model(ids).logits[0, len(reference.prompt_ids) - 1 : -1]
                with _rounded_once_more(self._model):
                    others = self._model(ids).logits[0, len(reference.prompt_ids) - 1 : -1]
        except Exception:  # the architecture's own code; it may need more than ids
            return 1.0
        apart = statistics.fmean(distance(a, b) for a, b in zip(others, logits, strict=True))
        times = apart / TOLERANCE[logits.dtype]
        return min(times, AMPLIFIED) if times > 1 else 1.0  # also for NaN


@contextmanager
def _rounded_once_more(model: PreTrainedModel) -> Iterator[None]:
    """Add a rounding error, of half a last digit at most, to what each weight is used for."""
    noise = torch.Generator(model.device).manual_seed(0)

    def rounded(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        digits = torch.rand(output.shape, generator=noise, device=output.device) - 0.5
        return (output * (1 + torch.finfo(output.dtype).eps * digits)).to(output.dtype)

    leaves = [m for m in model.modules() if m._parameters and not m._modules]
    hooks = [module.register_forward_hook(rounded) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe_prompt(model: PreTrainedModel, n_tokens: int, seed: int) -> tuple[int, ...]:
    """Return random ids, without special ones such as padding."""
    special = set(_special_ids(model))
    ids = [i for i in range(vocabulary(model)) if i not in special] or [0]
    return tuple(random.Random(seed).choices(ids, k=n_tokens))


def _special_ids(model: PreTrainedModel) -> Iterator[int]:
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                ids = value if isinstance(value, list) else [value]
                yield from (i for i in ids if isinstance(i, int))


def take_reference(model: PreTrainedModel, prompt_ids: tuple[int, ...], n_tokens: int) -> Reference:
    """Continue a prompt with exactly `n_tokens` greedy tokens by `generate`.

    Raises:
        DjinnError: it gives no logits.
    """
    options = request_options(model, n_tokens, ignore_eos=True)
    options |= {"return_dict_in_generate": True, "output_logits": True}
    output: Any = call_generate(model, prompt_ids, model.device, **options)
    if not getattr(output, "logits", None):
        raise DjinnError(f"expected logits from generate of a {type(model).__name__}, got none")
    tokens = output.sequences[0, len(prompt_ids) :].tolist()
    return Reference(prompt_ids, tuple(tokens), torch.cat(output.logits))


def compare(followed: Followed, reference: Reference, times: float = 1.0) -> None:
    """Refuse logits that rounding cannot explain, and clearly less likely tokens.

    Args:
        followed: what another way of decoding gave.
        reference: what `generate` gave.
        times: how many times the usual tolerance is allowed.

    Raises:
        DjinnError: the difference is larger.
    """
    after = f"after a prompt of {len(reference.prompt_ids)} tokens"
    for i, (got, expected) in enumerate(zip(followed.logits, reference.logits, strict=True)):
        ensure_alike(got, expected, f"at token {i} {after}", times)
        token, own = reference.token_ids[i], followed.token_ids[i]
        gap = float(expected[token] - expected[own])
        if gap > 2 * times * TOLERANCE[got.dtype] * float(expected.float().std()):
            raise DjinnError(f"expected token {token} at token {i} {after}, got {own}")


def ensure_alike(
    got: torch.Tensor, expected: torch.Tensor, where: str = "", times: float = 1.0
) -> None:
    """Refuse logits that rounding cannot explain.

    An offset common to all logits has no effect, so logits are compared without their mean. But a
    large mean costs precision, so the tolerance includes the last digit's value.

    Args:
        got: (vocabulary,), in the dtype of the model.
        expected: (vocabulary,).
        where: description for the error.
        times: how many times the usual tolerance is allowed.

    Raises:
        DjinnError: the difference is larger.
    """
    limits, allowed = torch.finfo(got.dtype), times * TOLERANCE[got.dtype]
    usual = _usual(expected, got.dtype)
    if not torch.equal(got[~usual].float(), expected[~usual].float()):
        raise DjinnError(
            f"expected the same impossible ids as transformers' generate {where}".strip()
        )
    a, b = _centred(got[usual]), _centred(expected[usual])
    apart, spread = float((a - b).norm()), float(b.norm())
    last_digit = limits.eps * float(expected[usual].double().norm())
    if not apart <= allowed * spread + last_digit:  # also true for NaN
        raise DjinnError(
            f"expected logits within {allowed:.2g} of those of transformers' generate, "
            f"got {apart / spread if spread else apart:.2g} {where}".strip()
        )


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the distance of logits (vocabulary,) as a share of the norm of the expected ones.

    Both are taken without their mean. It is NaN if all expected ones are equal.
    """
    a, b = _centred(got), _centred(expected)
    return float((a - b).norm() / b.norm()) if b.any() else math.nan


def _distances(followed: Followed, reference: Reference) -> Iterator[float]:
    """Yield the distance at each token, without impossible ids; 0 if all others are equal."""
    for got, expected in zip(followed.logits, reference.logits, strict=True):
        usual = _usual(expected, got.dtype)
        apart = distance(got[usual], expected[usual])
        yield apart if math.isfinite(apart) else 0.0


def _usual(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether a logit is a number; the others mark impossible ids."""
    return logits.double().abs() < torch.finfo(dtype).max / 2


def _centred(logits: torch.Tensor) -> torch.Tensor:
    values = logits.double()
    return values - values.mean()


def _buffers(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the identity and the number of writes of each buffer."""
    for name, buffer in model.named_buffers():
        yield name, (id(buffer), buffer._version)
