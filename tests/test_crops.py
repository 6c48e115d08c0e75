import pytest
import torch
from test_stages import _trace
from torch import nn
from torch.nn import functional

from attnviz import crops
from attnviz.crops import Neuron, decompose, field_of_view, run
from attnviz.probes.ablation import ablate
from attnviz.stages import staged


class Block(nn.Module):
    """A residual block with a projection, as in ResNet."""

    def __init__(self, before, after, stride=1, dilation=1, groups=1):
        super().__init__()
        self.conv1 = nn.Conv2d(
            before, after, 3, stride, dilation, dilation, groups=groups, bias=False
        )
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, (3, 1), padding=(1, 0))
        self.bn2 = nn.BatchNorm2d(after)
        self.project = nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.project(x)
        return self.relu(out)


class Squeeze(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def _layers(kind):
    """What leads from a first stage of 4 channels to a second one."""
    return {
        "conv": [nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()],
        "no padding": [nn.Conv2d(4, 5, 4), nn.ReLU()],
        "stride": [nn.Conv2d(4, 5, 5, 3, 2), nn.ReLU(), nn.Conv2d(5, 5, 3, 2), nn.ReLU()],
        "dilation": [nn.Conv2d(4, 5, 3, padding=(2, 6), dilation=(2, 3)), nn.ReLU()],
        "same": [nn.Conv2d(4, 5, (4, 3), padding="same", dilation=(2, 1)), nn.ReLU()],
        "padding beyond kernel": [nn.Conv2d(4, 5, 1, padding=1), nn.ReLU()],
        "grouped": [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU()],
        "depthwise": [nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.BatchNorm2d(4), nn.ReLU6()],
        "max": [nn.MaxPool2d(2), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU()],
        "overlapping max": [
            nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
        ],
        "dilated max": [nn.MaxPool2d(2, 1, dilation=2), nn.Conv2d(4, 5, 1), nn.ReLU()],
        "mean": [nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(4, 5, 3), nn.ReLU()],
        "mean of what is there": [
            nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(4, 5, 3), nn.ReLU(),
        ],
        "residual": [Block(4, 6, 2), Block(6, 6, dilation=2), nn.Dropout(), nn.Identity()],
        "other activation": [nn.Conv2d(4, 5, 3, 2, 1), nn.SiLU(inplace=True), Block(5, 5)],
        "squeeze": [nn.Conv2d(4, 5, 3, padding=1), Squeeze(), nn.ReLU()],
    }[kind]  # fmt: skip


KINDS = (
    "conv", "no padding", "stride", "dilation", "same", "padding beyond kernel", "grouped",
    "depthwise", "max", "overlapping max", "dilated max", "mean", "mean of what is there",
    "residual", "other activation", "squeeze",
)  # fmt: skip


class Two(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(inplace=True))
        self.second = nn.Sequential(*_layers(kind))
        self.fc = nn.LazyLinear(4)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def _net(kind, dtype=torch.float64):
    torch.manual_seed(3)
    model = Two(kind).eval()
    model(torch.zeros(1, 3, 13, 11))
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    last = [each for each in model.second.modules() if getattr(each, "bias", None) is not None][-1]
    last.bias.data += 3  # so that neurons are open in every corner
    return staged(model, ["first", "second"], image_size=(13, 11))


def _image(dtype=torch.float64, size=(13, 11)):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, 3, *size, generator=generator, dtype=torch.float64).to(dtype)


def _open_neurons(forward, stage):
    places = (forward.activations[stage - 1] > 0).nonzero().tolist()
    return [Neuron(stage, *place) for place in places]


def _by_autograd(model, image, neurons, stage):
    """Gradients of neurons of stage 2 (or 1), one call each, on the plain model."""
    image = image.clone().requires_grad_()
    with torch.enable_grad():
        first = model.first(image)
        second = model.second(first.clone())
    values = (image, first, second)
    return [
        torch.autograd.grad(
            values[n.stage][0, n.channel, n.row, n.column], values[stage], retain_graph=True
        )[0][0]
        for n in neurons
    ]


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_windows_give_the_gradient_of_every_open_neuron(kind, clipped, monkeypatch):
    monkeypatch.setattr(crops, "_STEP_COST", -1e12 if clipped else 1e12)
    net, image = _net(kind), _image()
    forward = run(net, image)
    neurons = _open_neurons(forward, 2)
    height, width = forward.size(2)
    corners = {(row, column) for row in (0, height - 1) for column in (0, width - 1)}
    assert {(n.row, n.column) for n in neurons} >= corners
    assert forward.is_local(2, 1) == (kind != "squeeze")
    windows = decompose(forward, neurons)
    expected = _by_autograd(net.model, image, neurons, 1)
    scale = max(each.abs().max() for each in expected)
    for neuron, window, gradient in zip(neurons, windows, expected, strict=True):
        found = window.whole(window.gradient)
        torch.testing.assert_close(found, gradient, rtol=0, atol=float(scale) * 1e-12)
        assert window.decision == float(forward.activations[1][neuron[1:]])
        attention = gradient * forward.activations[0]
        torch.testing.assert_close(window.whole(window.attention), attention)
        torch.testing.assert_close(window.contributions, attention.mean((1, 2)))
        for score, values in (("MA", attention), ("MG", gradient)):
            torch.testing.assert_close(window.scores(score), values.amax((1, 2)))
        torch.testing.assert_close(window.scores("AG"), gradient.mean((1, 2)))


@pytest.mark.parametrize("kind", ["residual", "overlapping max", "stride"])
def test_windows_are_exact_in_single_precision(kind):
    net, image = _net(kind, torch.float32), _image(torch.float32)
    forward = run(net, image)
    neurons = _open_neurons(forward, 2)
    expected = _by_autograd(net.model, image, neurons, 1)
    scale = max(each.abs().max() for each in expected)
    for window, gradient in zip(decompose(forward, neurons), expected, strict=True):
        found = window.whole(window.gradient)
        torch.testing.assert_close(found, gradient, rtol=0, atol=float(scale) * 1e-6)


@pytest.mark.parametrize("kind", ["residual", "max", "squeeze"])
def test_a_neuron_is_decomposed_past_a_stage_down_to_the_image(kind):
    net, image = _net(kind), _image()
    forward = run(net, image)
    neurons = _open_neurons(forward, 2)[::7]
    windows = decompose(forward, neurons, 0)
    for window, gradient in zip(windows, _by_autograd(net.model, image, neurons, 0), strict=True):
        torch.testing.assert_close(window.whole(window.gradient), gradient)


def test_equal_values_in_a_pool_give_all_to_the_first_as_torch_does():
    net = _net("max")
    with torch.no_grad():
        net.model.first[0].weight.zero_()
        net.model.first[0].bias.fill_(1.0)
        net.model.second[1].bias.fill_(9.0)
    forward = run(net, _image())
    neurons = _open_neurons(forward, 2)[::5]
    expected = _by_autograd(net.model, _image(), neurons, 1)
    for window, gradient in zip(decompose(forward, neurons), expected, strict=True):
        torch.testing.assert_close(window.whole(window.gradient), gradient)


def test_windows_are_small_and_their_batches_bounded(monkeypatch):
    forward = run(_net("conv"), _image(size=(40, 40)))
    neurons = _open_neurons(forward, 2)[::50]
    whole = [window.gradient for window in decompose(forward, neurons)]
    assert max(each.shape[1] * each.shape[2] for each in whole) == 9
    monkeypatch.setattr(crops, "_LARGEST", 100)
    parts = [window.gradient for window in decompose(forward, neurons)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("whole", [False, True])
def test_guided_gradients_pass_a_relu_only_where_they_are_positive(whole):
    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * (ctx.saved_tensors[0] > 0) * (gradient > 0)

    net, image = _net("residual"), _image().requires_grad_()
    first, second = net.model.first, net.model.second
    x = Guided.apply(first[0](image))
    for block in second[:2]:
        out = Guided.apply(block.bn1(block.conv1(x)))
        x = Guided.apply(block.bn2(block.conv2(out)) + block.project(x))
    forward = run(net, image.detach())
    neurons = _open_neurons(forward, 2)[::5]
    windows = decompose(forward, neurons, 0, guided=True, crops=not whole)
    for neuron, window in zip(neurons, windows, strict=True):
        [expected] = torch.autograd.grad(x[0][neuron[1:]], image, retain_graph=True)
        torch.testing.assert_close(window.whole(window.gradient), expected[0])


def test_class_is_decomposed_into_any_stage(tiny, generator):
    net = staged(tiny)
    image = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    forward = run(net, image)
    activations, output = net.activations(image.clone().requires_grad_())
    for class_id in (0, 3):
        gradients = torch.autograd.grad(output[0, class_id], activations, retain_graph=True)
        for stage, gradient in enumerate(gradients, start=1):
            [window] = decompose(forward, class_id, stage)
            torch.testing.assert_close(window.gradient, gradient[0])
            assert window.decision == float(output[0, class_id].detach())


def test_single_score_speaks_for_class_1_and_against_class_0():
    model = _net("conv").model
    model.fc = nn.Linear(5, 1).double()
    forward = run(staged(model, ["first", "second"], image_size=(13, 11)), _image())
    [against], [spoken] = decompose(forward, 0), decompose(forward, 1)
    torch.testing.assert_close(against.gradient, -spoken.gradient)
    assert against.decision == -spoken.decision == -float(forward.output.detach())


@pytest.mark.parametrize("kind", ["conv", "stride", "max", "same", "no padding"])
def test_field_of_view_holds_the_pixels_that_matter_and_no_others(kind):
    net = _net(kind)
    with torch.no_grad():
        for parameter in net.model.parameters():
            parameter.fill_(0.1)
    image = _image().abs()
    forward = run(net, image)
    height, width = forward.size(2)
    for row in range(height):
        for column in range(width):
            neuron = Neuron(2, 0, row, column)
            seen = torch.zeros_like(image)
            x0, y0, x1, y1 = field_of_view(forward, 2, row, column)
            seen[..., y0:y1, x0:x1] = 1
            [gradient] = _by_autograd(net.model, image, [neuron], 0)
            if kind == "max":  # only the winners have a gradient
                assert not (gradient * (1 - seen[0])).any()
            else:
                assert ((gradient != 0) == (seen[0] == 1)).all()


def test_layer_with_a_hook_is_decomposed_in_whole_maps():
    net, image = _net("residual"), _image()
    net.model.second[0].conv1.register_forward_hook(lambda module, args, output: 3 * output)
    forward = run(net, image)
    assert not forward.is_local(2, 1)
    neurons = _open_neurons(forward, 2)[::9]
    expected = _by_autograd(net.model, image, neurons, 1)
    for window, gradient in zip(decompose(forward, neurons), expected, strict=True):
        torch.testing.assert_close(window.gradient, gradient)


def test_mask_that_was_worked_on_later_is_not_trusted():
    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            out = functional.relu(self.conv(x))
            out -= x
            return out

    torch.manual_seed(0)
    model = nn.Sequential()
    model.first, model.second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), Add()
    model.double()
    forward = run(staged(model, ["first", "second"], image_size=9), _image(size=(9, 9)))
    assert forward.is_local(1, 0)
    assert not forward.is_local(2, 1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_output_is_the_models_and_the_model_is_left_as_it_was(context):
    net, image = _net("residual"), _image()
    before = _trace(net.model)
    with context():
        forward = run(net, image)
        windows = decompose(forward, _open_neurons(forward, 2)[:3])
        decompose(forward, 1)
    assert torch.equal(forward.output, net(image))
    assert len(windows) == 3
    with pytest.raises(ValueError, match="expected an open neuron"):
        decompose(forward, [Neuron(1, *(forward.activations[0] <= 0).nonzero()[0].tolist())])
    assert _trace(net.model) == before


def test_weights_that_changed_since_count():
    net, image = _net("conv"), _image()
    run(net, image)
    with torch.no_grad():
        net.model.second[0].weight *= 2
    forward = run(net, image)
    neurons = _open_neurons(forward, 2)[:4]
    expected = _by_autograd(net.model, image, neurons, 1)
    for window, gradient in zip(decompose(forward, neurons), expected, strict=True):
        torch.testing.assert_close(window.whole(window.gradient), gradient)


def test_wrong_decisions_are_refused_in_one_line():
    forward = run(_net("conv"), _image())
    some = _open_neurons(forward, 2)[0]
    for decision, stage, message in [
        ([Neuron(3, 0, 0, 0)], None, "expected a stage from 1 to 2, got 3"),
        ([Neuron(2, 5, 0, 0)], None, "expected a channel from 0 to 4 in stage 2, got 5"),
        ([Neuron(2, 0, 13, 0)], None, "expected a row from 0 to 12 in stage 2, got 13"),
        ([Neuron(2, 0, 0, -1)], None, "expected a column from 0 to 10 in stage 2, got -1"),
        ([some], 2, "expected a stage from 0 to 1 to decompose into, got 2"),
        ([some, Neuron(1, *_open_neurons(forward, 1)[0][1:])], None, r"got stages \[1, 2\]"),
        (4, None, "expected a class from 0 to 3, got 4"),
        (0, 3, "expected a stage from 0 to 2 to decompose into, got 3"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            decompose(forward, decision, stage)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected one image"):
        run(_net("conv"), torch.zeros(2, 3, 9, 9, dtype=torch.float64))


# Ablation.


def _by_hand(model, values, neuron, fills):
    """What a neuron of stage 2 loses when channels of stage 1 are replaced, one by one."""
    with torch.no_grad():
        before = model.second(values[None].clone())[0][neuron[1:]]
        found = []
        for channel, fill in enumerate(fills):
            changed = values.clone()
            changed[channel] = fill
            found.append(before - model.second(changed[None])[0][neuron[1:]])
    return torch.stack(found)


@pytest.mark.parametrize("fill", ["zero", "spatial_mean", "dataset_mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_ablation_in_windows_is_what_the_network_without_the_channel_loses(kind, fill):
    net = _net(kind)
    forward = run(net, _image())
    values, means = forward.activations[0], torch.rand(4, dtype=torch.float64)
    fills = {"zero": torch.zeros(4), "spatial_mean": values.mean((1, 2)), "dataset_mean": means}
    neurons = _open_neurons(forward, 2)
    for neuron in (neurons[0], neurons[len(neurons) // 2], neurons[-1]):
        expected = _by_hand(net.model, values, neuron, fills[fill].tolist())
        for cropped in (True, False):
            found = ablate(
                net, forward, neuron, fill=fill, means=means, crops=cropped, batch_size=3
            )
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_zero_fill_is_the_contribution_times_the_positions_on_a_pooled_head(tiny, generator):
    image = torch.randn(1, 3, 16, 16, generator=generator, dtype=torch.float64)
    net = staged(tiny)
    forward = run(net, image)
    for class_id in range(4):
        [window] = decompose(forward, class_id)
        expected = window.contributions * window.gradient[0].numel()
        torch.testing.assert_close(ablate(net, forward, class_id), expected)
        mean = ablate(net, forward, class_id, fill="spatial_mean")
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


def test_wrong_ablations_are_refused(untyped):
    net = _net("conv")
    forward = run(net, _image())
    neuron = _open_neurons(forward, 2)[0]
    with pytest.raises(ValueError, match="expected `fill` in .*'zero'.* got 'noise'"):
        ablate(net, forward, neuron, fill="noise")
    with pytest.raises(ValueError, match="expected `means` of 4 channels .* got none"):
        ablate(net, forward, neuron, fill="dataset_mean")
    with pytest.raises(ValueError, match="expected `stage` from 1 to 1, got 2"):
        ablate(net, forward, neuron, 2)
