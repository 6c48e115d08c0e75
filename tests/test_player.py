import base64
import io
import json
import re
import shutil
import subprocess
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import GRID, maps_of, record, train, watch, writer
from traitlets import TraitError

import attnviz
from attnviz import cli, colors
from attnviz.evolution import load_evolution, stop_requested
from attnviz.panels import EvolutionPlayer, explore_accumulation, player


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "plain", 5, history=True)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    return record(tmp_path_factory.mktemp("runs") / "dropped", 3, drop=True, seed=9)


def _bilinear(map, size):
    # The resized map, pixel by pixel, pixel centers aligned.
    rows, columns = map.shape
    result = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * rows / size[0] - 0.5, 0), rows - 1)
            u = min(max((x + 0.5) * columns / size[1] - 0.5, 0), columns - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
            upper = map[y0, x0] * (1 - u + x0) + map[y0, x1] * (u - x0)
            lower = map[y1, x0] * (1 - u + x0) + map[y1, x1] * (u - x0)
            result[y, x] = upper * (1 - v + y0) + lower * (v - y0)
    return result


def _wait(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------- traits


def test_player_opens_on_the_last_epoch_of_the_first_class(run):
    panel = attnviz.explore_accumulation(run)
    assert (panel.image_index, panel.class_id, panel.class_name, panel.epoch) == (0, 0, "deer", 5)
    assert (panel.threshold, panel.live, panel.stopping) == (0.5, False, False)
    assert repr(panel) == "EvolutionPlayer(CAM, OAA; 2 pictures, 'deer', epoch 5 of 5)"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("epoch", 6, "expected `epoch` as a recorded one from 1 to 5, got 6"),
        ("epoch", 0, "expected `epoch` as a recorded one from 1 to 5, got 0"),
        ("threshold", 0.0, r"expected `threshold` in \(0, 1\), got 0; it is a share"),
        ("threshold", float("nan"), r"expected `threshold` in \(0, 1\), got nan"),
        ("opacity", 1.5, r"expected `opacity` in \[0, 1\], got 1.5"),
        ("highlight", "all", r"expected `highlight` in \('epoch', 'first', 'none'\), got 'all'"),
        ("curve_of", "run", r"expected `curve_of` in \('picture', 'training'\), got 'run'"),
        ("palette", "rainbow", r"expected `palette` in \('inferno', .*got 'rainbow'"),
        ("speed", 3.0, r"expected `speed` in \(1.0, 2.0, .*got 3.0"),
        ("class_id", 1, r"expected `class_id` in \[0, 2\], got 1; the others were not watched"),
        ("image_index", 2, r"expected `image_index` in \[0, 2\), got 2; the panel has 2"),
        ("live", True, "live.*read-only"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(run, setting, value, message):
    panel = explore_accumulation(run)
    before = getattr(panel, setting)
    with pytest.raises(TraitError, match=message):
        setattr(panel, setting, value)
    assert getattr(panel, setting) == before
    with pytest.raises(TypeError, match=r"got `epochs`; the nearest are \['epoch'\]"):
        explore_accumulation(run, epochs=3)


def test_another_picture_without_the_class_shows_its_first_class(run):
    panel = explore_accumulation(run, class_id=2)
    panel.image_index = 1
    assert (panel.class_id, panel.render()[0].shape) == (1, (60, 40, 3))
    assert explore_accumulation(run, image_index=1).class_id == 1


# --------------------------------------------------------------------------------- what is drawn


def test_columns_are_the_recorded_maps_over_the_picture(run):
    panel = explore_accumulation(run, class_id=2, epoch=4, highlight="none", opacity=0.6)
    pairs = [("pond", 0), ("pond", 2), ("street", 1)]
    maps = [maps_of(epoch, pairs)[("pond", 2)] for epoch in (1, 2, 3, 4)]
    image = watch()[0].image
    for drawn, map in zip(panel.render(), (maps[3], np.max(maps, axis=0)), strict=True):
        values = _bilinear(np.floor(map * 255 + 0.5), (48, 64))
        expected = colors.overlay(image, values / values.max(), opacity=0.6).astype(int)
        assert np.abs(drawn - expected).max() <= 2  # one level more or less by rounding


def test_what_was_found_stays_found_and_only_the_rest_is_new(run):
    panel = explore_accumulation(run, epoch=1)
    assert not panel.new(1).any()  # nothing before the first epoch
    seen, total = panel.found(1), np.zeros((48, 64), bool)
    first = seen.copy()
    for epoch in (2, 3, 4, 5):
        panel.epoch = epoch
        new = panel.new(1)
        np.testing.assert_array_equal(new, panel.found(1) & ~seen)
        assert not panel.new(0).any()  # a map of one epoch has no past
        total |= new
        seen = panel.found(1)
    assert total.any()
    panel.highlight = "first"
    np.testing.assert_array_equal(panel.new(1), panel.found(1) & ~first)
    tinted = panel.render()[1]
    panel.highlight = "none"
    plain = panel.render()[1].astype(int)
    changed = (tinted != plain).any(axis=-1)
    new = panel.found(1) & ~first
    np.testing.assert_array_equal(changed, new)
    mixed = 0.4 * plain[new] + 0.6 * np.array([0, 229, 255])
    assert np.abs(tinted[new] - mixed).max() <= 0.5 + 1e-6


def test_curves_are_recall_and_noise_of_every_epoch(run):
    panel = explore_accumulation(run, threshold=0.3, class_id=2)
    mask = watch()[1].mask
    curve = panel.curve()
    assert list(curve) == ["CAM", "OAA"]
    for place, epoch in enumerate((1, 2, 3, 4, 5)):
        panel.epoch = epoch
        for column, name in enumerate(curve):
            found = panel.found(column)
            recall, noise = (found & mask).sum() / mask.sum(), (found & ~mask).sum() / found.sum()
            assert curve[name]["recall"][place] == pytest.approx(recall)
            assert curve[name]["noise"][place] == pytest.approx(noise)
            assert curve[name]["found"][place] == pytest.approx(found.mean())
    assert (np.diff(curve["OAA"]["recall"]) >= 0).all()  # maxima only grow


def test_run_without_masks_has_the_share_of_the_picture_only(tmp_path):
    panel = explore_accumulation(record(tmp_path / "run", 2, masks=False))
    assert [list(curve) for curve in panel.curve().values()] == [["found"], ["found"]]
    assert panel.picture().ndim == 3


def test_ignored_pixels_count_for_nothing():
    levels = np.array([[255, 255, 0, 255]], np.uint8)
    mask = np.array([[1, 0, 1, 255]], np.uint8)
    found, recall, noise = player._rates(*player._count(levels, mask), 128)
    assert (found, recall, noise) == (2 / 3, 0.5, 0.5)


def test_map_that_is_zero_finds_nothing(tmp_path):
    target = writer(tmp_path / "run", 1, method="integral")
    target.write(1, {})
    panel = explore_accumulation(tmp_path / "run")
    assert not panel.found(0).any()
    np.testing.assert_array_equal(panel.render()[0], watch()[0].image)
    assert np.isnan(panel.curve()["OAA+"]["noise"]).all()
    assert panel.curve()["OAA+"]["recall"].tolist() == [0]


# ------------------------------------------------------------------------------------------ runs


def test_several_runs_stand_beside_each_other(run, dropped, tmp_path):
    learned = record(tmp_path / "learned", 2, method="integral", grid=(3, 4))
    panel = explore_accumulation([dropped, run, learned])
    names = [(each["name"], each["grows"]) for each in panel.state["_data"]["series"]]
    assert names == [("CAM", False), ("OAA++", True), ("OAA", True), ("OAA+", False)]
    assert panel.state["_frames"]["epochs"] == [1, 2, 3, 4, 5]
    # CAM is that of the run without drop; a run that ended early keeps its last map
    assert panel.state["_frames"]["frames"] == [
        [0, 1, 2, 3, 4], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4], [0, 1, 1, 1, 1],
    ]  # fmt: skip
    panel.epoch = 4
    later = panel.render()[1]
    panel.epoch, panel.highlight = 3, "none"
    np.testing.assert_array_equal(panel.render()[1], later)  # and nothing is new in it
    assert not panel.new(1).any()


def test_runs_may_be_named_and_equal_ones_are_told_apart(run, dropped, tmp_path):
    panel = explore_accumulation({"all": run, "half": dropped})
    assert repr(panel).startswith("EvolutionPlayer(CAM, all, half; ")
    other = record(tmp_path / "other", 2)
    assert "CAM, OAA (plain), OAA (other);" in repr(explore_accumulation([run, other]))


def test_runs_that_watch_something_else_are_refused(run, tmp_path, monkeypatch):
    other = record(tmp_path / "other", 1)
    header = other / "evolution" / "evolution.json"
    text = header.read_text()
    header.write_text(text.replace('"pond"', '"lake"'))
    with pytest.raises(
        ValueError, match=r"same pictures and classes, got \('(pond|lake)', .*only"
    ):
        explore_accumulation([run, other])
    header.write_text(text)
    Image.new("RGB", (64, 48)).save(other / "evolution" / "picture-000.png")
    with pytest.raises(
        ValueError, match=r"two that are both called 'pond' in 'plain' and 'other'"
    ):
        explore_accumulation([run, other])


def test_runs_without_anything_to_show_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        explore_accumulation(tmp_path / "nope")
    with pytest.raises(FileNotFoundError, match="a folder without evolution/evolution.json"):
        explore_accumulation(tmp_path)
    with pytest.raises(ValueError, match="at least one run in `runs`, got none"):
        explore_accumulation([])
    with pytest.raises(TypeError, match="the folders of runs in `runs`, got NoneType"):
        explore_accumulation(None)
    run = record(tmp_path / "run", 1)
    (run / "evolution" / "epoch-0001.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"recorded epochs in '.*run', got none \(epoch-0001.npz"):
        EvolutionPlayer([load_evolution(run)])


def test_damaged_epoch_is_skipped_and_said(tmp_path):
    run = record(tmp_path / "run", 4)
    (run / "evolution" / "epoch-0002.npz").write_bytes(b"damaged")
    panel = explore_accumulation(run)
    assert panel.state["_frames"]["epochs"] == [1, 3, 4]
    assert panel.state["_frames"]["skipped"][0].startswith("epoch-0002.npz left out")


# ----------------------------------------------------------------------------------- what is sent


def test_maps_are_sent_as_differences_of_epochs(run):
    panel = explore_accumulation(run)
    block = np.frombuffer(zlib.decompress(panel.state["_frames"]["maps"][0]), np.uint8)
    frames = block.reshape(2, 2, 5, *GRID).cumsum(axis=2, dtype=np.uint8)
    evolution = load_evolution(run)
    for number in (0, 1):
        np.testing.assert_array_equal(frames[number, 0], evolution.maps[number])
        np.testing.assert_array_equal(frames[number, 1], evolution.accumulated[number])
    masks = zlib.decompress(panel.state["_data"]["pictures"][1]["masks"])
    np.testing.assert_array_equal(np.frombuffer(masks, np.uint8).reshape(60, 40), watch()[2].mask)
    record_ = panel.state["_frames"]["training"]
    assert record_[1]["recall"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert record_[0]["noise"] == [None] * 5
    assert record_[0]["loss"][:2] == [1.0, 0.5]


def test_setting_a_trait_sends_no_data_again(run):
    panel = explore_accumulation(run)
    sent = []
    panel.send_state = lambda key=None: sent.append(key)
    panel.epoch, panel.threshold = 2, 0.3
    assert not {"_data", "_frames"} & {name for key in sent for name in np.atleast_1d(key)}


def test_sixty_epochs_of_three_variants_and_eight_pictures_stay_small(tmp_path):
    # the largest grid in use, 41 x 41 for 321 pixels, and noise that compresses badly
    from attnviz.evolution import EvolutionWriter, Watch

    generator = np.random.default_rng(0)
    grid, y = (41, 41), np.mgrid[:41, :41]
    for drop in (False, True):
        target = EvolutionWriter(
            tmp_path / f"{drop}",
            [Watch(f"{k}", 0, np.full((321, 321, 3), 9 * k, np.uint8), grid) for k in range(8)],
            run_id="r", network="n", data="d", class_names=["x"], epochs=60, drop=drop,
        )  # fmt: skip
        top = dict.fromkeys(target.pairs, np.zeros(grid))
        for epoch in range(1, 61):
            maps = {}
            for pair in target.pairs:
                center = generator.uniform(5, 35, (2, 1, 1))
                map = np.exp(-((y - center) ** 2).sum(axis=0) / 60) + 0.05 * generator.random(grid)
                maps[pair] = map / map.max()
                top[pair] = np.maximum(top[pair], maps[pair])
            target.write(epoch, maps, top)
    panel = explore_accumulation([tmp_path / "False", tmp_path / "True"])
    assert panel.save_html(tmp_path / "page.html").stat().st_size < 4e6


# ------------------------------------------------------------------------- notebook, saved page


def test_notebook_keeps_a_picture_beside_the_widget(run):
    panel = explore_accumulation(run, epoch=3)
    bundle, _ = panel._repr_mimebundle_()
    assert bundle["text/plain"] == repr(panel)
    assert "0x" not in bundle["text/plain"]
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/jpeg"])))
    assert picture.size == (3 * 248 - 8, 180 + 22)
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_saved_page_holds_everything_and_asks_for_nothing(run, tmp_path):
    panel = explore_accumulation(run, image_index=1, epoch=2)
    text = panel.save_html(tmp_path / "page.html").read_text("utf-8")
    assert re.findall(r"https?://[\w.]*", text.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"<(link|img|iframe)|\ssrc=|@import|url\(", text)
    assert text.count("</script>") == 2  # a class is called </script><b>taxi
    state = json.loads(re.search(r'id="data">(.*)</script>', text)[1])["panels"][0]["state"]
    assert (state["epoch"], state["image_index"], state["class_id"]) == (2, 1, 1)
    assert (state["live"], state["stopping"]) == (False, False)


# ------------------------------------------------------------------------------------- following


def test_running_training_is_followed_without_touching_what_the_user_set(tmp_path):
    go = threading.Semaphore(0)
    training = threading.Thread(
        target=lambda: train(writer(tmp_path / "run", 4), 4, go.acquire), daemon=True
    )
    training.start()  # the folder does not exist yet
    panel = explore_accumulation(tmp_path / "run", training=training, seconds=0.02, threshold=0.3)
    assert (panel.live, panel.epoch, panel.state["_frames"]["epochs"]) == (True, 0, [])
    assert [drawn.shape for drawn in panel.render()] == [(48, 64, 3)] * 2
    assert "epoch 0 of 0" in repr(panel)
    assert panel.picture().ndim == 3
    go.release()
    _wait(lambda: panel.epoch == 1)
    go.release()
    _wait(lambda: panel.epoch == 2)  # who looks at the newest epoch goes on with it
    panel.epoch, panel.class_id = 1, 2
    go.release()
    _wait(lambda: panel.state["_frames"]["epochs"] == [1, 2, 3])
    assert (panel.epoch, panel.class_id, panel.threshold) == (1, 2, 0.3)
    go.release()
    _wait(lambda: not panel.live)  # all that was planned is there
    assert panel.state["_frames"]["epochs"] == [1, 2, 3, 4]
    training.join()


def test_stop_ends_the_training_and_the_following(tmp_path):
    go = threading.Semaphore(0)
    target = writer(tmp_path / "run", 9)
    training = threading.Thread(target=train, args=(target, 9, go.acquire), daemon=True)
    training.start()
    go.release()
    panel = explore_accumulation(tmp_path / "run", training=training, seconds=0.02)
    _wait(lambda: panel.epoch == 1)
    assert not stop_requested(tmp_path / "run")
    panel.stop()
    assert stop_requested(tmp_path / "run")
    go.release()
    training.join(10)
    _wait(lambda: not panel.live)
    assert panel.state["_frames"]["epochs"] == [1]


def test_stop_button_of_a_finished_run_asks_for_nothing(run):
    panel = explore_accumulation(run)
    panel.stopping = True
    assert not stop_requested(run)


def test_closed_panel_and_vanished_folder_end_the_following(tmp_path):
    for end in ("close", "vanish"):
        before = set(threading.enumerate())
        run = record(tmp_path / end, 1, planned=3)
        panel = explore_accumulation(run, seconds=0.02)  # not finished: taken for running
        (follower,) = set(threading.enumerate()) - before
        assert panel.live
        if end == "close":
            panel.close()
        else:
            shutil.rmtree(run)
        follower.join(10)
        assert not follower.is_alive()


def test_training_that_ended_early_is_not_followed(tmp_path):
    run = record(tmp_path / "run", 1, planned=3)
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not explore_accumulation(run, training=ended).live
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        explore_accumulation(tmp_path / "nope", training=ended)


@pytest.mark.usefixtures("untyped")
def test_training_must_be_a_thread_or_a_process(run):
    with pytest.raises(TypeError, match="`training` as a thread or a process, got int"):
        explore_accumulation(run, training=3)


# ---------------------------------------------------------------------------------- command line


def test_play_writes_one_page(run, dropped, tmp_path, capsys):
    page, summary = tmp_path / "page.html", tmp_path / "page.json"
    assert (
        cli.main(["play", str(run), str(dropped), "--out", str(page), "--json", str(summary)]) == 0
    )
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert json.loads(summary.read_text())["epochs"] == {str(run): 5, str(dropped): 3}
    assert "CAM, OAA, OAA++; 2 pictures" in capsys.readouterr().out


def test_play_says_in_one_line_what_is_wrong(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["play", str(tmp_path / "nope"), "--out", str(page)]) == 2
    assert cli.main(["play", str(tmp_path), "--out", str(page)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("attnviz: expected ") for line in lines)
    assert not page.exists()


def test_play_names_what_it_left_out(tmp_path, capsys):
    run = record(tmp_path / "run", 3)
    (run / "evolution" / "epoch-0002.npz").write_bytes(b"damaged")
    assert cli.main(["play", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "epoch-0002.npz left out" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- JavaScript

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


@needs_node
def test_functions_in_javascript():
    script = Path(__file__).with_name("player.test.mjs")
    result = subprocess.run(
        ["node", "--test", str(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@needs_node
def test_javascript_and_python_draw_the_same(tmp_path):
    generator = np.random.default_rng(4)
    grid, size = (9, 12), (50, 70)
    now, before = generator.integers(0, 256, (2, *grid), dtype=np.uint8)
    mask = generator.choice([0, 0, 1, 255], size).astype(np.uint8)
    script = """
        const [now, before, mask] = process.argv.slice(2)
          .map((text) => Uint8Array.from(JSON.parse(text)));
        const [grid, size] = [[9, 12], [50, 70]];
        const [a, b] = [now, before].map((map) => stretch(map, grid, size));
        const marks = new Uint8Array(a.length);
        const added = mark(a, b, 0.37, marks);
        console.log(JSON.stringify({
          levels: [...a], before: [...b], marks: [...marks], added,
          rates: rates(countLevels(a, mask), 0.37), lines: outline(marks, size),
        }));
    """
    (tmp_path / "twin.mjs").write_text(player.source("player") + script)
    arguments = [json.dumps(array.ravel().tolist()) for array in (now, before, mask)]
    result = subprocess.run(
        ["node", str(tmp_path / "twin.mjs"), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    drawn = json.loads(result.stdout)
    levels = player._stretch(now, size)
    assert np.abs(levels.ravel().astype(int) - drawn["levels"]).max() <= 1
    assert (levels.ravel() != drawn["levels"]).mean() < 0.002
    theirs, earlier = (
        np.array(drawn[name], np.uint8).reshape(size) for name in ("levels", "before")
    )
    found = player._found(theirs, 0.37)
    new = found & ~player._found(earlier, 0.37)
    np.testing.assert_array_equal(np.array(drawn["marks"]).reshape(size), found * 1 + new)
    assert drawn["added"] == new.sum()
    expected = player._rates(*player._count(theirs, mask), int(np.ceil(0.37 * 255)))
    assert tuple(drawn["rates"].values()) == pytest.approx(expected)
    assert sorted(map(tuple, drawn["lines"])) == sorted(player._outline(found))


def test_every_control_keeps_its_keys_from_the_notebook():
    created = set(re.findall(r"document\.createElement\w*\((.*?)\)", player.source("player")))
    assert created == {"name", '"http://www.w3.org/2000/svg", name'}
