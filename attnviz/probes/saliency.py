r"""Attribution to pixels: the gradient of a class score and the methods built on it.

They are what the decomposition is compared with in thesis figure 5.7. All of them return one
value per pixel and color, :func:`pixel_map` makes a map of these. Symbols: :math:`y` is a class
score, :math:`x` an image, :math:`x'` a baseline.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..checks import check_choice, check_number, check_whole, shown
from ..stages import Staged, check_network
from .occlusion import ClassIds, _check_scores, _chosen, _class_ids

__all__ = [
    "Baseline",
    "deconvnet",
    "deeplift",
    "gradient",
    "guided_backprop",
    "integrated_gradients",
    "pixel_map",
    "smoothgrad",
]

Baseline = Literal["mean", "black"]


def pixel_map(attribution: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Sums the absolute values over the colors."""
    return attribution.abs().sum(dim=1)


def gradient(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient of a class score at each pixel.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: One class for all images or one per image; the highest score's if None.

    Returns:
        The gradient, by normalized pixel values.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Deep Inside Convolutional Networks (Simonyan et al., 2014),
        https://arxiv.org/abs/1312.6034.
    """
    check_network(net)
    net._check_images(images)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        scores = _check_scores(net.activations(leaf)[1], len(leaf))
        ids = _class_ids(scores.detach(), class_ids).clone()  # not one of inference_mode
        return _gradient(scores.gather(1, ids[:, None]), leaf)


def smoothgrad(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    samples: int = 50,
    noise: float = 0.15,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b c h w"]:
    r"""Averages the gradient over noisy copies of the image.

    .. math:: \frac{1}{n} \sum_{i=1}^n \frac{\partial y}{\partial x}(x + \epsilon_i), \qquad
        \epsilon_i \sim N(0, (\sigma (\max x - \min x))^2)

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`; chosen on the images without noise.
        samples: Noisy copies of each image; one batch for each.
        noise: :math:`\sigma`, a share of the range of each image, from 0 to 100.
        generator: Where the noise comes from; seed 0 if None. It runs on through the batch: an
            image alone gets other noise.

    Returns:
        The mean gradient.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        SmoothGrad: Removing Noise by Adding Noise (Smilkov et al., 2017),
        https://arxiv.org/abs/1706.03825.
    """
    samples, noise = check_whole("samples", samples, 1), check_number("noise", noise, 0, 100)
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"expected `generator` as a torch.Generator, got {shown(generator)}")
    ids = _chosen(net, images, class_ids)
    if generator is None:
        generator = torch.Generator(images.device).manual_seed(0)
    width = noise * (images.amax((1, 2, 3), True) - images.amin((1, 2, 3), True))
    total = torch.zeros_like(images)
    for _ in range(samples):
        draws = torch.randn(
            images.shape, generator=generator, device=images.device, dtype=images.dtype
        )
        total += gradient(net, images + width * draws, ids)
    return total / samples


def integrated_gradients(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    baseline: Baseline = "mean",
    steps: int = 50,
) -> Float[Tensor, "b c h w"]:
    r"""Averages the gradient on the straight way from a baseline to the image.

    .. math:: (x - x') \odot \int_0^1 \frac{\partial y}{\partial x}(x' + t (x - x')) \, dt

    The sum over an image tends to :math:`y(x) - y(x')` as `steps` grow. Computed by captum
    (Gauss-Legendre nodes).

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.
        baseline: ``mean``: 0 after normalization, the mean color; or ``black``.
        steps: Nodes of the integral.

    Returns:
        The attribution, in the unit of the score.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Axiomatic Attribution for Deep Networks (Sundararajan et al., 2017),
        https://arxiv.org/abs/1703.01365.
    """
    from captum.attr import IntegratedGradients

    steps = check_whole("steps", steps, 1)
    ids = _chosen(net, images, class_ids)
    start = _start(net, images, baseline)
    with torch.inference_mode(False), torch.enable_grad():
        method = IntegratedGradients(lambda x: net.activations(x)[1])
        found = method.attribute(
            images.detach().clone(), start.clone(), target=ids.clone(), n_steps=steps,
            internal_batch_size=len(ids),
        )  # fmt: skip
    return found.detach().to(images.dtype)


def deeplift(
    net: Staged,
    images: Float[Tensor, "b c h w"],
    class_ids: ClassIds = None,
    *,
    baseline: Baseline = "mean",
) -> Float[Tensor, "b c h w"]:
    r"""Divides the difference to the score of a baseline among the pixels, in one backward pass.

    Rescale rule: an activation function passes back
    :math:`(f(u) - f(u')) / (u - u')` in place of its derivative, and a max-pooling passes the
    difference of its results to where the larger of both maxima lies. In a network of
    convolutions, linear layers, batch normalization, average and max-poolings over places and the
    activation functions of torch the sum over an image is :math:`y(x) - y(x')`. What else is not
    linear keeps its gradient, and the sum is then another: layer and group normalization
    (ConvNeXt), products of activations (squeeze and excitation, attention, GLU), ``softmax``,
    ``amax``, and what TorchScript compiled, which can't be seen. Images must stay in the order of
    the batch, in the first dimension.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.
        baseline: See :func:`integrated_gradients`.

    Returns:
        The attribution, in the unit of the score.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Learning Important Features Through Propagating Activation Differences (Shrikumar et al.,
        2017), https://arxiv.org/abs/1704.02685.
    """
    ids = _chosen(net, images, class_ids)
    start = _start(net, images, baseline)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.detach().clone().requires_grad_()
        with _Rescaled(2 * len(leaf)):
            scores = net.activations(torch.cat([leaf, start]))[1][: len(leaf)]
        picked = scores.gather(1, ids.clone()[:, None])
        found = _gradient(picked, leaf)
    return found * (images.detach() - start)


def guided_backprop(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient with each ReLU passing back only what is positive.

    A ReLU passes :math:`g` where :math:`x > 0` and :math:`g > 0`. Modules, functions and
    in-place forms of ReLU and ReLU6 are meant alike; other activation functions, ``clamp``, and
    what TorchScript compiled keep their gradient.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.

    Returns:
        The guided gradient.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Striving for Simplicity: The All Convolutional Net (Springenberg et al., 2015),
        https://arxiv.org/abs/1412.6806.
    """
    with _GuidedReLUs():
        return gradient(net, images, class_ids)


def deconvnet(
    net: Staged, images: Float[Tensor, "b c h w"], class_ids: ClassIds = None
) -> Float[Tensor, "b c h w"]:
    """Computes the gradient with each ReLU passing back only what is positive, open or not.

    A ReLU passes :math:`g` where :math:`g > 0`, whatever its input was. For the rest see
    :func:`guided_backprop`; max-poolings remember their places.

    Args:
        net: A network with one score per class.
        images: Images, normalized as the network expects.
        class_ids: See :func:`gradient`.

    Returns:
        What arrives at the pixels.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, or scores are not finite.

    References:
        Visualizing and Understanding Convolutional Networks (Zeiler and Fergus, 2014),
        https://arxiv.org/abs/1311.2901.
    """
    with _GuidedReLUs(deconvolution=True):
        return gradient(net, images, class_ids)


def _gradient(picked: Tensor, leaf: Tensor) -> Tensor:
    try:
        return torch.autograd.grad(picked.sum(), leaf)[0]
    except RuntimeError as error:
        if "checkpoint" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(
            "expected a network that keeps its activations; switch checkpointing off"
        ) from error


def _start(net: Staged, images: Tensor, baseline: Baseline) -> Tensor:
    check_choice("baseline", baseline, Baseline)
    start = torch.zeros_like(images)
    if baseline == "black":
        mean, std = (images.new_tensor(part)[:, None, None] for part in (net.mean, net.std))
        start = (start - mean) / std
    return start


class _GuidedReLUs(TorchFunctionMode):
    # Within it, every ReLU passes back positive gradients only; with `deconvolution` it does so
    # where it is closed, too.
    def __init__(self, deconvolution: bool = False) -> None:
        super().__init__()
        self.deconvolution = deconvolution

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        top = _top(func, kwargs)
        if top is None:
            return func(*args, **kwargs)
        x, _, _ = _split(args, kwargs)
        return _put(_Guided.apply(x, top, self.deconvolution), x, func, kwargs)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, x: Tensor, top: float, everywhere: bool
    ) -> Tensor:
        context.save_for_backward(((x > 0) & (x < top)) | everywhere)
        return x.clamp(0, top)

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        (open_,) = context.saved_tensors
        return gradient.relu() * open_, None, None


class _Rescaled(TorchFunctionMode):
    # Within it, a batch is images and then as many baselines; see `deeplift`.
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        x, rest, named = _split(args, kwargs) if func in _RESCALED else (None, (), {})
        if x is None or not x.requires_grad:  # a parameter, say
            return func(*args, **kwargs)
        if not x.ndim or len(x) % self.count:  # a multiple if channels were folded into the batch
            raise ValueError(
                f"expected a network that keeps a batch together, got a part {tuple(x.shape)}"
            )
        if func in _ELEMENTWISE:
            found = _Ratio.apply(x, lambda u: func(u, *rest, **named))
            return _put(found, x, func, kwargs)
        named |= {"return_indices": True}
        found, places = _Winner.apply(x, lambda u: _POOLINGS[func](u, *rest, **named))
        return (found, places) if kwargs.get("return_indices") else found


def _top(func: Callable, kwargs: dict) -> float | None:
    # The largest value that a ReLU gives; None for another function.
    if func is functional.hardtanh and kwargs.get("min_val") == 0:  # the module ReLU6
        return kwargs["max_val"]
    return _TOPS.get(func)


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    # What a function is applied to, and what else it takes; without its order to work in place.
    named = {name: value for name, value in kwargs.items() if name not in ("input", "inplace")}
    return (args[0], args[1:], named) if args else (kwargs["input"], (), named)


def _put(found: Tensor, x: Tensor, func: Callable, kwargs: dict) -> Tensor:
    # The caller of a function that works in place may look at the place alone.
    return x.copy_(found) if kwargs.get("inplace") or func.__name__.endswith("_") else found


class _Ratio(torch.autograd.Function):
    # An elementwise function, which passes back the ratio of differences to the baseline.
    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, x: Tensor, function: Callable
    ) -> Tensor:
        # a copy, since what comes next may work in place; [None], so that checkpointing, which
        # runs the plain function again, finds another shape and says so
        context.save_for_backward(x.clone()[None])
        context.function = function
        return function(x.clone())

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None]:
        whole = context.saved_tensors[0][0]
        with torch.enable_grad():
            leaf = whole.detach().requires_grad_()
            values = context.function(leaf.clone())
            slope = torch.autograd.grad(values.sum(), leaf)[0].chunk(2)[0]
        (x, start), (y, end) = whole.chunk(2), values.detach().chunk(2)
        ratio = torch.where(_apart(x, start, y, end), (y - end) / (x - start), slope)
        return gradient * torch.cat([ratio, torch.zeros_like(ratio)]), None


class _Winner(torch.autograd.Function):
    # A max-pooling, which passes the difference to the larger of both maxima.
    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx, x: Tensor, pool: Callable
    ) -> tuple[Tensor, Tensor]:
        y, places = pool(x)
        context.save_for_backward(x, places)  # not y, where a ReLU may work in place
        context.mark_non_differentiable(places)
        return y, places

    @staticmethod
    def backward(
        context: torch.autograd.function.FunctionCtx, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor, None]:
        (x, start), (at, of_start) = (each.flatten(-2).chunk(2) for each in context.saved_tensors)
        y, end = x.gather(-1, at), start.gather(-1, of_start)
        winner = torch.where(y >= end, at, of_start)
        one, other = x.gather(-1, winner), start.gather(-1, winner)
        ratio = torch.where(_apart(one, other, y, end), (y - end) / (one - other), 1.0)
        passed = gradient.flatten(-2).chunk(2)[0] * ratio
        found = torch.zeros_like(x).scatter_add(-1, winner, passed)
        whole = torch.cat([found, torch.zeros_like(found)])
        return whole.reshape(context.saved_tensors[0].shape), None


def _apart(x: Tensor, start: Tensor, y: Tensor, end: Tensor) -> Tensor:
    # Whether inputs differ by far more than their rounding and that of the results, so that the
    # quotient of the differences is known to a thousandth.
    largest = torch.stack([x.abs(), start.abs(), y.abs(), end.abs()]).amax(dim=0)
    return (x - start).abs() > 1000 * torch.finfo(x.dtype).eps * largest


def _forms(*names: str) -> set[Callable]:
    # Functions and methods of these names, in place or not.
    return {
        getattr(owner, name + end)
        for owner in (functional, torch, Tensor)
        for name in names
        for end in ("", "_")
        if hasattr(owner, name + end)
    }


_TOPS = dict.fromkeys(_forms("relu"), torch.inf) | {functional.relu6: 6.0}  # largest value given
_POOLINGS = {
    functional.max_pool2d: functional.max_pool2d, torch.max_pool2d: functional.max_pool2d,
    functional.adaptive_max_pool2d: functional.adaptive_max_pool2d,
    functional.max_pool2d_with_indices: functional.max_pool2d,
    functional.adaptive_max_pool2d_with_indices: functional.adaptive_max_pool2d,
}  # fmt: skip
_ELEMENTWISE = _forms(
    "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "softplus", "softsign", "logsigmoid", "hardswish", "hardsigmoid", "hardshrink", "softshrink",
    "tanhshrink", "prelu", "rrelu", "threshold", "sigmoid", "tanh", "clamp", "clamp_min",
    "clamp_max", "clip",
)  # fmt: skip
_RESCALED = _ELEMENTWISE | set(_POOLINGS)
