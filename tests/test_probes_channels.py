from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_stages import _trace
from tiny import Tiny

from attnviz.probes import channels
from attnviz.probes.channels import (
    channel_groups,
    count_channels,
    discriminativeness,
    index_channels,
    map_overlaps,
    stage_discriminativeness,
)
from attnviz.stages import staged


@pytest.fixture
def net():
    model = Tiny()
    model.fc.weight.data[:] = 0
    model.convolutions[1].weight.data[3] = -1  # a channel that no picture opens
    return staged(model, image_size=(16, 16), mean=[0.0] * 3, std=[1.0] * 3)


class _Items:
    # Pictures made when asked for; reading one of them may fail.
    def __init__(self, count=13, broken=None, sizes=((16, 16),)):
        self.count, self.broken, self.sizes, self.reads = count, broken, sizes, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        def read():
            if i == self.broken:
                raise KeyboardInterrupt
            self.reads.append(i)
            size = self.sizes[i % len(self.sizes)]
            return np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)

        return SimpleNamespace(image_id=f"picture{i}", read=read, class_ids=(i % 3, 3))


# --------------------------------------------------------------------------------------- index


def test_patches_are_the_largest_activations_found_one_by_one(net):
    data = _Items()
    index = index_channels(net, data, top=4, batch_size=5, progress=False)
    for stage in (1, 2, 3):
        peaks = []
        for i in range(len(data)):
            activation = net.activations(net.preprocess(data[i].read()))[0][stage - 1][0]
            peaks.append(activation)
        for channel in range(peaks[0].shape[0]):
            best = [(a[channel].max().item(), -i) for i, a in enumerate(peaks)]
            expected = sorted((v for v in best if v[0] > 0), reverse=True)[:4]
            found = index.patches(stage, channel)
            assert [-p.item for p in found] == [i for _, i in expected]
            for patch, (value, _) in zip(found, expected):
                assert patch.activation == pytest.approx(value, rel=1e-5)
                at = peaks[patch.item][channel][patch.peak].item()
                assert at == pytest.approx(value, rel=1e-5)
                assert patch.image_id == f"picture{patch.item}"
    assert index.patches(2, 3) == ()


def test_the_field_of_a_patch_is_all_that_its_activation_depends_on(net):
    data = _Items()
    index = index_channels(net, data, top=2, progress=False)
    for patch in index.patches(3, 0) + index.patches(1, 2):
        stage = 3 if patch in index.patches(3, 0) else 1
        image = net.preprocess(data[patch.item].read())
        x0, y0, x1, y1 = patch.field
        only = torch.zeros_like(image)
        only[..., y0:y1, x0:x1] = image[..., y0:y1, x0:x1]
        channel = 0 if stage == 3 else 2
        at = net.activations(only)[0][stage - 1][0, channel][patch.peak]
        assert at.item() == pytest.approx(patch.activation, rel=1e-5)
        assert (x1 - x0) * (y1 - y0) < 256 or stage == 3


def test_pictures_are_the_pixels_of_the_fields(net):
    data = _Items()
    index = index_channels(net, data, top=3, progress=False)
    for patch, pixels in zip(index.patches(2, 1), index.pictures(2, 1)):
        x0, y0, x1, y1 = patch.field
        assert np.array_equal(pixels, data[patch.item].read()[y0:y1, x0:x1])


def test_batch_size_and_sizes_of_pictures_do_not_change_the_index():
    net = staged(Tiny(), image_size=16, mean=[0.0] * 3, std=[1.0] * 3)
    data = _Items(sizes=((16, 16), (16, 32), (32, 16)))
    indices = [index_channels(net, data, batch_size=size, progress=False) for size in (1, 4, 32)]
    for index in indices[1:]:
        for name in ("items", "places"):
            for a, b in zip(getattr(index, name), getattr(indices[0], name)):
                assert np.array_equal(a, b)
    assert indices[0].sizes.tolist()[:3] == [[16, 16], [16, 32], [32, 16]]
    assert all(patch.field[2] <= 32 for patch in indices[0].patches(1, 0))


def test_an_interrupted_index_goes_on_where_it_was(net, tmp_path):
    whole = index_channels(net, _Items(), top=3, batch_size=4, progress=False)
    cache = tmp_path / "deep" / "index.npz"
    with pytest.raises(KeyboardInterrupt):
        index_channels(net, _Items(broken=9), top=3, batch_size=4, cache=cache, progress=False)
    data = _Items()
    index = index_channels(net, data, top=3, batch_size=4, cache=cache, progress=False)
    assert data.reads == list(range(8, 13))  # what was whole is not read again
    for name in ("items", "places", "activations"):
        for a, b in zip(getattr(index, name), getattr(whole, name)):
            assert np.array_equal(a, b)
    again = _Items()
    index_channels(net, again, top=3, cache=cache, progress=False)
    assert again.reads == []
    assert [path.name for path in cache.parent.iterdir()] == ["index.npz"]


def test_an_index_of_something_else_or_damaged_is_refused(net, tmp_path):
    cache = tmp_path / "index.npz"
    index_channels(net, _Items(3), top=3, cache=cache, progress=False)
    for other in ({"top": 4}, {"stages": [1]}):
        with pytest.raises(ValueError, match="index of this network, .* got another one"):
            index_channels(net, _Items(3), cache=cache, progress=False, **{"top": 3} | other)
    net.model.convolutions[0].weight.data += 1
    with pytest.raises(ValueError, match="got another one; name another file"):
        index_channels(net, _Items(3), top=3, cache=cache, progress=False)
    cache.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="cannot be read .*; delete it"):
        index_channels(net, _Items(3), top=3, cache=cache, progress=False)


def test_nothing_is_written_without_a_cache_and_no_trace_left(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(channels, "_save", lambda *_: pytest.fail("it was saved"))
    net.model.train()
    before = _trace(net.model)
    index_channels(net, _Items(2), progress=False)
    assert _trace(net.model) == before


def test_a_card_counts_classes_and_names_them(net):
    index = index_channels(net, _Items(), top=5, progress=False)
    counts = pd.DataFrame(
        {"stage": [3, 3, 2], "channel": [0, 0, 0], "class_id": [1, 4, 1], "count": [3, 6, 9]}
    )
    card = index.card(3, 0, counts)
    expected = Counter(c for patch in card.patches for c in (patch.item % 3, 3))
    assert card.classes.to_dict() == dict(expected)
    assert card.counts.to_dict() == {4: 6, 1: 3}
    assert card.discriminativeness == pytest.approx(6 / 9)
    assert np.isnan(index.card(3, 0).discriminativeness)
    net.class_names = ("a", "b", "c", "every")
    assert index.card(3, 0).classes.index[0] == "every"
    assert "stage 3, channel 0; every" in index.card(3, 0)._repr_html_()


def test_bad_arguments_say_what_is_expected(net, untyped):
    index = index_channels(net, _Items(2), [1, 3], progress=False)
    with pytest.raises(ValueError, match=r"a stage of the index, \(1, 3\), got 2"):
        index.patches(2, 0)
    with pytest.raises(ValueError, match="a channel from 0 to 5 of stage 3, got 6"):
        index.card(3, 6)
    with pytest.raises(ValueError, match="got 0 pictures and top 9"):
        index_channels(net, _Items(0))


# --------------------------------------------------------------------------- discriminativeness


def _tree(children):
    nodes = {str(i): SimpleNamespace(stage=s, channel=k) for i, (s, k) in enumerate(children)}
    return SimpleNamespace(nodes=nodes, edges=[SimpleNamespace(child=key) for key in nodes])


def test_every_decomposition_counts_once():
    trees = [
        (7, _tree([(2, 0), (2, 0), (2, 1), (1, 0)])),
        (7, _tree([(2, 1)])),
        (5, _tree([(2, 1), (1, 0)])),
    ]
    counts = count_channels(trees).set_index(["stage", "channel", "class_id"])["count"]
    assert counts.to_dict() == {
        (2, 0, 7): 2,
        (2, 1, 7): 2,
        (2, 1, 5): 1,
        (1, 0, 7): 1,
        (1, 0, 5): 1,
    }
    table = discriminativeness(counts.reset_index()).set_index(["stage", "channel"])
    assert table.loc[(2, 0), "discriminativeness"] == 1
    assert table.loc[(2, 1), "discriminativeness"] == pytest.approx(2 / 3)
    assert table.loc[(2, 1), "class_id"] == 7
    assert table.loc[(1, 0), "discriminativeness"] == pytest.approx(1 / 2)
    means = stage_discriminativeness(counts.reset_index())
    assert means.to_dict() == pytest.approx({1: 1 / 2, 2: (1 + 2 / 3) / 2})
    assert stage_discriminativeness(counts.reset_index(), 3).to_dict() == pytest.approx({2: 2 / 3})


def test_discriminativeness_lies_between_one_over_the_classes_and_one(generator):
    draws = torch.randint(1, 20, (6, 4), generator=generator)
    draws[0], draws[1, 1:] = 5, 0
    rows = [
        {"stage": 1, "channel": k, "class_id": c, "count": int(n)}
        for k, row in enumerate(draws.tolist()) for c, n in enumerate(row) if n
    ]  # fmt: skip
    found = discriminativeness(pd.DataFrame(rows)).set_index("channel")["discriminativeness"]
    assert found.between(1 / 4, 1).all()
    assert found[0] == 1 / 4
    assert found[1] == 1


# --------------------------------------------------------------------------------------- groups


def test_overlaps_and_groups_by_hand():
    maps = torch.zeros(6, 4, 4)
    maps[0, 0, :2] = 1.0
    maps[1, 0, :3] = torch.tensor([5.0, 3.0, 2.4])  # 2.4 lies below half of 5
    maps[2, 0, 1:4] = 1.0
    maps[3, 3, 3] = 2.0
    maps[4] = -1.0
    maps[5, 3, 2:] = 1.0
    overlaps = map_overlaps(maps)
    assert overlaps[0, 1] == 1
    assert overlaps[0, 2] == pytest.approx(1 / 4)
    assert overlaps[0, 3] == 0
    assert overlaps[3, 5] == pytest.approx(1 / 2)
    assert overlaps[4].isnan().all()
    assert list(channel_groups(maps)) == [(0, 1), (2,), (3,), (5,)]
    assert list(channel_groups(maps, 0.2)) == [(0, 1, 2), (3, 5)]
    assert list(channel_groups(maps, level=0.4)) == [(0, 1), (2,), (3,), (5,)]
    assert map_overlaps(maps, 0.4)[0, 1] == pytest.approx(2 / 3)
