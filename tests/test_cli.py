import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attnviz import cli, fuse, networks
from attnviz.cli import main


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def _map(photo, out, *options):
    return main(
        ["map", str(photo), "--network", "squeezenet1_1", "--weights", "random", "--out", str(out)]
        + list(options)
    )


def test_map_writes_pictures_arrays_and_a_result(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert _map(photo, out, "--json", str(tmp_path / "all.json"), "--class", "tabby") == 0
    folder = out / "photo"
    assert sorted(path.name for path in folder.iterdir()) == [
        "fused.png", "maps.npz", "result.json", "stage1.png", "stage2.png", "stage3.png",
        "stage4.png", "stages.png",
    ]  # fmt: skip
    with Image.open(folder / "fused.png") as picture:
        assert picture.size == (90, 60)
    result = json.loads((folder / "result.json").read_text())
    assert json.loads((tmp_path / "all.json").read_text()) == {"results": [result]}
    assert result["class"]["name"] == "tabby"
    assert len(result["top"]) == 5
    assert result["size"] == [60, 90]
    assert result["weights"] == "random"
    assert {"seed", "versions", "gradient_at", "threshold", "method"} <= result.keys()
    arrays = np.load(folder / "maps.npz")
    raw = [torch.from_numpy(arrays[f"stage{k}"]) for k in (1, 2, 3, 4)]
    torch.testing.assert_close(fuse(raw, size=(60, 90)), torch.from_numpy(arrays["fused"]))
    assert "tabby" in capsys.readouterr().out


def test_map_takes_some_stages_and_pictures_of_the_same_name(photo, tmp_path):
    (tmp_path / "other").mkdir()
    second = tmp_path / "other" / "photo.png"
    second.write_bytes(photo.read_bytes())
    code = main(
        ["map", str(photo), str(second), "--network", "squeezenet1_1", "--weights", "random"]
        + ["--stages", "2-3,4", "--out", str(tmp_path / "out")]
    )
    assert code == 0
    for name in ("photo", "photo-2"):
        found = np.load(tmp_path / "out" / name / "maps.npz").files
        assert found == ["stage2", "stage3", "stage4", "fused"]


@pytest.mark.parametrize("method", ["cmwp", "gradcam_pp_released"])
def test_every_kind_of_method_can_be_mapped(photo, tmp_path, method):
    assert _map(photo, tmp_path / "out", "--method", method, "--stages", "4") == 0
    result = json.loads((tmp_path / "out" / "photo" / "result.json").read_text())
    assert result["method"] == method


def test_the_same_seed_gives_the_same_result(photo, tmp_path):
    for name in ("a", "b"):
        assert _map(photo, tmp_path / name, "--seed", "5") == 0
    first, second = (np.load(tmp_path / n / "photo" / "maps.npz")["fused"] for n in ("a", "b"))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class", "tabbi"], "expected a class of squeezenet1_1, got 'tabbi'; the nearest are"),
        (["--class", "1000"], "expected a class from 0 to 999, got 1000"),
        (["--stages", "1-5"], "expected `stages` from 1 to 4"),
        (["--stages", "deep"], "expected --stages like 1-5, 3,4,5 or all, got 'deep'"),
        (["--gamma", "0"], "expected --gamma above 0 and at most 8, got 0.0"),
        (["--gamma", "inf"], "expected --gamma above 0 and at most 8, got inf"),
        (["--stages", "1-99999999999"], "expected --stages like 1-5"),
        (["--stages", "3-1"], "expected --stages like 1-5"),
        (["--seed", str(2**70)], "expected --seed from 0"),
        (["--json", "."], "expected a file for --json, got the folder"),
        (["--threshold", "15"], "expected --threshold in [0, 1), got 15.0"),
        (["--weights", "none.pth"], "expected `weights` as 'auto', 'random' or a file"),
        (["--network", "resnet5"], "expected the name of a network, got 'resnet5'"),
    ],
)
def test_bad_input_gives_exit_code_2_one_line_and_no_file(
    photo, tmp_path, capsys, options, message
):
    assert _map(photo, tmp_path / "out", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("attnviz: ")
    assert message in lines[0]
    assert not list((tmp_path / "out").glob("**/*")) if (tmp_path / "out").exists() else True


def test_bad_pictures_give_one_line(tmp_path, capsys):
    bad = tmp_path / "text.jpg"
    bad.write_text("hello")
    assert _map(bad, tmp_path / "out") == 2
    assert "which no picture format matches" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_gives_one_line(photo, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert _map(photo, tmp_path / "file" / "out") == 2
    assert "expected a folder that can be written to" in capsys.readouterr().err


def test_nan_weights_give_one_line(photo, tmp_path, capsys):
    net = networks.load_network("squeezenet1_1", "random")
    state = net.model.state_dict()
    state["features.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    assert _map(photo, tmp_path / "out", "--weights", str(tmp_path / "nan.pth")) == 2
    assert "expected finite scores, got NaN" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cli.write_whole(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["map"],
        ["lab"],
        ["train"],
        ["train", "classifier"],
        ["bench", "cam"],
        ["data", "check"],
    ],
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: attnviz" in capsys.readouterr().out


def test_wrong_usage_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["map", "--network"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_training_runs_resumes_and_refuses_to_overwrite(tmp_path, capsys):
    common = [
        "train",
        "classifier",
        "--limit",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*common, "--epochs", "1", "--json", str(tmp_path / "r.json")]) == 0
    assert "mean_average_precision" in json.loads((tmp_path / "r.json").read_text())
    assert main([*common, "--epochs", "1"]) == 2
    assert "which holds one; pass `resume` (--resume)" in capsys.readouterr().err
    assert main([*common, "--epochs", "1", "--resume"]) == 0


def test_data_sets_are_listed_checked_and_named(tmp_path, capsys):
    root = ["--data-root", str(tmp_path)]
    assert main(["data", "list", *root, "--json", str(tmp_path / "list.json")]) == 0
    rows = json.loads((tmp_path / "list.json").read_text())["data"]
    assert {"scenes", "ilsvrc", "cub"} <= {row["name"] for row in rows}
    assert "drawn when it is needed" in capsys.readouterr().out
    assert main(["data", "check", "imagenet", *root]) == 2
    assert "expected a data set of" in capsys.readouterr().err
    assert main(["data", "check", "cub", *root]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_tables_and_figures_are_listed_made_and_refused(tmp_path, capsys):
    assert main(["table", "--list"]) == main(["figure", "--list"]) == 0
    assert capsys.readouterr().out.count("3.1") >= 2
    for wrong in (
        ["table", "9.9"],
        ["table"],
        ["figure", "3.1"],
        ["figure", "9.9", "--out", "f.pdf"],
    ):
        assert main(wrong) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main(["figure", "1.1", "--out", str(tmp_path / "f.pdf")]) == 0
    assert (tmp_path / "f.pdf").read_bytes().startswith(b"%PDF")


def test_lab_serves_the_chapters(tmp_path):
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-m", "attnviz", "lab", "--", "--show-config-json"],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    settings = json.loads(found.stdout)
    folder = Path(settings["ServerApp"]["root_dir"])
    assert folder.samefile(Path(cli.__file__).parent.parent / "notebooks")


@pytest.mark.parametrize("command", ["tree", "play", "table"])
def test_pages_are_html(photo, tmp_path, capsys, command):
    given = {
        "tree": [photo, "--network", "scenes_fc"],
        "play": [networks.bundled_folder() / "runs" / "oaa"],
        "table": ["all", "--data", "scenes"],
    }
    page = tmp_path / "page.pdf"
    assert main([command, *map(str, given[command]), "--out", str(page)]) == 2
    assert "expected --out as .html, got" in capsys.readouterr().err
    assert not page.exists()


def test_a_page_may_be_html_in_capitals(photo, tmp_path):
    page = tmp_path / "page.HTML"
    assert main(["tree", str(photo), "--network", "scenes_fc", "--out", str(page)]) == 0
    assert page.read_text().startswith("<!doctype html>")
