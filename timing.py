"""
Measures seconds, memory and a device's peak, and names the hardware.
"""

import concurrent.futures
import multiprocessing
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch

import parallel


def hardware(device):
    """The GPU's name, or the CPU's and the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{(names or [platform.processor()])[0]}, {threads} thread{'s' * (threads > 1)}"


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(work, device, seconds=1.0, least=3, warmup=2):
    """Median seconds of work(), over at least `least` calls and `seconds` in total.

    Of N processes all call it as often, for it may wait for the others.
    """
    times = []
    for _ in range(warmup):
        work()
    while parallel.any_process(len(times) < least or sum(times) < seconds)[0]:
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Stopwatch:
    """Seconds between marks, by name; the device is synchronised at each of them."""

    def __init__(self, device):
        self.device, self.times = device, {}
        self.mark("start")

    def mark(self, name):
        synchronise(self.device)
        now = time.perf_counter()
        if name != "start":
            self.times.setdefault(name, []).append(now - self.last)
        self.last = now

    def medians(self):
        return {name: statistics.median(times) for name, times in self.times.items()}


def memory(device, what):
    """GB of this process: "now", or the "peak" since it began; None where nothing counts them."""
    if torch.device(device).type == "cuda":
        count = dict(now=torch.cuda.memory_allocated, peak=torch.cuda.max_memory_allocated)[what]
        return count(device) / 1e9
    status = Path("/proc/self/status")  # Linux only; resource.ru_maxrss starts at the parent's
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines[dict(now="VmRSS", peak="VmHWM")[what]].split()[0]) * 1024 / 1e9


def matmul_peak(device, dtype, seconds=0.5):
    """The highest FLOP/s that a product of two large square matrices reaches here."""
    best = 0
    for n in (4096, 8192) if torch.device(device).type == "cuda" else (1024, 2048):
        a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
        best = max(best, 2 * n**3 / timed(partial(torch.mm, a, a), device, seconds))
    return best


def in_processes(work, *calls):
    """[work(*call) for call in calls], all at once, each in a new process with its own memory."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(calls), mp_context=spawn) as pool:
        return [job.result() for job in [pool.submit(work, *call) for call in calls]]
