"""The pictures that figures are drawn from: generated scenes, or the user's own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import wrap

import numpy as np
from jaxtyping import Bool, UInt8
from torch import Tensor

from ..cam import scale
from ..data.folder import LabeledImage, LabeledImages
from ..data.masks import MaskedImage
from ..data.scenes import CLASS_CONTEXTS, CLASS_NAMES, Scene, Scenes
from ..explain import StageMaps, stage_maps
from ..images import to_pixels
from ..localize import Box
from ..stages import Staged
from .sheet import Sheet

__all__ = ["Example"]

NAMES = {
    "cam": "CAM",
    "gradcam": "Grad-CAM",
    "gradcam_pp": "Grad-CAM++",
    "gradcam_pp_released": "Grad-CAM++ (released)",
    "layercam": "LayerCAM",
    "layercam_normal": "LayerCAM-normal",
    "normgrad": "NormGrad",
    "scorecam": "Score-CAM",
    "mwp": "MWP",
    "cmwp": "cMWP",
}


@dataclass(frozen=True, eq=False)
class Example:
    """A picture to draw, with what is known of it."""

    picture: UInt8[np.ndarray, "h w 3"]
    """The picture."""
    class_id: int | None = None
    """The network's number of the class to explain; None for the highest score."""
    boxes: tuple[Box, ...] = ()
    """True boxes of that class, ``(x0, y0, x1, y1)`` in pixels, half-open."""
    mask: Bool[np.ndarray, "h w"] | None = None
    """The true pixels of that class."""
    scene: Scene | None = None
    """The generated scene with all its truth, if it is one."""
    name: str = "picture"
    """Where it comes from."""
    regions: Mapping[str, Bool[np.ndarray, "h w"]] | None = None
    """Which pixels show what; None takes objects and contexts of the scene."""


@dataclass(frozen=True)
class Kind:
    title: str
    draw: Callable[[Staged, list[Example], int], Sheet]
    network: str = "scenes_fc"
    wanted: tuple[str, ...] = ("horse",)  # classes of the generated scenes
    several: int = 0  # how many further scenes with several objects
    sample: int = 0  # a study: of so many scenes with one object, or of all pictures given
    in_context: bool = False  # scenes that show the usual context of the class
    examples: Callable[[Staged, "Kind", int], list[Example]] | None = None  # not of scenes


def generated_examples(net: Staged, kind: Kind, seed: int) -> list[Example]:
    if kind.examples is not None:
        return kind.examples(net, kind, seed)
    if tuple(net.class_names or ()) != CLASS_NAMES:
        raise ValueError(
            f"expected `pictures` for {net.name}, got none; only scenes_fc and scenes_conv know "
            "the classes of the generated scenes"
        )
    scenes = Scenes("val", count=10_000, seed=seed, objects="few")
    if kind.sample:
        singles = (scene for scene in scenes if len(scene.objects) == 1)
        return [example_of_scene(scene, seed) for scene in islice(singles, kind.sample)]
    found = [
        next(
            s
            for s in scenes
            if [o.class_id for o in s.objects] == [CLASS_NAMES.index(name)]
            and (CLASS_CONTEXTS[name] in s.contexts or not kind.in_context)
        )
        for name in kind.wanted
    ]
    crowded = Scenes("val", count=1000, seed=seed, objects="several")
    found += islice((s for s in crowded if len(s.objects) == len(s.class_ids) == 3), kind.several)
    return [example_of_scene(scene, seed) for scene in found]


def example_of_scene(scene: Scene, seed: int) -> Example:
    first = scene.objects[0].class_id
    same = [each for each in scene.objects if each.class_id == first]
    mask = np.any([each.mask for each in same], axis=0)
    name = f"generated {scene.image_id} of seed {seed}"
    return Example(scene.image, first, tuple(each.box for each in same), mask, scene, name)


def given_examples(
    net: Staged, pictures: LabeledImages | Iterable[object], most: int | None
) -> list[Example]:
    class_names = pictures.class_names if isinstance(pictures, LabeledImages) else ()
    found = []
    for item in islice(iter(pictures), most):
        if isinstance(item, Example):
            found.append(item)
        elif isinstance(item, LabeledImage):
            boxes = tuple(tuple(round(side) for side in box) for box in item.boxes)
            class_id = _known_class(net, item.class_id, class_names)
            found.append(Example(to_pixels(item.read()), class_id, boxes, name=item.image_id))
        elif isinstance(item, MaskedImage):
            mask, label = item.read_mask(), 1 + item.class_ids[0] if item.class_ids else 0
            shown = None if mask is None else (mask == label) & (mask > 0)
            found.append(Example(to_pixels(item.read()), mask=shown, name=item.image_id))
        else:
            name = Path(item).name if isinstance(item, str | Path) else "picture"
            found.append(Example(to_pixels(item), name=name))
    if not found:
        raise ValueError("expected at least one picture, got none")
    return found


def _known_class(net: Staged, class_id: int | None, class_names: Sequence[str]) -> int | None:
    # Folders number their classes by themselves: only the name says which of the network's it is.
    if class_id is None or class_id >= len(class_names) or not net.class_names:
        return None
    try:
        return net.class_id(class_names[class_id].split(",")[0])
    except ValueError:
        return None


def example_maps(
    net: Staged,
    example: Example,
    methods: Sequence[str] = ("layercam",),
    stages: Sequence[int] | None = None,
) -> StageMaps:
    images = net.preprocess(example.picture)
    return stage_maps(net, images, example.class_id, methods, stages=stages, gradient_at="pool_up")


def phased(maps: StageMaps, method: str, net: Staged) -> list[Tensor]:
    # Each stage as it enters the fusion: all but the deepest scaled by tanh.
    deepest = len(net.stage_names)
    return [
        scale(stage[0].cpu(), "none" if number == deepest else "tanh")
        for number, stage in zip(maps.stages, maps[method], strict=True)
    ]


def class_label(net: Staged, class_id: int) -> str:
    # In lines of at most 14 letters, two at best.
    name = net.class_names[class_id].split(",")[0] if net.class_names else f"class {class_id}"
    return "\n".join(wrap(name, 14, max_lines=2, placeholder=" ..."))


def need_stages(net: Staged, number: str, least: int) -> int:
    count = len(net.stage_names)
    if count < least:
        raise ValueError(
            f"expected a network of at least {least} stages for figure {number}, got {net.name} "
            f"with {count}"
        )
    return count
