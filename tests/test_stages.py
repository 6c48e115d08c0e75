import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from attnviz.stages import staged

FAMILIES = {  # name: (stages, post-activation is never negative)
    "alexnet": (3, True),
    "vgg11": (5, True),
    "vgg11_bn": (5, True),
    "resnet18": (5, True),
    "resnext50_32x4d": (5, True),
    "wide_resnet50_2": (5, True),
    "squeezenet1_1": (4, True),
    "densenet121": (5, True),
    "mobilenet_v2": (5, True),
    "mobilenet_v3_small": (5, False),
    "efficientnet_b0": (5, False),
    "convnext_tiny": (4, False),
    "googlenet": (5, True),
    "shufflenet_v2_x0_5": (4, True),
    "regnet_y_400mf": (5, True),
}
TIMM = [
    "dm_nfnet_f0",
    "resnet10t",
    "efficientnet_lite0",
    "mobilenetv3_small_050",
    "regnetx_002",
    "convnext_atto",
]


def _build(name):
    torch.manual_seed(0)
    extra = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **extra).eval()


def _trace(model):
    """Everything a caller could find changed."""
    return {
        name: (
            module.training,
            *(len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")),
            *((key, p.requires_grad, p.grad, p._version) for key, p in module.named_parameters()),
            *((key, b._version) for key, b in module.named_buffers()),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_cut_into_its_stages_with_bit_equal_output(name):
    model, (count, nonnegative) = _build(name), FAMILIES[name]
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)
    before = _trace(model)
    net = staged(model)
    activations, output = net.activations(images)
    assert torch.equal(net(images), expected)
    assert torch.equal(output, expected)
    assert torch.equal(net.differentiable(images).output, expected)
    assert len(activations) == len(net.stage_names) == count
    areas = [a.shape[2] * a.shape[3] for a in activations]
    assert areas == sorted(set(areas), reverse=True)
    assert (not nonnegative) or all((a >= 0).all() for a in activations)
    assert _trace(model) == before


@pytest.mark.parametrize("name", TIMM)
def test_timm_network_is_cut_with_bit_equal_output(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False).eval()
    for module in model.modules():
        if hasattr(module, "skipinit_gain"):  # zero at first, which would hide a lost write
            module.skipinit_gain.data.fill_(0.7)
    images = torch.randn(1, 3, 96, 96)
    net = staged(model)
    assert len(net.stage_names) >= 4
    with torch.no_grad():
        assert torch.equal(net(images), model(images))


def test_vgg_stages_are_the_relus_before_the_pools():
    net = staged(_build("vgg16"))
    assert net.stage_names == tuple(f"features.{i}" for i in (3, 8, 15, 22, 29))
    activations, _ = net.activations(torch.zeros(1, 3, 224, 224))
    assert [a.shape[-1] for a in activations] == [224, 112, 56, 28, 14]


def test_activations_are_those_of_a_hook_on_the_model():
    model, seen = _build("resnet18"), {}
    names = ("relu", "layer1", "layer2", "layer3", "layer4")
    images = torch.randn(1, 3, 64, 64)
    activations, _ = staged(model).activations(images)
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, out.detach().clone())
        )
    with torch.no_grad():
        model(images)
    assert all(torch.equal(seen[n], a) for n, a in zip(names, activations))


def test_gradients_are_those_of_the_whole_model(tiny):
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    activations, output = staged(tiny).activations(images.requires_grad_())
    ours = torch.autograd.grad(output[:, 1].sum(), [images, *activations])
    plain = torch.autograd.grad(tiny(images)[:, 1].sum(), images)
    torch.testing.assert_close(ours[0], plain[0])


@pytest.mark.parametrize("stages", [[1], [3], [2, 3], [3, 1]])
def test_graph_begins_at_the_earliest_stage(tiny, stages):
    pieces = staged(tiny).differentiable(torch.rand(1, 3, 16, 16).double(), stages)
    assert [a.is_leaf for a in pieces.activations] == [True] + [False] * (len(stages) - 1)
    assert len(torch.autograd.grad(pieces.output[0, 0], pieces.activations)) == len(stages)


@pytest.mark.parametrize("cut", ["convolutions.0", "relus.0"])
def test_what_is_kept_is_not_overwritten_in_place(cut, tiny_inplace):
    model = tiny_inplace
    images = torch.randn(1, 3, 8, 8)
    (activation,), output = staged(model, [cut]).activations(images)
    expected = model.convolutions[0](images)
    if cut == "relus.0":
        expected = expected.relu()
    assert torch.equal(activation, expected)
    assert torch.equal(output, model(images))


class _Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.fc = nn.Linear(4, 2)

    def forward(self, x, flag=True):
        x = self.stem(x)
        y = self.inner(x).relu() * self.scale
        x = x + y if flag else x
        x = self.norm(x).relu_()
        return {"scores": self.fc(x.mean((2, 3))), "features": x}


def test_cut_beside_a_residual_branch_keeps_the_other_branch():
    model = _Residual().eval()
    images = torch.randn(2, 3, 8, 8)
    net = staged(model, ["inner"])
    expected = model(images)
    (activation,), output = net.activations(images)
    assert torch.equal(output["scores"], expected["scores"])
    assert torch.equal(activation, model.inner(model.stem(images)))
    pieces = net.differentiable(images)
    assert torch.autograd.grad(pieces.output["scores"].sum(), pieces.activations)[0].any()


class _ControlFlow(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.child = nn.Sequential(nn.ReLU())

    def forward(self, x):
        x = self.child(self.conv(x))
        return x if x.sum() > 0 else -x


class _Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = _ControlFlow(), nn.Sequential(nn.Flatten(), nn.Linear(144, 2))

    def forward(self, x):
        return self.second(self.first(x))


def test_modules_that_hold_no_cut_may_hold_any_code():
    model = _Holder().eval()
    images = torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match=r"torch\.fx can trace, got _Holder .*in `cuts`"):
        staged(model, image_size=8)
    assert torch.equal(staged(model, ["first"], image_size=8)(images), model(images))


class _InPlace(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.last, self.fc = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Linear(4, 2)
        self.write = write

    def forward(self, x):
        x = self.conv(x)
        kept = x
        self.write(self, x)
        return self.fc(self.last(x + kept).relu().mean((2, 3)))


STATEMENTS = {
    "layer": lambda self, x: self.relu(x),
    "function": lambda self, x: nn.functional.relu(x, inplace=True),
    "underscore": lambda self, x: torch.relu_(x),
    "method": lambda self, x: x.mul_(3),
    "view": lambda self, x: x.view(x.shape[0], -1).mul_(3),
    "slice": lambda self, x: x[:, 0].add_(1),
    "chunk": lambda self, x: x.chunk(2, 1)[0].add_(1),
}


@pytest.mark.parametrize("write", STATEMENTS.values(), ids=STATEMENTS)
def test_statements_that_write_in_place_are_kept(write):
    model = _InPlace(write).eval()
    images = torch.randn(2, 3, 8, 8)
    net = staged(model, image_size=8)
    with torch.no_grad():
        expected = model(images.clone())
    assert torch.equal(net(images), expected)
    assert torch.equal(net.differentiable(images).output, expected)


class _TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x)
        y = x
        x += 1  # changes y as well, which no trace can see
        return self.fc((x * y).relu().mean((2, 3)))


def test_a_trace_that_computes_something_else_is_refused():
    with pytest.raises(TypeError, match="computes the same when traced, got _TwoNames"):
        staged(_TwoNames().eval(), image_size=8)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class _Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.last(_Sign.apply(self.conv(x))).mean((2, 3))


def test_a_custom_backward_is_refused_not_lost():
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(TypeError, match="_Sign is a custom autograd function.*in `cuts`"):
        staged(_Custom().eval(), image_size=8)
    assert torch.autograd.Function.__dict__["apply"] is before


class _Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("shift", torch.ones(4, 1, 1))
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.fc(((self.conv(x) + self.shift).relu() * self.gain).mean((2, 3)))


def test_parameters_and_buffers_used_directly_follow_the_model():
    model = _Shifted().eval()
    net = staged(model, image_size=8)
    model.load_state_dict({k: v * 3 for k, v in model.state_dict().items()}, assign=True)
    model.double()
    images = torch.rand(2, 3, 8, 8).double()
    assert torch.equal(net(images), model(images))


class _Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.fc = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_forward_that_changes_a_buffer_is_refused_and_the_buffer_kept():
    model = _Counter().eval()
    with pytest.raises(TypeError, match="got _Counter, whose forward changes 'calls'"):
        staged(model, image_size=8)
    assert model.calls == 0


def test_a_network_of_two_inputs_is_refused():
    class Two(nn.Module):
        def forward(self, x, y):
            return x + y

    with pytest.raises(TypeError, match=r"of one input, got Two.forward\(x, y\); wrap it"):
        staged(Two())


# The states a user's model may be in.


def test_train_mode_gives_the_evaluation_output_and_stays():
    model = _build("resnet18")
    images = torch.randn(2, 3, 64, 64)
    expected = staged(model)(images)
    model.train()
    before = _trace(model)
    net = staged(model)
    assert torch.equal(net(images), expected)
    net.differentiable(images)
    assert _trace(model) == before
    assert all(module.training for module in model.modules())


def test_parameters_follow_training_moves_and_loading(tiny):
    net = staged(tiny)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        tiny.fc.weight.add_(1)
    assert torch.equal(net(images.double()), tiny(images.double()))
    tiny.float()
    assert net.dtype == torch.float32
    assert torch.equal(net(images), tiny(images))
    state = {key: value * 2 for key, value in tiny.state_dict().items()}
    tiny.load_state_dict(state, assign=True)
    assert torch.equal(net(images), tiny(images))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.11's of its own
def test_compiled_and_data_parallel_models_are_unwrapped(tiny):
    images = torch.rand(1, 3, 16, 16).double()
    for wrapped in (torch.compile(tiny), nn.DataParallel(tiny)):
        assert staged(wrapped).model is tiny
        assert torch.equal(staged(wrapped)(images), tiny(images))


def test_hooks_on_layers_run_and_stay(tiny):
    calls = []
    tiny.relus[1].register_forward_hook(lambda *_: calls.append(1))
    staged(tiny)(torch.rand(1, 3, 16, 16).double())
    assert calls == [1]
    assert len(tiny.relus[1]._forward_hooks) == 1


def test_a_hooked_block_is_called_as_a_whole():
    model, calls = _build("resnet18"), []
    model.layer2.register_forward_hook(lambda module, args, out: calls.append(1) or out * 2)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
    net = staged(model)
    assert torch.equal(net(images), expected)
    assert net.stage_names[2] == "layer2"
    assert len(calls) == 2


def test_a_hook_round_a_stage_is_refused():
    model = _build("vgg11")
    model.features.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="got hooks on 'features'; remove them"):
        staged(model)


def test_parametrized_layers_are_cut():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    images = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(staged(model, image_size=8)(images), model(images))


def test_half_precision_gives_the_half_precision_output():
    model = _build("squeezenet1_1").to(torch.bfloat16)
    images = torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(staged(model)(images), model(images))


def test_no_grad_inference_mode_and_frozen_parameters_do_not_matter(tiny):
    tiny.requires_grad_(False)
    net = staged(tiny)
    images = torch.rand(1, 3, 16, 16).double()
    expected = torch.autograd.grad(*_score(net, images))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            given = images.clone()  # an inference tensor inside inference_mode
            pieces = net.differentiable(given)
            assert pieces.output.requires_grad
        found = torch.autograd.grad(pieces.output[0, 0], pieces.activations)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not any(p.requires_grad for p in tiny.parameters())


def _score(net, images):
    pieces = net.differentiable(images)
    return pieces.output[0, 0], pieces.activations


def test_a_failing_forward_leaves_no_trace(tiny):
    net = staged(tiny)
    before = _trace(tiny)
    with pytest.raises(ValueError, match="expected images that Tiny can take.*float32"):
        net(torch.rand(1, 3, 16, 16).float())  # the model is float64
    with pytest.raises(ValueError, match="3 channels, got 1"):
        net(torch.rand(1, 1, 16, 16).double())
    assert _trace(tiny) == before


def test_a_staged_network_can_be_copied(tiny):
    images = torch.rand(1, 3, 16, 16).double()
    net = staged(tiny)
    assert torch.equal(copy.deepcopy(net)(images), net(images))


# Bad input.


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "expected images as a tensor .* got str; net.preprocess"),
        (torch.rand(3, 8, 8), r"shape \(b, c, h, w\), got \(3, 8, 8\); add the batch"),
        (torch.rand(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), "expected images with 3 channels, got 4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point type, got torch.uint8"),
        (torch.rand(1, 3, 2, 2).double(), r"images that Tiny can take, got \(1, 3, 2, 2\)"),
    ],
)
def test_bad_images_are_named(tiny, images, message, untyped):
    with pytest.raises((TypeError, ValueError), match=message):
        staged(tiny)(images)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_transformers_are_refused(name):
    with pytest.raises(TypeError, match="expected a convolutional network"):
        staged(models.get_model(name, weights=None))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mixer_s32_224", "pvt_v2_b0"])
def test_timm_transformers_are_refused(name):
    timm = pytest.importorskip("timm")
    with pytest.raises(TypeError, match="expected a convolutional network"):
        staged(timm.create_model(name, pretrained=False))


def test_unpadded_convolutions_begin_no_stage():
    model = models.inception_v3(weights=None, init_weights=False).eval()
    assert len(staged(model, image_size=299).stage_names) == 5


def test_what_is_no_network_is_refused(tiny, untyped):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got str"):
        staged("resnet18")
    with pytest.raises(TypeError, match="cut already"):
        staged(staged(tiny))
    with pytest.raises(TypeError, match="without a convolutional stage"):
        staged(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)))


def test_unknown_cuts_get_the_nearest_names():
    model = _build("resnet18")
    with pytest.raises(ValueError, match=r"got 'layer5'; the nearest are \['layer4'"):
        staged(model, ["layer1", "layer5"])
    with pytest.raises(ValueError, match="in the order the network runs them"):
        staged(model, ["layer3", "layer1"])
    with pytest.raises(ValueError, match="as a list of module names"):
        staged(model, "layer1")


def test_unknown_stages_are_refused(tiny):
    with pytest.raises(
        ValueError, match=r"`stages` from 1 to 3 .* got \[0, 2\]; 1 is the shallow"
    ):
        staged(tiny).differentiable(torch.rand(1, 3, 8, 8).double(), [0, 2])


def test_class_is_found_by_number_and_name_and_the_nearest_are_offered(tiny):
    net = staged(tiny, class_names=("tabby cat", "tiger", "crane", "crane"))
    assert net.class_id("Tabby Cat") == 0
    assert net.class_id(2) == net.class_id("2") == 2
    with pytest.raises(ValueError, match=r"got 'taby cat'; the nearest are tabby cat \(0\)"):
        net.class_id("taby cat")
    with pytest.raises(ValueError, match=r"the name of \[2, 3\]; use a number"):
        net.class_id("crane")
    for wrong in (4, "-1"):
        with pytest.raises(ValueError, match=f"from 0 to 3, got {wrong}"):
            net.class_id(wrong)


def test_a_network_of_one_channel_takes_grey_pictures():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 2))
    net = staged(model.eval(), image_size=32)
    images = net.preprocess(torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy())
    assert images.shape == (1, 1, 32, 32)
    assert net(images).shape == (1, 2)
    with pytest.raises(ValueError, match="expected 1 numbers in `mean`.*got 3 and 1"):
        staged(model, mean=(0, 0, 0), image_size=32)


def test_numbers_come_in_any_container(untyped, tiny):
    net = staged(tiny)
    for stages in (torch.tensor([3, 1]), np.array([1, 3]), {1, 3}, [torch.tensor(1), np.int64(3)]):
        assert net.check_stages(stages) == (1, 3)
    plain = staged(tiny, image_size=(32, 33), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    for kind in (np.array, torch.tensor, list):
        other = staged(
            tiny, image_size=kind([32, 33]), mean=kind([[[0.1]], [[0.2]], [[0.3]]]),
            std=kind([1.0, 2.0, 3.0]), multilabel=np.True_,
        )  # fmt: skip
        assert other.image_size == plain.image_size
        assert other.mean == pytest.approx(plain.mean)
        assert (other.std, other.multilabel) == (plain.std, True)
    cuts = dict.fromkeys(["relus.0", "relus.2"])
    assert staged(tiny, cuts).stage_names == staged(tiny, list(cuts)).stage_names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": "123"}, "`mean` as a list of numbers, got '123'"),
        ({"std": [0.0, 1, 1]}, "`std` from 1e-12 to"),
        ({"mean": [float("inf")] * 3}, "`mean` from -1000000.0 to"),
        ({"image_size": 0}, "`image_size` of at least 1"),
        ({"image_size": (3, True)}, "`image_size` as \\(height, width\\)"),
        ({"class_names": "cat"}, "`class_names` as a list of names"),
        ({"multilabel": "no"}, "`multilabel` True or False"),
        ({"cuts": 5}, "`cuts` as a list of module names"),
    ],
)
def test_odd_facts_of_a_network_are_refused(untyped, tiny, given, message):
    with pytest.raises((ValueError, TypeError), match=f"expected {message}"):
        staged(tiny, **given)


def test_a_constant_may_index_a_parameter():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
            self.shift = nn.Parameter(torch.randn(4, 9))

        def forward(self, x):
            shift = self.shift[:, torch.arange(7)].mean(1)[None, :, None, None]
            return self.relu(self.conv(x) + shift).mean((2, 3))

    with torch.random.fork_rng():
        model = Indexed()
    images = torch.rand(2, 3, 16, 16)
    net = staged(model, ["relu"], image_size=16)
    assert torch.equal(net(images), model(images))
    model.shift.data += 1  # the model's own
    assert torch.equal(net(images), model(images))
