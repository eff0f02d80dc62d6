"""Each data set on a miniature tree in its official layout."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_train import run

import catalog
import data
import eval as evaluation
import model
from classes import CITYSCAPES, COCO_STUFF_UNUSED, VOC
from files import UserError

RNG = np.random.default_rng(0)


def save(array, path, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(palette)
    image.save(path)


def labels(values, height=40, width=48):
    """A label of 4x4 blocks in which every one of the given values occurs."""
    blocks = np.resize(values, (height // 4) * (width // 4)).astype(np.uint8)
    blocks = RNG.permutation(blocks).reshape(height // 4, width // 4)
    return np.kron(blocks, np.ones((4, 4), np.uint8))


def cityscapes(root, kinds=("labelIds",)):
    for split, city, n in (("train", "aachen", 3), ("val", "ulm", 2), ("test", "bonn", 1)):
        for k in range(n):
            name = f"{city}/{city}_{k:06d}_000019"
            save(picture(k)[0], root / f"leftImg8bit/{split}/{name}_leftImg8bit.png")
            ids = labels(range(34)) if split != "test" else labels([3])
            for kind in kinds:
                table = dict((raw, k) for k, (_, raw, _) in enumerate(CITYSCAPES))
                map_ = np.array([table.get(v, 255) for v in range(256)], np.uint8)
                label = map_[ids] if kind == "labelTrainIds" else ids
                save(label, root / f"gtFine/{split}/{name}_gtFine_{kind}.png")
    return root


def acdc(root, images="rgb_anon", gt="gt"):
    parts = dict(fog="GOPR0475", night="GOPR0351", rain="GP010", snow="GX")
    for part, seq in parts.items():
        for split in ("train", "val", "test"):
            name = f"{part}/{split}/{seq}/{seq}_frame_000{len(split)}41"
            save(picture(len(name))[0], root / images / f"{name}_rgb_anon.png")
            reference = name.replace(f"/{split}/", f"/{split}_ref/")
            save(picture(1)[0], root / images / f"{reference}_rgb_ref_anon.png")
            if split != "test":
                label = labels([*range(19), 255])
                save(label, root / gt / f"{name}_gt_labelTrainIds.png")
                save(labels(range(34)), root / gt / f"{name}_gt_labelIds.png")
                save(labels([0, 255]), root / gt / f"{name}_gt_invIds.png")
    return root


def voc2012(root, augmented=False):
    inner = root / "VOCdevkit/VOC2012"
    colours = [v for c in ((0, 0, 0), *catalog.colours(255)) for v in c]
    lists = dict(train=["2007_000032", "2007_000039"], val=["2007_000033"], trainaug=[])
    lists["trainaug"] = [*lists["train"], "2008_000002"]
    for stem in (*lists["trainaug"], *lists["val"]):
        save(picture(len(stem))[0], inner / f"JPEGImages/{stem}.jpg")
        if stem != "2008_000002":
            label = labels([0, 1, 20, 255])
            save(label, inner / f"SegmentationClass/{stem}.png", colours)
        if augmented:
            save(labels([0, 5, 255]), inner / f"SegmentationClassAug/{stem}.png")
    for name, stems in lists.items():
        if name != "trainaug" or augmented:
            path = inner / f"ImageSets/Segmentation/{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(stems) + "\n")
    return root


def ade20k(root):
    for split, short, n in (("training", "train", 3), ("validation", "val", 2)):
        for k in range(n):
            stem = f"ADE_{short}_{k + 1:08d}"
            save(picture(k)[0], root / f"ADEChallengeData2016/images/{split}/{stem}.jpg")
            folder = root / f"ADEChallengeData2016/annotations/{split}"
            save(labels([0, 1, 75, 150]), folder / f"{stem}.png")
    return root


def cocostuff164k(root, maps="annotations"):
    for split in ("train2017", "val2017"):
        for k in range(2):
            save(picture(k)[0], root / f"images/{split}/{k:012d}.jpg")
            save(labels([0, 90 - 1, 181, 11, 255]), root / f"{maps}/{split}/{k:012d}.png")
            # what mmsegmentation's preparation leaves beside them
            save(labels([170]), root / f"{maps}/{split}/{k:012d}_labelTrainIds.png")
    return root


def cocostuff10k(root):
    io = pytest.importorskip("scipy.io")
    (root / "annotations").mkdir(parents=True)
    (root / "imageLists").mkdir()
    stems = [f"COCO_train2014_{k:012d}" for k in range(3)]
    for stem in stems:
        save(picture(3)[0], root / f"images/{stem}.jpg")
        label = labels([0, 1, 90, 182]).astype(float)  # MATLAB's doubles
        io.savemat(root / f"annotations/{stem}.mat", dict(S=label, names=["x"]))
    (root / "imageLists/train.txt").write_text("\n".join(stems[:2]) + "\n")
    (root / "imageLists/test.txt").write_text(stems[2] + "\n")
    return root


def seen(dataset, split):
    """All the values that the labels of a split have after the table."""
    found = [np.unique(catalog.read_pair(p, dataset.table)[1]) for p in dataset.pairs[split]]
    return set(np.concatenate(found).tolist())


@pytest.mark.parametrize("kinds", [["labelIds"], ["labelIds", "labelTrainIds"]])
def test_cityscapes(tmp_path, kinds):
    dataset = catalog.open_dataset("cityscapes", cityscapes(tmp_path, kinds))
    assert {k: len(v) for k, v in dataset.pairs.items()} == dict(train=3, val=2, test=1)
    assert seen(dataset, "train") == {*range(19), 255} and seen(dataset, "test") == {255}
    assert dataset.classes[13] == "car" and dataset.ids[13] == 26 and len(dataset.classes) == 19
    assert dataset.pairs["val"][0][2].name.endswith(f"{kinds[-1]}.png")


def test_cityscapes_ids_and_train_ids_are_the_same_labels(tmp_path):
    cityscapes(tmp_path, ["labelIds", "labelTrainIds"])
    by_train_id = catalog.open_dataset("cityscapes", tmp_path)
    want = [catalog.read_pair(p, by_train_id.table)[1] for p in by_train_id.pairs["train"]]
    next(tmp_path.rglob("*_labelTrainIds.png")).unlink()  # one is missing: none is used
    by_id = catalog.open_dataset("cityscapes", tmp_path)
    got = [catalog.read_pair(p, by_id.table)[1] for p in by_id.pairs["train"]]
    assert all(np.array_equal(a, b) for a, b in zip(got, want))


def test_the_official_table_of_cityscapes():
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    known = [x for x in official if 0 <= x.trainId < 19]
    assert [(x.name, x.id, x.color) for x in sorted(known, key=lambda x: x.trainId)] == [
        *CITYSCAPES
    ]


@pytest.mark.parametrize("folders", [(), ("rgb_anon_trainvaltest/rgb_anon", "gt_trainval/gt")])
def test_acdc(tmp_path, folders):
    dataset = catalog.open_dataset("acdc", acdc(tmp_path, *folders))
    assert {k: len(v) for k, v in dataset.pairs.items()} == dict(train=4, val=4, test=4)
    assert dataset.parts_of("val") == ["fog", "night", "rain", "snow"]
    assert dataset.pairs["test"][0][2] is None and seen(dataset, "test") == {255}
    assert seen(dataset, "train") <= {*range(19), 255}


def test_voc2012(tmp_path):
    dataset = catalog.open_dataset("voc2012", voc2012(tmp_path / "a"))
    assert len(dataset.pairs["train"]) == 2 and seen(dataset, "val") == {0, 1, 20, 255}
    assert dataset.classes == VOC and dataset.palette[15] == (192, 128, 128)  # a person
    voc2012(tmp_path / "b", augmented=True)
    for root in (tmp_path / "b", tmp_path / "b/VOCdevkit", tmp_path / "b/VOCdevkit/VOC2012"):
        dataset = catalog.open_dataset("voc2012", root)
        assert len(dataset.pairs["train"]) == 3 and seen(dataset, "train") == {0, 5, 255}
        assert seen(dataset, "val") == {0, 1, 20, 255}


@pytest.mark.parametrize(
    "n, void, name, colour",
    [
        (19, None, "road", (128, 64, 128)),
        (20, 19, "road", (128, 64, 128)),
        (21, None, "background", (0, 0, 0)),
        (150, None, "wall", catalog.colours(150)[0]),
        (7, None, "class 0", catalog.colours(7)[0]),
    ],
)
def test_names_where_a_checkpoint_has_none(n, void, name, colour):
    facts = dict(classes=None, palette=None, void=void)
    filled = catalog.complete(facts, n)
    assert len(filled["classes"]) == len(filled["palette"]) == n - (void is not None)
    assert filled["classes"][0] == name
    assert filled["palette"][0] == list(colour)
    assert catalog.complete(dict(facts, classes=["x"] * n), n)["classes"] == ["x"] * n


def test_ade20k(tmp_path):
    dataset = catalog.open_dataset("ade20k", ade20k(tmp_path))
    assert len(dataset.pairs["train"]) == 3 and len(dataset.pairs["val"]) == 2
    assert seen(dataset, "train") == {0, 74, 149, 255} and len(dataset.classes) == 150
    assert (dataset.classes[12], dataset.classes[149]) == ("person", "flag")


def test_cocostuff(tmp_path):
    dataset = catalog.open_dataset("cocostuff164k", cocostuff164k(tmp_path))
    assert len(dataset.classes) == 171 == len(set(dataset.classes))
    assert seen(dataset, "train") == {0, 79, 170, 255}
    assert [dataset.classes[k] for k in (79, 80, 170)] == ["toothbrush", "banner", "wood"]
    assert len(dataset.pairs["val"]) == 2 and len(COCO_STUFF_UNUSED) == 11


def test_cocos_own_annotations_beside_the_maps(tmp_path):
    root = cocostuff164k(tmp_path, maps="stuffthingmaps")
    (root / "annotations").mkdir()
    (root / "annotations/instances_train2017.json").write_text("{}")
    assert len(catalog.open_dataset("cocostuff164k", root).pairs["train"]) == 2


@pytest.mark.parametrize("name", ["cityscapes", "acdc"])
def test_what_macos_leaves_beside_images(tmp_path, name):
    root = dict(cityscapes=cityscapes, acdc=acdc)[name](tmp_path)
    before = catalog.open_dataset(name, root).pairs
    for path in [p for p in root.rglob("*.png") if "train" in p.parts]:
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    assert catalog.open_dataset(name, root).pairs == before


def test_cocostuff10k(tmp_path):
    dataset = catalog.open_dataset("cocostuff10k", cocostuff10k(tmp_path))
    assert {k: len(v) for k, v in dataset.pairs.items()} == dict(train=2, val=1)
    assert seen(dataset, "train") | seen(dataset, "val") == {0, 79, 170, 255}
    dataset.pairs["val"][0][2].write_bytes(b"no .mat file")
    with pytest.raises(UserError, match=r"000002.mat: no MATLAB file .* numbers as S \("):
        seen(dataset, "val")


@pytest.mark.parametrize("name", ["cityscapes", "acdc", "voc2012", "ade20k", "cocostuff164k"])
def test_an_empty_folder_is_an_error_that_helps(tmp_path, name):
    words = {
        "cityscapes": "fetch leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https:",
        "acdc": "fetch rgb_anon_trainvaltest.zip and gt_trainval.zip from https:",
        "cocostuff164k": "fetch train2017.zip, val2017.zip and stuffthingmaps_trainval2017.zip",
    }.get(name, f"python data.py download {name}")
    with pytest.raises(UserError, match=f"{tmp_path}/.*; {words}"):
        catalog.open_dataset(name, tmp_path)


def test_a_layout_of_ones_own_with_a_name_or_a_colour_too_few():
    for names, colours, what in (("a", 2, "1 names, 2 colours"), ("ab", 1, "2 names, 1 colours")):
        with pytest.raises(UserError, match=f"mine: {what}, 2 label values"):
            catalog.Dataset("mine", names, catalog.colours(colours), catalog.label_table(2), {})


def test_a_label_that_is_not_there(tmp_path):
    root = cityscapes(tmp_path)
    next(root.glob("gtFine/train/*/*000001*")).unlink()
    with pytest.raises(UserError, match="1 of 5 labels are missing: .*000001_000019_gtFine_lab"):
        catalog.open_dataset("cityscapes", root)


# ------------------------------------------------------------------------------------------------
# scores and predictions as the benchmarks want them


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A net of 19 classes that knows nothing but predicts many of them."""
    path = tmp_path_factory.mktemp("net") / "net.pt"
    torch.manual_seed(1)
    net = model.build("nano", 19)
    torch.nn.init.normal_(net.head.classifier.weight)
    model.save(path, net, dataset="cityscapes")
    return path


def run_eval(capsys, *argv):
    evaluation.main(evaluation.get_args([*map(str, argv), "--device", "cpu", "--json"]))
    return json.loads(capsys.readouterr().out)


def test_predictions_score_the_same_in_cityscapes_own_evaluation(tmp_path, capsys, ckpt):
    pytest.importorskip("cityscapesscripts")
    root, preds = cityscapes(tmp_path / "data"), tmp_path / "preds"
    ours = run_eval(capsys, "--ckpt", ckpt, "--data-dir", root, "--save-preds", preds)
    assert {p.name for p in preds.iterdir()} == {
        f"ulm_00000{k}_000019_leftImg8bit.png" for k in range(2)
    }
    code = (
        "import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as e, glob\n"
        "e.args.JSONOutput, e.args.quiet = False, True\n"
        "gt = sorted(glob.glob(e.args.groundTruthSearch))\n"
        "e.args.evalInstLevelScore = e.args.evalPixelAccuracy = False\n"
        "r = e.evaluateImgLists([e.getPrediction(e.args, g) for g in gt], gt, e.args)\n"
        "print('SCORE', r['averageScoreClasses'])\n"
    )
    env = os.environ | dict(CITYSCAPES_DATASET=str(root), CITYSCAPES_RESULTS=str(preds))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    score = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("SCORE")]
    assert score, done.stdout + done.stderr
    assert ours["miou"] == pytest.approx(float(score[0]), abs=1e-6) and ours["miou"] > 0


def test_acdc_is_scored_apart_and_together(tmp_path, capsys, ckpt):
    root, preds = acdc(tmp_path / "data"), tmp_path / "preds"
    argv = ("--ckpt", ckpt, "--dataset", "acdc", "--data-dir", root)
    both = run_eval(capsys, *argv, "--save-preds", preds)
    assert set(both["parts"]) == {"fog", "night", "rain", "snow"} and both["images"] == 4
    for part in both["parts"]:  # by the rest of the data set taken away
        for other in {"fog", "night", "rain", "snow"} - {part}:
            (root / "rgb_anon" / other).rename(tmp_path / other)
        alone = run_eval(capsys, *argv, "--cache", "off")
        for key in ("miou", "iou", "boundary_iou", "pixel_acc"):
            assert both["parts"][part][key] == alone[key]
        for other in {"fog", "night", "rain", "snow"} - {part}:
            (tmp_path / other).rename(root / "rgb_anon" / other)
    saved = np.asarray(Image.open(next(preds.glob("GOPR0475*_rgb_anon.png"))))
    assert saved.shape == (40, 48) and saved.max() < 19  # trainIds, as its server wants
    unlabelled = run_eval(capsys, *argv, "--split", "test", "--save-preds", preds)
    assert unlabelled["miou"] is None and len(list(preds.iterdir())) == 8


def test_training_scores_the_conditions_of_acdc_apart_too(tmp_path):
    few = "--dataset acdc --method none --max-iters 1".split()
    metrics = run(acdc(tmp_path / "data"), tmp_path / "out", *few)
    assert set(metrics["student"]["parts"]) == {"fog", "night", "rain", "snow"}


def test_a_void_output_is_a_miss_and_no_class(tmp_path, capsys):
    """TransKD's release: 20 outputs, the last of which means that nothing is known."""
    from test_weights import nvlabs

    root = cityscapes(tmp_path / "data")
    net = model.build("b0", 20)
    with torch.no_grad():
        net.head.classifier.weight.zero_()
        net.head.classifier.bias.copy_(torch.arange(20.0))  # void wins everywhere
    state = {f"student.{k}": v for k, v in nvlabs(net.state_dict(), "", head="").items()}
    torch.save(state, tmp_path / "x.pth")
    argv = ("--ckpt", tmp_path / "x.pth", "--dataset", "cityscapes", "--data-dir", root)
    got = run_eval(capsys, *argv, "--save-preds", tmp_path / "preds")
    assert got["miou"] == 0 and len(got["iou"]) == 19 == len(got["classes"])
    assert got["classes"][0] == "road" and got["pixel_acc"] == 0
    saved = np.asarray(Image.open(next((tmp_path / "preds").iterdir())))
    assert set(np.unique(saved)) == {0}  # "unlabeled"
    with torch.no_grad():
        net.head.classifier.bias.copy_(torch.arange(20.0) * (torch.arange(20) < 19))
    state = {f"student.{k}": v for k, v in nvlabs(net.state_dict(), "", head="").items()}
    torch.save(state, tmp_path / "x.pth")
    got = run_eval(capsys, *argv)
    dataset = catalog.open_dataset("cityscapes", root)
    truth = data.class_pixels(data.Files(dataset.pairs["val"], dataset.table))[:19]
    assert got["iou"][18] == pytest.approx(truth[18] / truth.sum())


def test_class_weights_are_the_papers():
    """Cityscapes' published weights are 1 / ln(1.10 + frequency): invert and compute them again."""
    paper = np.array([float(v) for v in PAPER_WEIGHTS.split()])
    frequency = np.exp(1 / paper) - 1.10
    assert frequency.sum() == pytest.approx(1, abs=1e-4)
    pixels = np.zeros(256, np.int64)
    pixels[:19] = np.round(frequency * 1e9)

    class Split:
        def __len__(self):
            return 1

        def label(self, i):
            return np.repeat(np.arange(256), pixels // 10**5)

    assert data.class_weights(Split(), 19).numpy() == pytest.approx(paper, rel=1e-3)


PAPER_WEIGHTS = """2.5959737 6.741505 3.5353868 9.866315 9.690922 9.369371 10.289124 9.953209
4.3098087 9.490392 7.674411 9.396925 10.347794 6.3928986 10.226673 10.241072 10.28059 10.396977
10.05567"""


@pytest.mark.parametrize(
    "theirs, ours, same",
    [
        (["земля", "небо"], ["Земля ", "Небо"], True),
        (["земля", "небо"], ["небо", "земля"], False),
        (["天空", "道路"], ["道路", "天空"], False),
        (["caf\u00e9", "b"], ["cafe\u0301", "b"], True),  # one character, or two
        (["+", "-"], ["-", "+"], False),
    ],
)
def test_classes_in_any_alphabet(theirs, ours, same, capsys):
    net, facts = SimpleNamespace(num_classes=2), dict(void=None, classes=theirs)
    dataset = SimpleNamespace(name="mine", classes=ours)
    if same:
        catalog.check_classes("a.pt", net, facts, dataset)
        assert not capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="in another order"):
            catalog.check_classes("a.pt", net, facts, dataset)


def test_accents_as_macos_writes_them_in_file_names(folder):
    for kind in ("images", "labels"):
        (folder / kind / "p0.png").rename(folder / kind / "cafe\u0301.png")
    # Windows' editors begin a file with a mark of their own
    for stem, encoding in (("caf\u00e9", "utf-8"), ("cafe\u0301", "utf-8-sig")):
        (folder / "train.txt").write_text(f"{stem}\np1", encoding=encoding)
        pairs = catalog.open_dataset("folder", folder).pairs["train"]
        assert [stem for stem, *_ in pairs] == ["caf\u00e9", "p1"] and pairs[0][1].is_file()
