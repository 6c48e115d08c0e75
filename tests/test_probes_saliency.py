from collections import OrderedDict

import pytest
import torch
import torch.utils.checkpoint
from test_stages import _trace
from torch import nn
from torch.nn.functional import relu

from attnviz.probes.saliency import (
    deconvnet,
    deeplift,
    gradient,
    guided_backprop,
    integrated_gradients,
    pixel_map,
    smoothgrad,
)
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.3


def test_gradient_equals_finite_differences(net, images):
    found = gradient(net, images, [0, 1, 2])
    step = 1e-6
    for row, channel, y, x in ((0, 1, 3, 4), (1, 0, 0, 15), (2, 2, 8, 8)):
        moved = images.clone()
        moved[row, channel, y, x] += step
        slope = (net(moved)[row, row] - net(images)[row, row]) / step
        assert found[row, channel, y, x].item() == pytest.approx(slope.item(), abs=1e-6)


def test_batch_equals_single_images(net, images):
    for method in (gradient, guided_backprop, integrated_gradients):
        together = method(net, images, [0, 1, 2])
        for row in range(3):
            alone = method(net, images[row : row + 1], row)
            torch.testing.assert_close(together[row : row + 1], alone)


def test_pixel_map_sums_absolute_colors():
    attribution = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.5]], [[0.0, 4.0]]]])
    assert torch.equal(pixel_map(attribution), torch.tensor([[[4.0, 6.5]]]))


def test_smoothgrad_of_a_linear_network_is_its_gradient_and_without_noise_always(net, images):
    linear = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    straight = staged(linear, ["0"], image_size=16)
    expected = gradient(straight, images, 1)
    torch.testing.assert_close(smoothgrad(straight, images, 1, samples=3), expected)
    still = smoothgrad(net, images, 1, samples=2, noise=0.0)
    torch.testing.assert_close(still, gradient(net, images, 1))


def test_smoothgrad_is_the_mean_over_the_noise_of_its_generator(net, images):
    generator = torch.Generator().manual_seed(5)
    found = smoothgrad(net, images, [3, 1, 0], samples=4, noise=0.2, generator=generator)
    generator.manual_seed(5)
    total = torch.zeros_like(images)
    for _ in range(4):
        noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
        for row, class_id in enumerate((3, 1, 0)):
            width = 0.2 * (images[row].max() - images[row].min())
            noisy = images[row : row + 1] + width * noise[row]
            total[row] += gradient(net, noisy, class_id)[0]
    torch.testing.assert_close(found, total / 4)
    state = torch.get_rng_state()
    torch.testing.assert_close(smoothgrad(net, images), smoothgrad(net, images))
    assert torch.equal(state, torch.get_rng_state())


def test_integrated_gradients_sum_to_the_difference_of_scores(net, images):
    scores = net(images)
    found = integrated_gradients(net, images, [0, 1, 2], steps=400)
    # no bias, so the score of the mean color is 0
    for row in range(3):
        assert found[row].sum().item() == pytest.approx(scores[row, row].item(), abs=2e-4)
    mean, std = (torch.tensor(p, dtype=torch.float64)[:, None, None] for p in (net.mean, net.std))
    black = ((0 - mean) / std).expand(1, 3, 16, 16)
    found = integrated_gradients(net, images, 2, baseline="black", steps=400)
    for row in range(3):
        difference = scores[row, 2] - net(black)[0, 2]
        assert found[row].sum().item() == pytest.approx(difference.item(), abs=2e-3)


class _Functional(nn.Module):
    # One module used twice, a function, and a ReLU in place.
    def __init__(self, reused):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.first, self.second, self.third = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.reused = reused

    def forward(self, x):
        if self.reused:
            x = relu(self.b(self.first(self.a(x))), inplace=True)
            return self.first(self.c(x)).mean((2, 3))
        x = self.second(self.b(self.first(self.a(x))))
        return self.third(self.c(x)).mean((2, 3))


def test_guided_backprop_equals_captum_and_takes_functions_and_reused_modules():
    from captum.attr import Deconvolution, GuidedBackprop

    with torch.random.fork_rng():
        plain, odd = _Functional(False).double(), _Functional(True).double()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator()) - 0.2
    leaf = images.clone().requires_grad_()
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
        expected = GuidedBackprop(plain).attribute(leaf, target=1)
    with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
        open_ = Deconvolution(plain).attribute(leaf, target=1)
    for model in (plain, odd):
        net = staged(model, ["a"], image_size=8)
        torch.testing.assert_close(guided_backprop(net, images, 1), expected)
        torch.testing.assert_close(deconvnet(net, images, 1), open_)
    assert not torch.allclose(expected, gradient(staged(plain, ["a"], image_size=8), images, 1))


def test_relu6_passes_back_positive_gradients_between_0_and_6():
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU6(inplace=True), nn.Flatten(),
                          nn.Linear(4, 2, bias=False))  # fmt: skip
    model[0].weight.data.fill_(1)
    model[3].weight.data = torch.tensor([[1.0, 2.0, -3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    image = torch.tensor([[[[7.0, 5.0], [5.0, -1.0]]]])
    found = guided_backprop(staged(model, ["1"], image_size=2), image, 0)
    assert found.flatten().tolist() == [0, 2, 0, 0]


def test_no_trace_is_left(net, tiny, images):
    tiny.train()
    before = _trace(tiny)
    with torch.inference_mode():
        for method in (gradient, guided_backprop, smoothgrad, integrated_gradients):
            assert not method(net, images, 0).requires_grad
    with pytest.raises(ValueError, match="classes from 0 to 3, got 4"):
        guided_backprop(net, images, 4)
    assert _trace(tiny) == before
    torch.testing.assert_close(relu(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def test_bad_arguments_say_what_is_expected(net, images, untyped):
    with pytest.raises(ValueError, match=r"`samples` of at least 1, got 0"):
        smoothgrad(net, images, samples=0)
    with pytest.raises(ValueError, match="`noise` from 0 to 100, got inf"):
        smoothgrad(net, images, noise=float("inf"))
    with pytest.raises(ValueError, match="`steps` of at least 1, got 0"):
        integrated_gradients(net, images, steps=0)
    with pytest.raises(TypeError, match="`steps` as a whole number, got nan"):
        integrated_gradients(net, images, steps=float("nan"))
    with pytest.raises(ValueError, match="got Tensor of shape \\(3, 3, 16, 16\\)$"):
        deeplift(net, images, baseline=images)
    with pytest.raises(TypeError, match="`generator` as a torch.Generator, got 5"):
        smoothgrad(net, images, generator=5)
    for method in (gradient, deeplift, guided_backprop, smoothgrad, integrated_gradients):
        with pytest.raises(TypeError, match=r"expected images as a tensor \(b, c, h, w\)"):
            method(net, images.numpy())
        with pytest.raises(ValueError, match="floating point type, got torch.uint8"):
            method(net, images.byte())
    with pytest.raises(ValueError, match=r"`baseline` in \('mean', 'black'\), got 'white'"):
        integrated_gradients(net, images, baseline="white")


def test_deeplift_equals_captum_where_there_is_no_max_pooling(images):
    from captum.attr import DeepLift

    with torch.random.fork_rng():
        torch.manual_seed(2)
        plain, odd = _Functional(False).double(), _Functional(True).double()
    leaf = images.clone().requires_grad_()
    with pytest.warns(UserWarning, match="Setting forward, backward hooks"):
        expected = DeepLift(plain).attribute(leaf, torch.zeros_like(images), target=1)
    for model in (plain, odd):
        found = deeplift(staged(model, ["a"], image_size=16), images, 1)
        torch.testing.assert_close(found, expected.detach())
    slope = gradient(staged(plain, ["a"], image_size=16), images, 1)
    assert not torch.allclose(expected, slope * images)


class _Block(nn.Module):
    # Untraced, since no cut is in it: an activation function by its result or by its place.
    def __init__(self, way):
        super().__init__()
        self.conv, self.way = nn.Conv2d(4, 4, 3, padding=1), way
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.conv(x)
        if self.way == "result":
            x = relu(x)
        elif self.way == "module":
            self.relu(x)
        elif self.way == "method":
            x.relu_()
        elif self.way == "keyword":
            x = torch.relu(input=x)
        elif self.way == "unbatched pool":
            x = nn.functional.max_pool2d(x.flatten(0, 1), 3, 1, 1).unflatten(0, (-1, 4)).relu()
        elif self.way == "pool and places":
            x = nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)[0].relu()
        elif self.way == "checkpoint":
            x = torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False)
        elif self.way == "split":
            x = torch.cat([each.relu() for each in x.split(1)])
        elif self.way == "pool":
            x = nn.functional.max_pool2d(x, 3, 1, 1).relu()
        elif self.way == "pool in place":
            x = nn.functional.max_pool2d(x, 3, 1, 1)
            self.relu(x)
        elif self.way == "leaky":
            x = nn.functional.leaky_relu((2 * x.tanh()).clamp(-0.1, 0.2), 0.3)
        else:
            x = 2 * x.tanh()
            x.clamp_(-0.1, 0.2)
            nn.functional.leaky_relu_(x, 0.3)
        return x


def _around(block):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        parts = OrderedDict(first=nn.Conv2d(3, 4, 3, padding=1), block=block())
        parts |= dict(pool=nn.AdaptiveMaxPool2d(3), flat=nn.Flatten(), last=nn.Linear(36, 4))
        return staged(nn.Sequential(parts).double().eval(), ["first", "block"], image_size=16)


@pytest.mark.parametrize(
    "ways",
    [
        ["result", "module", "method", "keyword"],
        ["pool", "pool in place", "unbatched pool", "pool and places"],
        ["leaky", "in place"],
    ],
)
def test_an_activation_function_may_work_in_place(images, ways):
    expected = None
    for way in ways:
        net = _around(lambda way=way: _Block(way))
        methods = (gradient, guided_backprop, deconvnet, deeplift)
        found = torch.stack([method(net, images, [0, 1, 2]) for method in methods])
        expected = found if expected is None else expected
        assert torch.equal(found, expected)
        total = (net(images) - net(0 * images))[range(3), range(3)]
        torch.testing.assert_close(found[-1].sum((1, 2, 3)), total)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(),
        nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Softsign(), nn.LogSigmoid(), nn.Hardswish(),
        nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink(),
        nn.PReLU(4), nn.RReLU(), nn.Threshold(0.1, 0.3), nn.Sigmoid(), nn.Tanh(),
        nn.LeakyReLU(0.2, inplace=True), nn.Threshold(0.1, 0.3, inplace=True),
    ],
    ids=repr,
)  # fmt: skip
def test_deeplift_has_a_rule_for_each_activation_function(images, module):
    net = _around(lambda: module)
    found = deeplift(net, images, [0, 1, 2]).sum((1, 2, 3))
    torch.testing.assert_close(found, (net(images) - net(0 * images))[range(3), range(3)])


def test_a_network_that_is_not_seen_whole_is_refused(images):
    for method in (guided_backprop, deconvnet, deeplift):
        with pytest.raises(ValueError, match="expected a network that keeps its activations"):
            method(_around(lambda: _Block("checkpoint")), images)
    with pytest.raises(ValueError, match="expected a network that keeps a batch together"):
        deeplift(_around(lambda: _Block("split")), images)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_deeplift_does_not_depend_on_the_unit_of_activations(images, factor):
    def made(factor):
        net = _around(lambda: _Block("pool"))
        net.model.first.weight.data *= factor
        net.model.first.bias.data *= factor
        net.model.block.conv.bias.data *= factor
        net.model.last.weight.data /= factor
        return net

    expected = deeplift(made(1), images, [0, 1, 2])
    torch.testing.assert_close(deeplift(made(factor), images, [0, 1, 2]), expected)


class _Gate(nn.Module):
    # What does not come from the image is not rescaled, whatever its shape.
    def __init__(self, shape):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.ones(shape))

    def forward(self, x):
        places = torch.arange(-3, 4).clamp(0, 3)
        return relu(self.conv(x))[:, places[:4].flip(0)] * torch.sigmoid(2 * self.gate)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1, 1), (6, 4, 1, 1)])
def test_deeplift_leaves_gates_alone_that_are_learned(images, shape):
    net = _around(lambda: _Gate(()))
    net.model.block.gate.data = torch.full(shape[1:] if len(shape) > 1 else shape, 0.3).double()
    found = deeplift(net, images, [0, 1, 2]).sum((1, 2, 3))
    torch.testing.assert_close(found, (net(images) - net(0 * images))[range(3), range(3)])


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid()], ids=repr)
def test_deeplift_of_nearly_the_baseline_is_no_rounding(module):
    # zero-sum kernels on an even picture: each input of the function is rounding alone
    kernels = torch.tensor([1.0, -2.0, 1.0]).expand(2, 3, 3, 3).contiguous()
    parts = nn.Conv2d(3, 2, 3, bias=False), module, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = staged(nn.Sequential(*parts), ["0"], image_size=16)
    net.model[0].weight.data = kernels
    image = torch.full((1, 3, 16, 16), 1.7)
    image += 1e-6 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    found = deeplift(net, image, 0)
    exact = deeplift(staged(net.model.double(), ["0"], image_size=16), image.double(), 0)
    torch.testing.assert_close(found.double(), exact, atol=0.02 * exact.abs().max().item(), rtol=0)


def test_what_needs_a_gradient_gets_no_graph(net, images):
    for method in (gradient, guided_backprop, deconvnet, deeplift, integrated_gradients):
        assert not method(net, images.clone().requires_grad_()).requires_grad


class _Activations(nn.Module):
    # Batch normalization, overlapping poolings, many activation functions, a shortcut.
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean += 0.3
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.silu, self.six = nn.SiLU(inplace=True), nn.ReLU6()
        self.gelu, self.last = nn.GELU(), nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(self.six(8 * self.norm(self.first(x))))
        x = x + self.silu(self.second(x))
        x = nn.functional.max_pool2d(self.gelu(x).tanh(), 2)
        return self.last(nn.functional.hardswish(x).sigmoid().mean((2, 3)))


@pytest.mark.parametrize("baseline", ["mean", "black"])
def test_deeplift_sums_to_the_difference_of_scores(net, images, baseline):
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mixed = _Activations().double().eval()
    for each in (net, staged(mixed, ["first", "second"], image_size=16)):
        found = deeplift(each, images, [0, 1, 2], baseline=baseline)
        mean, std = (
            torch.tensor(p, dtype=torch.float64)[:, None, None] for p in (each.mean, each.std)
        )
        start = ((0 - mean) / std if baseline == "black" else 0 * mean).expand(1, 3, 16, 16)
        difference = (each(images) - each(start))[range(3), range(3)]
        torch.testing.assert_close(found.sum((1, 2, 3)), difference.detach())
        alone = deeplift(each, images[1:2], 1, baseline=baseline)
        torch.testing.assert_close(found[1:2], alone)


def test_deeplift_of_a_pooling_goes_to_the_larger_of_both_maxima():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Conv2d(3, 3, 1, bias=False)
            self.same.weight.data = torch.eye(3)[:, :, None, None]

        def forward(self, x):
            return nn.functional.max_pool2d(self.same(x), 2)[:, :2, 0, 0]

    image = torch.tensor([[-3.0, -2.5], [-4.0, -1.5]]).expand(1, 3, 2, 2).contiguous()
    net = staged(Pool(), ["same"], image_size=2, mean=(1.0, 2.0, 0.0), std=(1.0, 1.0, 1.0))
    # first channel: both maxima -1.5 and -1; the baseline's, in its first place, is larger, and
    # all of -0.5 goes there. Second channel: -1.5 is the larger, 0.5 goes to its place.
    found = deeplift(net, image, 0, baseline="black")[0, 0]
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.0], [0.0, 0.0]]))
    found = deeplift(net, image, 1, baseline="black")[0, 1]
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [0.0, 0.5]]))
