"""Optimizing and restoring never hold the weights twice: at most a tenth of the model on top, measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from runtime_models import medium_llama

from regraft.runtime.optimize import optimize, restore

MEASURE = """
import gc, hashlib, json
import torch
import regraft
from runtime_models import medium_llama, tiny_llama

torch.set_num_threads(1)


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def peak(action):
    gc.collect()
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM counts from here
    action()
    return status("VmHWM") - before


def digests(model):
    bits = ((n, p.detach().view(torch.int16).numpy()) for n, p in model.named_parameters())
    return {name: hashlib.sha256(b).hexdigest() for name, b in bits}


regraft.optimize(tiny_llama(24), verbose=False)  # what Python itself needs, once
model = medium_llama()
reference = digests(model)
result = {
    "model": sum(p.nbytes for p in model.parameters()),
    "optimize": peak(lambda: regraft.optimize(model, verbose=False)),
    "served": model.forward.record.signatures[0].served,
    "views": model.forward.record.memory["packed_views"],
    "restore": peak(lambda: regraft.restore(model)),
}
result["equal"] = digests(model) == reference
print(json.dumps(result))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak memory counter")
def test_peak_of_optimize_and_restore_on_the_cpu() -> None:
    # glibc keeps small freed blocks; with mmap for everything large, what is freed is seen to be free.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["served"] and result["equal"]
    assert result["views"] > 0.6 * result["model"]  # q, k, v, gate and up
    assert result["optimize"] <= 0.1 * result["model"]
    assert result["restore"] <= 0.1 * result["model"]


@pytest.mark.gpu
def test_peak_of_optimize_and_restore_on_the_gpu() -> None:
    model = medium_llama("cuda")
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.long, device="cuda"))  # cuBLAS keeps a workspace from here on
    size = torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    optimize(model, verbose=False)
    assert model.forward.record.signatures[0].served
    assert torch.cuda.max_memory_reserved() <= 1.2 * reserved  # what is free between weights counts
    torch.cuda.reset_peak_memory_stats()
    restore(model)
    assert torch.cuda.max_memory_allocated() <= 1.1 * size
    assert torch.cuda.memory_allocated() <= 1.05 * size  # the rest is cuBLAS's workspace
