"""Named networks, ready to look into: torchvision's, timm's and the small bundled ones."""

import hashlib
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .files import first_line, read_saved
from .stages import Staged, staged

__all__ = [
    "OAA_NETWORKS", "FiveStage", "OAANetwork", "bundled_folder", "data_root", "load_network",
    "network_names", "oaa_network",
]  # fmt: skip

SUFFIXES = (".pth", ".pt", ".safetensors")


class FiveStage(nn.Module):
    """A small VGG-style network with five stages, for pictures of 112 x 112 pixels.

    Args:
        class_count: Number of classes.
        head: ``fc``: the last stage, at 7 x 7, is flattened into two linear layers, so its
            gradient differs from place to place (chapter 3). ``conv``: one 1x1 convolution per
            class on a 14 x 14 map, averaged (chapter 4); a location of the last stage sees
            90 x 90 pixels. ``gap``: the same on a 7 x 7 map, so that each stage is coarser than
            the one before it, as in ResNet.
        size: Height and width of the pictures; ``fc`` takes no other, the others any.
    """

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    cuts = ("stage1", "stage2", "stage3", "stage4", "stage5")

    def __init__(
        self, class_count: int, head: Literal["fc", "conv", "gap"] = "fc", size: int = 112
    ) -> None:
        super().__init__()
        if head not in ("fc", "conv", "gap"):
            raise ValueError(f"expected `head` in ('fc', 'conv', 'gap'), got {head!r}")
        self.head = head
        widths, depths = (3, 16, 16, 32, 64, 96), (1, 2, 1, 2, 2)
        for stage, depth in enumerate(depths, start=1):
            layers: list[nn.Module] = []
            for layer in range(depth):
                before, after = widths[stage - 1 if layer == 0 else stage], widths[stage]
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            self.add_module(f"stage{stage}", nn.Sequential(*layers))
        self.pool = nn.MaxPool2d(2)
        if head == "fc":
            self.classifier = nn.Sequential(
                nn.Flatten(), nn.Dropout(0.2), nn.Linear(widths[-1] * (size // 16) ** 2, 64),
                nn.ReLU(), nn.Linear(64, class_count),
            )  # fmt: skip
        else:
            self.classifier = nn.Conv2d(widths[-1], class_count, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class scores ``(b, classes)`` of normalized images ``(b, 3, h, w)``."""
        return self.classify(self.last_stage(images))

    def last_stage(self, images: Tensor) -> Tensor:
        """Returns the activation of the last stage."""
        x = self.stage1(images)
        x = self.stage2(self.pool(x))
        x = self.stage3(self.pool(x))
        x = self.stage4(self.pool(x))
        return self.stage5(x if self.head == "conv" else self.pool(x))

    def classify(self, activation: Tensor) -> Tensor:
        """Returns the class scores of the last stage's activation."""
        scores = self.classifier(activation)
        return scores if self.head == "fc" else scores.mean(dim=(2, 3))


class OAANetwork(nn.Module):
    """A classification network that ends in one map per class, as chapter 4 trains it.

    Its scores are the means of its class maps. ``backbone`` and ``head`` may be called one after
    the other, with something in between. Made by :func:`oaa_network`.
    """

    name: str
    """One of :data:`OAA_NETWORKS`."""
    backbone: nn.Sequential
    """The pretrained layers."""
    head: nn.Sequential
    """The new layers; the last is a 1x1 convolution with one channel per class."""
    stride: int
    """Pixels of the image per cell of a class map, in height and in width."""
    mean: tuple[float, float, float]
    """Mean of each color channel, for pixels in [0, 1], to take off."""
    std: tuple[float, float, float]
    """Standard deviation of each color channel to divide by."""
    cuts: tuple[str, ...] | None
    """The modules that end its stages; None where :func:`attnviz.staged` finds them."""
    provenance: dict[str, str]
    """Where the weights come from."""

    def __init__(
        self, name: str, backbone: nn.Sequential, class_count: int, ceil_mode: bool
    ) -> None:
        super().__init__()
        self.name, self.class_count, self.ceil_mode = name, class_count, ceil_mode
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        self.stride, channels, depth, self.cuts = _OAA[name]
        if name == "scenes":
            self.mean, self.std = FiveStage.mean, FiveStage.std
        # statistics of small batches would spoil those of the pretrained weights
        self.frozen_norms = name != "scenes"
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, 512, 3, padding=1), nn.ReLU(inplace=True)]
            channels = 512
        self.backbone = backbone
        self.head = nn.Sequential(*layers, nn.Conv2d(channels, class_count, 1))
        for layer in self.head[::2]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        for norm in self._norms():
            norm.requires_grad_(not self.frozen_norms)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the class scores ``(b, classes)`` of normalized images ``(b, 3, h, w)``."""
        return self.class_maps(images).mean(dim=(2, 3))

    def class_maps(self, images: Tensor) -> Tensor:
        """Returns one map per class ``(b, classes, h, w)``, signed; its mean is the score."""
        return self.head(self.backbone(images))

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters of the new layers."""
        return list(self.head.parameters())

    def old_parameters(self) -> list[nn.Parameter]:
        """Parameters of the pretrained layers, without those that stay as they are."""
        return [p for p in self.backbone.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> "OAANetwork":
        """Sets the training mode; normalization in pretrained layers stays in eval mode."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def metadata(self, class_names: Sequence[str] | None = None) -> dict[str, str]:
        """What a safetensors file of its weights must say for :func:`load_network` to open it."""
        facts = {"kind": "oaa", "network": self.name, "class_count": str(self.class_count)}
        facts["ceil_mode"] = str(self.ceil_mode)
        return facts | ({} if class_names is None else {"class_names": json.dumps(class_names)})

    def _norms(self) -> Iterable[nn.BatchNorm2d]:
        return (m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d))


_LAYERS = ("layer1", "layer2", "layer3", "layer4")
_FIVE = ("stage1", "stage2", "stage3", "stage4", "stage5")
_OAA = {  # stride, channels of the backbone, 3x3 convolutions of the head, stages
    "scenes": (8, 96, 0, tuple(f"backbone.{stage}" for stage in _FIVE)),
    "vgg16": (8, 512, 3, tuple(f"backbone.{relu}" for relu in (3, 8, 15, 22, 29))),
    "resnet50": (8, 2048, 3, tuple(f"backbone.{m}" for m in ("relu", *_LAYERS))),
    "resnet101": (8, 2048, 3, tuple(f"backbone.{m}" for m in ("relu", *_LAYERS))),
    "squeezenet1_1": (8, 512, 0, None),
    "mobilenet_v2": (16, 1280, 0, None),
}

OAA_NETWORKS = tuple(_OAA)
"""The networks that :func:`oaa_network` makes."""


def oaa_network(
    name: str,
    class_count: int,
    weights: Literal["auto", "random"] | str | Path = "auto",
    *,
    ceil_mode: bool = False,
    data: str | Path | None = None,
) -> OAANetwork:
    """Makes a network for chapter 4: pretrained layers with fine maps and a new head.

    ``vgg16`` is the thesis': its fourth pooling is 3x3 with stride 1, its fifth is left out, the
    last three convolutions are dilated by 2; three 3x3 convolutions with 512 channels and ReLU
    and one 1x1 convolution follow. ``resnet50`` and ``resnet101`` have this head as well and are
    dilated to the same stride 8. ``squeezenet1_1`` (stride 8) and ``mobilenet_v2`` (stride 16),
    for processors without a GPU, and ``scenes``, :class:`FiveStage` for the generated pictures,
    end in the 1x1 convolution alone. The new layers start at N(0, 0.01), biases at 0.

    Args:
        name: One of :data:`OAA_NETWORKS`.
        class_count: Number of classes.
        weights: ``auto`` finds ImageNet weights as :func:`load_network` does; ``scenes`` has
            none and starts ``random``. A path is the plain network's file, of which the last
            layer is left out, or that of a trained :class:`OAANetwork`, taken whole.
        ceil_mode: Round the sizes after VGG16's poolings up, as Caffe does: an image of width
            300 then gives 38 columns, not 37.
        data: The data root; see :func:`data_root`.

    Raises:
        ValueError: The name is wrong, or a file does not fit the network.
        FileNotFoundError: No weights were found; names every place searched.
    """
    if name not in OAA_NETWORKS:
        raise ValueError(f"expected `name` in {OAA_NETWORKS}, got {name!r}; choose one of these")
    if ceil_mode and name != "vgg16":
        raise ValueError(f"expected `ceil_mode` with 'vgg16' only, got it with {name!r}")
    if weights == "auto":
        weights = "random" if name == "scenes" else _official_weights(name, data_root(data))
    options = {"replace_stride_with_dilation": (False, True, True)} if "resnet" in name else {}
    with torch.device("meta"):  # VGG16's classifier alone takes seconds to draw
        scenes = name == "scenes"
        plain = FiveStage(1, "conv") if scenes else _models().get_model(name, **options)
    setattr(plain, "fc" if "resnet" in name else "classifier", nn.Identity())
    _draw(plain.to_empty(device="cpu"))
    trained = _metadata(weights).get("kind") == "oaa"
    provenance = {"weights": "random"}
    if weights != "random":
        state, provenance = _read_state(Path(weights))
        if not trained:
            state = {k: v for k, v in state.items() if not k.startswith(("classifier.", "fc."))}
            _load_state(plain, state, provenance["weights"], name)
    model = OAANetwork(name, _oaa_backbone(name, plain, ceil_mode), class_count, ceil_mode)
    if trained:
        _load_state(model, state, provenance["weights"], f"{name} with {class_count} classes")
    model.provenance = provenance
    return model


def _oaa_backbone(name: str, plain: nn.Module, ceil_mode: bool) -> nn.Sequential:
    if name == "scenes":
        children = [(stage, getattr(plain, stage)) for stage in _FIVE]
        pools = [(f"pool{k}", nn.MaxPool2d(2)) for k in (1, 2, 3)]
        order = [*(pair for k in range(3) for pair in (children[k], pools[k])), *children[3:]]
        return nn.Sequential(OrderedDict(order))
    if "resnet" in name:
        children = [(n, m) for n, m in plain.named_children() if n not in ("avgpool", "fc")]
        return nn.Sequential(OrderedDict(children))
    layers = plain.features
    if name == "vgg16":
        layers = layers[:30]
        for pool in (4, 9, 16):
            layers[pool].ceil_mode = ceil_mode
        layers[23] = nn.MaxPool2d(3, stride=1, padding=1)
        _dilate(layers[24:])
    elif name == "squeezenet1_1":
        layers[8] = nn.MaxPool2d(3, stride=1, padding=1)
        _dilate(layers[9:])
    else:
        for layer in layers[14].modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
        _dilate(layers[15:])
    return layers


def _dilate(layers: nn.Module) -> None:
    # Without the stride before them, they see what they saw with it.
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.dilation = layer.padding = (2, 2)


def _draw(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()


def data_root(folder: str | Path | None = None) -> Path:
    """Returns the folder of data sets and weights: `folder`, ``$ATTNVIZ_DATA`` or ``data``."""
    return Path(folder or os.environ.get("ATTNVIZ_DATA") or "data")


def bundled_folder() -> Path:
    """Returns the folder of the data that comes with the package."""
    inside = Path(__file__).parent / "bundled"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "data"


def network_names() -> list[str]:
    """Names that :func:`load_network` knows: bundled ones first, then torchvision's."""
    from torchvision.models import list_models

    bundled = sorted(path.stem for path in (bundled_folder() / "networks").glob("*.safetensors"))
    return [*bundled, *list_models(module=_models())]


def load_network(
    name: str,
    weights: Literal["auto", "random"] | str | Path = "auto",
    *,
    data: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Staged:
    """Loads a network with its weights, cut into stages.

    Args:
        name: A bundled network (``scenes_fc``, ``scenes_conv``), a torchvision model such as
            ``resnet50`` or, with timm installed, a timm model. ``oaa``, or the name it was
            trained under, with the file of a trained :class:`OAANetwork`.
        weights: ``auto`` looks in the data root's ``weights`` folder, then in torch's cache, then
            downloads torchvision's (or timm's) weights. A path loads that file, also one for
            another number of classes, whose names are not known then; a hash in its name is
            verified. ``random`` leaves the network untrained.
        data: The data root; see :func:`data_root`.
        device: Where the network is put.

    Returns:
        The network, with ``class_names``, ``preprocess`` and the provenance of its weights.

    Raises:
        TypeError: The name is no text, or the weights are neither text nor a path.
        ValueError: The name or a hash is wrong, or the file does not fit the network.
        FileNotFoundError: No weights were found; names every place searched.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a network, got {type(name).__name__}")
    if not isinstance(weights, str | os.PathLike):
        raise TypeError(f"expected `weights` 'auto', 'random' or a file, got {weights!r}")
    bundled = bundled_folder() / "networks" / f"{name}.safetensors"
    if _metadata(weights).get("kind") == "oaa":
        net = _load_oaa(name, weights)
    elif bundled.is_file():
        net = _load_bundled(name, bundled if weights == "auto" else weights)
    elif name in _torchvision_names():
        net = _load_torchvision(name, weights, data_root(data))
    else:
        net = _load_timm(name, weights, data_root(data))
    return net.to(device)


def _models() -> object:
    import torchvision.models

    return torchvision.models


def _torchvision_names() -> list[str]:
    return _models().list_models(module=_models())


# ------------------------------------------------------------------------------------- bundled


def _load_bundled(name: str, weights: str | Path) -> Staged:
    bundled = _metadata(bundled_folder() / "networks" / f"{name}.safetensors")
    own = _metadata(weights)
    metadata = own if own.get("head") == bundled["head"] else bundled
    (names,) = stated(metadata, weights, "class_names")
    class_names, size = tuple(names.split(",")), stated_count(metadata, weights, "size")
    model = FiveStage(len(class_names), metadata["head"], size).eval()
    provenance = _fill(model, weights, name)
    if own is metadata:
        known = ("command", "mean_average_precision")
        provenance |= zip(known, stated(own, weights, *known), strict=True)
    return staged(
        model, model.cuts, name=name, mean=model.mean, std=model.std, image_size=(size, size),
        class_names=class_names, multilabel=metadata.get("multilabel") != "False",
        provenance=provenance,
    )  # fmt: skip


def _load_oaa(name: str, weights: str | Path) -> Staged:
    own = _metadata(weights)
    network, rounding = stated(own, weights, "network", "ceil_mode")
    if name not in ("oaa", network):
        raise ValueError(
            f"expected `name` 'oaa' or {network!r} for {Path(weights).name}, got {name!r}"
        )
    count, ceil_mode = stated_count(own, weights, "class_count"), rounding == "True"
    names = stated_names(own, weights)
    model = oaa_network(network, count, weights, ceil_mode=ceil_mode).eval()
    size = (112, 112) if network == "scenes" else 224
    return staged(
        model, model.cuts, name=network, mean=model.mean, std=model.std, image_size=size,
        class_names=names, multilabel=True, provenance=model.provenance,
    )  # fmt: skip


def stated(facts: Mapping[str, str], file: str | Path, *names: str) -> list[str]:
    """Returns what a trained network's file says about itself; ValueError if it does not."""
    if missing := [name for name in names if name not in facts]:
        raise ValueError(
            f"expected {missing[0]!r} in the header of {Path(file).name}, got none; it is "
            "damaged, train the network again"
        )
    return [facts[name] for name in names]


def stated_count(facts: Mapping[str, str], file: str | Path, name: str) -> int:
    """Returns a number, from 1 to 65,535, of those; ValueError if it is none."""
    (text,) = stated(facts, file, name)
    if not text.isdecimal() or not 1 <= int(text[:6]) <= 65_535:
        raise ValueError(
            f"expected {name!r} in the header of {Path(file).name} as a number, got "
            f"{text[:20]!r}; it is damaged, train the network again"
        )
    return int(text)


def stated_names(facts: Mapping[str, str], file: str | Path) -> tuple[str, ...] | None:
    """Returns the names of the classes in JSON, None if there are none; ValueError if not."""
    if "class_names" not in facts:
        return None
    try:
        names = tuple(json.loads(facts["class_names"]))
    except (ValueError, TypeError, RecursionError):
        names = (None,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"expected the names of classes in the header of {Path(file).name}, got others; it "
            "is damaged, train the network again"
        )
    return names


def _metadata(file: str | Path) -> dict[str, str]:
    # What a trained network's file says about itself; empty if it says nothing.
    if Path(file).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):  # _fill says what is wrong with the file
        return {}


# ----------------------------------------------------------------------- torchvision and timm


def _load_torchvision(name: str, weights: str | Path, root: Path) -> Staged:
    official = list(_models().get_model_weights(name))
    if not official:
        raise ValueError(f"expected a network with published weights, got {name!r}")
    entry = _models().get_model_weights(name).DEFAULT
    extra = {"transform_input": True} if name in ("googlenet", "inception_v3") else {}
    if extra:
        extra["init_weights"] = False
    if weights == "auto":
        weights = _official_weights(name, root)
    names = tuple(entry.meta["categories"])
    make = partial(_models().get_model, name, weights=None, **extra)
    model, provenance, count = _filled(make, weights, name)
    entry = next((e for e in official if Path(e.url).name == provenance["weights"]), entry)
    transform = entry.transforms()
    size = transform.crop_size[0]
    own = _metadata(weights)
    if "class_names" in own:  # one that was trained here
        names = tuple(own["class_names"].split(","))
        size = (stated_count(own, weights, "size"),) * 2
    return staged(
        model, name=name, mean=tuple(transform.mean), std=tuple(transform.std),
        image_size=size, class_names=names if count == len(names) else None,
        provenance=provenance,
    )  # fmt: skip


def _official_weights(name: str, root: Path) -> Path:
    best = _models().get_model_weights(name).DEFAULT
    others = [entry.url for entry in _models().get_model_weights(name) if entry is not best]
    files = [Path(url).name for url in (best.url, *others)]
    return _find_weights(name, root, files, best.url)


def _load_timm(name: str, weights: str | Path, root: Path) -> Staged:
    try:
        import timm
    except ImportError:
        reason = "; timm, which knows more, is not installed"
        raise _unknown(name, network_names(), reason) from None
    if not timm.is_model(name):
        raise _unknown(name, [*network_names(), *timm.list_models()], "")
    try:
        if weights == "auto":
            weights = _find_weights(name, root, [], None)
        if weights is None:
            model = timm.create_model(name, pretrained=True).eval()
            provenance = {"weights": "timm"}
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"expected weights of {name}, found none in {str(root / 'weights')!r}, and timm could "
            f"not fetch them ({first_line(error)}); put a file there or pass `weights`"
        ) from error
    if weights is not None:
        model, provenance, _ = _filled(partial(timm.create_model, name), weights, name)
    config = timm.data.resolve_data_config({}, model=model)
    names = timm.data.ImageNetInfo().label_descriptions() if model.num_classes == 1000 else None
    return staged(
        model, name=name, mean=config["mean"], std=config["std"],
        image_size=config["input_size"][-1], class_names=tuple(names) if names else None,
        provenance=provenance,
    )  # fmt: skip


def _unknown(name: str, names: list[str], reason: str) -> ValueError:
    near = get_close_matches(name, dict.fromkeys(names), n=4, cutoff=0.4)
    remedy = f"the nearest are {', '.join(near)}" if near else "for instance resnet50"
    return ValueError(f"expected the name of a network, got {name!r}{reason}; {remedy}")


# ------------------------------------------------------------------------------------- weights


def _find_weights(name: str, root: Path, files: list[str], url: str | None) -> Path | None:
    folder = root / "weights"
    pattern = re.compile(rf"{re.escape(name)}([-_](imagenet|[0-9a-f]{{8,}}))?")
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES and pattern.fullmatch(path.stem):
                return path
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for file in files:
        if (cache / file).is_file():
            return cache / file
    if url is None:
        return None
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"expected weights of {name}, found none in {str(folder)!r} (as {name}.pth or "
            f"{files[0]}) nor in {str(cache)!r}, and the download of {url} failed "
            f"({first_line(error)}); put the file into one of the two, or pass `weights`"
        ) from error
    return cache / files[0]


def _filled(
    make: Callable[..., nn.Module], weights: str | Path, name: str
) -> tuple[nn.Module, dict[str, str], int]:
    # The network with its weights, what they are, and the number of classes, which they decide.
    model = make().eval()
    last, bias = list(model.state_dict().items())[-1]  # of the classifier
    if weights == "random":
        return model, {"weights": "random"}, len(bias)
    state, provenance = _read_state(Path(weights))
    own = state.get(last)
    if isinstance(own, Tensor) and own.ndim == 1 and len(own) != len(bias):
        model, bias = make(num_classes=len(own)).eval(), own
    _load_state(model, state, provenance["weights"], name)
    return model, provenance, len(bias)


def _fill(model: nn.Module, weights: str | Path, name: str) -> dict[str, str]:
    # Loads the weights into the model and says what they are.
    if weights == "random":
        return {"weights": "random"}
    state, provenance = _read_state(Path(weights))
    _load_state(model, state, provenance["weights"], name)
    return provenance


def check_weights(weights: str | Path) -> None:
    """Raises where `weights` is a file that cannot be read; before hours of something else."""
    if weights not in ("auto", "random"):
        _read_state(Path(weights))


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"expected `weights` as 'auto', 'random' or a file, got {str(path)!r}, "
            "which is not there"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stated = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    if stated and not digest.startswith(stated[1]):
        raise ValueError(
            f"expected {path.name} to have the sha256 {stated[1]}... of its name, "
            f"got {digest[: len(stated[1])]}...; the file is damaged, download it again"
        )
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = read_saved(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"expected a file of weights, got {str(path)!r}, which could not be read "
            f"({first_line(error)}); save the state dict with torch.save or safetensors"
        ) from error
    for key in ("state_dict", "model"):  # of a checkpoint with more in it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ValueError(
            f"expected a state dict in {path.name}, got {type(state).__name__}; "
            "save model.state_dict()"
        )
    state = {key.removeprefix("module."): value for key, value in state.items()}
    return state, {"weights": path.name, "sha256": digest}


def _load_state(model: nn.Module, state: dict[str, Tensor], file: str, name: str) -> None:
    if type(model).__name__ == "DenseNet":  # torchvision's files use the names of torch 0.3
        state = {re.sub(r"(norm|relu|conv)\.([12])\.", r"\1\2.", k): v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reasons = str(error).splitlines()
        reason = reasons[1].strip() if len(reasons) > 1 else reasons[0]
        raise ValueError(
            f"expected weights that fit {name}, got {file} ({reason[:200]}); "
            "is it another network's?"
        ) from error
