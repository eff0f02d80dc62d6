"""
What `step.Graphed` uses of torch.cuda, on a CPU: streams without effect, and graphs that hold a
list of operations, with the tensors that each reads and writes.

As on a GPU, recording leaves no trace: what was changed in place is put back, and so is the random
generator. Operations for which the host would have to wait cannot be recorded, and an error while
recording is followed by another. Random numbers drawn on the host would stay the same on a GPU, but
do not here.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Stream(contextlib.nullcontext):
    def __init__(self, device=None):
        super().__init__()

    def wait_stream(self, other):
        pass


class CUDAGraph:
    def __init__(self):
        self.operations = []

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, outputs in self.operations:
                for old, new in zip(outputs, tensors(function(*args, **kwargs))):
                    if new.data_ptr() != old.data_ptr():  # neither in place nor a view
                        old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph, stream, capture_error_mode):
        super().__init__()
        self.operations, self.before, self.made = graph.operations, {}, set()
        self.generator = torch.get_rng_state()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        indices = name == "index" and not any(x.dtype == torch.bool for x in tensors(args[1]))
        if WAITS & {*function.tags} and not indices:
            raise RuntimeError("operation not permitted when stream is capturing")
        norm = "batch_norm" in name and "backward" not in name  # writes, which its schema hides
        for argument, value in zip(function._schema.arguments, args):
            if norm or (argument.alias_info and argument.alias_info.is_write):
                for x in tensors(value):
                    if x.untyped_storage().data_ptr() not in self.made:
                        self.before.setdefault(x.data_ptr(), (x, x.clone()))
        outputs = function(*args, **kwargs)
        self.made |= {x.untyped_storage().data_ptr() for x in tensors(outputs)} - {
            x.untyped_storage().data_ptr() for x in tensors((args, kwargs))
        }
        self.operations.append((function, args, kwargs, tensors(outputs)))
        return outputs

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0]:
            raise RuntimeError("operation failed due to a previous error during capture")
        torch.set_rng_state(self.generator)
        with torch.no_grad():
            for x, value in self.before.values():
                x.copy_(value)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def without_gpu(monkeypatch):
    """Let torch.cuda be this."""
    for name, value in dict(Stream=Stream, CUDAGraph=CUDAGraph, graph=Recording).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
