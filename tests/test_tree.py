import json

import pytest
import torch
from test_crops import Block, Squeeze, _by_autograd, _image, _net, _open_neurons
from test_stages import _trace
from torch import nn

import attnviz
from attnviz import evidence
from attnviz.bench_tree import bench_tree
from attnviz.crops import Neuron, run
from attnviz.networks import FiveStage
from attnviz.stages import staged
from attnviz.tree import CLASS


@pytest.fixture
def image(generator):
    return torch.randn(1, 3, 24, 24, generator=generator, dtype=torch.float64)


def _slow_tree(net, image, class_id, top):
    """The thesis' procedure: one backward pass on the whole network for each decision."""
    activations, output = net.activations(image.clone().requires_grad_())
    edges, front, seen = {}, [(CLASS, output[0, class_id])], set()
    for stage in range(len(activations), 0, -1):
        found = []
        for parent, decision in front:
            values = activations[stage - 1]
            [gradient] = torch.autograd.grad(decision, values, retain_graph=True)
            maps = (gradient * values).detach()[0]
            alphas = maps.mean(dim=(1, 2))
            for channel in alphas.argsort(descending=True)[:top].tolist():
                if alphas[channel] <= 0:
                    continue
                row, column = divmod(int(maps[channel].argmax()), maps.shape[2])
                child = f"{stage}:{channel}@{row},{column}"
                share = float(alphas[channel] / alphas.clamp_min(0).sum())
                explained = float((maps.sum() / decision).detach())
                edges[parent, child] = float(alphas[channel]), share, maps[channel], explained
                if child not in seen:
                    seen.add(child)
                    found.append((child, values[0, channel, row, column]))
        front = found
    return edges


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(1)
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU())
    residual = nn.Sequential(
        stem, Block(6, 8, 2), Block(8, 10, 2, 2), nn.Flatten(), nn.Linear(360, 5)
    )
    mixing = nn.Sequential(
        nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), Squeeze(),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(72, 5),
    )  # fmt: skip
    for model in (residual, mixing):
        model.double().eval()
    return {
        "residual": staged(residual, ["0", "1", "2"], image_size=24),
        "mixing": staged(mixing, ["1", "5", "8"], image_size=24),
    }


@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("name", ["tiny", "residual", "mixing"])
def test_tree_is_the_plain_one_node_by_node(name, crops, tiny, nets, image):
    net = staged(tiny) if name == "tiny" else nets[name]
    tree = evidence(net, image, 2, top=2, crops=crops)
    expected = _slow_tree(net, image, 2, 2)
    assert {(edge.parent, edge.child) for edge in tree.edges} == set(expected)
    assert len(tree.edges) == len(expected) > 6
    for edge in tree.edges:
        alpha, share, map, explained = expected[edge.parent, edge.child]
        assert edge.contribution == pytest.approx(alpha, rel=1e-10)
        assert edge.share == pytest.approx(share, rel=1e-10)
        torch.testing.assert_close(edge.map, map)
        assert tree.explained[edge.parent] == pytest.approx(explained, rel=1e-9)
    whole = tree.provenance["whole_maps"]
    assert whole == ([2, 3] if not crops else [2] if name == "mixing" else [])


def test_every_decision_is_explained_whole_without_biases(tiny, image):
    tree = evidence(staged(tiny), image, 1)
    assert len(tree.explained) > 4
    assert list(tree.explained.values()) == pytest.approx([1.0] * len(tree.explained), rel=1e-9)


def test_nodes_are_open_and_know_where_they_look(tiny, image):
    tree = evidence(staged(tiny), image, 1)
    for node in tree.nodes.values():
        assert node.activation == float(tree.forward.activations[node.stage - 1][node.neuron[1:]])
        assert node.activation > 0
        x0, y0, x1, y1 = node.field
        assert 0 <= x0 < x1 <= 24
        assert 0 <= y0 < y1 <= 24
        assert node.id == f"{node.stage}:{node.channel}@{node.peak[0]},{node.peak[1]}"
    assert all(0 < edge.share <= 1 for edge in tree.edges)


def test_tree_grows_on_demand_to_the_same_tree(tiny, image):
    net = staged(tiny)
    whole, grown = evidence(net, image, 0), evidence(net, image, 0, depth=1)
    assert {node.stage for node in grown.nodes.values()} == {3}
    for _ in range(3):
        for id in list(grown.nodes):
            grown.expand(id)
    assert set(grown.nodes) == set(whole.nodes)
    assert {(e.parent, e.child) for e in grown.edges} == {(e.parent, e.child) for e in whole.edges}
    assert grown.explained == pytest.approx(whole.explained)
    count = len(grown.edges)
    again = grown.expand(*grown.nodes)
    assert len(grown.edges) == count >= len(again)
    first = whole.children(CLASS)[0]
    assert first in whole.parents(first.child)


def test_forward_pass_serves_another_class_and_stages_may_be_left_out(tiny, image):
    net = staged(tiny)
    tree = evidence(net, evidence(net, image, 0).forward, 3, stages=[1, 3])
    assert tree.forward is not run(net, image)
    assert {node.stage for node in tree.nodes.values()} == {1, 3}
    fresh = evidence(net, image, 3, stages=[1, 3])
    assert list(fresh.nodes) == list(tree.nodes)


def test_neuron_is_explained_like_a_class(image):
    net, image = _net("residual"), _image()
    neuron = _open_neurons(run(net, image), 2)[4]
    tree = evidence(net, image, tuple(neuron), top=4)
    assert tree.root == str(neuron)
    assert tree.class_id is None
    assert tree.probability is None
    [gradient] = _by_autograd(net.model, image, [neuron], 1)
    alphas = (gradient * tree.forward.activations[0]).mean((1, 2))
    assert [tree.nodes[e.child].channel for e in tree.children(tree.root)] == [
        k for k in alphas.argsort(descending=True).tolist() if alphas[k] > 0
    ][:4]


def test_merged_channels_do_not_light_up_the_same_places(tiny, image):
    net = staged(tiny)
    tree = evidence(net, image, 1, top=3, merge=0.5)
    for parent in tree.explained:
        masks = [edge.map >= edge.map.max() / 2 for edge in tree.children(parent)]
        for i, a in enumerate(masks):
            for b in masks[:i]:
                assert (a & b).sum() / (a | b).sum() <= 0.5
    assert len(tree.edges) <= len(evidence(net, image, 1, top=3).edges)


def test_tight_boxes_hold_the_guided_gradient(tiny, image):
    tree = evidence(staged(tiny), image, 1, tight=True)
    assert all(node.tight is not None for node in tree.nodes.values())
    for node in tree.nodes.values():
        [window] = tree.guided(node.id)
        size = window.whole(window.gradient).abs().amax(dim=0)
        strong = (size > 0.01 * size.max()).nonzero()
        (y0, x0), (y1, x1) = strong.amin(dim=0).tolist(), strong.amax(dim=0).tolist()
        assert node.tight == (x0, y0, x1 + 1, y1 + 1)
        assert node.field[0] <= x0
        assert node.field[3] >= y1 + 1


def test_saliency_sums_the_gradients_of_the_leaves(tiny, image):
    net = staged(tiny)
    tree = evidence(net, image, 1, top=2)
    image = image.clone().requires_grad_()
    first = net.activations(image)[0][0]
    leaves = [node for node in tree.nodes.values() if node.stage == 1]
    total = sum(first[0][node.neuron[1:]] for node in leaves)
    [gradient] = torch.autograd.grad(total, image)
    torch.testing.assert_close(tree.saliency(weighted=False), gradient[0].abs().sum(0))
    assert tree.saliency().sum() > 0


def test_exports_are_plain_and_agree(tiny, image):
    tree = evidence(staged(tiny, class_names=["a", "b", "c", "d"]), image, "b")
    read = json.loads(json.dumps(tree.to_json(), allow_nan=False))
    assert read["format"] == 1
    assert (read["class_id"], read["class_name"]) == (1, "b")
    assert [node["id"] for node in read["nodes"]] == list(tree.nodes)
    assert len(read["edges"]) == len(tree.edges) == len(tree.to_frame())
    graph = tree.to_networkx()
    assert set(graph.nodes) == {CLASS, *tree.nodes}
    assert graph.number_of_edges() == len(tree.edges)
    assert "class 1 (b)" in repr(tree)
    assert str(tree.edges[0].child) in tree._repr_html_()


def test_class_without_evidence_gives_an_empty_tree_that_says_so(tiny, image):
    tiny.fc.weight.data = -tiny.fc.weight.data.abs()
    tree = evidence(staged(tiny), image, 2)
    assert tree.nodes == {}
    assert tree.edges == []
    assert tree.note.startswith("no channel of stage 3 speaks for class 2, whose score is -")
    assert tree.note in repr(tree)
    json.dumps(tree.to_json(), allow_nan=False)


def test_bad_input_is_refused_in_one_line(tiny, image):
    net = staged(tiny)
    closed = Neuron(3, *(run(net, image).activations[2] <= 0).nonzero()[0].tolist())
    for keywords, message in [
        ({"class_id": 4}, "expected a class from 0 to 3, got 4"),
        ({"class_id": (3, 6, 0, 0)}, "expected a channel from 0 to 5 in stage 3, got 6"),
        ({"class_id": closed}, r"expected an open neuron, got 3:.* with activation 0"),
        ({"top": 0}, "expected `top` of at least 1, got 0"),
        ({"depth": 0}, "expected `depth` of at least 1, got 0"),
        ({"merge": 0.0}, r"expected `merge` in \(0, 1\], got 0"),
        ({"stages": [4]}, "expected `stages` from 1 to 3"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            evidence(net, image, **keywords)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected images that Tiny can take, got"):
        evidence(net, image[..., :3, :3])
    with pytest.raises(ValueError, match="expected a node of the tree, got '9:9@9,9'"):
        evidence(net, image, 1).expand("9:9@9,9")
    with pytest.raises(ValueError, match="expected a forward pass of Tiny, got one of Tiny; give"):
        evidence(net, run(staged(tiny), image), 1)
    for network, keywords, message in [
        (tiny, {}, "expected a network from attnviz.staged .* got Tiny; attnviz.staged"),
        (net, {"top": 1.5}, "expected `top` as a number of channels, got 1.5"),
        (net, {"stages": "all"}, r"expected `stages` as a list such as \[4, 5\], got 'all'"),
    ]:
        with pytest.raises(TypeError, match=message):
            evidence(network, image, 1, **keywords)


def test_network_with_attention_is_refused_where_it_is_cut():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 16, 1, 2, 16, 16)
    with pytest.raises(TypeError, match="expected a convolutional network, got Vision"):
        staged(model, image_size=32)


def test_bundled_architecture_is_run_in_windows_and_left_as_it_was():
    torch.manual_seed(0)
    model = FiveStage(4)
    before = _trace(model)
    tree = attnviz.evidence(
        staged(model, FiveStage.cuts, image_size=112), torch.randn(3, 112, 112)
    )
    assert tree.provenance["whole_maps"] == []
    assert _trace(model) == before


def test_benchmark_compares_with_passes_of_the_same_round():
    result = bench_tree(["resnet18"], rounds=1, size=64, device="cpu", progress=False)
    cases = [row["case"] for row in result.rows]
    assert cases[0] == "resnet18: evidence tree, all stages, top 3, beside its forward pass"
    assert sum("channels of stage" in case for case in cases) == 4
    assert all(row["ratio"] > 0 for row in result.rows)
    json.dumps(result.to_json(), allow_nan=False)
