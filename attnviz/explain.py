"""Where networks and mathematics meet: maps of all stages, methods and classes at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from . import __version__
from .cam import METHODS
from .stages import Pieces, Staged

__all__ = ["GradientAt", "StageMaps", "stage_maps"]

GradientAt = Literal["native", "pool", "pool_up"]
Target = Callable[[object], Tensor]
ClassIds = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | Target | None


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
) -> StageMaps:
    """Computes the maps of all stages, methods and classes from one forward pass.

    There is one backward pass per class of an image, none per stage or method, and the graph
    begins at the earliest stage. The model is left as it was.

    Args:
        net: A network from :func:`attnviz.staged` or :func:`attnviz.load_network`.
        images: Images, normalized as the network expects; see :meth:`Staged.preprocess`.
        class_ids: One class for all images, one per image, several per image (a list for each
            image; the maps become ``(b, k, h, w)``), None for the highest score, or a function
            of the network's output that returns one value per image. Scores are taken before
            softmax. A network with one score per image has the classes 1 (the score) and 0
            (its negative).
        methods: Names from :data:`attnviz.cam.METHODS`.
        stages: Numbers of the stages, 1 = shallowest; all if None.
        gradient_at: Where the gradient is taken. ``native``: at the activation, as the thesis
            writes; before a 2x2 max-pooling at most one in four positions is not zero then.
            ``pool_up``: at the output of the pooling layer that follows, resized to the
            activation (the released localization code). ``pool``: activation and gradient at
            the pooling layer. A stage that ends in a stride is averaged over 2 x 2 instead; the
            deepest stage without pooling stays native.

    Returns:
        The maps, detached.

    Raises:
        ValueError: An argument is out of range, or scores are not finite.

    Example:
        >>> from torchvision.models import resnet18
        >>> import attnviz
        >>> net = attnviz.staged(resnet18())
        >>> maps = stage_maps(net, torch.rand(2, 3, 64, 64), [3, 7])
        >>> [tuple(stage.shape) for stage in maps["layercam"]][:2]
        [(2, 32, 32), (2, 16, 16)]
    """
    methods = _check_methods(methods)
    if gradient_at not in get_args(GradientAt):
        raise ValueError(f"expected `gradient_at` in {get_args(GradientAt)}, got {gradient_at!r}")
    numbers = net.check_stages(stages)
    with torch.inference_mode(False), torch.enable_grad():
        pieces = net.differentiable(images, numbers)
        targets, ids = _targets(pieces.output, class_ids, len(images))
        sources = _sources(pieces, gradient_at)
        activations = _activations(pieces, gradient_at, net, numbers)
        maps: dict[str, list[list[Tensor]]] = {method: [[] for _ in numbers] for method in methods}
        for index, target in enumerate(targets):
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
                for method in methods:
                    maps[method][position].append(METHODS[method](activation, gradient))
            del gradient
    several = ids is not None and ids.ndim == 2
    scores = pieces.output.detach() if _is_rows(pieces.output) else None
    return StageMaps(
        maps={
            method: [torch.stack(each, 1) if several else each[0] for each in per_stage]
            for method, per_stage in maps.items()
        },
        scores=scores,
        class_ids=ids,
        stages=numbers,
        stage_names=tuple(net.stage_names[number - 1] for number in numbers),
        provenance=provenance(net) | {"gradient_at": gradient_at},
    )


def provenance(net: Staged) -> dict[str, object]:
    """Returns what is needed to repeat a result: network, weights and versions."""
    versions = {
        "attnviz": __version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }
    return {"network": net.name, **net.provenance, "versions": versions}


def _check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(
            f"expected `methods` in {tuple(METHODS)}, got {unknown[0] if unknown else 'none'!r}"
        )
    return methods


# ------------------------------------------------------------------------------------- targets


def _is_rows(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim in (1, 2)


def _targets(
    output: object, class_ids: ClassIds, count: int
) -> tuple[list[Tensor], Tensor | None]:
    # One value per image for each class to explain, and the classes.
    if callable(class_ids):
        target = class_ids(output)
        if not isinstance(target, Tensor) or target.shape not in ((), (count,)):
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(
                f"expected the target function to return one value per image ({count},), got {got}"
            )
        _check_finite(target)
        return [target], None
    if not _is_rows(output):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expected a network output of one row of scores per image, got {got}; "
            "pass a function of the output as `class_ids`"
        )
    _check_finite(output)
    scores = output.reshape(count, -1)
    if scores.shape[1] == 1:
        scores = torch.cat([-scores, scores], dim=1)
    ids = _check_class_ids(scores, class_ids)
    columns = ids if ids.ndim == 2 else ids[:, None]
    picked = scores.gather(1, columns.clamp_min(0)).masked_fill(columns < 0, 0)
    return list(picked.unbind(1)), ids


def _check_finite(scores: Tensor) -> None:
    if not scores.isfinite().all():
        raise ValueError(
            "expected finite scores, got NaN or infinity; check the network's weights and the "
            "images for NaN, and half precision for overflow"
        )


def _check_class_ids(scores: Tensor, class_ids: ClassIds) -> Tensor:
    count, classes = scores.shape
    if class_ids is None:
        return scores.argmax(dim=1)
    if isinstance(class_ids, int):
        class_ids = [class_ids] * count
    if isinstance(class_ids, Tensor):
        class_ids = class_ids.tolist()
    rows = list(class_ids)
    if len(rows) != count:
        raise ValueError(
            f"expected `class_ids` for {count} images, got {len(rows)}; "
            "several classes of one image are a list in the list, [[3, 5]]"
        )
    nested = [isinstance(row, Sequence | Tensor) for row in rows]
    if any(nested) and not all(nested):
        raise ValueError(f"expected `class_ids` as numbers or as lists, got a mixture: {rows}")
    if all(nested):
        rows = [[int(each) for each in row] for row in rows]
        most = max(len(row) for row in rows)
        if most == 0:
            raise ValueError("expected at least one class in `class_ids`, got none")
        flat = [each for row in rows for each in row]
        rows = [row + [-1] * (most - len(row)) for row in rows]
    else:
        rows = flat = [int(row) for row in rows]
    wrong = [each for each in flat if not 0 <= each < classes]
    if wrong:
        raise ValueError(f"expected classes from 0 to {classes - 1}, got {wrong[0]}")
    return torch.tensor(rows, device=scores.device)


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
        kind = torch.promote_types(activation.dtype, torch.float32)  # powers of g need the range
        found.append(activation.detach().to(kind))
    return found


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
