"""Two processes against one that sees the whole batch."""

import os
import socket

import numpy as np
import pytest
import torch

import parallel
import timing

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def filled(norm):
    torch.manual_seed(1)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    return norm


def maps(dtype):
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 5, 7) * torch.rand(6, 1, 1) + 3).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.randn_like(x)


def half(rank, dtype):
    """What one of two processes makes of its half: output, gradients, running statistics."""
    net = torch.nn.Sequential(filled(torch.nn.BatchNorm2d(6)))
    norm = parallel.share_statistics(net, torch.device("cpu"))[0]
    assert type(norm) is parallel.GlooBatchNorm
    x, grad = (t[2 * rank : 2 * rank + 2] for t in maps(dtype))
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    grads = [p.grad for p in norm.parameters()]
    tensors = [y.detach(), x.grad, *grads, norm.running_mean, norm.running_var]
    return [t.float().numpy() for t in tensors]


def work(rank, port):
    """All that the tests want of one of two processes."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    parallel.start("cpu")
    made = {dtype: half(rank, dtype) for dtype in TOLERANCES}
    made["answers"] = parallel.any_process(rank == 0, rank == 1, False, True)
    parallel.stop()
    return made


@pytest.fixture(scope="module")
def both():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return timing.in_processes(work, (0, port), (1, port))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES.items())
def test_batch_norm_over_processes_is_that_of_the_whole_batch(both, dtype, tolerance):
    halves = [made[dtype] for made in both]
    ys, dxs, dws, dbs, means, variances = (torch.from_numpy(np.stack(t)) for t in zip(*halves))
    norm = filled(torch.nn.BatchNorm2d(6))
    x, grad = maps(dtype)
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    for got, want in (
        (ys.flatten(0, 1), y),
        (dxs.flatten(0, 1), x.grad),
        (dws.sum(0), norm.weight.grad),  # DDP, and the mean loss of the processes, scale them
        (dbs.sum(0), norm.bias.grad),
        (means[0], norm.running_mean),
        (variances[1], norm.running_var),
    ):
        assert (got - want).norm() < tolerance * want.norm()


@pytest.mark.parametrize(
    "cores, processes, workers", [(1, 1, 1), (2, 1, 1), (16, 1, 14), (16, 4, 3), (128, 4, 16)]
)
def test_spare_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parallel.spare_cores() == workers


def test_a_synchronised_norm_is_the_same_norm():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3, eps=0.1, momentum=0.3)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    got = parallel.share_statistics(torch.nn.Sequential(norm), torch.device("cpu"))[0]
    assert type(got) is parallel.GlooBatchNorm and (got.eps, got.momentum) == (0.1, 0.3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(got.eval()(x), norm.eval()(x))


def test_any_process_speaks_for_all(both):
    assert [made["answers"] for made in both] == [[True, True, False, True]] * 2
