import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnviz.data.scenes import draw_scene
from attnviz.explain import stage_maps
from attnviz.networks import load_network
from attnviz.tables import make_table, measured
from attnviz.tables import processes as team

ROOT = Path(__file__).parents[1]
LIMIT = {"3.8": 29, "5.1": 5}  # in batches of 8 and 4

# Two machines without a common folder make two tables; then the second one dies in a third.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from attnviz.cli import main
from attnviz.tables import make_table, measured
rank, out, limits = os.environ["RANK"], Path(sys.argv[1]), json.loads(sys.argv[2])
table = make_table("5.1", limit=limits["5.1"], cache=out / rank, progress=False)
(out / f"5.1-{rank}.json").write_text(json.dumps(table.to_json()))
command = ["table", "3.8", "--limit", str(limits["3.8"]), "--device", "cpu", "--cache"]
main([*command, str(out / rank), "--json", str(out / f"3.8-{rank}.json")])
add = measured.Store.add
def killed(store, records):
    add(store, records)
    if rank == "1" and "id" in records[0]:
        os.kill(os.getpid(), signal.SIGKILL)
measured.Store.add = killed
sys.exit(main([*command, str(out / "killed")]))
"""


# Trainings in a folder that both processes see; in the end one is killed after its first training.
TRAINED = {"4.9": {"limit": 16, "epochs": 2}, "3.13": {"limit": 16, "epochs": 2}}
TRAINING = """
import json, os, signal, sys, time
from pathlib import Path
from attnviz.tables import make_table, sources
from attnviz.tables.processes import processes
rank, out, tables = os.environ["RANK"], Path(sys.argv[1]), json.loads(sys.argv[2])
for id, options in tables.items():
    table = make_table(id, cache=out / "cache", progress=False, **options)
    (out / f"{id}-{rank}.json").write_text(json.dumps(table.to_json()))

def begun():
    raise ValueError("expected a part, got none")
def needs(number):
    processes().once("part", begun)
try:
    processes().each([lambda: needs(0), lambda: needs(1), lambda: 2])
except ValueError as error:
    (out / f"error-{rank}").write_text(str(error))
def shared(number):
    processes().once("part", lambda: (out / f"part-{rank}").touch())
    time.sleep(1)
    return number, rank
found = processes().each([lambda: shared(0), lambda: shared(1)])
(out / f"shared-{rank}").write_text(json.dumps(found))

train = sources.train_oaa
def killed(*args, **options):
    train(*args, **options)
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)
sources.train_oaa = killed
make_table("4.9", cache=out / "killed", progress=False, **tables["4.9"])
"""


def _make(id, cache):
    return make_table(id, limit=LIMIT[id], cache=cache, progress=False)


def _records(folder):
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [record for line in lines if "id" in (record := json.loads(line))]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process gives."""
    cache = tmp_path_factory.mktemp("single")
    return {id: json.loads(json.dumps(_make(id, cache).to_json())) for id in LIMIT}


def _launch(folder, script, argument):
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", folder / "script.py", folder, json.dumps(argument)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, _launch(folder, SCRIPT, LIMIT)


@pytest.fixture
def reads(monkeypatch):
    """The names of the pictures that are read to be measured."""
    names, read = [], measured._read
    monkeypatch.setattr(measured, "_read", lambda item: names.append(item.image_id) or read(item))
    return names


@pytest.mark.slow
def test_two_machines_without_a_common_folder_make_the_table_of_one_process(
    single, launched, reads
):
    folder, found = launched
    assert found.stdout.count("table 3.8:") == 1
    assert not (folder / "3.8-1.json").exists()
    for name, id in (("5.1-0", "5.1"), ("5.1-1", "5.1"), ("3.8-0", "3.8")):
        assert json.loads((folder / f"{name}.json").read_text()) == single[id]
    assert len(_records(folder / "1")) == 8 + 5 + 1  # every second batch
    assert len(_records(folder / "0")) == sum(LIMIT.values())  # its own and the other's
    for id in LIMIT:
        assert _make(id, folder / "0").rows == single[id]["rows"]
    assert not reads


@pytest.mark.slow
def test_killed_process_ends_the_others_and_what_was_measured_is_kept(single, launched, reads):
    folder, found = launched
    assert found.returncode != 0
    lines = [line for line in found.stderr.splitlines() if line.startswith("attnviz:")]
    assert len(lines) == 1
    assert "expected 2 processes, got no answer from one of them; start them again" in lines[0]
    kept = {record["id"] for record in _records(folder / "killed")}
    assert 8 <= len(kept) < LIMIT["3.8"]
    table = _make("3.8", folder / "killed")
    assert table.rows == single["3.8"]["rows"]
    assert len(reads) == LIMIT["3.8"] - len(kept)
    assert not kept & set(reads)


@pytest.mark.slow
def test_two_processes_train_the_tables_of_one(tmp_path):
    found = _launch(tmp_path, TRAINING, TRAINED)
    assert found.returncode != 0  # one was killed
    assert "expected 2 processes, got no answer from one of them" in found.stderr
    shared = [json.loads((tmp_path / f"shared-{rank}").read_text()) for rank in (0, 1)]
    assert shared[0] == shared[1]
    assert [number for number, _ in shared[0]] == [0, 1]
    assert {rank for _, rank in shared[0]} == {"0", "1"}
    assert len([*tmp_path.glob("part-*")]) == 1
    for rank in (0, 1):
        text = (tmp_path / f"error-{rank}").read_text()
        assert text == "expected a part, got none"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/*/*.safetensors")}
    assert 1 <= len(kept) < 3  # of three trainings
    for id, options in TRAINED.items():
        cache = tmp_path / ("killed" if id == "4.9" else "single")
        table = json.loads(
            json.dumps(make_table(id, cache=cache, progress=False, **options).to_json())
        )
        for rank in (0, 1):
            assert json.loads((tmp_path / f"{id}-{rank}.json").read_text()) == table
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def _other_advances(pair, times):
    for _ in range(times):
        pair._store.add(f"{pair._passes}/1", 1)


@pytest.fixture
def pair():
    """The first of two processes; the store is not shared, so the test is the other one."""
    made = team.Processes(0, 1)
    made.count = 2
    return made


def test_parts_go_round_and_all_are_counted(pair):
    assert pair.share("abcde") == "ace"
    assert pair.advance() == 1
    _other_advances(pair, 2)
    assert pair.advance() == 4
    assert pair.advance() == 5
    shown = []
    pair.wait(lambda *now: shown.append(now))
    assert shown == [(5, "")]
    assert pair.share("ab") == "a"  # a new pass counts anew
    assert pair.advance() == 1


def test_slower_process_is_waited_for_as_long_as_it_goes_on(pair, monkeypatch):
    monkeypatch.setattr(team, "PATIENCE", team.PATIENCE * 0.001)  # 0.6 s
    monkeypatch.setattr(team, "_LONGER", 0)
    monkeypatch.setattr(team.time, "sleep", lambda seconds: None)
    clock = iter(range(100))
    monkeypatch.setattr(team.time, "monotonic", lambda: 0.5 * next(clock))
    pair.share(range(10))
    for _ in range(5):
        pair.advance()
    shown = []

    def show(done, waiting):
        shown.append((done, waiting))
        if done < 8:
            _other_advances(pair, 1)

    message = "expected 2 processes, got nothing from number 1 for 0 minutes; start them again"
    with pytest.raises(ConnectionError, match=message):
        pair.wait(show)
    assert shown[:3] == [(done, "waiting for process 1") for done in (5, 6, 7)]
    assert shown[-1] == (8, "waiting for process 1")


def test_processes_with_other_pictures_are_told(pair, tmp_path, monkeypatch):
    items = [measured.Item(name, 0, (), "x", dict) for name in "ab"]
    store = measured.Store(tmp_path, "maps", {})
    monkeypatch.setattr(pair, "gather", lambda mine: [mine, ("other", 3, set())])
    with pytest.raises(ValueError, match=r"expected the same pictures.*; give .* \(2, 3 pictures"):
        measured._missing(pair, store, items, {}, 8)


def test_only_batches_that_no_process_knows_are_measured(pair, tmp_path, monkeypatch):
    items = [measured.Item(str(number), 0, (), "x", dict) for number in range(10)]
    keys = [item.key for item in items]
    store = measured.Store(tmp_path, "maps", {})
    others = set(keys[:4])  # the second batch wants one more
    monkeypatch.setattr(pair, "gather", lambda mine: [mine, (mine[0], 10, others)])
    todo, common = measured._missing(pair, store, items, dict.fromkeys(keys[3:5]), 2)
    assert [[item.image_id for item in block] for block in todo] == [
        ["4", "5"], ["6", "7"], ["8", "9"]
    ]  # fmt: skip
    assert common == {keys[3]}


def test_each_process_of_a_machine_has_its_gpu(monkeypatch):
    monkeypatch.setattr(team.torch.cuda, "device_count", lambda: 4)
    assert str(team.own_device("cuda")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(team.own_device("cuda")) == "cuda:3"
    assert str(team.own_device("cuda:1")) == "cuda:1"
    assert str(team.own_device("cpu")) == "cpu"


def test_maps_in_bfloat16_are_float32_and_nearly_the_same(untyped):
    net = load_network("scenes_fc")
    images = torch.stack([net.preprocess(draw_scene(i).image)[0] for i in range(2)])
    exact = stage_maps(net, images, [0, 1], ("gradcam", "layercam"))
    found = stage_maps(net, images, [0, 1], ("gradcam", "layercam"), precision="bf16")
    assert found.provenance["precision"] == "bf16"
    for method, maps in exact.items():
        for stage, (one, other) in enumerate(zip(maps, found[method])):
            assert other.dtype == torch.float32
            error = (one - other).norm() / one.norm()
            assert 0 < error < 0.1, (method, stage)
    assert all(each.dtype == torch.float32 for each in net.model.parameters())
    with pytest.raises(ValueError, match="expected `precision` in .*, got 'fp16'"):
        stage_maps(net, images, 0, precision="fp16")
