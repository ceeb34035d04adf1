"""What every test file shares: instruction sets, threads, and the rule for errors."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Triton reads this when it is imported (its own library is compiled or interpreted then), and fastattn's import of
# torch's compiler imports it. `triton_device` sets it again for the tests that run kernels.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") and importlib.util.find_spec("numpy"):
    os.environ["TRITON_INTERPRET"] = "1"
    import triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # The same examples every time; --hypothesis-profile=default draws new ones.
    settings.register_profile("repeatable", derandomize=True)
    settings.load_profile("repeatable")

import fastattn  # noqa: F401
from fastattn import _info
from fastattn._library import force_isa
from fastattn.masks import native

ISAS = _info.available_isas()


@pytest.fixture
def restore_isa():
    yield
    force_isa(_info.isa())


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set this machine has, forced in turn."""
    force_isa(request.param)
    yield request.param
    force_isa(_info.isa())


@pytest.fixture
def threads():
    """Sets torch's thread count; puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For thousands of small calls: waking threads would take longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """How masks are lowered: by the C++ ops, and by the torch code that serves other devices."""
    monkeypatch.setattr(native, "enabled", request.param == "native")
    return request.param


@pytest.fixture
def task_order():
    """Shuffles the order in which kernels take their tasks; puts the plain order back."""
    yield torch.ops.fastattn._set_task_order
    torch.ops.fastattn._set_task_order(0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collectstart(collector):
    """Before a file is imported: what it draws outside its tests is the same every time too."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """What runs in Triton's interpreter here is a test for the GPU where there is one."""
    if torch.cuda.is_available():
        for item in items:
            if "triton_device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture
def triton_device(monkeypatch):
    """Where Triton kernels run in a test: on the GPU, or without one on CPU tensors in Triton's interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton")
    pytest.importorskip("numpy")
    # Read when a kernel is decorated, at the first import of its module, and by the dispatch at every call.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")
