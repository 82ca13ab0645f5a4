"""The CPU keeps the contract of all devices; a GPU does in `test_gpu`."""

import pytest
import torch
from device_contract import CONTRACT


@pytest.mark.parametrize("name", CONTRACT)
def test_on_the_cpu(name):
    CONTRACT[name](torch.device("cpu"))
