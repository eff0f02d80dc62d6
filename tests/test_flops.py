"""Costs against the papers' and against counts by hand."""

import json

import pytest

import files
import flops
import model

# GMACs at 512x1024 with 20 classes, convolutions and linears; TransKD's published GFLOPs for the
# same (13.67, 113.84; in training 16.47, 16.80, 17.84) also count norms, and are within 1 %
GMACS = dict(b0=(13.60, 4.16), b2=(113.62, 15.57))
# and the parameters of student and adapters together, exactly those of the release
WRAPPED = {
    "transkd-base": (16.38, 4563124),
    "transkd-gl": (16.72, 5219254),
    "transkd-ea": (17.75, 5534076),
}


def run(capsys, *words):
    flops.main(flops.get_args([*words, "--json"]))
    return json.loads(capsys.readouterr().out)


def test_contract(capsys):
    words = "--model b0 b2 --num-classes 20 --size 512x1024".split()
    b0, b2 = run(capsys, *words)
    assert (b0["name"], b0["params"]) == ("b0", 3719284)
    assert (b2["name"], b2["params"]) == ("b2", 27362004)
    for row in (b0, b2):
        assert (row["gmacs"], row["attention_gmacs"]) == pytest.approx(
            GMACS[row["name"]], abs=0.006
        )
        assert row["executed_gmacs"] < 0.4 * row["gmacs"] and "latency_ms" not in row


@pytest.mark.parametrize("method", WRAPPED)
def test_training_wrapper(capsys, method):
    words = f"--model b0 --num-classes 20 --method {method} --csf-norm batch".split()
    _, row = run(capsys, *words)
    gmacs, params = WRAPPED[method]
    assert row["gmacs"] == pytest.approx(gmacs, abs=0.006) and row["params"] == params
    assert "training only" in row["name"]


def test_what_a_method_adds_by_hand(capsys):
    """FitNet: a 1x1 convolution from 64 channels to 256, without bias, at stride 4."""
    flops.print_methods("nano", "b0", 20, (512, 1024))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fitnet" in line)
    added = 64 * 256
    assert line.split()[1:3] == [f"{added:,}", f"{added * 128 * 256 / 1e9:.2f}"]


def test_head_by_hand():
    """What the merged head saves: three 1x1 convs of D to D at stride 4, and more."""
    D, n = 64, [24 * 40, 12 * 20, 6 * 10, 3 * 5]
    dims = model.MODELS["nano"][0]
    written = sum(c * D * k for c, k in zip(dims, n)) + 4 * D * D * n[0]
    merged = sum(c * D * k for c, k in zip(dims, n))
    products = sum(D * D * (c + 1) for c in dims)  # of the matrices, and of matrix and bias
    row = flops.measure_named("nano", 3, (96, 160))
    saved = (row["gmacs"] - row["executed_gmacs"]) * 1e9
    assert saved == pytest.approx(written - merged - products, rel=0.01)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--method none", "--method none: no adapters, no row; leave --method out"),
        ("--model fcn_resnet50 --method kd", "fcn_resnet50: CNNs only teach; leave --method out"),
        ("--model b9 --method kd", "unknown model 'b9'"),
        ("--device xpu", "--device xpu: cpu or cuda"),
        ("--teacher b2", "--teacher has no effect without --method"),
        ("--csf-norm batch", "--csf-norm has no effect without --method"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(files.UserError, match=message):
        flops.main(flops.get_args(words.split()))


@pytest.mark.parametrize("size", ["31x64", "64x999999", "64", "axb"])
def test_sizes_that_no_image_has(size, capsys):
    with pytest.raises(SystemExit):
        flops.get_args(["--size", size])
    assert "--size: " in capsys.readouterr().err.splitlines()[-1]


def test_latency(capsys):
    (row,) = run(capsys, "--model", "nano", "--size", "64x64", "--latency")
    assert 0 < row["latency_ms"] < 1e4
