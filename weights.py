"""
Other people's weights: reading them from a file, a folder or a hub, and renaming their tensors.

`read(source)` recognises a checkpoint by its contents, not by its file name:

    ours             what model.save writes, or a state dict with our names
    NVlabs           mit_b*.pth, and SegFormer checkpoints (backbone.*, decode_head.*)
    PVTv2, LVT       their authors' pvt_v2_b*.pth, with NVlabs' tensor names, and lvt_*.pth.tar
    Hugging Face     SegformerModel, ...ForImageClassification, ...ForSemanticSegmentation, and
                     those of PvtV2; as a folder, a file (.bin, .safetensors) or a name on the hub
                     (nvidia/mit-b0)
    mmsegmentation   its own MiT (backbone.layers.*); its head, another function, is left out
    TransKD          the authors' release: student.* among adapters, no mean and std, a void class
    torchvision      ResNet-50 and -101, and DeepLabV3 and FCN on them; as a file, or by a name in
                     torchvision (torchvision/resnet50, torchvision/deeplabv3_resnet101)

Only tensors and plain values are ever unpickled.
"""

import json
import re
import socket
import urllib.parse
import urllib.request
from pathlib import Path

import torch

from downloads import digest, download
from files import UserError, installed, load_tensors

FORMAT = "segmentation-student-1"  # marks our own files
# for RGB images in [0, 1]: what every published MiT was trained with
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = ("format", "state_dict")  # all else in them is a fact

# ------------------------------------------------------------------------------------------------
# names

# prefixes of the names
WRAPPERS = r"^(?:(?:module|_orig_mod|student|backbone|segformer|pvt_v2)\.)+"
STUDENT = r"^(?:(?:module|_orig_mod)\.)*student\."  # TransKD: the student among its adapters
EMBED = r"encoder.stages.\1.patch_embed."
BLOCK = r"encoder.stages.\1.blocks.\2."
NORM = r"encoder.stages.\1.norm."
RENAMES = (  # applied in order; the layouts' names do not clash
    # the position: stage and block
    (r"^(?:encoder\.)?patch_embed(?:dings)?\.(\d)\.", EMBED),
    (r"^(?:stages|encoder\.layers)\.(\d)\.patch_embeddings?\.", EMBED),
    (r"^(?:layers\.)?(\d)\.0\.", EMBED),
    (r"^(?:encoder\.)?block\.(\d)\.(\d+)\.", BLOCK),
    (r"^(?:stages|encoder\.layers)\.(\d)\.blocks\.(\d+)\.", BLOCK),
    (r"^(?:layers\.)?(\d)\.1\.(\d+)\.", BLOCK),
    (r"^(?:encoder\.layer_norm|norm)\.(\d)\.", NORM),
    (r"^(?:stages|encoder\.layers)\.(\d)\.layer_norm\.", NORM),
    (r"^layers\.(\d)\.2\.", NORM),
    # the tensor, within a patch embedding or a block
    (r"patch_embed\.projection\.", "patch_embed.proj."),
    (r"patch_embed\.layer_norm\.", "patch_embed.norm."),
    (r"\.layer_norm_(\d)\.", r".norm\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue)\.", r"attn.\1."),
    (r"attention\.(q|k|v)_proj\.", r"attn.\1."),
    (r"attn\.attn\.in_proj_", "attn.qkv."),
    (r"attention\.(?:output\.dense|o_proj|proj)\.|attn\.attn\.out_proj\.", "attn.proj."),
    (
        r"attention\.(?:self\.sr|sequence_reduction\.sequence_reduction|spatial_reduction)\.",
        "attn.sr.",
    ),
    (r"attention\.(?:(?:self|sequence_reduction)\.)?layer_norm\.", "attn.norm."),
    (r"attn\.(weight|ds)\.weight$", r"attn.\1"),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"\.(?:mlp\.dwconv\.dwconv|mlp\.depconv|ffn\.layers\.1)\.", ".mlp.dwconv."),
    (r"\.ffn\.layers\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.4\.", ".mlp.fc2."),
    # the head
    (r"^(?:decode_head\.)?(?:linear_c|linear_projections)\.(\d)\.proj\.", r"head.linears.\1."),
    (r"^(?:decode_head\.)?linear_fuse\.(?:conv\.)?(weight)", r"head.fuse.\1"),
    (r"^(?:decode_head\.)?(?:linear_fuse\.bn|batch_norm)\.", "head.norm."),
    (r"^(?:decode_head\.)?linear_pred\.|^decode_head\.classifier\.", "head.classifier."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"head.laterals.\1."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"head.smooths.\1."),
    (r"^head\.scale_heads\.(\d)\.0\.conv\.", r"head.branches.\1.0."),  # every other layer there
    (r"^head\.scale_heads\.(\d)\.2\.conv\.", r"head.branches.\1.1."),  # is an upsampling
    (r"^head\.scale_heads\.(\d)\.4\.conv\.", r"head.branches.\1.2."),
    (r"^head\.conv_seg\.", "head.classifier."),
    # torchvision
    (r"^(conv1|bn1|layer\d)\.", r"backbone.\1."),
)
RELEASE = r"((module|_orig_mod|student)\.)*(linear_pred|head\.conv_seg)\."  # TransKD's


def rename(name):
    """A tensor's name in any layout -> ours, or what is left of it if we have no such tensor."""
    name = re.sub(WRAPPERS, "", name)
    name = re.sub(  # NVlabs counts stages from one
        r"^((?:decode_head\.)?(?:patch_embed|block|norm|linear_c))(\d)\.",
        lambda m: f"{m[1]}.{int(m[2]) - 1}.",
        name,
    )
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def translate(tensors):
    """A state dict in any layout, in our names.

    Hugging Face's separate keys and values become one matrix; mmsegmentation's joint q, k, v become
    two, and its 1x1 convolutions become matrices. TransKD's adapters keep their names: those of the
    Embedding Assistant would be taken for patch embeddings.
    """
    ours, wrapped = {}, any(re.match(STUDENT, name) for name in tensors)
    for name, value in tensors.items():
        if not wrapped or re.match(STUDENT, name):
            name = rename(name)
        if ".attn.qkv." in name:
            ours[name.replace(".qkv.", ".q.")], k, v = value.chunk(3)
            ours[name.replace(".qkv.", ".kv.")] = torch.cat([k, v])
        elif re.search(r"\.fc\d\.weight$", name) and value.ndim == 4:
            ours[name] = value.flatten(1)
        else:
            ours[name] = value
    for name in [name for name in ours if ".attn.k." in name]:
        both = name, name.replace(".attn.k.", ".attn.v.")
        if both[1] in ours:
            ours[name.replace(".k.", ".kv.")] = torch.cat([ours.pop(part) for part in both])
    return ours


# ------------------------------------------------------------------------------------------------
# files, folders, hubs


def read(source):
    """(state dict in our names, facts) of a file, a folder or a name on the hub.

    facts, as far as the source has them: what `model.save` wrote beside our weights, or `classes`,
    `palette`, `mean`, `std`, `heads`, `resize` (to this shorter side, before the net) and `void`
    (the output that means "none of the classes"). Raises UserError that says what is wrong.
    """
    path = locate(source)
    tensors, facts = read_folder(path) if path.is_dir() else unwrap(load_any(path), path)
    if "model" in facts:  # ours
        return tensors, facts
    state = translate(tensors)
    if not any(re.match(r"encoder\.stages\.0\.|backbone\.layer1\.", name) for name in state):
        some = ", ".join(list(tensors)[:4]) or "none"
        problem = "no SegFormer and no ResNet in a layout that we know"
        raise UserError(f"{source}: {problem}; its tensors: {some}")
    if str(source).startswith("torchvision/"):
        facts.setdefault("resize", 520)  # the shorter side at which its segmenters were scored
    if any(re.match(RELEASE, name) for name in tensors):
        # TransKD's release: images of 512 rows in [0, 1], the 20th class is void
        facts |= dict(mean=[0.0] * 3, std=[1.0] * 3, resize=512)
        if len(state["head.classifier.weight"]) == 20:
            facts["void"] = 19
    return state, facts


# what they publish is looked for there, even where a folder is called like them
OWNERS = ("nvidia", "OpenGVLab", "torchvision")


def locate(source):
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    here = path.parent.exists() and path.parts[0] not in OWNERS
    a_file = re.search(r"\.(pt|pth|bin|safetensors|ckpt)$", name) or here
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not a_file:
        home, model = name.split("/")
        if home == "torchvision":
            return fetch_torchvision(model)
        try:
            return fetch_from_hub(name)
        except UserError as e:
            raise UserError(f"no file or folder here, and on the hub, {e}") from e
    raise UserError(f"{source}: no such file" + " or folder" * (not path.suffix))


def load_any(path):
    """The contents of a .safetensors, .bin, .pth or .pt file, recognised by its first bytes."""
    with open(path, "rb") as f:
        start = f.read(9)
    if start[8:] != b"{":  # safetensors: eight bytes of length, then JSON
        return load_tensors(path)
    try:
        import safetensors
        import safetensors.torch
    except ImportError as e:
        raise UserError(f"{path}: pip install safetensors, to read it") from e
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e})") from e


def unwrap(tree, path):
    """(tensors, facts) of what a training script saved: weights, and plain values beside them."""
    facts = {}
    if isinstance(tree, dict) and tree.get("format") not in (None, FORMAT):
        raise UserError(f"{path}: the state of a run; pass the run's student.pt or teacher.pt")
    while isinstance(tree, dict):
        if tree.get("format") == FORMAT:
            facts = {k: v for k, v in tree.items() if k not in OURS}
        meta = tree.get("meta")  # mmcv's
        if isinstance(meta, dict) and meta.get("CLASSES"):
            facts |= dict(classes=list(meta["CLASSES"]))
            if meta.get("PALETTE"):
                facts |= dict(palette=[list(c) for c in meta["PALETTE"]])
        for name in ("state_dict", "model", "model_state_dict", "net"):
            if isinstance(tree.get(name), dict):
                tree = tree[name]
                break
        else:
            return {k: v for k, v in tree.items() if isinstance(v, torch.Tensor)}, facts
    return {}, facts


def read_json(path):
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not a JSON file ({e})") from e
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return tree


KINDS = ("model.safetensors", "pytorch_model.bin")  # transformers' names of weights


def kinds():
    """KINDS, that which can be read here first."""
    return KINDS if installed("safetensors") else KINDS[::-1]


def read_folder(folder):
    """(tensors, facts) of a folder that transformers wrote."""
    tensors = {}
    for name in kinds():
        index = folder / f"{name}.index.json"
        if (folder / name).exists() or index.exists():
            for part in [name] if (folder / name).exists() else shards(index):
                tensors |= unwrap(load_any(folder / part), folder / part)[0]
            return tensors, folder_facts(folder)
    ours = [folder / name for name in ("student.pt", "teacher.pt", "encoder.pt")]
    hint = next((f"; pass {path}" for path in ours if path.exists()), "")
    problem = f"neither {' nor '.join(KINDS)} in it (nor shards of them)"
    raise UserError(f"{folder}: {problem}{hint}")


def shards(index):
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{index}: no weight_map in it")
    names = sorted(set(map(str, names.values())))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UserError(f"{index}: names the shard {name}, which is no file beside it")
    return names


def folder_facts(folder):
    """Class names, input statistics and size, from config.json and preprocessor_config.json."""
    paths = folder / "config.json", folder / "preprocessor_config.json"
    config, inputs = (read_json(path) if path.exists() else {} for path in paths)
    if config.get("model_type", "segformer") not in ("segformer", "pvt_v2"):
        raise UserError(f"{paths[0]}: a {config['model_type']}, not a segformer or pvt_v2")
    facts = {}
    try:
        facts["heads"] = tuple(config.get("num_attention_heads") or ()) or None
        names = config.get("id2label") or {}
        facts["classes"] = [str(names[str(k)]) for k in range(len(names))] or None
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            facts[ours] = [float(v) for v in inputs.get(theirs) or ()] or None
        if not inputs.get("do_normalize", True):
            facts |= dict(mean=[0.0] * 3, std=[1.0] * 3)
        factor = inputs.get("rescale_factor", 1 / 255) if inputs.get("do_rescale", True) else 1
        if abs(255 * factor - 1) > 1e-6:  # our images are in [0, 1] before mean and std
            for ours, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
                facts[ours] = [v / (255 * factor) for v in facts[ours] or usual]
        size = inputs.get("size") if inputs.get("do_resize", True) else None
        # for photos; scoring need not resize to it: Cityscapes is scored at the files' own size
        facts["short_side"] = size and int(min(size.values()) if isinstance(size, dict) else size)
        if FORMAT in config and is_as_exported(facts, config[FORMAT]):
            facts |= dict(short_side=None) | config[FORMAT]
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as e:
        problem = f"{type(e).__name__}: {e}"
        raise UserError(f"{folder}: its config files are not as they should be ({problem})") from e
    for name, value in (("hidden_act", "gelu"), ("strides", [4, 2, 2, 2])):
        if config.get(name, value) != value:
            raise UserError(f"{paths[0]}: {name} {config[name]}: only {value} is possible here")
    return facts


def is_as_exported(facts, ours):
    """Whether transformers' own fields still say what export.py wrote beside ours. In a folder that
    was trained further by transformers they may not, and then they count."""
    classes = facts["classes"] or []
    photo_side = ours.get("resize") or ours.get("short_side")
    return classes == [*ours["classes"], "void"][: len(classes)] and (
        facts["mean"] is None  # there is no preprocessor_config.json
        or (facts["mean"], facts["std"]) == (ours["mean"], ours["std"])
        and facts["short_side"] == photo_side
    )


def fetch_from_hub(name):
    """The folder of a model on the hub in huggingface_hub's cache, downloaded if missing."""
    by_hand = (
        f"get config.json, preprocessor_config.json (if there) and model.safetensors or "
        f"pytorch_model.bin from https://huggingface.co/{name}/tree/main and pass the folder"
    )
    try:
        from huggingface_hub import _CACHED_NO_EXIST as NO_SUCH_FILE
        from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as e:
        raise UserError(f"{name}: pip install huggingface_hub to download it, or {by_hand}") from e
    is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not (is_cached or constants.HF_HUB_OFFLINE or reachable(constants.ENDPOINT)):
        raise UserError(f"{name}: no connection to {constants.ENDPOINT}; {by_hand}")

    if not is_cached:
        print(f"{name}: downloading from {constants.ENDPOINT}/{name} (see its licence there)")

    def get(*files):
        for file in files:
            found = try_to_load_from_cache(name, file)  # without asking the hub once more
            if found is NO_SUCH_FILE:
                continue
            if found:
                return Path(found)
            try:
                return Path(hf_hub_download(name, file))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
        return None

    try:
        config = get("config.json")
        if config is None:
            raise UserError(f"{name}: has no config.json, so it is no model of transformers")
        get("preprocessor_config.json")
        first, second = kinds()
        weights = get(first, f"{first}.index.json", second, f"{second}.index.json")
        if weights is None:
            raise UserError(f"{name}: has neither {' nor '.join(KINDS)}")
        parts = [weights]
        if weights.suffix == ".json":
            names = set(map(str, read_json(weights).get("weight_map", {}).values()))
            parts = [get(part) for part in sorted(names)]
    except (OSError, ValueError) as e:  # huggingface_hub's, of the network, the server or the name
        raise UserError(f"{name}: {str(e).splitlines()[0]} Or: {by_hand}") from e
    for part in filter(None, parts):
        verify(part)
    return config.parent


def fetch_torchvision(name):
    """The file of a torchvision model's weights in torch.hub's cache, fetched if missing.

    Of a ResNet, the first version of the ImageNet weights, as torchvision's DeepLabV3 starts from.
    """
    from torchvision.models import get_model_weights

    try:
        url = next(iter(get_model_weights(name))).url
    except ValueError as e:
        raise UserError(f"torchvision/{name}: torchvision has no model of this name") from e
    return cached(url, Path(torch.hub.get_dir()) / "checkpoints")


def cached(url, folder):
    """The file of a URL ending in -HASH.pth, HASH a prefix of its SHA-256; fetched if missing."""
    path = folder / url.rsplit("/", 1)[1]
    if not (path.exists() or reachable(url)):
        raise UserError(f"{url}: no connection; fetch it in a browser and put it at {path}")
    download(url, path, sha256=path.stem.rsplit("-", 1)[1])
    return path


def verify(path):
    """Compare a large file with its SHA-256, which is its name in the hub's cache."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = digest(blob)
        if found != blob.name:
            blob.unlink()
            raise UserError(f"{path}: damaged (SHA-256 {found}); removed, so try again")


def reachable(url):
    """Whether a server answers within seconds: the downloader itself would wait far longer."""
    if urllib.request.getproxies():
        return True
    parts = urllib.parse.urlsplit(url)
    address = (parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443))
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True
