"""
What makes N processes (torchrun) do the work of one: same draws, same means, same statistics.
"""

import datetime
import os

import torch
import torch.distributed as dist
from torch import nn

from model import Drop, get_device


def rank_and_world():
    """This process's number and how many there are: (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(device):
    """Join the processes that torchrun started, on NCCL or gloo. Returns this process's device."""
    device = get_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            device = get_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
        patience = datetime.timedelta(hours=12)  # while one process decodes a large data set
        dist.init_process_group(backend, timeout=patience)
    return device


def stop():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def first_then_others(work):
    """work() in process 0, and only then in the others (who find what it left: a cache, a file)."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    try:
        return work()
    finally:  # an error is theirs to find too: nobody must wait for a process that is gone
        if rank == 0 and world > 1:
            dist.barrier()


def any_process(*flags):
    """For each flag, whether it is set in any process: all get the same answers."""
    flags = [bool(flag) for flag in flags]
    if dist.is_initialized():
        asked = torch.tensor(flags, dtype=torch.float32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        flags = asked.bool().tolist()
    return flags


def process_mean(x):
    """The mean of a number over the processes, x itself in a single one. No gradient.

    DDP averages the gradients of its processes. Divided by this mean instead of its own count, each
    process's sum contributes what it would in one process that sees the whole batch.
    """
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class AllReduceMean(torch.autograd.Function):
    """The mean of a tensor over the processes, with its gradient."""

    @staticmethod
    def forward(ctx, x):
        return process_mean(x.contiguous())

    @staticmethod
    def backward(ctx, grad):
        return process_mean(grad.contiguous())


class GlooBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on CPUs (torch's SyncBatchNorm wants a GPU)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean = AllReduceMean.apply(x.float().mean((0, 2, 3)))  # shares are of one size
        centred = x.float() - mean[:, None, None]
        var = AllReduceMean.apply(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise(module, device):
    """Batch norms with the statistics, and drops with the coins, of the whole batch."""
    for m in module.modules():
        if isinstance(m, Drop):
            m.shard = rank_and_world()
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                new = GlooBatchNorm(child.num_features, child.eps, child.momentum)
                new.load_state_dict(child.state_dict())
                setattr(parent, name, new)
    return module


def wrap(module, device):
    """The module under DDP; itself in a single process."""
    if not dist.is_initialized():
        return module
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids)
