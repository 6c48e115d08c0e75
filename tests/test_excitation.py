import itertools
import threading
from collections import OrderedDict

import pytest
import torch
import torchvision
from test_stages import _trace
from tiny import Tiny
from torch import nn

from attnviz.excitation import descend, record
from attnviz.explain import excitation_backprop
from attnviz.stages import staged


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)


def _reached(model, images, class_id, cuts=None, contrastive=False):
    """Winning probabilities of every channel and position of each stage."""
    net = staged(model, cuts, image_size=tuple(images.shape[2:]))
    names = net._parts.stages
    with torch.no_grad():
        passed = record(net._parts, images, names[0])
        classes = torch.full((len(images),), class_id)
        return descend(passed, classes, names, contrastive=contrastive)


def _weights(layer, values):
    values = torch.as_tensor(values, dtype=torch.float64)
    layer.weight.data = values.reshape(values.shape + (1,) * (layer.weight.ndim - values.ndim))


# Values by hand.


@pytest.fixture
def two_layers():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(2, 2, bias=False),
    ).double()  # fmt: skip
    _weights(model[0], [[2], [1]])
    _weights(model[2], [[1, -1], [0.5, 2]])
    _weights(model[5], [[1, 2], [3, -1]])
    return model, torch.ones(1, 1, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("class_id", "contrastive", "expected"),
    [  # x = (2, 1), then y = (1, 3)
        (0, False, [[3 / 7, 4 / 7], [1 / 7, 6 / 7]]),
        (0, True, [[3 / 7, 4 / 7], [1 / 7, 6 / 7]]),  # nothing speaks against it
        (1, False, [[1, 0], [1, 0]]),
        (1, True, [[2 / 3, -2 / 3], [1, -1]]),
    ],
)
def test_two_layers_by_hand(two_layers, class_id, contrastive, expected):
    model, image = two_layers
    found = _reached(model, image, class_id, ["1", "3"], contrastive)
    for stage, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(
            stage.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-15, atol=1e-15
        )


class _Wired(nn.Module):
    """A 1x1 layer with weight 1, a wiring of layers a and b, two scores."""

    def __init__(self, wire, width, inputs=1):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(inputs, 2, 1, bias=False), nn.ReLU()
        self.a, self.b = nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
        self.fc = nn.Linear(width, 2, bias=False)
        self.wire = wire
        self.double()
        _weights(self.stem, [[2], [1]])
        _weights(self.a, [[1, -1], [0.5, 2]])
        _weights(self.b, [[-3, 1], [1, 1]])
        _weights(self.fc, torch.arange(1.0, 2 * width + 1).reshape(2, width))

    def forward(self, x):
        return self.fc(self.wire(self, self.relu(self.stem(x))).flatten(1))


@pytest.mark.parametrize("inplace", [False, True])
def test_residual_sum_splits_in_proportion_by_hand(inplace):
    def wire(self, x):
        y = self.a(x)
        if inplace:
            y += x
            return torch.relu_(y)
        return torch.relu(y + x)

    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    [found] = _reached(_Wired(wire, 2), image, 0, ["relu"])
    # x = (2, 1), a(x) = (1, 3), sums (3, 4), scores 1 * 3 + 2 * 4 = 11: p = (3, 8) / 11
    p0, p1 = 3 / 11, 8 / 11
    skip = [p0 * 2 / 3, p1 * 1 / 4]
    through = [p0 * 1 / 3 + p1 * 3 / 4 * 1 / 3, p1 * 3 / 4 * 2 / 3]
    expected = torch.tensor(skip, dtype=torch.float64) + torch.tensor(through)
    torch.testing.assert_close(found.flatten(), expected)
    torch.testing.assert_close(found.sum(), torch.tensor(1.0).double())


def test_negative_part_of_a_residual_sum_gets_nothing():
    def wire(self, x):
        return torch.relu(self.b(x) + 4 * x)

    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    [found] = _reached(_Wired(wire, 2), image, 0, ["relu"])
    # x = (2, 1), b(x) = (-5, 3), 4 x = (8, 4), sums (3, 7): p = (3, 14) / 17
    p0, p1 = 3 / 17, 14 / 17
    expected = torch.tensor([p0 + p1 * 3 / 7 * 2 / 3, p1 * 4 / 7 + p1 * 3 / 7 / 3]).double()
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=0)


def test_concatenation_hands_each_part_back_by_hand():
    def wire(self, x):
        return torch.relu(torch.cat([self.a(x), self.b(x), x], 1))

    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    [found] = _reached(_Wired(wire, 6), image, 0, ["relu"])
    # (1, 3), (0, 3), (2, 1) with weights 1 to 6: 1 + 6 + 0 + 12 + 10 + 6 = 35
    a0, a1, b1, x0, x1 = (value / 35 for value in (1, 6, 12, 10, 6))
    expected = [a0 + a1 / 3 + b1 * 2 / 3 + x0, a1 * 2 / 3 + b1 / 3 + x1]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_average_pooling_splits_by_value_and_maximum_pooling_passes():
    x = torch.tensor([[[[1.0, 2.0], [0.0, 5.0]]]], dtype=torch.float64)
    for pool, expected in ((nn.AvgPool2d(2), x / 8), (nn.MaxPool2d(2), (x == 5).double())):
        model = nn.Sequential(
            nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), pool, nn.Flatten(), nn.Linear(1, 2)
        ).double()
        _weights(model[0], [[1]])
        _weights(model[4], [[1], [1]])
        torch.testing.assert_close(_reached(model, x, 0, ["1"])[0], expected)


# Replica: loops over single numbers.


def _linear_loop(x, weight, p):
    """The formula: x (inputs), weight (outputs, inputs), p (outputs)."""
    result = torch.zeros_like(x)
    for i in range(len(p)):
        total = sum(max(0.0, float(weight[i, k])) * float(x[k]) for k in range(len(x)))
        if total > 0:
            for j in range(len(x)):
                result[j] += x[j] * max(0.0, float(weight[i, j])) * p[i] / total
    return result


def _convolution_loop(x, weight, p):
    """A 3x3 convolution with padding 1: x (c, h, w), weight (o, c, 3, 3), p (o, h, w)."""
    result = torch.zeros_like(x)
    o, h, w = p.shape
    for i, row, column in itertools.product(range(o), range(h), range(w)):
        window = [
            (k, row + a - 1, column + b - 1, max(0.0, float(weight[i, k, a, b])))
            for k, a, b in itertools.product(range(x.shape[0]), range(3), range(3))
            if 0 <= row + a - 1 < h and 0 <= column + b - 1 < w
        ]
        total = sum(value * float(x[k, y, z]) for k, y, z, value in window)
        for k, y, z, value in window:
            if total > 0:
                result[k, y, z] += x[k, y, z] * value * p[i, row, column] / total
    return result


def _pool_loop(x, p):
    result = torch.zeros_like(x)
    for k, row, column in itertools.product(*map(range, p.shape)):
        window = x[k, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        a, b = divmod(int(window.argmax()), 2)
        result[k, 2 * row + a, 2 * column + b] += p[k, row, column]
    return result


def _tiny_loop(model, image, class_id, sign=1):
    """Probabilities of the three stages of `Tiny`, deepest first."""
    with torch.no_grad():
        stages, inputs, x = [], [], image[None]
        for index, (convolution, relu) in enumerate(zip(model.convolutions, model.relus)):
            x = model.pool(x) if index else x
            inputs.append(x[0])
            x = relu(convolution(x))
            stages.append(x[0])
        pooled = x.mean((2, 3))[0]
        p = torch.zeros(4, dtype=torch.float64)
        p[class_id] = 1
        p = _linear_loop(pooled, sign * model.fc.weight, p)
        deep, area = stages[2], stages[2][0].numel()
        p = torch.stack([_linear_loop(c.flatten(), torch.ones(1, area), q[None]).reshape(c.shape)
                         for c, q in zip(deep, p)])  # fmt: skip
        found = [p]
        for index in (2, 1):
            p = _convolution_loop(inputs[index], model.convolutions[index].weight, p)
            p = _pool_loop(stages[index - 1], p)
            found.append(p)
    return found


@pytest.mark.parametrize("class_id", [0, 2])
def test_probabilities_and_maps_equal_the_loops(net, tiny, images, class_id):
    found = _reached(tiny, images, class_id)
    contrast = _reached(tiny, images, class_id, contrastive=True)
    mwp = excitation_backprop(net, images, class_id, contrastive=False)["mwp"]
    cmwp = excitation_backprop(net, images, class_id)["cmwp"]
    for row in range(2):
        won = _tiny_loop(tiny, images[row], class_id)[::-1]
        lost = _tiny_loop(tiny, images[row], class_id, -1)[::-1]
        for stage in range(3):
            expected = won[stage], won[stage] - lost[stage]
            for each, wanted in zip((found, contrast), expected):
                torch.testing.assert_close(each[stage][row], wanted, rtol=1e-10, atol=1e-14)
            for each, wanted in zip((mwp, cmwp), expected):
                wanted = wanted.sum(0).relu()
                torch.testing.assert_close(each[stage][row], wanted, rtol=1e-10, atol=1e-14)


# Another implementation.


def _vgg(normalized=False):
    torch.manual_seed(3)
    layers = []
    for i, o in ((3, 6), (6, 8), (8, 8)):
        layers.append(nn.Conv2d(i, o, 3, padding=1))
        if normalized:
            layers.append(nn.BatchNorm2d(o, eps=1e-14))  # zennit, when it merges, adds eps again
            nn.init.uniform_(layers[-1].weight, -1, 1)
            nn.init.uniform_(layers[-1].bias, -0.2, 1)
            layers[-1].running_mean.uniform_(-0.2, 0.2)
            layers[-1].running_var.uniform_(0.5, 2)
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU()]
    layers += [nn.Dropout(), nn.Linear(16, 5)]
    return nn.Sequential(OrderedDict((f"layer{n}", each) for n, each in enumerate(layers)))


@pytest.mark.parametrize("normalized", [False, True])
def test_zennit_agrees(normalized):
    composites = pytest.importorskip("zennit.composites")
    canonizers = pytest.importorskip("zennit.canonizers")
    model = _vgg(normalized).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    ends = [n for n, layer in enumerate(model) if isinstance(layer, nn.MaxPool2d)]
    found = _reached(model, images, 3, [f"layer{end - 1}" for end in ends])
    for end, stage in zip(ends, found):
        activation = model[:end](images).detach().requires_grad_()
        composite = composites.ExcitationBackprop(
            stabilizer=1e-30,
            zero_params=["bias"],
            canonizers=[canonizers.SequentialMergeBatchNorm()] if normalized else None,
        )
        with composite.context(model[end:]) as rest:
            output = rest(activation)
            start = torch.eye(5, dtype=torch.float64)[[3, 3]]
            [expected] = torch.autograd.grad(output, activation, start)
        torch.testing.assert_close(stage, expected, rtol=1e-9, atol=1e-13)


# Theorems.


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "resnet18", "mobilenet_v2"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("densenet121", "googlenet", "alexnet")],
)
def test_probability_sums_to_one_in_every_stage(name):
    torch.manual_seed(0)
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(**options)
    images = torch.rand(1, 3, 64, 64)
    net = staged(model, image_size=64)
    maps = excitation_backprop(net, images, contrastive=False)
    assert torch.equal(maps.scores, net(images))
    for stage in maps["mwp"]:
        assert (stage >= 0).all()
        torch.testing.assert_close(stage.sum(), torch.tensor(1.0), rtol=0, atol=1e-4)
    assert all((stage >= 0).all() for stage in excitation_backprop(net, images)["cmwp"])


def test_probability_is_lost_where_only_a_bias_excites(two_layers):
    model, image = two_layers
    model[2].bias = nn.Parameter(torch.tensor([0.0, 1.0]).double())
    _weights(model[2], [[1, -1], [-1, -1]])  # y = (1, relu(-3 + 1) = 0)
    model[2].bias.data[1] = 6  # y = (1, 3), the second by its bias alone
    first, second = _reached(model, image, 0, ["1", "3"])
    torch.testing.assert_close(second.sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(
        first.flatten(), torch.tensor([1 / 7, 0]).double(), rtol=1e-6, atol=0
    )


def test_signed_contrast_sums_to_zero_and_its_opposite_class_is_its_negative(tiny, images):
    with torch.no_grad():
        tiny.fc.weight[1] = -tiny.fc.weight[0]
    first = _reached(tiny, images, 0, contrastive=True)
    second = _reached(tiny, images, 1, contrastive=True)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, -b)
        torch.testing.assert_close(a.sum((1, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("class_id", [0, 1])
def test_contrast_of_a_convolutional_classifier_equals_that_of_the_linear_one(images, class_id):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    classifier = nn.Conv2d(6, 3, 1)
    linear = nn.Linear(6, 3)
    linear.weight.data = classifier.weight.data[:, :, 0, 0]
    convolutional = nn.Sequential(*body, classifier, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    found, expected = (
        _reached(model.double(), images, class_id, ["1", "3"], contrastive=True)
        for model in (convolutional, plain)
    )
    for a, b in zip(found, expected, strict=True):
        assert a.sum(1).abs().max() > 1e-3
        torch.testing.assert_close(a, b)


def test_contrast_is_the_difference_to_the_network_with_a_negated_last_layer(tiny, images):
    negated = Tiny().double()
    negated.load_state_dict(tiny.state_dict())
    negated.fc.weight.data.neg_()
    triples = zip(
        _reached(tiny, images, 2, contrastive=True),
        _reached(tiny, images, 2),
        _reached(negated, images, 2),
    )
    for contrast, won, lost in triples:
        torch.testing.assert_close(contrast, won - lost)


def test_scale_of_a_layer_and_of_the_image_do_not_matter(tiny, images):
    expected = _reached(tiny, images, 1)
    with torch.no_grad():
        tiny.convolutions[1].weight *= 1e-6
        tiny.fc.weight *= 1e8
    for a, b in zip(_reached(tiny, 100 * images, 1), expected):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_batch_normalization_after_a_layer_equals_the_merged_layer():
    model = _vgg(normalized=True).double().eval()
    merged = []
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            merged[-1] = nn.utils.fuse_conv_bn_eval(merged[-1], layer)
        else:
            merged.append(layer)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    one = excitation_backprop(staged(model, image_size=16), images, 1)["cmwp"]
    other = excitation_backprop(staged(nn.Sequential(*merged), image_size=16), images, 1)["cmwp"]
    assert all(stage.any() for stage in one)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_in_place_layers_do_not_matter(images):
    plain, inplace = Tiny().double(), Tiny(inplace=True).double()
    for a, b in zip(_reached(plain, images, 1), _reached(inplace, images, 1), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().double()
    expected = excitation_backprop(staged(model), images, 1)["cmwp"]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = not module.inplace
    for a, b in zip(excitation_backprop(staged(model), images, 1)["cmwp"], expected):
        assert torch.equal(a, b)


def test_modules_called_as_a_whole_are_opened():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    images = torch.rand(1, 3, 64, 64)
    expected = excitation_backprop(staged(model), images, 1)
    found = excitation_backprop(staged(model, ["layer1", "layer3"]), images, 1)
    assert found.stage_names == ("layer1", "layer3")
    for a, b in zip(found["cmwp"], (expected["cmwp"][1], expected["cmwp"][3])):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


# Calling conventions.


def test_some_stages_equal_those_among_all(net, images):
    everything = excitation_backprop(net, images, 1)
    some = excitation_backprop(net, images, 1, stages=[3, 2])
    assert some.stages == (2, 3)
    for a, b in zip(some["cmwp"], everything["cmwp"][1:], strict=True):
        assert torch.equal(a, b)


def test_several_classes_equal_one_class_after_another(net, images):
    found = excitation_backprop(net, images, [[0, 1], [2], []])
    assert found.class_ids.tolist() == [[0, 1], [2, -1], [-1, -1]]
    for row, class_ids in enumerate([[0, 1], [2]]):
        for column, class_id in enumerate(class_ids):
            alone = excitation_backprop(net, images[row : row + 1], class_id)["cmwp"]
            for many, one in zip(found["cmwp"], alone, strict=True):
                torch.testing.assert_close(many[row, column], one[0])
    for stage in found["cmwp"]:
        assert not stage[1, 1].any()
        assert not stage[2].any()


def test_without_class_the_highest_score_is_explained(net, images):
    found = excitation_backprop(net, images)
    assert torch.equal(found.class_ids, net(images).argmax(1))
    expected = excitation_backprop(net, images, found.class_ids)
    assert all(map(torch.equal, found["cmwp"], expected["cmwp"]))


class _Column(nn.Module):
    def __init__(self, tiny, flat):
        super().__init__()
        self.tiny, self.flat = tiny, flat
        tiny.fc.weight.data = tiny.fc.weight.data[1:2]

    def forward(self, x):
        return self.tiny(x)[:, 0] if self.flat else self.tiny(x)


@pytest.mark.parametrize("contrastive", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_single_score_speaks_for_class_one_and_against_class_zero(images, flat, contrastive):
    two = Tiny().double()
    two.fc.weight.data[0] = -two.fc.weight.data[1]
    single = staged(_Column(Tiny().double(), flat))
    found = excitation_backprop(single, images, [0, 1, 0], contrastive=contrastive)
    expected = excitation_backprop(staged(two), images, [0, 1, 0], contrastive=contrastive)
    method = "cmwp" if contrastive else "mwp"
    for a, b in zip(found[method], expected[method], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_give_float32_maps(tiny, images, dtype):
    expected = excitation_backprop(staged(tiny.float()), images.float(), 1)["cmwp"]
    found = excitation_backprop(staged(tiny.to(dtype)), images.to(dtype), 1)["cmwp"]
    for a, b in zip(found, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05 * float(b.max()))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_surrounding_grad_mode_does_not_matter(tiny, images, context):
    expected = excitation_backprop(staged(tiny), images, 1)["cmwp"]
    tiny.requires_grad_(False)
    with context():
        found = excitation_backprop(staged(tiny), images.clone(), 1)["cmwp"]
    assert all(map(torch.equal, found, expected))
    assert not any(stage.requires_grad or stage.is_inference() for stage in found)


def test_four_threads_on_one_network_get_the_right_maps_every_time(net, images):
    wrong = []
    expected = [excitation_backprop(net, images, k)["cmwp"] for k in range(4)]

    def work(offset):
        for call in range(25):
            k = (call + offset) % 4
            found = excitation_backprop(net, images, k)["cmwp"]
            if not all(map(torch.equal, found, expected[k])):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# No trace.


@pytest.mark.parametrize("training", [False, True])
def test_no_trace(tiny, images, training):
    tiny.train(training)
    tiny.fc.weight.grad = grad = torch.ones_like(tiny.fc.weight)
    versions = [p._version for p in tiny.parameters()]
    values = [p.clone() for p in tiny.parameters()]
    runs = []
    hook = tiny.convolutions[1].register_forward_hook(lambda *_: runs.append(1))
    copies = images.clone()
    excitation_backprop(staged(tiny), images, 1)
    assert tiny.fc.weight.grad is grad
    assert (grad == 1).all()
    assert tiny.training is training
    assert [p._version for p in tiny.parameters()] == versions
    assert all(map(torch.equal, tiny.parameters(), values))
    assert all(p.requires_grad for p in tiny.parameters())
    assert len(runs) == 1  # the forward pass, not the way back
    assert len(tiny.convolutions[1]._forward_hooks) == 1
    assert torch.equal(images, copies)
    hook.remove()


def test_no_trace_after_a_failure(images):
    model = _with(nn.SiLU())
    before = _trace(model)
    with pytest.raises(ValueError, match="SiLU"):
        excitation_backprop(staged(model, ["1"]), images)
    assert _trace(model) == before


# Bad input.


def _with(layer):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), layer,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip


class _Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class _Gate(nn.Module):
    def forward(self, x):
        return x * x.sigmoid()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.SiLU(), r"expected layers that .* has a rule for, got SiLU \(3\); explain a stage"),
        (nn.GroupNorm(2, 4), r"got GroupNorm \(3\)"),
        (_Gate(), r"got mul \(3\.mul\)"),
        (_Standardized(4, 4, 1), r"got conv2d \(3\.conv2d\)"),
    ],
)
def test_a_layer_without_a_rule_is_named(images, layer, message):
    net = staged(_with(layer), ["1", "3"])
    with pytest.raises(ValueError, match=message):
        excitation_backprop(net, images, 0)
    assert excitation_backprop(net, images, 0, stages=[2]).stages == (2,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_ids": lambda s: s[:, 0]}, "expected `class_ids` as classes, got a function"),
        ({"class_ids": 4}, "expected classes from 0 to 3, got 4"),
        ({"class_ids": [1, 2]}, "for 3 images, got 2"),
        ({"stages": [4]}, r"`stages` from 1 to 3 .* got \[4\]"),
    ],
)
def test_bad_arguments_say_what_is_expected(net, images, arguments, message, untyped):
    with pytest.raises(ValueError, match=message):
        excitation_backprop(net, images, **arguments)


def test_bad_images_and_outputs_say_what_is_expected(net, tiny, images, untyped):
    with pytest.raises(ValueError, match=r"images with 3 channels, got 1"):
        excitation_backprop(net, images[:, :1], 0)
    with torch.no_grad():
        tiny.convolutions[1].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite scores, got NaN"):
        excitation_backprop(net, images, 0)


def test_a_network_without_a_score_and_one_without_weights_are_refused(images):
    class Boxes(Tiny):
        def forward(self, x):
            return {"boxes": super().forward(x)}

    with pytest.raises(ValueError, match="one row of scores per image, got dict; excitation"):
        excitation_backprop(staged(Boxes().double()), images, 0)
    pooled = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    net = staged(pooled, ["1"])
    with pytest.raises(ValueError, match="expected a layer with weights after the stage"):
        excitation_backprop(net, images, 0)
    found = excitation_backprop(net, images, 0, contrastive=False)["mwp"][0]
    activation = net.activations(images)[0][0][:, 0]
    expected = activation / activation.sum((1, 2), keepdim=True)
    torch.testing.assert_close(found, expected.detach())
