import copy
import pickle

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
TIMM = ["resnet10t", "efficientnet_lite0", "mobilenetv3_small_050", "regnetx_002", "convnext_atto"]


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
        staged(model)
    assert torch.equal(staged(model, ["first"])(images), model(images))


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
    with pytest.raises(RuntimeError):
        net(torch.rand(1, 3, 16, 16).float())  # the model is float64
    with pytest.raises(ValueError, match="3 channels, got 1"):
        net(torch.rand(1, 1, 16, 16).double())
    assert _trace(tiny) == before


def test_the_model_can_still_be_copied_and_pickled(tiny):
    staged(tiny)
    assert copy.deepcopy(tiny.state_dict()).keys() == tiny.state_dict().keys()
    assert len(pickle.dumps(tiny.state_dict())) > 0


# Bad input.


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("photo.jpg", "expected images as a tensor .* got str; net.preprocess"),
        (torch.rand(3, 8, 8), r"shape \(b, c, h, w\), got \(3, 8, 8\); add the batch"),
        (torch.rand(0, 3, 8, 8), r"got \(0, 3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), "expected images with 3 channels, got 4"),
    ],
)
def test_bad_images_are_named(tiny, images, message, untyped):
    with pytest.raises((TypeError, ValueError), match=message):
        staged(tiny)(images)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t"])
def test_transformers_are_refused(name):
    with pytest.raises(TypeError, match="expected a convolutional network"):
        staged(models.get_model(name, weights=None))


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
    with pytest.raises(ValueError, match="from 0 to 3, got 4"):
        net.class_id(4)
