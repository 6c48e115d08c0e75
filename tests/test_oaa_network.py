"""The networks of chapter 4: their strides, their weights, what trains and what does not."""

import pytest
import torch
from torch.nn.functional import conv2d, max_pool2d
from torchvision import models

from attnviz import load_network, staged
from attnviz.networks import OAA_NETWORKS, FiveStage, bundled_folder, oaa_network
from attnviz.training.runs import network_bytes


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: oaa_network(name, 5, "random") for name in OAA_NETWORKS if name != "resnet101"}


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """The convolutions of a VGG16 in a file as torchvision names them, with another classifier."""
    torch.manual_seed(1)
    layers = models.vgg.make_layers(models.vgg.cfgs["D"])
    state = {f"features.{name}": value for name, value in layers.state_dict().items()}
    state["classifier.6.weight"] = torch.zeros(3, 2)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


# ----------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("name", "stride", "columns"),
    [("vgg16", 8, 37), ("scenes", 8, 37), ("resnet50", 8, 38), ("mobilenet_v2", 16, 19)],
)
def test_class_maps_have_the_stated_stride(networks, name, stride, columns):
    network = networks[name].eval()
    assert network.stride == stride
    with torch.no_grad():
        assert network.class_maps(torch.rand(1, 3, 64, 300)).shape == (1, 5, 64 // stride, columns)


def test_ceil_mode_gives_caffes_38_columns_at_width_300():
    network = oaa_network("vgg16", 2, "random", ceil_mode=True).eval()
    with torch.no_grad():
        assert network.class_maps(torch.rand(1, 3, 60, 300)).shape == (1, 2, 8, 38)
    # 150 to 75 to 37.5: only the last pooling leaves a rest
    assert [network.backbone[pool].ceil_mode for pool in (4, 9, 16)] == [True] * 3
    with pytest.raises(ValueError, match="`ceil_mode` with 'vgg16' only, got it with 'resnet50'"):
        oaa_network("resnet50", 2, "random", ceil_mode=True)


@pytest.mark.parametrize("name", ["scenes", "vgg16", "squeezenet1_1"])
def test_scores_are_the_means_of_the_class_maps(networks, name):
    network, images = networks[name].eval(), torch.rand(2, 3, 64, 72)
    with torch.no_grad():
        maps, scores = network.class_maps(images), network(images)
        features = network.head(network.backbone(images))
    assert torch.equal(maps.mean((2, 3)), scores)
    assert torch.equal(maps, features)


def test_a_class_maps_bias_is_part_of_it(networks):
    network = networks["scenes"].eval()
    images = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        before = network.class_maps(images)
        network.head[-1].bias += 1.5
        torch.testing.assert_close(network.class_maps(images), before + 1.5)
        network.head[-1].bias -= 1.5


# ------------------------------------------------------------------------------------ weights


def test_new_layers_of_vgg16_start_as_the_thesis_says(networks):
    head = networks["vgg16"].head
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Conv2d", "ReLU"] * 3 + ["Conv2d"]
    shapes = [tuple(head[i].weight.shape) for i in (0, 2, 4, 6)]
    assert shapes == [(512, 512, 3, 3)] * 3 + [(5, 512, 1, 1)]
    for layer in head[::2]:
        count = layer.weight.numel()
        assert abs(layer.weight.std().item() - 0.01) < 5 * 0.01 / (2 * count) ** 0.5
        assert abs(layer.weight.mean().item()) < 5 * 0.01 / count**0.5
        assert not layer.bias.any()


def test_vgg16_equals_a_dilated_replica_of_torchvisions_weights(vgg_file):
    network = oaa_network("vgg16", 4, vgg_file).eval()
    state = torch.load(vgg_file, weights_only=True)
    x = images = torch.rand(1, 3, 48, 56)
    for stage, layers in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        for layer in layers:
            weight, bias = (state[f"features.{layer}.{part}"] for part in ("weight", "bias"))
            d = 2 if stage == 4 else 1
            x = conv2d(x, weight, bias, padding=d, dilation=d).relu()
        if stage < 3:
            x = max_pool2d(x, 2)
        elif stage == 3:
            x = max_pool2d(x, 3, stride=1, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(network.backbone(images), x)
    assert x.abs().max() > 0
    assert network.provenance["weights"] == "vgg16.pth"


@pytest.mark.parametrize(
    ("name", "first", "step"),
    [("squeezenet1_1", 1, 2), ("mobilenet_v2", 0, 2), ("resnet50", 0, 4)],
)
def test_dilated_networks_contain_the_activations_of_the_original(name, first, step, tmp_path):
    torch.manual_seed(2)
    plain = models.get_model(name).eval()
    torch.save(plain.state_dict(), tmp_path / "net.pth")
    network = oaa_network(name, 4, tmp_path / "net.pth").eval()
    images = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        fine = network.backbone(images)
        if name == "resnet50":
            coarse = torch.nn.Sequential(*list(plain.children())[:-2])(images)
        else:
            coarse = plain.features(images)
    assert fine.shape[-1] > 1.5 * coarse.shape[-1]
    kept = fine[..., first::step, first::step][..., : coarse.shape[-2], : coarse.shape[-1]]
    coarse = coarse[..., : kept.shape[-2], : kept.shape[-1]]
    torch.testing.assert_close(kept, coarse, rtol=1e-4, atol=1e-4 * coarse.abs().max().item())


def test_scenes_takes_the_layers_of_a_five_stage_network(tmp_path):
    bundled = bundled_folder() / "networks" / "scenes_conv.safetensors"
    network = oaa_network("scenes", 3, bundled).eval()
    plain = load_network("scenes_conv").model
    images = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(network.backbone(images), plain.last_stage(images))
    assert isinstance(plain, FiveStage)
    assert network(images).shape == (1, 3)


def test_scenes_starts_untrained():
    assert oaa_network("scenes", 3).provenance == {"weights": "random"}


def test_a_file_of_another_network_is_refused(vgg_file):
    with pytest.raises(ValueError, match="expected weights that fit resnet50, got vgg16.pth"):
        oaa_network("resnet50", 3, vgg_file)
    with pytest.raises(ValueError, match=r"`name` in \('scenes', .*\), got 'alexnet'"):
        oaa_network("alexnet", 3)


@pytest.mark.real
@pytest.mark.parametrize(("name", "cat"), [("squeezenet1_1", 285), ("mobilenet_v2", 285)])
def test_genuine_weights_are_found_and_still_see_the_cat(name, cat, real_data):
    network = oaa_network(name, 20, data=real_data).eval()
    assert network.provenance["weights"].startswith(name)
    plain = load_network(name, data=real_data)
    images = plain.preprocess(bundled_folder() / "pictures" / "cat.jpg")
    with torch.no_grad():
        scores = plain.model.classifier(
            network.backbone(images)
            if name == "squeezenet1_1"
            else network.backbone(images).mean((2, 3))
        ).flatten(1)
    assert int(scores.argmax()) == cat


# ----------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["scenes", "vgg16", "squeezenet1_1", "mobilenet_v2", "resnet50"])
def test_gradients_reach_every_trained_parameter(networks, name):
    network = networks[name].train()
    network.zero_grad()
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    trained = network.old_parameters() + network.new_parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad.abs().sum() > 0 for p in trained if p.ndim == 4)
    named = {id(p) for p in trained}
    assert len(named) == len(trained)
    for parameter in network.parameters():
        assert (id(parameter) in named) == parameter.requires_grad
    network.zero_grad()


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
def test_normalization_of_pretrained_layers_never_changes(networks, name):
    network = networks[name].train()
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    before = [tuple(t.clone() for t in norm.state_dict().values()) for norm in norms]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    for norm, kept in zip(norms, before):
        assert not norm.training
        assert not any(p.requires_grad for p in norm.parameters())
        assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), kept))
    assert network.training
    network.zero_grad()


def test_normalization_of_the_small_network_trains(networks):
    network = networks["scenes"].train()
    norm = network.backbone.stage1[1]
    before = norm.running_mean.clone()
    network(torch.randn(2, 3, 64, 64))
    assert norm.training
    assert not torch.equal(norm.running_mean, before)


# ------------------------------------------------------------------------------- opened again


@pytest.mark.parametrize("name", ["scenes", "squeezenet1_1"])
def test_a_trained_network_opens_as_a_staged_one(networks, name, tmp_path):
    network = networks[name].eval()
    names = ["cat, tame", "dog", "cow", "horse", "sheep"]
    file = tmp_path / "network.safetensors"
    content = network_bytes(network.state_dict(), network.metadata(names))
    assert content == network_bytes(network.state_dict(), network.metadata(names))
    file.write_bytes(content)
    images = torch.rand(2, 3, 112, 112)
    for called in ("oaa", name):
        net = load_network(called, file)
        with torch.no_grad():
            assert torch.equal(net(images), network(images))
    assert net.name == name
    assert net.class_names == tuple(names)
    assert net.multilabel
    assert net.mean == network.mean
    assert net.std == network.std
    assert net.provenance["weights"] == "network.safetensors"
    assert not net.model.training
    with pytest.raises(
        ValueError, match=f"'oaa' or '{name}' for network.safetensors, got 'vgg11'"
    ):
        load_network("vgg11", file)


@pytest.mark.slow
def test_a_trained_vgg16_keeps_its_rounding_and_its_five_stages(tmp_path):
    network = oaa_network("vgg16", 2, "random", ceil_mode=True).eval()
    file = tmp_path / "network.safetensors"
    file.write_bytes(network_bytes(network.state_dict(), network.metadata()))
    net = load_network("vgg16", file)
    assert net.class_names is None
    activations, scores = net.activations(torch.rand(1, 3, 60, 60))
    assert [a.shape[-1] for a in activations] == [60, 30, 15, 8, 8]
    assert scores.shape == (1, 2)


def test_a_trained_network_is_where_another_training_may_start(networks, tmp_path):
    network, file = networks["scenes"].eval(), tmp_path / "network.safetensors"
    file.write_bytes(network_bytes(network.state_dict(), network.metadata()))
    images = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        assert torch.equal(oaa_network("scenes", 5, file).eval()(images), network(images))
    with pytest.raises(ValueError, match="weights that fit scenes with 4 classes"):
        oaa_network("scenes", 4, file)


@pytest.mark.parametrize("name", ["scenes", "squeezenet1_1", "mobilenet_v2"])
def test_stages_of_the_network_are_found(networks, name):
    network, images = networks[name].eval(), torch.rand(1, 3, 224, 224)
    net = staged(network)
    with torch.no_grad():
        assert torch.equal(net(images), network(images))
    assert len(net.stage_names) == 4
