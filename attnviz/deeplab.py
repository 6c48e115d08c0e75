"""Segmentation networks: DeepLab-LargeFOV and DeepLabv2 (ASPP), and small ones of their kind.

A network ends in one map per class at a stride of the image; :meth:`SegmentationNetwork.enlarged`
brings scores to pixels. Classes are numbered as in masks: 0 background, ``1 + class_id`` a class.

References:
    DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs (Chen et al., 2017), https://arxiv.org/abs/1606.00915, section 3, for
    both networks.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .networks import (
    _load_state,
    _metadata,
    _official_weights,
    _read_state,
    bundled_folder,
    data_root,
    oaa_network,
    stated,
    stated_count,
    stated_names,
)

__all__ = [
    "SEGMENTATION_NETWORKS", "SegmentationNetwork", "load_segmentation", "segmentation_network",
]  # fmt: skip

_KIND = "segmentation"
# backbone, width of the head, its dilation, stride, window
_NETWORKS = {
    "largefov_vgg16": ("vgg16", 1024, 12, 8, 401),
    "largefov_resnet50": ("resnet50", 1024, 12, 8, 401),
    "largefov_resnet101": ("resnet101", 1024, 12, 8, 401),
    "aspp_resnet101": ("resnet101", 0, 0, 8, 401),
    "squeezenet1_1": ("squeezenet1_1", 256, 12, 8, 401),
    "mobilenet_v2": ("mobilenet_v2", 256, 6, 16, 401),
    "scenes": ("scenes", 128, 2, 8, 112),
    "scenes_aspp": ("scenes", 0, 0, 8, 112),
}
_CHANNELS = {"vgg16": 512, "squeezenet1_1": 512, "mobilenet_v2": 1280, "scenes": 96}

SEGMENTATION_NETWORKS = tuple(_NETWORKS)
"""The networks that :func:`segmentation_network` makes."""


class SegmentationNetwork(nn.Module):
    """A network that gives each place of an image a score per class, background first.

    Made by :func:`segmentation_network`.
    """

    name: str
    """One of :data:`SEGMENTATION_NETWORKS`."""
    class_count: int
    """Number of classes, without background."""
    backbone: nn.Sequential
    """The pretrained layers."""
    head: nn.Module
    """The layers behind them; ``head.score`` or the branches of ASPP give the scores."""
    stride: int
    """Pixels of the image per cell of the scores, in height and in width."""
    window: int
    """Side of the windows that it is tested on, in pixels."""
    cornered: bool
    """Whether the first cell's center is the first pixel's, so that ``1 + k * stride`` pixels
    give ``1 + k`` cells; else each cell is the middle of its own pixels."""
    mean: tuple[float, float, float]
    """Mean of each color channel, for pixels in [0, 1], to take off."""
    std: tuple[float, float, float]
    """Standard deviation of each color channel to divide by."""
    class_names: tuple[str, ...] | None
    """Names of the classes, without background; None where they are not known."""
    provenance: dict[str, str]
    """Where the weights come from."""

    def __init__(self, name: str, class_count: int, backbone: nn.Sequential) -> None:
        super().__init__()
        kind, width, dilation, self.stride, self.window = _NETWORKS[name]
        self.name, self.class_count, self.class_names = name, class_count, None
        self.cornered = kind != "scenes"
        # statistics of small batches would spoil those of the pretrained weights
        self.frozen_norms = kind != "scenes"
        self.backbone = backbone
        channels = _CHANNELS.get(kind, 2048)
        if "aspp" in name:
            # cells of scenes are few: the same views, a third as wide
            rates = (2, 4, 6, 8) if kind == "scenes" else (6, 12, 18, 24)
            self.head = _ASPP(channels, 1 + class_count, rates)
        else:
            self.head = _large_fov(channels, width, dilation, 1 + class_count, name)
        self._old_head: list[nn.Module] = []

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """Returns the scores ``(b, 1 + class_count, h, w)`` of normalized images, by stride."""
        return self.head(self.backbone(images))

    def normalized(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """Returns pixels as the network wants them; zero is the mean color."""
        center, spread = (
            torch.tensor(part, device=pixels.device)[:, None, None]
            for part in (self.mean, self.std)
        )
        values = (pixels.float() / 255 - center) / spread
        return values.contiguous(memory_format=torch.channels_last)

    def enlarged(
        self, scores: Float[Tensor, "b k h w"], size: tuple[int, int]
    ) -> Float[Tensor, "b k H W"]:
        """Interpolates scores between the centers of their cells, to the size of the image."""
        return interpolate(scores, size, mode="bilinear", align_corners=self.cornered)

    def fitting(self, side: int) -> int:
        """Returns the least length of at least `side` that gives whole cells."""
        return -(-(side - self.cornered) // self.stride) * self.stride + self.cornered

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters that no pretrained weights were found for."""
        old = {id(p) for layer in self._old_head for p in layer.parameters()}
        return [p for p in self.head.parameters() if id(p) not in old]

    def old_parameters(self) -> list[nn.Parameter]:
        """Parameters of the pretrained layers, without those that stay as they are."""
        layers = [self.backbone, *self._old_head]
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> "SegmentationNetwork":
        """Sets the training mode; normalization in pretrained layers stays in eval mode."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def metadata(self, class_names: Sequence[str] | None = None) -> dict[str, str]:
        """What a safetensors file of its weights must say for :func:`load_segmentation`."""
        facts = {"kind": _KIND, "network": self.name, "class_count": str(self.class_count)}
        facts["init"] = self.provenance["weights"]
        return facts | ({} if class_names is None else {"class_names": json.dumps(class_names)})

    def _norms(self) -> Iterable[nn.BatchNorm2d]:
        return (m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm2d))


def _large_fov(channels: int, width: int, dilation: int, count: int, name: str) -> nn.Sequential:
    # VGG16's layers are its fully connected ones, with biases and dropout; ResNet's are new
    fully = "resnet" not in name
    dropout = 0.5 if name == "largefov_vgg16" else 0.0
    layers = nn.Sequential()
    layers.add_module(
        "fc6", nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation, bias=fully)
    )
    layers.add_module("relu6", nn.ReLU(inplace=True))
    layers.add_module("drop6", nn.Dropout(dropout))
    layers.add_module("fc7", nn.Conv2d(width, width, 1, bias=fully))
    layers.add_module("relu7", nn.ReLU(inplace=True))
    layers.add_module("drop7", nn.Dropout(dropout))
    layers.add_module("score", nn.Conv2d(width, count, 1))
    for layer in (layers.fc6, layers.fc7):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.normal_(layers.score.weight, std=0.01)
    nn.init.zeros_(layers.score.bias)
    return layers


class _ASPP(nn.Module):
    # Atrous spatial pyramid pooling: the sum of four views of different width.
    def __init__(self, channels: int, count: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, count, 3, padding=rate, dilation=rate) for rate in rates
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, features: Tensor) -> Tensor:
        return sum(branch(features) for branch in self.branches)


def segmentation_network(
    name: str,
    class_count: int,
    weights: Literal["auto", "random"] | str | Path = "auto",
    *,
    data: str | Path | None = None,
) -> SegmentationNetwork:
    """Makes a network for segmentation: pretrained layers at a fine stride and a new head.

    ``largefov_vgg16`` is DeepLab-LargeFOV: poolings of 3x3, the last two without stride, the last
    three convolutions dilated by 2, then VGG16's fully connected layers, thinned out to 1024
    channels and, the first, to 3x3 with dilation 12. ``largefov_resnet50`` and ``-101`` are
    dilated to the same stride 8, their head is new. ``aspp_resnet101`` is DeepLabv2.
    ``squeezenet1_1`` (stride 8) and ``mobilenet_v2`` (stride 16) have a LargeFOV head of 256
    channels, for processors without a GPU. ``scenes`` is for the generated pictures: the five
    stages of the bundled ``scenes_conv``, at stride 8, and a head of 128 channels with dilation
    2; ``scenes_aspp`` has DeepLabv2's head of four views instead. New layers that give scores
    start at N(0, 0.01), the others at Xavier's.

    Args:
        name: One of :data:`SEGMENTATION_NETWORKS`.
        class_count: Number of classes, without background.
        weights: ``auto`` finds ImageNet weights as :func:`attnviz.load_network` does, for
            ``scenes`` the bundled classifier's; ``random`` none. A path is the plain network's
            file, that of an :class:`~attnviz.networks.OAANetwork` with as many classes or of
            another training of this package, all without their last layer, or that of a trained
            segmentation network, taken whole.
        data: The data root; see :func:`attnviz.networks.data_root`.

    Raises:
        ValueError: The name is wrong, a file does not fit the network, or there are too many
            classes for 8-bit label pictures.
        FileNotFoundError: No weights were found; names every place searched.
    """
    if name not in _NETWORKS:
        raise ValueError(
            f"expected `name` in {SEGMENTATION_NETWORKS}, got {name!r}; choose one of these"
        )
    if (
        not isinstance(class_count, int) or not 1 <= class_count <= 254
    ):  # the numbers of a label picture, without 255
        raise ValueError(f"expected `class_count` from 1 to 254, got {class_count}")
    kind = _NETWORKS[name][0]
    if weights == "auto":
        bundled = bundled_folder() / "networks" / "scenes_conv.safetensors"
        weights = bundled if kind == "scenes" else _official_weights(kind, data_root(data))
    trained = _metadata(weights).get("kind") == _KIND
    start = oaa_network(kind, class_count, "random" if trained else weights, data=data)
    model = SegmentationNetwork(name, class_count, _backbone(kind, start.backbone))
    model.mean, model.std, model.provenance = start.mean, start.std, start.provenance
    if trained:
        state, model.provenance = _read_state(Path(weights))
        _load_state(
            model, state, model.provenance["weights"], f"{name} with {class_count} classes"
        )
    elif kind == "vgg16" and weights != "random":
        state, _ = _read_state(Path(weights))
        if "classifier.0.weight" in state:
            model.provenance["head"] = "fully connected layers, thinned out"
            model._old_head = _thinned(model.head, state)
    return model


def load_segmentation(path: str | Path) -> SegmentationNetwork:
    """Loads a trained network from its file or from the folder of its run.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It is not that of a segmentation network.
    """
    path = Path(path)
    path = path / "network.safetensors" if path.is_dir() else path
    facts = _metadata(path)
    if path.is_file() and facts.get("kind") != _KIND:
        raise ValueError(
            f"expected the network of a run of `attnviz train segment`, got {str(path)!r}; "
            "train one"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a trained segmentation network in {str(path)!r}, which is not there; "
            "finish its run with --resume"
        )
    network, init = stated(facts, path, "network", "init")
    names = stated_names(facts, path)
    model = segmentation_network(network, stated_count(facts, path, "class_count"), path).eval()
    model.class_names = names
    model.provenance["init"] = init
    return model


def _backbone(kind: str, layers: nn.Sequential) -> nn.Sequential:
    # From chapter 4's cut of the network to DeepLab's poolings and stride.
    if kind == "vgg16":
        for pool in (4, 9, 16):
            layers[pool] = nn.MaxPool2d(3, 2, padding=1)
        return nn.Sequential(*layers, nn.MaxPool2d(3, 1, padding=1), nn.AvgPool2d(3, 1, padding=1))
    if kind == "squeezenet1_1":  # padded, so that cells lie where those of the others do
        layers[0].padding = (1, 1)
        for pool in (2, 5):
            layers[pool] = nn.MaxPool2d(3, 2, padding=1)
    return layers


def _thinned(head: nn.Sequential, state: dict[str, Tensor]) -> list[nn.Module]:
    # Every fourth channel, and of 7 x 7 places the first, the middle and the last.
    first = state["classifier.0.weight"].reshape(4096, 512, 7, 7)
    head.fc6.weight.data = first[::4, :, ::3, ::3].clone()
    head.fc6.bias.data = state["classifier.0.bias"][::4].clone()
    head.fc7.weight.data = state["classifier.3.weight"][::4, ::4, None, None].clone()
    head.fc7.bias.data = state["classifier.3.bias"][::4].clone()
    return [head.fc6, head.fc7]
