"""
Devices; and N processes (torchrun) that compute what one would: same draws, means, statistics.
"""

import ctypes
import datetime
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from files import UserError
from nets import Drop

# ------------------------------------------------------------------------------------------------
# devices


def get_device(name):
    """The torch.device of a --device flag; UserError if this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from e
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch finds {n} GPUs here; --device cpu does without")
    return device


def has_native(device, dtype):
    """Whether a device multiplies in `dtype` natively: emulated, it is slower than float32."""
    if dtype == "float32":
        return True
    if device.type == "cuda":
        return dtype == "float16" or torch.cuda.get_device_capability(device)[0] >= 8
    ops = torch.ops.mkldnn  # torch's own check, which has no public name
    queries = dict(bfloat16="_is_mkldnn_bf16_supported", float16="_is_mkldnn_fp16_supported")
    return torch.backends.mkldnn.is_available() and getattr(ops, queries[dtype])()


def keep_memory():
    """Let glibc keep the memory of freed host tensors: the next step needs the same sizes again.

    Otherwise large blocks go back to the system and return as zeroed pages, every time. With
    another C library nothing changes.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # numbers from malloc.h
        if not libc.mallopt(mmap_threshold, 2**31 - 1):  # an old glibc
            libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**31 - 1)


# ------------------------------------------------------------------------------------------------
# processes


def rank_and_world():
    """(this process's number, how many there are); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start(device):
    """Join the processes that torchrun started, on NCCL or gloo. Returns this process's device."""
    device = get_device(device)
    many, cuda = int(os.environ.get("WORLD_SIZE", 1)) > 1, device.type == "cuda"
    if many and cuda:
        device = get_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if cuda and device.index is not None:
        torch.cuda.set_device(device)  # and nothing is put onto the first
    if many:
        backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
        patience = datetime.timedelta(hours=12)  # while one process decodes a large data set
        dist.init_process_group(backend, timeout=patience)
    return device


def stop():
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def spare_cores():
    """How many worker processes may prepare this process's batches: 1 to 16.

    All cores but two, shared between the processes of torchrun on this machine.
    """
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    share = (len(here) - 2) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(max(share, 1), 16)


def first_then_others(work):
    """work() in process 0, then in the others, which find what it left: a cache, a file."""
    rank, world = rank_and_world()
    if rank > 0:
        dist.barrier()
    try:
        return work()
    finally:  # also after an error: nobody must wait for a process that is gone
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
    """The mean of a tensor over the processes; x itself in a single one. No gradient.

    DDP averages the gradients of its processes. If each divides its sum by the mean of all counts,
    not by its own count, it contributes what it would in one process that sees the whole batch.
    """
    if dist.is_initialized():
        x = x.detach().clone()
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


class Gather(torch.autograd.Function):
    """`gather`, with a gradient."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """(B, ...) in each process -> (world * B, ...), the whole batch; x itself in a single process.

    For terms that relate images to each other. A row's gradient is the sum of those that it has in
    all processes, so that DDP's mean is the gradient of the processes' mean term.
    """
    return Gather.apply(x) if dist.is_initialized() else x


class NormOverProcesses(torch.autograd.Function):
    """Batch norm of maps (B, C, H, W) with the statistics of all processes: (y, mean, var)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean((0, 2, 3), dtype=torch.float32)  # (C,)
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        mean, var = mean.double(), var.double()
        mean, square = process_mean(torch.stack([mean, var + mean.square()]))  # shares are equal
        mean, var = mean.float(), (square - mean.square()).float()
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps), mean, var

    @staticmethod
    def backward(ctx, dy, *_):
        """dx = w / std (dy - mean(dy) - z mean(z dy)), z = (x - mean) / std."""
        x, weight, mean, var = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(  # dx so far: w / std dy
            dy, x, weight, mean, var, None, None, False, ctx.eps, [True] * 3
        )
        z_dy, m_dy = process_mean(torch.stack([dw, db])) * len(dw) / x.numel()  # (C,) means
        slope = -weight * scale.square() * z_dy
        offset = -weight * scale * m_dy - slope * mean
        dx += torch.addcmul(offset[:, None, None], x, slope[:, None, None])
        return dx, dw, db, None


class GlooBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on CPUs (torch's SyncBatchNorm wants a GPU)."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var = NormOverProcesses.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            n = x.numel() // x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def share_statistics(module, device):
    """Give batch norms the statistics, and drops the coins, of the whole batch."""
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
    for p in module.parameters():
        if p.shape[2:] == (1, 1):  # in channels-last its strides would differ from its gradient's
            p.data = p.data.flatten(1)[:, :, None, None]
    ids = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids)
