"""Two processes against one that sees the whole batch."""

import os
import socket

import numpy as np
import pytest
import torch

import parallel
import timing


def filled(norm):
    torch.manual_seed(1)
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    return norm


def maps(dtype):
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 5, 7) * torch.rand(6, 1, 1) + 3).to(dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.randn_like(x)


def half(rank, port, dtype):
    """What one of two processes makes of its half: output, gradients, running statistics."""
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    device = parallel.start("cpu")
    net = torch.nn.Sequential(filled(torch.nn.BatchNorm2d(6)))
    norm = parallel.synchronise(net, device)[0]
    assert type(norm) is parallel.GlooBatchNorm
    x, grad = (t[2 * rank : 2 * rank + 2] for t in maps(dtype))
    x.requires_grad_()
    y = norm(x)
    y.backward(grad)
    parallel.stop()
    grads = [p.grad for p in norm.parameters()]
    tensors = [y.detach(), x.grad, *grads, norm.running_mean, norm.running_var]
    return [t.float().numpy() for t in tensors]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(dtype, tolerance):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    halves = timing.in_processes(half, (0, port, dtype), (1, port, dtype))
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
    got = parallel.synchronise(torch.nn.Sequential(norm), torch.device("cpu"))[0]
    assert type(got) is parallel.GlooBatchNorm and (got.eps, got.momentum) == (0.1, 0.3)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(got.eval()(x), norm.eval()(x))


def asked(rank, port):
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
    parallel.start("cpu")
    answers = parallel.any_process(rank == 0, rank == 1, False, True)
    parallel.stop()
    return answers


def test_any_process_speaks_for_all():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    assert timing.in_processes(asked, (0, port), (1, port)) == [[True, True, False, True]] * 2
