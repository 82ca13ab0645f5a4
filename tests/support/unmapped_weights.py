"""Tries every operation of torch on weights whose pages are not mapped. Run by test_lending."""

import warnings
from collections import Counter

import torch
from tiny import spec
from torch.overrides import get_overridable_functions

import djinn_lib as dj
from djinn_lib.errors import LeaseError


def main() -> None:
    """Print how often an operation was refused, and how often it did something else."""
    warnings.simplefilter("ignore")
    djinn = dj.Djinn("2MiB", "cpu", "16KiB", progress=lambda step: None)
    djinn.add("m", spec("phi"))
    with djinn.lease("m") as model:
        weight = model.lm_head.weight
        alias = weight.detach()[1:]
    djinn.evict("m")
    functions = {f for functions in get_overridable_functions().values() for f in functions}
    outcomes: Counter[str] = Counter()
    for function in functions:
        for w in (weight, alias):
            for arguments in ((w,), (w, w), (w, 0), (torch.zeros(w.shape), w), ([w, w],)):
                try:
                    function(*arguments)
                    outcomes["returned"] += 1
                except LeaseError:
                    outcomes["refused"] += 1
                except Exception:  # of any kind: the arguments do not suit all functions
                    outcomes["raised"] += 1
    assert outcomes["refused"] > outcomes["returned"], outcomes
    djinn.close()
    print(dict(outcomes))


if __name__ == "__main__":
    main()
