r"""Attacks: small changes of a picture that change what the network says.

Images are normalized as the network expects, bounds and distances are those of pixels in [0, 1].
Symbols: :math:`x` are the pixels, :math:`x'` changed ones, :math:`z` the scores, :math:`t` the
class wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import trange

from ..stages import Staged
from .occlusion import _check_scores, _class_ids

__all__ = ["Attack", "carlini_wagner", "fgsm", "pgd"]

_INSIDE = 1 - 1e-6  # keeps the hyperbolic arc tangent of black and white finite


@dataclass(frozen=True, eq=False)
class Attack:
    """Changed images and what became of them."""

    images: Float[Tensor, "b c h w"]
    """The changed images, normalized; where the attack failed, its last try, or the image itself
    for :func:`carlini_wagner`."""
    success: Bool[Tensor, " b"]
    """Whether the class with the highest score is the one wanted, or for an attack without a
    wanted class, not the one it began from."""
    distance: Float[Tensor, " b"]
    """Euclidean distance from the image, of pixels in [0, 1]."""
    class_ids: Int[Tensor, " b"]
    """The class of the highest score now."""


def fgsm(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    epsilon: float = 8 / 255,
    targeted: bool = False,
) -> Attack:
    r"""Moves every pixel by `epsilon` in the direction in which the loss grows.

    .. math:: x' = x + \epsilon \, \mathrm{sign} \frac{\partial}{\partial x} L(x, y)

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The classes to leave, or with `targeted` to reach; the highest score's if None.
        epsilon: The largest change of a pixel, of 1.
        targeted: Whether `class_ids` are to be reached.

    Returns:
        The changed images.

    References:
        Explaining and Harnessing Adversarial Examples (Goodfellow et al., 2015),
        https://arxiv.org/abs/1412.6572.
    """
    return pgd(net, images, class_ids, epsilon=epsilon, step=epsilon, steps=1, targeted=targeted)


def pgd(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"] | None = None,
    *,
    epsilon: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 10,
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Attack:
    """Repeats small steps of :func:`fgsm`, and stays within `epsilon` of each pixel.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The classes to leave, or with `targeted` to reach; the highest score's if None.
        epsilon: The largest change of a pixel, of 1.
        step: The change of a pixel in one step.
        steps: Number of steps.
        targeted: Whether `class_ids` are to be reached.
        generator: Draws a start within `epsilon`; the image itself if None.

    Returns:
        The changed images.

    References:
        Towards Deep Learning Models Resistant to Adversarial Attacks (Madry et al., 2018),
        https://arxiv.org/abs/1706.06083.
    """
    if epsilon <= 0 or step <= 0 or steps < 1:
        raise ValueError(
            "expected `epsilon` and `step` above 0 and `steps` of at least 1, got "
            f"{epsilon}, {step} and {steps}"
        )
    pixels, ids = _start(net, images, class_ids)
    low, high = (pixels - epsilon).clamp_min(0), (pixels + epsilon).clamp_max(1)
    found = pixels
    if generator is not None:
        draws = torch.rand(
            pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype
        )
        found = low + draws * (high - low)
    for _ in range(steps):
        with torch.inference_mode(False), torch.enable_grad():
            leaf = found.clone().requires_grad_()
            loss = cross_entropy(_scores(net, leaf), ids.clone(), reduction="sum")
            slope = torch.autograd.grad(loss, leaf)[0].sign()
        found = torch.clamp(found + (-step if targeted else step) * slope, low, high)
    return _attack(net, pixels, found, ids, targeted)


def carlini_wagner(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: int | Sequence[int] | Int[Tensor, " b"],
    *,
    confidence: float = 0.0,
    searches: int = 5,
    steps: int = 1000,
    learning_rate: float = 5e-3,
    constant: float = 1e-2,
    progress: bool = False,
) -> Attack:
    r"""Finds a close image for which the network names a wanted class.

    .. math:: \min_w \| x' - x \|^2 + c \, \max \big( \max_{i \neq t} z_i(x') - z_t(x'),
        -\kappa \big), \qquad x' = \tfrac{1}{2} (\tanh w + 1)

    Adam on :math:`w`; a search, per image, makes :math:`c` ten times larger while the class is
    not reached and halves the interval after that. A search of an image ends early when a tenth
    of its steps no longer lowers the sum. The closest image that reached the class is kept.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: The classes wanted, :math:`t`.
        confidence: :math:`\kappa`, by how much the wanted score is to lead.
        searches: How many :math:`c` are tried.
        steps: Steps for each of them.
        learning_rate: Adam's.
        constant: The first :math:`c`.
        progress: Whether to show a bar.

    Returns:
        The changed images.

    References:
        Towards Evaluating the Robustness of Neural Networks (Carlini and Wagner, 2017),
        https://arxiv.org/abs/1608.04644; the thesis' figure 5.12 follows Understanding the Role
        of Individual Units in a Deep Neural Network (Bau et al., 2020).
    """
    if confidence < 0 or min(searches, steps) < 1 or learning_rate <= 0 or constant <= 0:
        raise ValueError(
            "expected `confidence` of at least 0, `searches` and `steps` of at least 1, "
            "`learning_rate` and `constant` above 0, got "
            f"{confidence}, {searches}, {steps}, {learning_rate} and {constant}"
        )
    if class_ids is None:
        raise ValueError("expected the classes wanted in `class_ids`, got None; name them")
    pixels, ids = _start(net, images, class_ids)
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        trange(searches * steps, desc="Carlini-Wagner", delay=2, disable=not progress) as bar,
    ):
        begin = torch.atanh((2 * pixels - 1) * _INSIDE)
        c = pixels.new_full((len(pixels),), constant)
        low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
        best, closest = pixels.clone(), torch.full_like(c, torch.inf)
        for search in range(searches):
            w, reached = begin.clone(), torch.zeros_like(ids, dtype=torch.bool)
            optimizer = torch.optim.Adam([w], lr=learning_rate)
            before, running = torch.full_like(c, torch.inf), torch.ones_like(reached)
            for number in range(steps):
                found, distance, behind, slope = _descent(net, w, pixels, ids, c, confidence)
                hit = running & (behind <= -confidence) & (behind < 0)  # equal decides nothing
                reached |= hit
                nearer = hit & (distance < closest)
                best = torch.where(nearer[:, None, None, None], found, best)
                closest = torch.where(nearer, distance, closest)
                if number % max(steps // 10, 1) == 0:
                    now = distance + c * behind.clamp_min(-confidence)
                    running &= now <= 0.9999 * before
                    before = now
                    if not running.any():
                        break
                w.grad = slope
                optimizer.step()
                bar.update()
            bar.update((search + 1) * steps - bar.n)
            high = torch.where(reached, c, high)
            low = torch.where(reached, low, c)
            c = torch.where(high.isinf(), c * 10, (low + high) / 2)
    return _attack(net, pixels, best, ids, targeted=True)


def _descent(
    net: Staged, w: Tensor, pixels: Tensor, ids: Tensor, c: Tensor, confidence: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The changed pixels, their squared distance, how far t is behind, and the slope at w.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = w.clone().requires_grad_()
        found = (leaf.tanh() + 1) / 2
        scores = _scores(net, found)
        wanted = scores.gather(1, ids[:, None])[:, 0]
        others = scores.scatter(1, ids[:, None], -torch.inf).amax(dim=1)
        distance = (found - pixels).square().sum(dim=(1, 2, 3))
        behind = others - wanted
        loss = (distance + c * behind.clamp_min(-confidence)).sum()
        slope = torch.autograd.grad(loss, leaf)[0]
    return found.detach(), distance.detach(), behind.detach(), slope


def _start(net: Staged, images: Tensor, class_ids: object) -> tuple[Tensor, Tensor]:
    # The pixels in [0, 1] and the classes; ordinary tensors, also under inference_mode.
    scores = _check_scores(net(images), len(images))
    with torch.inference_mode(False):
        mean, std = _colors(net, images)
        pixels = (images.detach().clone() * std + mean).clamp(0, 1)
        return pixels, _class_ids(scores, class_ids).clone()


def _colors(net: Staged, images: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (images.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
    return mean, std


def _scores(net: Staged, pixels: Tensor) -> Tensor:
    mean, std = _colors(net, pixels)
    return net.activations((pixels - mean) / std)[1]


def _attack(net: Staged, pixels: Tensor, found: Tensor, ids: Tensor, targeted: bool) -> Attack:
    mean, std = _colors(net, pixels)
    images = (found - mean) / std
    now = net(images).argmax(dim=1)
    success = now == ids if targeted else now != ids
    return Attack(images, success, (found - pixels).square().sum(dim=(1, 2, 3)).sqrt(), now)
