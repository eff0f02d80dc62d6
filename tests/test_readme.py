"""The README's commands, run in their order on small data; and what it says of the files."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_folder, write_photos
from test_catalog import cityscapes
from test_data import write_camvid
from test_weights import nvlabs

import catalog
import model
import scenes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
INSTALL, *COMMANDS = [block.strip().split("\n") for block in BLOCKS]
HUB, RELEASE = "hub.pth", "segformerb0_TransKDBase_cityscapes.pth"
LISTS, IDEA = re.findall(r"```py\n(.*?)```", README, re.S)
SMALL = "--student nano --crop-size 32 --batch-size 4 --max-iters 1".split()
SMALL_PHOTOS = "--model nano --size 32 --batch-size 4 --max-iters 1".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the scripts, and with data where the README's commands expect it."""
    place = tmp_path_factory.mktemp("readme")
    for script in ROOT.glob("*.py"):
        (place / script.name).symlink_to(script)
    write_folder(place / "data/nyuv2", classes=40)
    write_camvid(place / "data/camvid")
    cityscapes(place / "data/cityscapes")
    write_photos(place / "data/imagenet")
    (place / "weights").mkdir()
    (place / "idea.py").write_text(IDEA)
    encoder = nvlabs(model.build("nano", 5).encoder.state_dict(prefix="encoder."), prefix="")
    torch.save(encoder, place / "weights/mit_b2.pth")
    for name, prefix, head, classes in (
        (HUB, "backbone.", "decode_head.", 19),
        (RELEASE, "student.", "student.", 20),
    ):
        state = model.build("nano", classes).state_dict()
        torch.save(nvlabs(state, prefix, head), place / "weights" / name)
    return place


def test_first_commands():
    assert INSTALL == [
        "pip install -r requirements.txt && python train.py",
        "pip install -r requirements.txt && python -m pytest",
    ]
    assert README.index(INSTALL[0]) < 1500


@pytest.mark.parametrize("line", [line for block in COMMANDS for line in block])
def test_command(place, line, monkeypatch):
    """In this process, to which nothing has to be imported again; torchrun, and a script that adds
    a method, in others.
    """
    program, *argv = shlex.split(line)
    assert program in ("python", "torchrun")
    if program == "torchrun":
        argv[0] = "--nproc_per_node=2"
    if {"train.py", "idea.py"} & {*argv}:
        argv += SMALL
        if "--teacher-ckpt" not in argv:
            argv += ["--teacher", "nano"]
    if "pretrain.py" in argv:
        argv = [word for word in argv if word not in ("--epochs", "300")] + SMALL_PHOTOS
    if "train.py" in argv and "--dataset" not in argv and "list" not in argv:
        argv += ["--dataset", "nyuv2", "--data-dir", "data/nyuv2"]  # fewer than the scenes
    if "--recipe" in argv:  # whole images, 512 high: two at a time are enough
        at = argv.index("--crop-size")
        argv[at : at + 4] = ["--batch-size", "2", "--teacher-batch-size", "2"]
    if "bench.py" in argv:
        pytest.importorskip("matplotlib")
        argv += "--only inference data --student nano --models nano --size 64x64".split()
        argv += "--batches 1 --seconds 0.1".split()
    if "suite.py" in argv:  # test_suite.py runs it
        argv += ["--no-runs"] if "scenes" in argv else ["--plan", "tiny", "--no-runs"]
    if "export.py" in argv or "exported/hf" in argv:
        for package in ("transformers", "onnxruntime", "onnxscript", "safetensors"):
            pytest.importorskip(package)
    argv = [f"weights/{HUB}" if word.startswith("nvidia/") else word for word in argv]
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    if program == "torchrun" or argv[0] == "idea.py":
        torchrun = ["-m", "torch.distributed.run", "--master_port", "29871"]
        words = [sys.executable, *(torchrun if program == "torchrun" else []), *argv]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0], run_name="__main__")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python(place, code, monkeypatch, capsys):
    """After the commands, with what they left."""
    (place / "snippet.py").write_text(code)
    monkeypatch.chdir(place)
    runpy.run_path("snippet.py")
    names = re.findall("'(.*?)'", capsys.readouterr().out)
    assert names and {*names} <= {name for name, _ in scenes.CLASSES}


def test_lists_of_a_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "lists.py").write_text(LISTS)
    before = catalog.open_dataset("folder", "data/mine").pairs
    runpy.run_path("lists.py")
    after = catalog.open_dataset("folder", "data/mine").pairs
    total = len(before["train"]) + len(before["val"])
    assert len(after["val"]) == total // 5 and len(after["train"]) == total - total // 5
    assert not {stem for stem, *_ in after["val"]} & {stem for stem, *_ in after["train"]}


def test_files_are_all_in_the_table_and_none_is_invented():
    table = set(re.findall(r"^\| `(\w+\.py)`", README, re.M))
    assert table == {p.name for p in ROOT.glob("*.py")}


def test_the_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).exists()


def test_files_import_only_from_those_above():
    order = re.findall(r"^\| `(\w+)\.py`", README, re.M)
    for k, name in enumerate(order):
        text = (ROOT / f"{name}.py").read_text()
        used = set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) & set(order)
        assert used <= set(order[:k]), f"{name}.py imports {used - set(order[:k])}"
