"""Files meet a full disk, a locked folder, a killed process, a wrong clock, and code in data."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import record

from attnviz.cli import main
from attnviz.evolution import load_evolution
from attnviz.files import only_one, read_arrays, read_saved, write_whole

PACKAGE = Path(__file__).parent.parent / "attnviz"
PICTURE = PACKAGE.parent / "data" / "pictures" / "cat.jpg"
MAP = ["map", str(PICTURE), "--network", "scenes_fc", "--out"]


def _run(code, *arguments, limit=None):
    """Runs code in a process of its own, whose files may have so many bytes."""
    before = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    before += f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    return subprocess.run(
        [sys.executable, "-c", (before if limit else "") + code, *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip


# ------------------------------------------------------------------------- a file whole or not


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    write_whole(path, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        content = full
    else:
        content = b"new"
        monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[step], full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, content)
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_bytes() == b"old"


def test_a_command_on_a_full_disk_ends_in_one_line(tmp_path):
    # every file is cut at 20 kB, as by a quota; maps.npz is larger
    code = "import sys; from attnviz.cli import main; sys.exit(main(sys.argv[1:]))"
    done = _run(code, *MAP, tmp_path, limit=20_000)
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines)) == (2, 1)
    assert lines[0].startswith("attnviz: ")
    assert "File too large" in lines[0]
    assert not list(tmp_path.rglob("*.part"))
    for path in tmp_path.rglob("*.png"):
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from attnviz.files import write_whole
path = Path(sys.argv[1])
for turn in range(8):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for number in range(10**6):
            write_whole(path, f"{number:07d}".encode() * 100_000)
            os.write(writer, b"1")
    os.read(reader, 1)
    time.sleep(0.004 * turn)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    content = path.read_bytes()
    print(content == content[:7] * 100_000, int(content[:7]))
"""


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    done = _run(_KILLED, tmp_path / "a")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [whole for whole, _ in rows] == ["True"] * 8, done.stderr
    assert len({number for _, number in rows}) > 1  # killed at different moments


# ------------------------------------------------------------------------------------- folders


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to")
def test_a_read_only_folder_is_said_before_anything_is_computed(capsys):
    assert main([*MAP, "/proc/attnviz/out"]) == 2
    said = capsys.readouterr().err
    assert "expected a folder that can be written to" in said
    assert said.count("\n") == 1


def test_a_file_in_the_place_of_a_folder_is_said_before_anything_is_computed(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main([*MAP, str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "expected a folder that can be written to" in said
    assert said.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_is_for_one_process_at_a_time_and_free_when_that_is_killed(tmp_path):
    code = "import sys, time; from pathlib import Path; from attnviz.files import only_one\n"
    code += "with only_one(Path(sys.argv[1]), 'training'): print(1, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        with pytest.raises(FileExistsError, match="expected no other training in .* name another"):
            with only_one(tmp_path, "training"):
                pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with only_one(tmp_path, "training"):
        assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- clock


def test_a_clock_set_back_changes_nothing_that_is_read(tmp_path):
    run = record(tmp_path / "run", epochs=3, history=True)
    before = load_evolution(run)
    for number, path in enumerate(sorted(run.rglob("*"), reverse=True)):
        os.utime(path, (10**9 - number, 10**9 - number))  # 2001, the last written first
    assert load_evolution(run).epochs == before.epochs == (1, 2, 3)
    os.utime(run / "history.csv", (2**33, 2**33))  # 2242
    assert load_evolution(run).curves == before.curves


def test_only_the_player_looks_at_the_time_of_a_file():
    # it asks whether a file has changed since it looked, not which of two is newer
    users = [path.name for path in PACKAGE.rglob("*.py") if "st_mtime" in path.read_text()]
    assert users == ["player.py"]
    wall = [path.name for path in PACKAGE.rglob("*.py") if "time.time()" in path.read_text()]
    assert wall == []


# ------------------------------------------------------------------------------ no code in data


def _calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            named = {each.arg: ast.unparse(each.value) for each in node.keywords}
            yield ast.unparse(node.func), named


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for each in node.names:
                yield getattr(node, "module", None) or each.name, each.name


def test_no_pickle_is_ever_loaded_from_data():
    wanted = {
        "torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False"),
        "torch.hub.load_state_dict_from_url": ("weights_only", "True"),
    }  # fmt: skip
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        for name, named in _calls(path):
            if name in wanted:
                option, value = wanted[name]
                assert named.get(option) == value, f"{path.name}: {name}"
                seen.add(name)
            assert name not in ("eval", "exec", "pd.read_pickle", "scipy.io.loadmat"), path.name
        for module, name in _imports(path):
            pickles = module.partition(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve")
            assert not pickles or name == "UnpicklingError", path.name
    assert seen == set(wanted)


class _Spy:
    ran = False

    def __reduce__(self):
        return _spy, ()


def _spy():
    _Spy.ran = True
    return 1


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"a": _Spy()}, tmp_path / "a.pt")
    np.savez(tmp_path / "a.npz", a=np.array([_Spy()], dtype=object))
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        read_saved(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_arrays(tmp_path / "a.npz")
    assert not _Spy.ran
