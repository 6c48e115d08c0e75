import hashlib

import pytest
import safetensors.torch
import torch
from torchvision import models

from attnviz import networks
from attnviz.networks import FiveStage, load_network


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNVIZ_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "data" / "weights").mkdir(parents=True)

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def state():
    return models.squeezenet1_1(weights=None).state_dict()


def _sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("file", ["squeezenet1_1.pth", "squeezenet1_1_imagenet.pt"])
def test_weights_come_from_the_data_root_first(root, state, file):
    path = root / "weights" / file
    torch.save(state, path)
    net = load_network("squeezenet1_1")
    assert net.provenance == {"weights": file, "sha256": _sha(path)}
    assert torch.equal(net.model.state_dict()["features.0.weight"], state["features.0.weight"])
    assert not net.model.training
    assert net.class_names[285] == "Egyptian cat"


def test_another_network_with_a_longer_name_is_not_taken(root, state):
    torch.save(state, root / "weights" / "squeezenet1_1_other.pth")
    with pytest.raises(FileNotFoundError, match="squeezenet1_1"):
        load_network("squeezenet1_1")


def test_weights_come_from_the_torch_cache_next(root, state):
    cache = root.parent / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(state, cache / "plain.pth")
    digest = _sha(cache / "plain.pth")
    file = cache / "squeezenet1_1-b8a52dc0.pth"
    (cache / "plain.pth").rename(file)
    with pytest.raises(
        ValueError, match=rf"the sha256 b8a52dc0\.\.\. of its name, got {digest[:8]}"
    ):
        load_network("squeezenet1_1")


def test_a_right_hash_in_the_name_is_accepted(root, state, tmp_path):
    torch.save(state, tmp_path / "net.pth")
    path = tmp_path / f"net-{_sha(tmp_path / 'net.pth')[:8]}.pth"
    (tmp_path / "net.pth").rename(path)
    assert load_network("squeezenet1_1", path).provenance["weights"] == path.name


def test_missing_weights_name_every_place_searched(root):
    with pytest.raises(FileNotFoundError) as caught:
        load_network("resnet18")
    message = str(caught.value)
    assert str(root / "weights") in message
    assert str(root.parent / "torch" / "hub" / "checkpoints") in message
    assert "download.pytorch.org" in message
    assert "\n" not in message


def test_the_file_must_be_there_readable_and_fit(root, state, tmp_path):
    with pytest.raises(FileNotFoundError, match="'auto', 'random' or a file, got 'none.pth'"):
        load_network("squeezenet1_1", "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="could not be read"):
        load_network("squeezenet1_1", tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a state dict in list.pth, got list"):
        load_network("squeezenet1_1", tmp_path / "list.pth")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected weights that fit resnet18, got other.pth"):
        load_network("resnet18", tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "resnet10t"])
def test_the_file_decides_the_number_of_classes(root, tmp_path, name):
    if name == "resnet10t":
        model = pytest.importorskip("timm").create_model(name, num_classes=20)
    else:
        model = models.get_model(name, weights=None, num_classes=20)
    torch.save(model.state_dict(), tmp_path / "birds.pth")
    net = load_network(name, tmp_path / "birds.pth")
    assert net.class_names is None
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(images), model.eval()(images))
    assert net(images).shape == (1, 20)


class _Malicious:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickle_that_runs_code_is_refused(root, tmp_path, capsys):
    torch.save({"features.0.weight": _Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="could not be read"):
        load_network("squeezenet1_1", tmp_path / "bad.pth")
    assert "executed" not in capsys.readouterr().out


def test_safetensors_and_wrapped_state_dicts_load(root, state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    for file in ("net.safetensors", "net.pth"):
        net = load_network("squeezenet1_1", tmp_path / file)
        assert torch.equal(net.model.state_dict()["features.0.weight"], state["features.0.weight"])


def test_unknown_network_gets_the_nearest_names(root):
    with pytest.raises(ValueError, match="got 'resnet5'; the nearest are .*resnet50"):
        load_network("resnet5")


def test_random_weights_say_so(root):
    net = load_network("squeezenet1_1", "random")
    assert net.provenance == {"weights": "random"}


def test_timm_network_loads(root):
    pytest.importorskip("timm")
    net = load_network("resnet10t", "random")
    assert len(net.stage_names) == 5
    assert len(net.class_names) == 1000


@pytest.mark.parametrize("head", ["fc", "conv", "gap"])
def test_five_stage_network_has_five_stages(head):
    net = networks.staged(FiveStage(7, head).eval(), FiveStage.cuts, image_size=(112, 112))
    activations, scores = net.activations(torch.rand(2, 3, 112, 112))
    last = 14 if head == "conv" else 7
    assert [a.shape[-1] for a in activations] == [112, 56, 28, 14, last]
    assert scores.shape == (2, 7)
    with pytest.raises(ValueError, match=r"`head` in \('fc', 'conv', 'gap'\), got 'max'"):
        FiveStage(7, "max")


def test_preprocess_normalizes_the_whole_picture(root):
    net = load_network("squeezenet1_1", "random")
    pixels = torch.full((30, 60, 3), 255, dtype=torch.uint8).numpy()
    images = net.preprocess(pixels)
    assert images.shape == (1, 3, 224, 448)
    expected = (1 - torch.tensor(net.mean)) / torch.tensor(net.std)
    torch.testing.assert_close(images.amax((0, 2, 3)), expected)
    torch.testing.assert_close(images.amin((0, 2, 3)), expected)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "cat"), [("squeezenet1_1", 285), ("squeezenet1_0", 285), ("mobilenet_v2", 285)]
)
def test_genuine_networks_see_the_cat(name, cat, real_data):
    net = load_network(name, data=real_data)
    picture = networks.bundled_folder() / "pictures" / "cat.jpg"
    assert int(net(net.preprocess(picture)).argmax()) == cat


@pytest.mark.parametrize("weights", [None, 3, [1]])
def test_weights_are_a_word_or_a_file(untyped, weights):
    with pytest.raises(TypeError, match="expected `weights` 'auto', 'random' or a file, got"):
        load_network("scenes_fc", weights)
    with pytest.raises(TypeError, match="expected the name of a network, got"):
        load_network(weights)
