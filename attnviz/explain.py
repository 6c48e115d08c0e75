"""Where networks and mathematics meet: maps of all stages, methods and classes at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from numbers import Integral
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from tqdm import tqdm

from . import __version__
from .cam import METHODS
from .checks import check_choice, check_whole, shown
from .excitation import descend, record
from .perturb import channel_scores, informative_channels
from .stages import Pieces, Staged, check_network

__all__ = [
    "GradientAt",
    "ScoreForm",
    "StageMaps",
    "excitation_backprop",
    "scorecam",
    "stage_maps",
]

GradientAt = Literal["native", "pool", "pool_up"]
Precision = Literal["32", "bf16"]
ScoreForm = Literal["released", "paper"]
Target = Callable[[object], Tensor]
ClassId = int | str | Integral
ClassIds = ClassId | Sequence[ClassId | Sequence[ClassId]] | Tensor | np.ndarray | Target | None


@dataclass(frozen=True, eq=False)
class StageMaps(Mapping):
    """The raw maps of several stages and methods; a mapping from method to maps."""

    maps: dict[str, list[Float[Tensor, "..."]]]
    """For each method the map of each stage, shallow first, at the stage's resolution: ``(b, h,
    w)``, or ``(b, k, h, w)`` where k classes per image were asked for. Not normalized."""
    scores: Float[Tensor, "..."] | None
    """The network's scores ``(b, classes)``, before softmax; None where its output is not one row
    per image."""
    class_ids: Int[Tensor, "..."] | None
    """The classes explained, ``(b,)`` or ``(b, k)``, -1 where an image has fewer; None for a
    target of one's own."""
    stages: tuple[int, ...]
    """The number of each stage, 1 = shallowest."""
    stage_names: tuple[str, ...]
    """The name of each stage."""
    provenance: dict[str, object]
    """Network, weights, gradient source and versions behind the maps."""

    def __getitem__(self, method: str) -> list[Tensor]:
        return self.maps[method]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(stage.shape)) for stage in next(iter(self.maps.values())))
        return f"StageMaps({', '.join(self.maps)}: {shapes})"

    def _repr_html_(self) -> str:
        maps = next(iter(self.maps.values()))
        rows = "".join(
            f"<tr><td>{number}</td><td>{name}</td><td>{' x '.join(map(str, stage.shape[-2:]))}"
            f"</td></tr>"
            for number, name, stage in zip(self.stages, self.stage_names, maps, strict=True)
        )
        facts = dict(self.provenance)
        facts |= facts.pop("versions")
        facts = ", ".join(f"{key} {value}" for key, value in facts.items())
        return (
            f"<table><caption>{', '.join(self.maps)}</caption><tr><th>stage</th><th>name</th>"
            f"<th>map</th></tr>{rows}</table><small>{facts}</small>"
        )


def stage_maps(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    methods: Sequence[str] = ("layercam",),
    *,
    stages: Sequence[int] | None = None,
    gradient_at: GradientAt = "native",
    precision: Precision = "32",
) -> StageMaps:
    """Computes the maps of all stages, methods and classes from one forward pass.

    There is one backward pass per class of an image, none per stage or method, and the graph
    begins at the earliest stage. The model is left as it was.

    Args:
        net: A network from :func:`attnviz.staged` or :func:`attnviz.load_network`.
        images: Images, normalized as the network expects; see :meth:`Staged.preprocess`.
        class_ids: One class for all images, one per image, several per image (a list for each
            image; the maps become ``(b, k, h, w)``), by number or name; None for the highest
            score; or a function of the network's output that returns one value per image. Scores
            are taken before softmax. A network with one score per image has the classes 1 (the
            score) and 0 (its negative).
        methods: Names from :data:`attnviz.cam.METHODS`.
        stages: Numbers of the stages, 1 = shallowest; all if None.
        gradient_at: Where the gradient is taken. ``native``: at the activation, as the thesis
            writes; before a 2x2 max-pooling at most one in four positions is not zero then.
            ``pool_up``: at the output of the pooling layer that follows, resized to the
            activation (the released localization code). ``pool``: activation and gradient at
            the pooling layer. A stage that ends in a stride is averaged over 2 x 2 instead; the
            deepest stage without pooling stays native.
        precision: ``32`` computes in the network's own type. ``bf16`` runs the network in
            bfloat16 (autocast, channels last), which is faster on GPUs and on processors that
            compute with it; maps then agree to about two digits and are float32 all the same.

    Returns:
        The maps, detached.

    Raises:
        TypeError: The network is not cut into stages, or an argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    Example:
        >>> from torchvision.models import resnet18
        >>> import attnviz
        >>> net = attnviz.staged(resnet18())
        >>> maps = stage_maps(net, torch.rand(2, 3, 64, 64), [3, 7])
        >>> [tuple(stage.shape) for stage in maps["layercam"]][:2]
        [(2, 32, 32), (2, 16, 16)]
    """
    check_network(net)
    methods = _check_methods(methods)
    check_choice("gradient_at", gradient_at, GradientAt)
    check_choice("precision", precision, Precision)
    numbers = net.check_stages(stages)
    lower = precision == "bf16"
    if lower:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(False), torch.enable_grad():
        with torch.autocast(net.device.type, torch.bfloat16, enabled=lower):
            pieces = net.differentiable(images, numbers)
        targets, ids = _targets(net, pieces.output, class_ids, len(images))
        sources = _sources(pieces, gradient_at)
        activations = _activations(pieces, gradient_at, net, numbers)
        maps: dict[str, list[list[Tensor]]] = {method: [[] for _ in numbers] for method in methods}
        for index, target in enumerate(targets):
            if not target.requires_grad:
                raise ValueError(
                    "expected the target to depend on the stages, but it does not; does the "
                    "function of the output detach it?"
                )
            last = index == len(targets) - 1
            gradients = list(
                torch.autograd.grad(
                    target.sum(), sources, retain_graph=not last, allow_unused=True
                )
            )
            for position in reversed(range(len(numbers))):  # the largest last, alone in memory
                activation, gradient = activations[position], gradients.pop()
                if gradient is None:
                    raise ValueError(
                        f"expected the target to depend on stage {numbers[position]} "
                        f"({net.stage_names[numbers[position] - 1]}), but it does not"
                    )
                deepest = numbers[position] == len(net.stage_names)
                gradient = _at_activation(
                    gradient.to(activation.dtype), pieces, position, gradient_at, deepest
                )
                if lower:
                    activation, gradient = activation.float(), gradient.float()
                for method in methods:
                    maps[method][position].append(METHODS[method](activation, gradient))
            del gradient
    facts = {"gradient_at": gradient_at} | ({"precision": precision} if lower else {})
    return _collect(net, numbers, maps, pieces.output, ids, facts)


def scorecam(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    stages: Sequence[int] | None = None,
    form: ScoreForm = "released",
    batch_size: int = 32,
    channels: int | None = None,
    progress: bool = False,
) -> StageMaps:
    r"""Weighs each channel by the score of the image seen through it alone, without gradients.

    .. math:: M = \mathrm{ReLU} \Big( \sum_k w_k A^k \Big), \qquad
        H_k = \frac{U^k - \min U^k}{\max U^k - \min U^k}

    :math:`U^k` is channel :math:`k` resized bilinearly to the image (``align_corners=False``);
    :math:`w_k` comes from a forward pass of the image times :math:`H_k`. What a mask hides is
    zero, which after normalization is the mean color, not black. Constant channels have no
    mask: they are not run and weigh nothing.

    It takes one forward pass for each channel of each stage, 1472 for an image and VGG16: name
    few `stages`, or few `channels`. Several classes of an image share its passes.

    Args:
        net: A network from :func:`attnviz.staged` or :func:`attnviz.load_network`.
        images: Images, normalized as the network expects.
        class_ids: As for :func:`stage_maps`. The value of a function of the output is taken in
            place of the probability.
        stages: Numbers of the stages, 1 = shallowest; all if None.
        form: ``released``: :math:`w_k` is the probability of the class (softmax over the
            classes, the sigmoid of a single score). ``paper``: the softmax over the channels
            of the score, before softmax, less that of a baseline image, which cancels there
            and is not run; where scores lie far apart, one channel gets all the weight.
        batch_size: Masked images in one forward pass.
        channels: How many channels of each image to use, those of the highest variance over
            its positions; all if None.
        progress: Show a progress bar if it takes more than 2 s.

    Returns:
        The maps, under ``"scorecam"``.

    Raises:
        TypeError: The network is not cut into stages, or an argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks
        (Wang et al., 2020), https://arxiv.org/abs/1910.01279.
    """
    check_network(net)
    check_choice("form", form, ScoreForm)
    batch_size = check_whole("batch_size", batch_size, 1)
    channels = None if channels is None else check_whole("channels", channels, 1)
    numbers = net.check_stages(stages)
    with torch.inference_mode(False), torch.no_grad():
        kept, output = net.activations(images)
        activations = [_in_float32(kept[number - 1]) for number in numbers]
        del kept
        ids = _targets(net, output, class_ids, len(images))[1]
        chosen = [informative_channels(activation, channels) for activation in activations]
        total = sum(int(each.sum()) for each in chosen)
        bar = tqdm(desc="Score-CAM", total=total, unit="mask", delay=2, disable=not progress)

        def score(masked: Tensor, rows: Tensor) -> Tensor:
            bar.update(len(rows))
            return _masked_scores(net(masked), class_ids, ids, rows, form)

        with bar:
            weights = [
                channel_scores(score, images, activation, each, batch_size)
                for activation, each in zip(activations, chosen, strict=True)
            ]
        maps = [
            _score_maps(activation, weight, each, ids, form)
            for activation, weight, each in zip(activations, weights, chosen, strict=True)
        ]
    facts = {"form": form, "channels": channels or "all", "masks": total}
    return _collect(net, numbers, {"scorecam": maps}, output, ids, facts)


def excitation_backprop(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | None = None,
    *,
    stages: Sequence[int] | None = None,
    contrastive: bool = True,
) -> StageMaps:
    r"""Passes the probability of winning from a class down to each stage.

    .. math:: p'_j = x_j \sum_i \frac{w^+_{ij} \, p_i}{\sum_k w^+_{ik} \, x_k}, \qquad
        M = \mathrm{ReLU} \Big( \sum_k p_k \Big)

    It begins with 1 at the class. Without contrast the map of each stage sums to 1, less what
    is lost where only a bias excites a neuron: next to nothing in a SqueezeNet, nearly all on
    the way to the shallow stages of a MobileNetV2, many of whose depthwise kernels have no
    positive weight. With contrast, what the last layer passes with negated weights is
    subtracted below it, so that only what speaks more for the class than against it remains.
    See :mod:`attnviz.excitation` for the rule of each layer.

    Args:
        net: A network from :func:`attnviz.staged` or :func:`attnviz.load_network`, of
            convolutions, linear layers, batch normalization, ReLU, pooling, residual sums and
            concatenations.
        images: Images, normalized as the network expects.
        class_ids: Classes as for :func:`stage_maps`; not a function.
        stages: Numbers of the stages, 1 = shallowest; all if None. The paper takes stage 4 of
            VGG16 (after its pooling) and of ResNet-50. Layers before the first one asked for
            may be of any kind.
        contrastive: Subtract the evidence against the class.

    Returns:
        The maps, under ``"cmwp"``, or ``"mwp"`` without contrast.

    Raises:
        TypeError: The network is not cut into stages, or an argument is of another type.
        ValueError: An argument is out of range, scores are not finite, or the network has a
            layer without a rule.

    References:
        Top-down Neural Attention by Excitation Backprop (Zhang et al., 2016),
        https://arxiv.org/abs/1608.00507.
    """
    check_network(net)
    if callable(class_ids):
        raise ValueError(
            "expected `class_ids` as classes, got a function; excitation backprop starts at the "
            "score of a class"
        )
    numbers = net.check_stages(stages)
    net._check_images(images)
    names = [net._parts.stages[number - 1] for number in numbers]
    with torch.inference_mode(False), torch.no_grad():
        try:
            passed = record(net._parts, images, names[0])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise net._unfit(images, error) from error
        if not _is_rows(passed.output):
            got = type(passed.output).__name__.removeprefix("immutable_")  # torch.fx made it so
            raise ValueError(
                f"expected a network output of one row of scores per image, got {got}; "
                "excitation backprop starts at a score"
            )
        ids = _targets(net, passed.output, class_ids, len(images))[1]
        maps: list[list[Tensor]] = [[] for _ in numbers]
        for column in ids.reshape(len(images), -1).unbind(1):
            reached = descend(passed, column, names, contrastive=contrastive)
            for per_stage, p in zip(maps, reached, strict=True):
                per_stage.append(p.sum(dim=1).relu())
    method = "cmwp" if contrastive else "mwp"
    return _collect(net, numbers, {method: maps}, passed.output, ids, {})


def provenance(net: Staged) -> dict[str, object]:
    """Returns what is needed to repeat a result: network, weights and versions."""
    return {"network": net.name, **net.provenance, "versions": package_versions()}


def package_versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    return {
        "attnviz": __version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }


def _collect(
    net: Staged,
    numbers: tuple[int, ...],
    maps: Mapping[str, list[list[Tensor]]],
    output: object,
    ids: Tensor | None,
    facts: Mapping[str, object],
) -> StageMaps:
    # From one map for each method, stage and class, in this order.
    several = ids is not None and ids.ndim == 2
    return StageMaps(
        maps={
            method: [torch.stack(each, 1) if several else each[0] for each in per_stage]
            for method, per_stage in maps.items()
        },
        scores=output.detach() if _is_rows(output) else None,
        class_ids=ids,
        stages=numbers,
        stage_names=tuple(net.stage_names[number - 1] for number in numbers),
        provenance=provenance(net) | facts,
    )


def _check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(methods, Iterable):
        raise TypeError(f"expected `methods` as a list of names, got {shown(methods)}")
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    unknown = [each for each in methods if not isinstance(each, str) or each not in METHODS]
    if unknown or not methods:
        got = shown(unknown[0]) if unknown else "none"
        raise ValueError(f"expected `methods` in {tuple(METHODS)}, got {got}")
    return methods


# ------------------------------------------------------------------------------------- targets


def _is_rows(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim in (1, 2)


def _targets(
    net: Staged, output: object, class_ids: ClassIds, count: int
) -> tuple[list[Tensor], Tensor | None]:
    # One value per image for each class to explain, and the classes.
    if callable(class_ids):
        return [_own_target(output, class_ids, count)], None
    scores = _scores(output, count)
    ids = _check_class_ids(net, scores, class_ids)
    columns = ids if ids.ndim == 2 else ids[:, None]
    picked = scores.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, 0)
    return list(picked.unbind(1)), ids


def _own_target(output: object, function: Target, count: int) -> Tensor:
    target = function(output)
    if not isinstance(target, Tensor) or target.shape not in ((), (count,)):
        got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(
            f"expected the target function to return one value per image ({count},), got {got}"
        )
    _check_finite(target)
    return target


def _scores(output: object, count: int) -> Tensor:
    # A row for each image; a single score becomes the two classes 0 and 1.
    if not _is_rows(output):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expected a network output of one row of scores per image, got {got}; "
            "pass a function of the output as `class_ids`"
        )
    _check_finite(output)
    scores = output.reshape(count, -1)
    return torch.cat([-scores, scores], dim=1) if scores.shape[1] == 1 else scores


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise ValueError(
            "expected finite scores, got NaN or infinity; check the network's weights and the "
            "images for NaN, and half precision for overflow"
        )


def _check_class_ids(net: Staged, scores: Tensor, class_ids: ClassIds) -> Tensor:
    count, classes = scores.shape
    if class_ids is None:
        return scores.argmax(dim=1)
    if isinstance(class_ids, Tensor | np.ndarray):
        class_ids = class_ids.tolist()
    if isinstance(class_ids, str | Integral) and not isinstance(class_ids, bool):
        class_ids = [class_ids] * count
    if not isinstance(class_ids, Sequence):
        raise TypeError(
            "expected `class_ids` as numbers or names of classes, as lists of these, or as a "
            f"function, got {shown(class_ids)}"
        )
    if len(class_ids) != count:
        raise ValueError(
            f"expected `class_ids` for {count} images, got {len(class_ids)}; "
            "several classes of one image are a list in the list, [[3, 5]]"
        )
    rows = [row.tolist() if isinstance(row, Tensor | np.ndarray) else row for row in class_ids]
    single = [isinstance(row, str) or not isinstance(row, Sequence) for row in rows]
    if any(single) and not all(single):
        raise ValueError(f"expected `class_ids` as numbers or as lists, got a mixture: {rows}")
    numbers = [[_number(net, each) for each in ([row] if all(single) else row)] for row in rows]
    wrong = [each for row in numbers for each in row if not 0 <= each < classes]
    if wrong:
        raise ValueError(f"expected classes from 0 to {classes - 1}, got {wrong[0]}")
    most = max(map(len, numbers))
    if most == 0:
        raise ValueError("expected at least one class in `class_ids`, got none")
    ids = torch.tensor([row + [-1] * (most - len(row)) for row in numbers], device=scores.device)
    return ids[:, 0] if all(single) else ids


def _number(net: Staged, class_id: object) -> int:
    if isinstance(class_id, str):
        return net.class_id(class_id)
    if not isinstance(class_id, Integral) or isinstance(class_id, bool):
        raise TypeError(f"expected classes as whole numbers or names, got {shown(class_id)}")
    return int(class_id)


# ---------------------------------------------------------------------------- gradient sources


def _sources(pieces: Pieces, gradient_at: GradientAt) -> list[Tensor]:
    if gradient_at == "native":
        return list(pieces.activations)
    pairs = zip(pieces.activations, pieces.pooled, strict=True)
    return [activation if pooled is None else pooled for activation, pooled in pairs]


def _activations(
    pieces: Pieces, gradient_at: GradientAt, net: Staged, numbers: Sequence[int]
) -> list[Tensor]:
    found = []
    for number, activation, pooled in zip(numbers, pieces.activations, pieces.pooled, strict=True):
        if gradient_at == "pool" and pooled is not None:
            activation = pooled
        elif gradient_at == "pool" and number < len(net.stage_names):
            activation = avg_pool2d(activation, 2, ceil_mode=True)
        found.append(_in_float32(activation.detach()))  # powers of g need the range
    return found


def _in_float32(activation: Tensor) -> Tensor:
    return activation.to(torch.promote_types(activation.dtype, torch.float32))


def _at_activation(
    gradient: Tensor, pieces: Pieces, position: int, gradient_at: GradientAt, deepest: bool
) -> Tensor:
    pooled = pieces.pooled[position] is not None
    if gradient_at == "native" or (deepest and not pooled):
        return gradient
    if not pooled:
        gradient = avg_pool2d(gradient, 2, ceil_mode=True)
    if gradient_at == "pool":
        return gradient
    size = pieces.activations[position].shape[-2:]
    return interpolate(gradient, size=size, mode="bilinear", align_corners=True)


# ----------------------------------------------------------------------------------- Score-CAM


def _masked_scores(
    output: object, class_ids: ClassIds, ids: Tensor | None, rows: Tensor, form: ScoreForm
) -> Tensor:
    # The value (n, k) of each class for masked copies of the images `rows`.
    count = len(rows)
    if ids is None:
        value = _own_target(output, class_ids, count)
        if value.ndim == 0:
            raise ValueError(
                f"expected the target function to return one value per image ({count},), got "
                "one for all; masked images run together"
            )
        return value[:, None]
    scores = _in_float32(_scores(output, count))
    if form == "released":
        scores = scores.sigmoid() if output.numel() == count else scores.softmax(dim=1)
    return scores.gather(1, ids.reshape(len(ids), -1)[rows].clamp_min(0))


def _score_maps(
    activation: Tensor, weight: Tensor | None, chosen: Tensor, ids: Tensor | None, form: ScoreForm
) -> list[Tensor]:
    # The map (b, h, w) of each class from the weights (b, c, k).
    if weight is None:
        weight = activation.new_zeros(*chosen.shape, 1 if ids is None else ids[0].numel())
    if form == "paper":
        unused = ~chosen[..., None]  # an image without any channel gives NaN, then zero
        weight = weight.masked_fill(unused, -torch.inf).softmax(dim=1).masked_fill(unused, 0)
    if ids is not None:
        weight = weight * (ids.reshape(len(ids), 1, -1) >= 0)
    return list(torch.einsum("bck,bchw->kbhw", weight, activation).relu())
