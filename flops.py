"""
A model's cost: parameters, multiply-accumulates, latency; and what a method adds in training.

    python flops.py --model b0 b2 --num-classes 20 --size 512x1024
    python flops.py --model b0 --teacher b2 --method transkd-base --num-classes 20

GMACs (10^9 multiply-accumulates; FLOPs are twice that) follow the papers: convolutions and linear
layers of the network as its paper draws it. Two figures beside them show what this leaves out: the
matrix products inside attention (with a method also those of its loss), and what is executed here,
where the head multiplies before it resizes.
"""

import argparse
import json
from functools import cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

import cnn
import files
import methods
import model
import parallel
from timing import timed


def count(run):
    """(conv and linear GMACs, attention GMACs) of calling run()."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    by_op = counter.get_flop_counts()["Global"]
    # one op where a fused kernel runs, two batched products where (as on meta tensors) none does
    products = ("scaled_dot_product", "bmm")
    attention = sum(n for op, n in by_op.items() if any(p in str(op) for p in products))
    return (sum(by_op.values()) - attention) / 2e9, attention / 2e9


def measure(net, image, extra=None):
    """GMACs of a net on a meta image (1, 3, H, W), and of extra(output) with it."""

    def run():
        out = net(image)
        if extra:
            extra(out)

    net.eval()
    heads = [m for m in net.modules() if isinstance(m, model.SegFormerHead)]  # a CNN has none
    for head in heads:
        head.merged = False
    gmacs, attention = count(run)
    for head in heads:
        head.merged = True
    executed, _ = count(run)
    return dict(gmacs=gmacs, attention_gmacs=attention, executed_gmacs=executed)


def measure_named(name, num_classes, size, head_width=None):
    """Parameters and GMACs of a new model at `size` (H, W), without memory for its weights."""
    with torch.device("meta"):
        net = model.build(name, num_classes, head_width=head_width)
        image = torch.empty(1, 3, *size)
    return dict(params=model.count_parameters(net), **measure(net, image))


def rows(args):
    for name in args.model:
        row = dict(name=name, **measure_named(name, args.num_classes, args.size))
        if args.latency:
            net = model.build(name, args.num_classes).to(args.device).eval()
            image = torch.randn(1, 3, *args.size, device=args.device)
            with torch.inference_mode():
                row["latency_ms"] = 1000 * timed(partial(net, image), args.device)
        yield row
        if args.method:
            options = {} if args.csf_norm is None else dict(csf_norm=args.csf_norm)
            shape = (args.num_classes, args.size)
            cost = with_method(args.method, name, args.teacher, *shape, **options)
            label = f"{name} + {args.method} from {args.teacher} (training only)"
            yield dict(name=label) | cost


@cache
def teacher_output(name, num_classes, size):
    """A teacher on the meta device, and its output for an image of size (H, W)."""
    with torch.device("meta"):
        net = model.build(name, num_classes).eval()
        return net, net(torch.empty(1, 3, *size))


def with_method(spec, student, teacher, num_classes, size, **options):
    """Parameters and GMACs of a student and a method's adapters; size: (H, W) of the image."""
    with torch.device("meta"):
        image = torch.empty(1, 3, *size)
        net = model.build(student, num_classes)
        teacher, output = teacher_output(teacher, num_classes, size)
        method = methods.build(spec, net, teacher, **options).eval()
        labels = torch.zeros(1, *size, dtype=torch.uint8)
        cost = measure(net, image, lambda out: method(out, output, image, labels))
    params = model.count_parameters(net) + model.count_parameters(method)
    return dict(params=params) | cost


def print_methods(student, teacher, num_classes, size):
    """--method list: every method, and its additional parameters and GMACs in training."""
    own = measure_named(student, num_classes, size)
    print(f"methods, from {teacher} to {student}, at {size[0]}x{size[1]}")
    print(f"{'':12s} {'+ params':>10s} {'+ GMACs':>8s}  paper")
    for name in methods.METHODS:
        try:
            cost = with_method(name, student, teacher, num_classes, size)
        except files.UserError as e:
            print(f"{name:12s} {e}")
            continue
        gmacs = sum(cost[k] - own[k] for k in ("gmacs", "attention_gmacs"))
        params = cost["params"] - own["params"]
        print(f"{name:12s} {params:10,d} {gmacs:8.2f}  {methods.PAPERS.get(name, '')}")


def size(text):
    try:
        height, width = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, like 512x1024") from None
    if not 32 <= min(height, width) <= max(height, width) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: each side must be 32 to 100000")
    return height, width


def get_args(argv=None):
    p = argparse.ArgumentParser(description="Count parameters and GMACs", allow_abbrev=False)
    p.add_argument("--model", nargs="+", help=f"of {', '.join(model.NAMES)} (default: b0 b2)")
    p.add_argument("--num-classes", type=int, default=19, help="outputs per pixel (default: 19)")
    p.add_argument("--size", type=size, default="512x1024", help="HEIGHTxWIDTH of the image")
    p.add_argument(
        "--method",
        help="add a row for each student with this method's adapters",
    )
    p.add_argument("--teacher", help="the teacher of --method (default: b2)")
    p.add_argument("--csf-norm", choices=("none", "batch"), help="as in train.py")
    p.add_argument("--latency", action="store_true", help="also time a forward pass at batch 1")
    p.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of --latency: cuda, cuda:N, cpu",
    )
    p.add_argument("--json", action="store_true", help="print a JSON list")
    return p.parse_args(argv)


def main(args):
    parallel.get_device(args.device)
    for name in ("csf_norm", "teacher"):
        if getattr(args, name) and not args.method:
            raise files.UserError(f"{files.as_flag(name)} has no effect without --method")
    cnns = [name for name in args.model or () if name in cnn.MODELS]
    if args.method == "none" or args.method and cnns:
        lack = "--method none: no adapters, no row" if not cnns else f"{cnns[0]}: CNNs only teach"
        raise files.UserError(f"{lack}; leave --method out")
    args.teacher, args.model = args.teacher or "b2", args.model or ["b0", "b2"]
    table = list(rows(args))
    if args.json:
        print(json.dumps(table))
        return
    print(f"at {args.size[0]}x{args.size[1]}, {args.num_classes} classes")
    print(f"{'params':>10s} {'GMACs':>8s} {'attention':>10s} {'executed':>9s} {'ms':>8s}  name")
    for r in table:
        ms = f"{r['latency_ms']:8.1f}" if "latency_ms" in r else " " * 8
        print(
            f"{r['params']:>10d} {r['gmacs']:8.2f} {r['attention_gmacs']:10.2f} "
            f"{r['executed_gmacs']:9.2f} {ms}  {r['name']}"
        )


if __name__ == "__main__":
    files.cli(main, get_args())
