"""Cuts any traceable CNN into explicit stages and a head.

Stage k is the post-activation output of the last convolution at one resolution, before the
pooling or the stride that ends it; stage 1 is the shallowest. The network is traced with
torch.fx and run piece by piece, so nothing is hooked: the model stays as it was, several
threads may use one :class:`Staged`, and an in-place layer can't spoil what is kept.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .checks import check_number, check_size, check_whole, plain, shown
from .files import first_line
from .graphs import OUTPUT, CutNetwork, cut_network, input_channels
from .images import network_size, to_pixels

_IMAGENET = {  # mean and standard deviation by number of channels
    1: ((0.449,), (0.226,)),
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_BILINEAR = Image.Resampling.BILINEAR

__all__ = ["Pieces", "Staged", "check_network", "staged"]


@dataclass(frozen=True)
class Pieces:
    """What one forward pass leaves: stage activations, pooled activations and the output."""

    activations: tuple[Tensor, ...]
    """The activation of each stage asked for, ``(b, c, h, w)``, shallow first."""
    pooled: tuple[Tensor | None, ...]
    """The output of the pooling layer that follows each stage, or None where there is none."""
    output: object
    """The model's own output."""


class Staged:
    """A convolutional network cut into explicit stages and a head.

    Calling it gives the output of ``model.eval()``, bit for bit. The parameters are the
    model's own and follow its updates and moves; its training mode, gradients, hooks and
    ``requires_grad`` are neither used nor changed. Made by :func:`staged`.
    """

    model: nn.Module
    """The user's model, as it was given."""
    name: str
    """The network's name."""
    stage_names: tuple[str, ...]
    """Name of the module (or graph node) that ends each stage, shallow first."""
    mean: tuple[float, ...]
    """Mean of each color channel, for pixels in [0, 1], that the network expects taken off."""
    std: tuple[float, ...]
    """Standard deviation of each color channel that the network expects divided by."""
    image_size: int | tuple[int, int]
    """Short side of the images it expects, or their exact height and width."""
    class_names: tuple[str, ...] | None
    """Name of each class, if known."""
    multilabel: bool
    """Whether several classes may be right: probabilities by sigmoid, not by softmax."""
    provenance: dict[str, str]
    """Where the weights come from."""

    def __init__(self, model: nn.Module, parts: CutNetwork) -> None:
        self.model = model
        self.stage_names = parts.stage_names
        self._parts = parts
        self._channels = input_channels(model)

    def __call__(self, images: Tensor) -> object:
        """Returns the model's output for images ``(b, c, h, w)``, without a gradient."""
        with torch.no_grad():
            return self._run(images, ()).output

    def activations(self, images: Tensor) -> tuple[tuple[Tensor, ...], object]:
        """Returns the activation of every stage, shallow first, and the model's output.

        The gradient flows from the output to `images` where they require it.
        """
        pieces = self._run(images, self._parts.stages)
        return pieces.activations, pieces.output

    def differentiable(self, images: Tensor, stages: Sequence[int] | None = None) -> Pieces:
        """Runs the network so that its output can be differentiated by the stages' activations.

        The graph begins at the earliest stage asked for: what lies before it is not recorded.
        Works inside ``no_grad`` and ``inference_mode`` and with frozen parameters.

        Args:
            images: Images ``(b, c, h, w)``, normalized as the network expects.
            stages: Numbers of the stages, 1 = shallowest; all if None.

        Returns:
            The pieces of the forward pass.
        """
        self._check_images(images)
        numbers = self.check_stages(stages)
        names = [self._parts.stages[number - 1] for number in numbers]
        with torch.inference_mode(False), torch.enable_grad():
            if images.is_inference():
                images = images.clone()
            return self._run(images.detach(), names, leaf=names[0])

    def preprocess(self, image: Image.Image | np.ndarray | str | Path) -> Tensor:
        """Returns a picture as the network expects it, ``(1, 3, h, w)``, on its device.

        The whole picture is kept and only resized, so that a place in a map is the same
        place in the picture.

        Args:
            image: A Pillow image, an array of pixels or a file; see
                :func:`attnviz.images.to_pixels`.
        """
        pixels = to_pixels(image)
        if len(self.mean) not in (1, 3):
            raise ValueError(
                f"expected a network of 1 or 3 channels, got {self.name} with {len(self.mean)}; "
                "make its images yourself"
            )
        if len(self.mean) == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        height, width = network_size(pixels.shape[:2], self.image_size)
        resized = Image.fromarray(pixels.squeeze()).resize((width, height), _BILINEAR)
        values = torch.from_numpy(np.array(resized).reshape(height, width, -1)).permute(2, 0, 1)
        values = values[None] / 255
        mean, std = (torch.tensor(part)[:, None, None] for part in (self.mean, self.std))
        return ((values - mean) / std).to(self.device, self.dtype)

    def class_id(self, name: str | int) -> int:
        """Returns the number of a class given by its number or name.

        Raises:
            TypeError: It is neither.
            ValueError: No class, or more than one, has this name; the nearest are listed.
        """
        names = self.class_names
        if not isinstance(name, str | Integral) or isinstance(name, bool):
            raise TypeError(f"expected a class as a number or a name, got {shown(name)}")
        if isinstance(name, Integral) or re.fullmatch(r"-?\d+", name):
            number = int(name)
            if number < 0 or (names is not None and number >= len(names)):
                last = f" to {len(names) - 1}" if names else ""
                raise ValueError(f"expected a class from 0{last}, got {number}")
            return number
        if names is None:
            raise ValueError(
                f"expected the number of a class, got {name!r}; {self.name} has no class names"
            )
        lowered = [each.lower() for each in names]
        found = [number for number, each in enumerate(lowered) if each == name.lower()]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"expected one class, got {name!r}, the name of {found}; use a number"
            )
        near = get_close_matches(name.lower(), lowered, n=3, cutoff=0.4)
        near += [each for each in lowered if name.lower() in each and each not in near][:3]
        nearest = ", ".join(
            f"{names[lowered.index(each)]} ({lowered.index(each)})" for each in near
        )
        raise ValueError(
            f"expected a class of {self.name}, got {name!r}; the nearest are {nearest or 'none'}"
        )

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the probability of each class from scores ``(b, classes)``."""
        return scores.float().sigmoid() if self.multilabel else scores.float().softmax(dim=-1)

    def check_stages(self, stages: Sequence[int] | None) -> tuple[int, ...]:
        """Returns the stage numbers in ascending order; all of them for None.

        Raises:
            ValueError: A number is not that of a stage, or none is given.
            TypeError: It is no list.
        """
        count = len(self._parts.stages)
        if stages is None:
            return tuple(range(1, count + 1))
        stages = plain(stages)
        if isinstance(stages, str) or not isinstance(stages, Iterable):
            raise TypeError(f"expected `stages` as a list such as [4, 5], got {shown(stages)}")
        stages = list(map(plain, stages))
        if not all(isinstance(each, Integral) and not isinstance(each, bool) for each in stages):
            raise TypeError(f"expected `stages` as whole numbers, got {shown(stages)}")
        stages = list(map(int, stages))
        numbers = tuple(sorted(set(stages)))
        if not numbers or numbers[0] < 1 or numbers[-1] > count:
            raise ValueError(
                f"expected `stages` from 1 to {count} ({self.name} has {count}), "
                f"got {stages}; 1 is the shallowest"
            )
        return numbers

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the model's parameters."""
        found = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def to(self, *args: object, **kwargs: object) -> "Staged":
        """Moves or casts the underlying model and returns this object."""
        self.model.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        return f"Staged({self.name}: {' | '.join(self.stage_names)} | head)"

    def _run(self, images: Tensor, keep: Collection[str], leaf: str | None = None) -> Pieces:
        self._check_images(images)
        values: dict[str, object] = {self._parts.segments[0].inputs[0]: images}
        kept: dict[str, Tensor] = {}
        recording = leaf is None
        for segment in self._parts.segments:
            inputs = [values[name] for name in segment.inputs]
            for name in segment.dead:
                del values[name]
            with torch.set_grad_enabled(recording and torch.is_grad_enabled()):
                outputs = self._call(segment.module, inputs, images)
            del inputs
            values.update(zip(segment.outputs, outputs, strict=True))
            if segment.ends in keep:
                if values[segment.ends].ndim != 4:
                    raise ValueError(
                        f"expected stages of shape (b, c, h, w), got "
                        f"{tuple(values[segment.ends].shape)} at {segment.ends!r}; "
                        "name other `cuts`"
                    )
                if segment.ends == leaf:
                    values[leaf] = values[leaf].detach().requires_grad_()
                    recording = True
                kept[segment.ends] = values[segment.ends]
            elif segment.ends in self._parts.pools:
                kept[segment.ends] = values[segment.ends]
        order = [
            (s, p) for s, p in zip(self._parts.stages, self._parts.pools, strict=True) if s in keep
        ]
        return Pieces(
            activations=tuple(kept[stage] for stage, _ in order),
            pooled=tuple(kept.get(pool) for _, pool in order),
            output=values[OUTPUT],
        )

    def _call(self, module: nn.Module, inputs: list, images: Tensor) -> tuple:
        try:
            return module.forward(*inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:  # torch's words for wrong sizes and types
            raise self._unfit(images, error) from error

    def _unfit(self, images: Tensor, error: Exception) -> ValueError:
        return ValueError(
            f"expected images that {self.name} can take, got {tuple(images.shape)}, "
            f"{images.dtype}, {images.device} ({first_line(error)})"
        )

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"expected images as a tensor (b, c, h, w), got {type(images).__name__}; "
                "net.preprocess(image) makes one"
            )
        if images.ndim != 4 or 0 in images.shape:
            raise ValueError(
                f"expected images of shape (b, c, h, w), got {tuple(images.shape)}; "
                "add the batch dimension with images[None]"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"expected images of a floating point type, got {images.dtype}; "
                "net.preprocess(image) makes them"
            )
        if self._channels is not None and images.shape[1] != self._channels:
            raise ValueError(
                f"expected images with {self._channels} channels, got {images.shape[1]} "
                f"(shape {tuple(images.shape)}); {self.name} takes (b, {self._channels}, h, w)"
            )


def staged(
    model: nn.Module,
    cuts: Sequence[str] | None = None,
    *,
    name: str | None = None,
    image_size: int | tuple[int, int] = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    multilabel: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> Staged:
    """Cuts a convolutional network into stages.

    Without `cuts` the stages are found: at each resolution, the last activation through which
    everything after it passes (before the pooling or stride that ends the stage; where a block
    ends without an activation function, as in ConvNeXt, its output). VGG and ResNet have five,
    SqueezeNet four, AlexNet three.

    Args:
        model: A CNN from torchvision, timm or your own. Compiled and data-parallel wrappers are
            taken off. It is never changed.
        cuts: Names of the modules whose outputs are the stages, shallow first, e.g.
            ``["layer1", "layer3"]``. Modules that contain no cut are not traced, so they may
            hold any code.
        name: The network's name; its class if None.
        image_size: Short side of the images it expects, or their exact height and width. Used
            to find the stages and by :meth:`Staged.preprocess`.
        mean: Mean of each channel that it expects; ImageNet's if None and there are 1 or 3.
        std: Standard deviation of each channel that it expects; likewise.
        class_names: Name of each class.
        multilabel: Whether several classes of an image may be right.
        provenance: Where its weights come from.

    Returns:
        The staged network.

    Raises:
        TypeError: The model is not a network that can be cut, or an argument is of another type.
        ValueError: A cut does not exist, or a number is out of range.

    Example:
        >>> from torchvision.models import resnet18
        >>> net = staged(resnet18())
        >>> net.stage_names
        ('relu', 'layer1', 'layer2', 'layer3', 'layer4')
    """
    model = _unwrap(model)
    size = image_size = plain(image_size)
    if not isinstance(image_size, Sequence):
        side = image_size = check_whole("image_size", image_size, 1)
        size = (side, side)
    check_size("image_size", size)
    image_size = image_size if isinstance(image_size, int) else tuple(map(int, image_size))
    channels = input_channels(model) or 3
    usual = _IMAGENET.get(channels, ((0.0,) * channels, (1.0,) * channels))
    mean, std = usual[0] if mean is None else mean, usual[1] if std is None else std
    mean, std = _numbers("mean", mean, -1e6), _numbers("std", std, 1e-12)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"expected {channels} numbers in `mean` and in `std`, one for each channel of the "
            f"images, got {len(mean)} and {len(std)}"
        )
    if isinstance(class_names, str) or not isinstance(class_names, Iterable | None):
        raise TypeError(f"expected `class_names` as a list of names, got {shown(class_names)}")
    multilabel = plain(multilabel)
    if not isinstance(multilabel, bool):
        raise TypeError(f"expected `multilabel` True or False, got {shown(multilabel)}")
    net = Staged(model, cut_network(model, cuts, size))
    net.name = name or type(model).__name__
    net.image_size = image_size
    net.mean, net.std = mean, std
    net.class_names = tuple(class_names) if class_names is not None else None
    net.multilabel = multilabel
    net.provenance = dict(provenance or {"weights": "the model's own"})
    return net


def check_network(net: object) -> None:
    """Raises TypeError unless a network is cut into its stages."""
    if not isinstance(net, Staged):
        raise TypeError(
            "expected a network from attnviz.staged or attnviz.load_network, got "
            f"{type(net).__name__}; attnviz.staged(model) makes one"
        )


def _numbers(name: str, values: object, least: float) -> tuple[float, ...]:
    try:
        numbers = np.asarray(list(map(plain, values)), dtype=np.float64).ravel().tolist()
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or isinstance(values, str):
        raise TypeError(f"expected `{name}` as a list of numbers, got {shown(values)}")
    for number in numbers:
        check_number(name, number, least, 1e6)
    return tuple(numbers)


def _unwrap(model: nn.Module) -> nn.Module:
    if isinstance(model, Staged):
        raise TypeError("expected a torch.nn.Module, got Staged; it is cut already")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("expected a torch.nn.Module, got a ScriptModule; pass the original model")
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            break
    if any(tensor.is_inference() for tensor in model.parameters()):
        raise TypeError(
            "expected parameters that autograd can use, got ones made under inference_mode; "
            "build or load the model outside of it"
        )
    return model
