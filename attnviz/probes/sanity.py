"""Sanity checks: a map that stays the same when the network forgets explains nothing.

Two tests of any function that makes maps: one gives weights back their random first values, from
the scores down; the other trains one network on true and one on permuted labels. How alike the
maps are is told by rank correlation, structural similarity and correlation of gradient
histograms.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, UInt8
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm, trange

from ..checks import check_choice
from ..networks import FiveStage
from ..stages import Staged, staged
from ..tree import evidence
from .occlusion import _chosen

__all__ = [
    "Mode",
    "compare_maps",
    "data_randomization",
    "evidence_maps",
    "hog_correlation",
    "memorize",
    "parameter_randomization",
    "randomized",
    "spearman",
    "structural_similarity",
    "weighted_layers",
]

Mode = Literal["cascading", "independent"]
MapFunction = Callable[[Staged, Tensor, Tensor], Tensor]

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def evidence_maps(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: Int[Tensor, " b"],
    *,
    top: int = 3,
    weighted: bool = True,
) -> Float[Tensor, "b h w"]:
    """Makes a map of pixels from the tree of evidence: the gradients of its leaves, summed.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The class of each image.
        top: Channels for each decision.
        weighted: See :meth:`attnviz.tree.Evidence.saliency`.

    Returns:
        The maps, zero where nothing speaks for the class.

    References:
        Thesis section 5.3.1.5.
    """
    pairs = zip(images.split(1), class_ids.tolist(), strict=True)
    return torch.stack([evidence(net, each, id, top).saliency(weighted) for each, id in pairs])


# ---------------------------------------------------------------------------------- comparison


def spearman(
    a: Float[Tensor, "b h w"], b: Float[Tensor, "b h w"], *, absolute: bool = False
) -> Float[Tensor, " b"]:
    """Correlates the ranks of the values of two maps; equal values share their mean rank.

    Args:
        a: Maps.
        b: Maps of the same size.
        absolute: Whether to rank absolute values.

    Returns:
        Spearman's coefficient, -1 to 1; NaN where a map is constant.
    """
    pairs = zip(_flat(a), _flat(b), strict=True)
    sizes = ((abs(x), abs(y)) if absolute else (x, y) for x, y in pairs)
    found = [_pearson(rankdata(x), rankdata(y)) for x, y in sizes]
    return torch.tensor(found, dtype=torch.float64)


def structural_similarity(
    a: Float[Tensor, "b h w"], b: Float[Tensor, "b h w"]
) -> Float[Tensor, " b"]:
    """Compares mean, variance and covariance in 7 x 7 windows of maps scaled to [0, 1].

    Args:
        a: Maps of at least 7 x 7.
        b: Maps of the same size.

    Returns:
        The mean similarity, 1 for equal maps.

    References:
        Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al.,
        2004), computed by scikit-image.
    """
    from skimage.metrics import structural_similarity as similarity

    values = [similarity(x, y, data_range=1.0) for x, y in zip(_unit(a), _unit(b), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def hog_correlation(a: Float[Tensor, "b h w"], b: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """Correlates the histograms of oriented gradients of two maps.

    Cells of 16 x 16 places, or a quarter of the short side if that is less.

    Args:
        a: Maps of at least 8 x 8.
        b: Maps of the same size.

    Returns:
        Pearson's coefficient, -1 to 1; NaN where a map is constant.

    References:
        Histograms of Oriented Gradients for Human Detection (Dalal and Triggs, 2005), computed
        by scikit-image.
    """
    from skimage.feature import hog

    cell = min(16, min(a.shape[-2:]) // 4)
    found = [
        _pearson(*(hog(each, pixels_per_cell=(cell, cell)) for each in pair))
        for pair in zip(_unit(a), _unit(b), strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)


def compare_maps(a: Float[Tensor, "b h w"], b: Float[Tensor, "b h w"]) -> pd.DataFrame:
    """Compares pairs of maps in all ways.

    Returns:
        One row per pair: ``spearman`` and ``spearman_absolute``, ``ssim`` and ``hog``.
    """
    if a.shape != b.shape or min(a.shape[-2:]) < 8:
        raise ValueError(
            f"expected two stacks of maps of one size, at least 8 x 8, got {tuple(a.shape)} "
            f"and {tuple(b.shape)}; resize them"
        )
    return pd.DataFrame(
        {
            "spearman": spearman(a, b).numpy(),
            "spearman_absolute": spearman(a, b, absolute=True).numpy(),
            "ssim": structural_similarity(a, b).numpy(),
            "hog": hog_correlation(a, b).numpy(),
        }
    )


def _flat(maps: Tensor) -> Float[np.ndarray, "b n"]:
    return maps.detach().double().cpu().flatten(1).numpy()


def _unit(maps: Tensor) -> Float[np.ndarray, "b h w"]:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    spread = torch.where(high > low, high - low, 1)
    return ((maps - low) / spread).detach().double().cpu().numpy()


def _pearson(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else float("nan")


# ---------------------------------------------------------------------------------- parameters


def weighted_layers(net: Staged) -> tuple[str, ...]:
    """Names the layers with weights, from the scores down, in the order the network runs them.

    A normalization layer belongs to the layer before it and is not named.
    """
    modules = dict(net.model.named_modules())
    nodes = (n for s in net._parts.segments for n in s.module.graph.nodes)
    called = [node.target for node in nodes if node.op == "call_module"]
    inner = (
        f"{name}.{part}".strip(".")
        for name in [*called, ""]  # last the whole: what only the model's own code calls
        if name in modules
        for part, _ in modules[name].named_modules()
    )
    own = [n for n in dict.fromkeys(inner) if any(True for _ in modules[n].parameters(False))]
    return tuple(name for name in reversed(own) if not isinstance(modules[name], _NORMS))


def randomized(
    net: Staged,
    mode: Mode = "cascading",
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[tuple[str, Staged]]:
    """Gives layer after layer its random first weights, on a copy.

    A layer's first weights are those of its ``reset_parameters``; a normalization layer gets
    scale 1 and shift 0 and keeps its running statistics.

    Args:
        net: The network; it stays as it is.
        mode: ``cascading``: layers stay random once they are; ``independent``: one at a time.
        layers: Names of modules, in order; :func:`weighted_layers` if None. A block stands for
            all layers in it.
        seed: Number behind the weights.

    Yields:
        The name of the layer and the network, which the next step changes further.

    Raises:
        ValueError: `mode` or the name of a layer does not exist.
        TypeError: A layer has weights, but no ``reset_parameters``.
    """
    check_choice("mode", mode, Mode)
    copy = deepcopy(net)
    modules = dict(copy.model.named_modules())
    norms = _norms_after(modules)
    for number, name in enumerate(weighted_layers(net) if layers is None else layers):
        if name not in modules:
            raise ValueError(
                f"expected `layers` of {net.name}, such as {weighted_layers(net)[:3]}, "
                f"got {name!r}"
            )
        parts = [modules[name], *norms.get(name, ())]
        kept = [deepcopy(part.state_dict()) for part in parts]
        _reset(parts, seed * 1009 + number, net.device)
        yield name, copy
        if mode == "independent":
            for part, state in zip(parts, kept, strict=True):
                part.load_state_dict(state)


def parameter_randomization(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    maps: Mapping[str, MapFunction],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    mode: Mode = "cascading",
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compares the maps of a network with those after its weights were made random.

    Args:
        net: A network with one score per class; it stays as it is.
        images: Images, normalized as the network expects.
        maps: Methods by name: functions of network, images and classes ``(b,)`` that return
            maps ``(b, h, w)``.
        class_ids: One class for all images or one per image; the highest score's of the
            original network if None.
        mode: See :func:`randomized`.
        layers: See :func:`randomized`.
        seed: Number behind the random weights.
        progress: Whether to show a bar.

    Returns:
        One row for each method, layer and image: ``method``, ``position`` (1 = first made
        random), ``layer``, ``image``, and the columns of :func:`compare_maps`.

    References:
        Sanity Checks for Saliency Maps (Adebayo et al., 2018),
        https://arxiv.org/abs/1810.03292; thesis figure 5.7 (a).
    """
    ids = _chosen(net, images, class_ids)
    original = {method: make(net, images, ids) for method, make in maps.items()}
    layers = weighted_layers(net) if layers is None else tuple(layers)
    rows = []
    steps = randomized(net, mode, layers=layers, seed=seed)
    bar = tqdm(steps, mode, len(layers), unit="layer", delay=2, disable=not progress)
    for position, (layer, changed) in enumerate(bar, start=1):
        for method, make in maps.items():
            table = compare_maps(original[method], make(changed, images, ids))
            facts = {"method": method, "position": position, "layer": layer}
            rows.append(table.assign(**facts, image=range(len(images))))
    table = pd.concat(rows, ignore_index=True)
    return table[["method", "position", "layer", "image", *table.columns[:4]]]


def _norms_after(modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    # For each layer with weights the normalization layers registered after it.
    found: dict[str, list[nn.Module]] = {}
    last = None
    for name, module in modules.items():
        if isinstance(module, _NORMS):
            if last is not None:
                found.setdefault(last, []).append(module)
        elif any(True for _ in module.parameters(False)):
            last = name
    return found


def _reset(parts: Sequence[nn.Module], seed: int, device: torch.device) -> None:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for module in (inner for part in parts for inner in part.modules()):
            if isinstance(module, _NORMS):
                if module.weight is not None:
                    module.weight.fill_(1)
                if module.bias is not None:
                    module.bias.zero_()
            elif any(True for _ in module.parameters(False)):
                if not hasattr(module, "reset_parameters"):
                    raise TypeError(
                        "expected layers with `reset_parameters`, got "
                        f"{type(module).__name__}; name other `layers`"
                    )
                module.reset_parameters()


# ---------------------------------------------------------------------------------------- data


def memorize(
    pixels: UInt8[Tensor, "b 3 s s"],
    targets: Float[Tensor, "b k"],
    *,
    epochs: int = 40,
    batch_size: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    progress: bool = False,
) -> Staged:
    """Trains a small five-stage network on the pictures until it knows them by heart.

    Without flips, dropout or validation, on purpose; :func:`attnviz.training.train_classifier`
    is the loop for networks that are to be good.

    Args:
        pixels: Square pictures, 0 to 255, of a side that is a multiple of 16.
        targets: 1 for each class of a picture, else 0; permuted for the test.
        epochs: How often every picture is seen.
        batch_size: Pictures per step.
        learning_rate: Adam's.
        seed: Number behind first weights and order.
        class_names: Names of the classes.
        progress: Whether to show a bar.

    Returns:
        The network; its provenance says what share of the pictures has all labels right
        (``training_accuracy``).
    """
    size = pixels.shape[-1]
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        model = FiveStage(targets.shape[1], "fc", size)
        model.classifier[1].p = 0.0
        mean, std = (torch.tensor(p)[:, None, None] for p in (model.mean, model.std))
        values = (pixels.float() / 255 - mean) / std
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
        for _ in trange(epochs, desc="training", unit="epoch", delay=2, disable=not progress):
            for batch in torch.randperm(len(values)).split(batch_size):
                if len(batch) == 1:  # batch normalization needs two
                    continue
                loss = binary_cross_entropy_with_logits(model(values[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model.eval().requires_grad_(False)
    known = torch.cat([model(part) for part in values.split(100)]) > 0
    accuracy = (known == targets.bool()).all(dim=1).float().mean().item()
    return staged(
        model, model.cuts, name="memorized", image_size=(size, size), mean=model.mean,
        std=model.std, class_names=class_names, multilabel=True,
        provenance={"weights": f"trained, seed {seed}", "training_accuracy": f"{accuracy:.4f}"},
    )  # fmt: skip


def data_randomization(
    net: Staged,
    permuted: Staged,
    images: Float[Tensor, "b c h w"],
    maps: Mapping[str, MapFunction],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
) -> pd.DataFrame:
    """Compares the maps of a network with those of one trained on permuted labels.

    Args:
        net: A network trained on the true labels; see :func:`memorize`.
        permuted: The same network trained on labels in random order.
        images: Images that neither has seen.
        maps: See :func:`parameter_randomization`.
        class_ids: One class for all images or one per image; the highest score's of `net` if
            None.

    Returns:
        One row for each method and image: ``method``, ``image`` and the columns of
        :func:`compare_maps`.

    References:
        Sanity Checks for Saliency Maps (Adebayo et al., 2018),
        https://arxiv.org/abs/1810.03292; thesis figure 5.7 (b).
    """
    ids = _chosen(net, images, class_ids)
    rows = []
    for method, make in maps.items():
        table = compare_maps(make(net, images, ids), make(permuted, images, ids))
        rows.append(table.assign(method=method, image=range(len(images))))
    table = pd.concat(rows, ignore_index=True)
    return table[["method", "image", *table.columns[:4]]]
