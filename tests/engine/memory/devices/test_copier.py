"""The copier of the CPU keeps the contract of all copiers; that of a GPU does in `test_gpu`."""

import pytest
import torch
from copier_contract import CONTRACT


@pytest.mark.parametrize("name", CONTRACT)
def test_on_the_cpu(name):
    CONTRACT[name](torch.device("cpu"))
