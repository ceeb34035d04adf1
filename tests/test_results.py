"""Results of a megabyte and more lie in blocks that are used again: csrc/results.h."""

import copy
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import fastattn

MEBIBYTE = 1 << 20


def state():
    used, idle, allowed, _ = torch.ops.fastattn._result_memory()
    return used, idle, allowed


@pytest.fixture(autouse=True)
def nothing_idle():
    fastattn.empty_cache()


def run(code: str, **environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_next_result_takes_the_memory_of_a_dead_one(dtype):
    x = torch.randn(1024, 1024).to(dtype)
    y = fastattn.softmax(x, -1)
    at, expected = y.data_ptr(), y.clone()
    del y
    assert state()[1] > 0
    y = fastattn.softmax(x, -1)
    assert y.data_ptr() == at and torch.equal(y, expected) and state()[1] == 0


def test_a_view_keeps_the_block():
    x = torch.randn(1024, 1024)
    view = fastattn.softmax(x, -1)[5, ::7]
    expected = view.clone()
    others = [fastattn.softmax(x + n, -1) for n in range(4)]
    assert torch.equal(view, expected)
    assert len({t.untyped_storage().data_ptr() for t in (view, *others)}) == 5


def test_sizes_near_each_other_share_a_block_and_far_ones_do_not():
    blocks = []
    for rows in (1000, 1001, 2000):
        y = fastattn.softmax(torch.randn(rows, 1024), -1)
        blocks.append(y.data_ptr())
        del y
    assert blocks[0] == blocks[1] != blocks[2]


def test_what_is_idle_is_bounded_and_the_oldest_goes_first():
    code = """
import torch, fastattn
x = torch.randn(1024, 512)  # 2 MB
results = [fastattn.softmax(x, -1) for _ in range(6)]
kept = [t.data_ptr() for t in results[-2:]]
while results:
    results.pop(0)
print(torch.ops.fastattn._result_memory()[1], fastattn.softmax(x, -1).data_ptr() in kept)
"""
    assert run(code, FASTATTN_KEEP_MB="5").split() == [str(4 * MEBIBYTE), "True"]


def test_turned_off():
    code = """
import torch, fastattn
y = fastattn.softmax(torch.randn(1024, 1024), -1)
used = torch.ops.fastattn._result_memory()
y.resize_(2048, 1024)  # torch's own memory
print(used[:3])
"""
    assert run(code, FASTATTN_KEEP_MB="0").strip() == "[0, 0, 0]"


def test_empty_cache_says_what_it_gave_back():
    y = fastattn.softmax(torch.randn(1024, 1024), -1)
    assert fastattn.empty_cache() == 0
    del y
    assert fastattn.empty_cache() == 4 * MEBIBYTE and state()[1] == 0


def calls():
    x, w = torch.randn(600, 1024), torch.randn(1024)
    q, k, v = (torch.randn(2, 8, 520, 64) for _ in range(3))
    dout = torch.randn_like(q)

    def gradients(function, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [torch.ones_like(t) if t.shape != dout.shape else dout for t in results]
        return torch.autograd.grad(results, leaves, upstream)

    yield "softmax", lambda: (fastattn.softmax(x, 0), fastattn.softmax(x, -1))
    yield "softmax gradients", lambda: gradients(lambda x: fastattn.softmax(x, -1), x)
    yield "layer_norm", lambda: (fastattn.layer_norm(x, (1024,), w, w),)
    yield "norm gradients", lambda: gradients(lambda x, w: fastattn.rms_norm(x, (1024,), w), x, w)
    yield "add_layer_norm", lambda: fastattn.add_layer_norm(x, x, (1024,), w)
    yield (
        "add_norm gradients",
        lambda: gradients(lambda a, b: fastattn.add_rms_norm(a, b, (1024,), w), x, x.flip(0)),
    )
    mask = fastattn.masks.Causal() & fastattn.masks.Dense(torch.rand(520, 520) < 0.1)
    yield "attention", lambda: (fastattn.attention(q, k, v, mask=mask),)
    yield "attention gradients", lambda: gradients(lambda *qkv: fastattn.attention(*qkv, mask=mask), q, k, v)


@pytest.mark.parametrize("name, call", [pytest.param(n, c, id=n) for n, c in calls()])
def test_every_element_of_a_result_is_written(name, call):
    expected = [t.clone() for t in call()]
    fastattn.empty_cache()
    sizes = {t.nbytes for t in expected if t.nbytes >= MEBIBYTE}
    assert sizes
    poisoned = []
    for size in sizes:
        poisoned += [
            torch.ops.fastattn._new_result([size // 4], torch.float32).fill_(float("nan")) for _ in range(4)
        ]
    memory = {t.data_ptr() for t in poisoned}
    del poisoned
    results = call()
    assert any(t.data_ptr() in memory for t in results)
    for result, want in zip(results, expected):
        assert torch.equal(result, want)


def test_threads_share_the_blocks_safely():
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for n in range(20):
            x = torch.randn(256 + 64 * ((n + seed) % 5), 1100, generator=generator)
            y = fastattn.softmax(x, -1)
            z = fastattn.softmax(y, -1)
            if not torch.equal(y, fastattn.softmax(x, -1)) or not torch.equal(z, fastattn.softmax(y, -1)):
                wrong.append((seed, n))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and state()[0] == 0


def test_a_forked_child_has_its_own():
    code = """
import os, torch, fastattn
torch.set_num_threads(1)
x = torch.randn(1024, 1024)
y = fastattn.softmax(x, -1)
kept, spare = y.clone(), fastattn.softmax(x + 1, -1)
del spare
child = os.fork()
if child == 0:
    z = fastattn.softmax(2 * x, -1)
    y.zero_()
    os._exit(0 if z.sum() > 1000 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(y, kept) and torch.equal(fastattn.softmax(x, -1), kept)
print("good")
"""
    assert run(code).strip() == "good"


def test_such_a_tensor_does_what_others_do():
    x = torch.randn(1024, 1024)
    y = fastattn.softmax(x, -1)
    expected = y.clone()
    assert torch.equal(pickle.loads(pickle.dumps(y)), expected)
    assert torch.equal(copy.deepcopy(y), expected)
    assert y.numpy().sum() == pytest.approx(1024, rel=1e-3)
    assert torch.equal(y.resize_(512, 1024), expected[:512])
    shared = fastattn.softmax(x, -1).share_memory_()
    assert shared.is_shared() and torch.equal(shared, expected)
    with torch.inference_mode():
        assert fastattn.softmax(x, -1).is_inference()
    with pytest.raises(RuntimeError, match="not resizable"):
        fastattn.softmax(x, -1).resize_(4096, 1024)


def test_tensors_outlive_the_module():
    code = """
import sys, torch, fastattn
sys.kept = fastattn.softmax(torch.randn(1024, 1024), -1)
print("good")
"""
    assert run(code).strip() == "good"


@pytest.mark.parametrize("given", ("much", "-1", "1.5", ""))
def test_a_limit_that_is_no_number_is_refused_at_import(given):
    code = "import fastattn"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTATTN_KEEP_MB": given},
    )
    assert done.returncode != 0
    assert f"FASTATTN_KEEP_MB must be a whole number of megabytes, 0 or more, got {given!r}" in done.stderr
