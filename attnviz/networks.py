"""Named networks, ready to look into: torchvision's, timm's and the small bundled ones."""

import hashlib
import os
import re
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .stages import Staged, staged

__all__ = ["FiveStage", "bundled_folder", "data_root", "load_network", "network_names"]

SUFFIXES = (".pth", ".pt", ".safetensors")
_UNREADABLE = (  # what readers raise on damaged files
    OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError,
)  # fmt: skip


class FiveStage(nn.Module):
    """A small VGG-style network with five stages, for pictures of 112 x 112 pixels.

    Args:
        class_count: Number of classes.
        head: ``fc``: the last stage, at 7 x 7, is flattened into two linear layers, so its
            gradient differs from place to place (chapter 3). ``conv``: one 1x1 convolution per
            class on a 14 x 14 map, averaged (chapter 4); a location of the last stage sees
            90 x 90 pixels.
        size: Height and width of the pictures; ``fc`` takes no other, ``conv`` any.
    """

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    cuts = ("stage1", "stage2", "stage3", "stage4", "stage5")

    def __init__(
        self, class_count: int, head: Literal["fc", "conv"] = "fc", size: int = 112
    ) -> None:
        super().__init__()
        if head not in ("fc", "conv"):
            raise ValueError(f"expected `head` in ('fc', 'conv'), got {head!r}")
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
        return self.stage5(self.pool(x) if self.head == "fc" else x)

    def classify(self, activation: Tensor) -> Tensor:
        """Returns the class scores of the last stage's activation."""
        scores = self.classifier(activation)
        return scores if self.head == "fc" else scores.mean(dim=(2, 3))


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
            ``resnet50`` or, with timm installed, a timm model.
        weights: ``auto`` looks in the data root's ``weights`` folder, then in torch's cache, then
            downloads torchvision's (or timm's) weights. A path loads that file; a hash in its
            name is verified. ``random`` leaves the network untrained.
        data: The data root; see :func:`data_root`.
        device: Where the network is put.

    Returns:
        The network, with ``class_names``, ``preprocess`` and the provenance of its weights.

    Raises:
        ValueError: The name or a hash is wrong, or the file does not fit the network.
        FileNotFoundError: No weights were found; names every place searched.
    """
    bundled = bundled_folder() / "networks" / f"{name}.safetensors"
    if bundled.is_file():
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
    class_names = tuple(metadata["class_names"].split(","))
    size = int(metadata["size"])
    model = FiveStage(len(class_names), metadata["head"], size).eval()
    provenance = _fill(model, weights, name)
    if own is metadata:
        provenance |= {key: own[key] for key in ("command", "mean_average_precision")}
    return staged(
        model, model.cuts, name=name, mean=model.mean, std=model.std, image_size=(size, size),
        class_names=class_names, multilabel=True, provenance=provenance,
    )  # fmt: skip


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
    model = _models().get_model(name, weights=None, **extra).eval()
    if weights == "auto":
        urls = [entry.url, *(other.url for other in official if other is not entry)]
        weights = _find_weights(name, root, [Path(url).name for url in urls], entry.url)
    provenance = _fill(model, weights, name)
    entry = next((e for e in official if Path(e.url).name == provenance["weights"]), entry)
    transform = entry.transforms()
    return staged(
        model, name=name, mean=tuple(transform.mean), std=tuple(transform.std),
        image_size=transform.crop_size[0], class_names=tuple(entry.meta["categories"]),
        provenance=provenance,
    )  # fmt: skip


def _load_timm(name: str, weights: str | Path, root: Path) -> Staged:
    try:
        import timm
    except ImportError:
        reason = "; timm, which knows more, is not installed"
        raise _unknown(name, network_names(), reason) from None
    if not timm.is_model(name):
        raise _unknown(name, [*network_names(), *timm.list_models()], "")
    try:
        model = timm.create_model(name, pretrained=False).eval()
        if weights == "auto":
            weights = _find_weights(name, root, [], None)
            if weights is None:
                model = timm.create_model(name, pretrained=True).eval()
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"expected weights of {name}, found none in {str(root / 'weights')!r}, and timm could "
            f"not fetch them ({_first_line(error)}); put a file there or pass `weights`"
        ) from error
    provenance = {"weights": "timm"} if weights is None else _fill(model, weights, name)
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
            f"({_first_line(error)}); put the file into one of the two, or pass `weights`"
        ) from error
    return cache / files[0]


def _fill(model: nn.Module, weights: str | Path, name: str) -> dict[str, str]:
    # Loads the weights into the model and says what they are.
    if weights == "random":
        return {"weights": "random"}
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected `weights` as 'auto', 'random' or a file, got {str(weights)!r}, "
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
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"expected a file of weights, got {str(path)!r}, which could not be read "
            f"({_first_line(error)}); save the state dict with torch.save or safetensors"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ValueError(
            f"expected a state dict in {path.name}, got {type(state).__name__}; "
            "save model.state_dict()"
        )
    if type(model).__name__ == "DenseNet":  # torchvision's files use the names of torch 0.3
        state = {re.sub(r"(norm|relu|conv)\.([12])\.", r"\1\2.", k): v for k, v in state.items()}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reasons = str(error).splitlines()
        reason = reasons[1].strip() if len(reasons) > 1 else reasons[0]
        raise ValueError(
            f"expected weights that fit {name}, got {path.name} ({reason[:200]}); "
            "is it another network's?"
        ) from error
    return {"weights": path.name, "sha256": digest}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
