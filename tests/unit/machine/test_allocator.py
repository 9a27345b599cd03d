"""Keeping freed memory: tensors of the same size do not fault their pages in again and again."""

import os
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys, threading
from mvar.machine.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
def work():
    for _ in range(3):
        torch.ones(80 << 18)  # 80 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(80 << 18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)  # As the encoder's: threads other than the first have arenas of their own.
thread.start()
thread.join()
"""


def faults(how: str) -> int:
    """Page faults of ten tensors; a caller that has called it itself passes nothing on to the plain process."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_tensors_of_a_thread_come_out_of_memory_that_is_there_already():
    assert faults("kept") < faults("plain") / 10
