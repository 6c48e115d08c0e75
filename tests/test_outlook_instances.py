import numpy as np
import pytest
import torch
from test_stages import _trace
from torch import nn

from attnviz.data.scenes import Scenes
from attnviz.excitation import descend, descend_from, record
from attnviz.instances import find_instances
from attnviz.networks import load_network
from attnviz.stages import staged


class _Spots(nn.Module):
    # Class 0 is what is red, 1 what is green, both summed over 2 x 2 pixels.
    def __init__(self):
        super().__init__()
        self.colors, self.sums = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 2, 3, 2, 1)
        self.first, self.second, self.fc = nn.ReLU(), nn.ReLU(), nn.Linear(2, 2, bias=False)
        self.colors.weight.data = torch.eye(3)[:, :, None, None].clone()
        self.sums.weight.data.zero_()
        self.sums.weight.data[0, 0, 1:, 1:] = self.sums.weight.data[1, 1, 1:, 1:] = 1.0
        self.sums.bias.data.zero_()
        self.fc.weight.data = torch.eye(2)

    def forward(self, images):
        return self.fc(self.second(self.sums(self.first(self.colors(images)))).mean((2, 3)))


def _net():
    return staged(_Spots(), ["first", "second"], mean=[0.0] * 3, std=[1.0] * 3)


def _image():
    image = torch.zeros(1, 3, 16, 16)
    image[0, 0, 2:4, 2:4], image[0, 0, 10, 12], image[0, 1, 6, 6] = 1.0, 2.5, 3.0
    return image


def test_each_spot_is_an_instance_with_its_own_pixels():
    found = find_instances(_net(), _image(), [0, 1])
    assert [(each.class_id, each.peak) for each in found] == [
        (0, (1, 1)),
        (0, (5, 6)),
        (1, (3, 3)),
    ]
    assert [each.response for each in found] == pytest.approx([1, 2.5 / 4, 1])
    assert found[0].place == (3.0, 3.0)
    first, second = torch.zeros(2, 16, 16)
    first[2:4, 2:4], second[10, 12] = 0.25, 1.0
    torch.testing.assert_close(found[0].map, first)
    torch.testing.assert_close(found[1].map, second)
    assert len(find_instances(_net(), _image(), [0], least=0.7)) == 1
    assert [each.class_id for each in find_instances(_net(), _image())] == [0, 0]


def test_a_class_without_response_has_no_instance():
    image = _image()
    image[0, 1] = 0
    assert find_instances(_net(), image, [1]) == []


def test_maps_of_all_places_weighed_by_their_response_are_the_map_of_the_class():
    # Excitation is linear in where it starts: the class's map is that of its places, joined.
    net = load_network("scenes_conv")
    scene = Scenes("val", count=8)[5]
    image = net.preprocess(scene.image)
    name, deepest = net._parts.stages[0], net._parts.stages[-1]
    with torch.no_grad():
        passed = record(net._parts, image, name)
        top, whole = descend(passed, torch.tensor(scene.class_ids[:1]), [deepest, name])
        kept = torch.zeros_like(top)
        kept[:, ::2] = top[:, ::2]
        halves = [descend_from(passed, deepest, part, [name])[0] for part in (kept, top - kept)]
    torch.testing.assert_close(halves[0] + halves[1], whole, rtol=1e-4, atol=1e-7)
    assert min(half.sum() for half in halves) > 0.01


def test_two_objects_of_a_class_are_two_peaks_more_often_than_not():
    net = load_network("scenes_conv")
    pairs = [
        (scene, class_id)
        for scene in Scenes("val", count=60)
        for class_id in scene.class_ids
        if sum(item.class_id == class_id for item in scene.objects) == 2
    ]
    right = inside = count = 0
    for scene, class_id in pairs:
        found = find_instances(net, net.preprocess(scene.image), [class_id])
        masks = np.array([item.mask for item in scene.objects if item.class_id == class_id])
        right += len(found) == 2
        count += len(found)
        inside += sum(masks[:, int(y), int(x)].any() for y, x in (each.place for each in found))
    area = np.mean([item.mask.mean() for scene, _ in pairs for item in scene.objects])
    assert len(pairs) >= 20
    assert right > 0.6 * len(pairs)
    assert inside > 0.6 * count > 3 * area * count


def test_no_trace_is_left_and_bad_arguments_are_refused(untyped):
    net = _net()
    net.model.train()
    before = _trace(net.model)
    find_instances(net, _image(), [0])
    with pytest.raises(ValueError, match="`least` from 0 to 1, got 2"):
        find_instances(net, _image(), [0], least=2)
    with pytest.raises(ValueError, match=r"one image \(1, c, h, w\), got \(2, 3, 16, 16\)"):
        find_instances(net, _image().repeat(2, 1, 1, 1), [0])
    with pytest.raises(ValueError, match="from 1 to 2"):
        find_instances(net, _image(), [0], stage=3)
    assert _trace(net.model) == before


def test_classes_have_names_and_bad_arguments_one_line(untyped):
    net = load_network("scenes_conv")
    image = net.preprocess(Scenes("val", count=1)[0].image)
    number = net.class_id("horse")
    same = find_instances(net, image, ["horse", number]), find_instances(net, image, [number])
    assert [[each.peak for each in found] for found in same] == [[e.peak for e in same[1]]] * 2
    with torch.inference_mode():
        again = find_instances(net, image, torch.tensor([number]))
    assert [(each.class_id, each.peak) for each in again] == [(number, e.peak) for e in same[1]]
    for options, message in (
        ({"class_ids": [-1]}, "expected classes from 0 to 11, got -1"),
        ({"class_ids": [1.5]}, "expected classes as whole numbers or names, got 1.5"),
        ({"least": "a"}, "expected `least` as a number, got 'a'"),
        ({"stage": 1.0}, "expected `stage` as a whole number, got 1.0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            find_instances(net, image, **options)
    with pytest.raises(ValueError, match="expected finite scores"):
        find_instances(net, image * torch.nan)
