import pytest
import torch
from test_stages import _trace

from attnviz.crops import run
from attnviz.probes.surrogate import surrogate, top_channels
from attnviz.stages import staged
from attnviz.tree import evidence


@pytest.fixture
def net(tiny):
    return staged(tiny)


@pytest.fixture
def images(generator):
    return torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64) - 0.3


def test_channels_are_those_of_the_tree_of_each_size(net, images):
    for stages in (None, [1, 3]):
        found = top_channels(run(net, images[:1]), 2, (1, 2, 3, 6), stages)
        for top in (1, 2, 3, 6):
            tree = evidence(net, images[:1], 2, top, stages=stages)
            expected = {}
            for node in tree.nodes.values():
                expected.setdefault(node.stage, set()).add(node.channel)
            assert found[top] == expected
            assert all(len(channels) >= 1 for channels in expected.values())


def test_surrogate_equals_a_forward_by_hand_with_the_other_channels_zero(net, tiny, images):
    labels = [0, 1, 2, 3]
    table = surrogate(net, images, labels, tops=[1, 2, 9]).set_index(["image", "top"])
    for row in range(4):
        image = images[row : row + 1]
        predicted = net(image).argmax().item()
        for top in (1, 2, 9):
            kept = top_channels(run(net, image), predicted, [top])[top]
            x, count = image, 0
            for stage in (1, 2, 3):
                x = tiny.pool(x) if stage > 1 else x
                x = tiny.relus[stage - 1](tiny.convolutions[stage - 1](x))
                for channel in range(x.shape[1]):
                    if channel in kept[stage]:
                        count += 1
                    else:
                        x[:, channel] = 0
            left = tiny.fc(x.mean((2, 3))).argmax().item()
            found = table.loc[(row, top)]
            assert found["surrogate"] == left
            assert found["predicted"] == predicted
            assert found["matches"] == (left == predicted)
            assert found["accurate"] == (left == labels[row])
            assert found["kept"] == pytest.approx(count / 15)


def test_one_stage_thinned_out_is_the_network_without_its_negative_channels(net, images):
    table = surrogate(net, images, [0] * 4, tops=[6], stages=[3])
    assert table["matches"].all()  # without negative contributions the first class only rises
    assert table["kept"].between(1 / 6, 1).all()


def test_no_trace_is_left(net, tiny, images):
    tiny.train()
    before = _trace(tiny)
    with torch.inference_mode():
        surrogate(net, images[:1], [0], tops=[2])
    assert _trace(tiny) == before


def test_bad_arguments_say_what_is_expected(net, images, untyped):
    with pytest.raises(ValueError, match=r"`tops` of at least 1, got \[0, 1\]"):
        surrogate(net, images, [0] * 4, tops=[0, 1])
    with pytest.raises(ValueError, match="4 classes in `class_ids`"):
        surrogate(net, images, [0, 1])
