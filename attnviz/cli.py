"""The ``attnviz`` command. Each subcommand parses, calls the package and says what it wrote."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_args

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import __version__
from .cam import METHODS, Scaling, fuse, resize, scale
from .colors import overlay
from .deeplab import SEGMENTATION_NETWORKS
from .explain import GradientAt, StageMaps, excitation_backprop, scorecam, stage_maps
from .files import write_whole
from .images import read_image
from .localize import map_to_box
from .networks import data_root, load_network
from .stages import Staged

_METHODS = (*METHODS, "scorecam", "cmwp", "mwp")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, or 2 with one line on bad input."""
    parser = _command_line()
    options = parser.parse_args(arguments)
    try:
        if options.run is not _lab:
            _prepare(options)
        result = options.run(options)
        if options.json is not None and _is_first():
            write_whole(options.json, json.dumps(result, indent=1).encode())
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        print(f"attnviz: {_one_line(error)}", file=sys.stderr)  # noqa: T201 (the command's voice)
        return 2
    except KeyboardInterrupt:
        print("attnviz: stopped", file=sys.stderr)  # noqa: T201 (the command's voice)
        return 130
    return 0


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename!r}"
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(message).split())


def _say(text: str) -> None:
    print(text)  # noqa: T201 (the command's voice)


def _prepare(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for --device cuda, got none; use --device cpu")
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"expected --seed from 0 to 2**63 - 1, got {options.seed}")
    if options.json is not None and not _is_device(options.json):
        check_writable(options.json.parent)
        if options.json.is_dir():
            raise ValueError(f"expected a file for --json, got the folder {str(options.json)!r}")
    torch.manual_seed(options.seed)


def _is_first() -> bool:
    # Of several processes of torchrun only one speaks and writes.
    return int(os.environ.get("RANK", "0")) == 0


def _device(options: argparse.Namespace) -> str:
    if options.device != "auto":
        return options.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _command_line() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnviz", description=sys.modules["attnviz"].__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"attnviz {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_lab(commands)
    _add_map(commands)
    _add_tree(commands)
    _add_play(commands)
    _add_train(commands)
    _add_bench(commands)
    _add_data(commands)
    _add_table(commands)
    _add_figure(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable, about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about, formatter_class=_Help)
    parser.set_defaults(run=run)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute"
    )
    return parser


# -------------------------------------------------------------------------------------- files


def check_writable(folder: Path) -> None:
    """Makes the folder; raises OSError with a remedy where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".attnviz-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"expected a folder that can be written to, got {str(folder)!r} "
            f"({error.strerror}); choose another one"
        ) from error


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


# ---------------------------------------------------------------------------------------- lab


def _add_lab(commands: argparse._SubParsersAction) -> None:
    about = "open JupyterLab on the chapters; what follows -- goes to jupyter lab"
    parser = commands.add_parser("lab", help=about, description=about)
    parser.add_argument("jupyter", nargs="*", metavar="-- OPTION", help="options of jupyter lab")
    parser.set_defaults(run=_lab, json=None)


def _lab(options: argparse.Namespace) -> None:
    package = Path(__file__).parent
    folder = package.parent / "notebooks"
    if not folder.is_dir():
        folder = _copy_chapters(package / "notebooks")
    # no "Jupyter news?" over the first picture, and nothing of the user's settings changed
    paths = [str(package / "lab"), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={folder}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    if not any("default_url" in option or option.endswith(".ipynb") for option in options.jupyter):
        command.append("--LabApp.default_url=/lab/tree/ch0_start.ipynb")
    os.execv(sys.executable, [*command, *options.jupyter])


def _copy_chapters(source: Path) -> Path:
    folder = Path("attnviz-notebooks")
    check_writable(folder)
    for chapter in source.glob("*.ipynb"):
        if not (folder / chapter.name).exists():
            (folder / chapter.name).write_bytes(chapter.read_bytes())
    return folder


# ---------------------------------------------------------------------------------------- map


def _add_map(commands: argparse._SubParsersAction) -> None:
    parser = _add(commands, "map", _map, "what each stage of a network attends to in pictures")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--network", required=True, help="a name, e.g. squeezenet1_1 or resnet50")
    parser.add_argument("--weights", default="auto", help="auto, random or a file")
    parser.add_argument("--data-root", type=Path, help="folder that holds weights/")
    parser.add_argument(
        "--class", dest="class_id", default="auto", help="name or number; auto: the highest score"
    )
    parser.add_argument("--method", choices=_METHODS, default="layercam", help="what makes a map")
    parser.add_argument("--stages", default="all", help="e.g. 1-5 or 3,4,5; 1 is the shallowest")
    parser.add_argument("--gamma", type=float, default=2.0, help="factor inside tanh")
    parser.add_argument(
        "--scaling", choices=get_args(Scaling), default="tanh", help="of all but the deepest map"
    )
    parser.add_argument(
        "--gradient-at", choices=get_args(GradientAt), default="native",
        help="at the activation, or at the pooling that follows; pool_up gives smoother maps",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.15, help="of the box, share of max")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="gets a folder for each picture: stages.png, stage1.png ... fused.png, maps.npz "
        "(raw), result.json (class, scores, box, how it was made)",
    )  # fmt: skip


def _map(options: argparse.Namespace) -> dict[str, object]:
    if not 0 < options.gamma <= 8:
        raise ValueError(f"expected --gamma above 0 and at most 8, got {options.gamma}")
    if not 0 <= options.threshold < 1:
        raise ValueError(f"expected --threshold in [0, 1), got {options.threshold}")
    pictures = [read_image(path) for path in options.images]
    check_writable(options.out)
    net = load_network(
        options.network, options.weights, data=options.data_root, device=_device(options)
    )
    stages = net.check_stages(_stage_numbers(options.stages))
    class_id = None if options.class_id == "auto" else net.class_id(options.class_id)
    results = []
    folders = _folders(options.out, options.images)
    jobs = list(zip(options.images, pictures, folders, strict=True))
    for path, picture, folder in tqdm(jobs, desc="maps", unit="image", disable=len(jobs) < 2):
        maps = _attention(net, net.preprocess(picture), class_id, stages, options)
        results.append(_write_maps(folder, path, picture, net, maps, options))
    return {"results": results}


def _attention(
    net: Staged,
    images: torch.Tensor,
    class_id: int | None,
    stages: Sequence[int],
    options: argparse.Namespace,
) -> StageMaps:
    if options.method == "scorecam":
        return scorecam(net, images, class_id, stages=stages, progress=True)
    if options.method in ("mwp", "cmwp"):
        contrastive = options.method == "cmwp"
        return excitation_backprop(net, images, class_id, stages=stages, contrastive=contrastive)
    gradient_at = options.gradient_at
    return stage_maps(
        net, images, class_id, (options.method,), stages=stages, gradient_at=gradient_at
    )


def _stage_numbers(text: str) -> list[int] | None:
    if text == "all":
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        whole = first.isdecimal() and (last.isdecimal() if dash else True)
        if not whole or len(first + last) > 4 or int(first) > int(last if dash else first):
            raise ValueError(f"expected --stages like 1-5, 3,4,5 or all, got {text!r}")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def _folders(out: Path, images: Sequence[Path]) -> list[Path]:
    # One folder a picture, named after it; numbered where two have the same name.
    folders: list[Path] = []
    for path in images:
        folder, number = out / path.stem, 2
        while folder in folders:
            folder, number = out / f"{path.stem}-{number}", number + 1
        folders.append(folder)
    return folders


def _write_maps(
    folder: Path,
    path: Path,
    picture: Image.Image,
    net: Staged,
    maps: StageMaps,
    options: argparse.Namespace,
) -> dict[str, object]:
    size = (picture.height, picture.width)
    raw = [stage[0].cpu() for stage in maps[options.method]]
    fused = fuse(raw, options.gamma, size, scaling=options.scaling)
    box = map_to_box(fused, options.threshold)
    # each stage as it enters the fusion: all but the deepest are scaled
    phis = [options.scaling] * (len(raw) - 1) + ["none"]
    shown = {
        f"stage{number}": resize(scale(stage, phi, options.gamma), size)
        for number, stage, phi in zip(maps.stages, raw, phis, strict=True)
    }
    shown["fused"] = fused
    check_writable(folder)
    pixels = np.asarray(picture)
    pictures = {name: overlay(pixels, map.numpy()) for name, map in shown.items()}
    for name, laid in pictures.items():
        _save_png(folder / f"{name}.png", laid)
    _save_png(folder / "stages.png", _sheet([pixels, *pictures.values()]))
    arrays = {f"stage{n}": m.numpy() for n, m in zip(maps.stages, raw, strict=True)}
    write_whole(
        folder / "maps.npz",
        lambda file: np.savez_compressed(file, **arrays, fused=fused.numpy()),
    )
    chosen = int(maps.class_ids[0])
    count = min(5, len(maps.scores[0]))
    top = maps.scores[0].topk(count).indices.tolist()
    result = {
        "image": path.name,
        "size": size,
        "class": _class_row(net, chosen, maps),
        "top": [_class_row(net, i, maps) for i in top],
        "box": box,
        "threshold": options.threshold,
        "method": options.method,
        "stages": dict(zip(maps.stages, maps.stage_names, strict=True)),
        "gamma": options.gamma,
        "scaling": options.scaling,
        "seed": options.seed,
        **maps.provenance,
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1).encode())
    label = result["class"]
    _say(f"{folder}: {label['name'] or label['id']} ({label['probability']:.3f}), box {box}")
    return result


def _class_row(net: Staged, class_id: int, maps: StageMaps) -> dict[str, object]:
    name = net.class_names[class_id] if net.class_names else None
    return {
        "id": class_id,
        "name": name,
        "score": float(maps.scores[0][class_id]),
        "probability": float(net.probabilities(maps.scores)[0][class_id]),
    }


def _save_png(path: Path, pixels: np.ndarray) -> None:
    write_whole(path, lambda file: Image.fromarray(pixels).save(file, "png"))


def _sheet(pictures: Sequence[np.ndarray], height: int = 240, gap: int = 6) -> np.ndarray:
    # The pictures in two rows on white.
    width = min(max(round(pictures[0].shape[1] * height / pictures[0].shape[0]), 32), 960)
    columns = -(-len(pictures) // 2)
    sheet = np.full((2 * height + gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        small = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = np.asarray(small)
    return sheet


# --------------------------------------------------------------------------------------- tree


def _add_tree(commands: argparse._SubParsersAction) -> None:
    about = "the channels behind a decision, as a tree to explore in a page of its own"
    parser = _add(commands, "tree", _tree, about)
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--network", required=True, help="a name, e.g. squeezenet1_1 or resnet50")
    parser.add_argument("--weights", default="auto", help="auto, random or a file")
    parser.add_argument("--data-root", type=Path, help="folder that holds weights/")
    parser.add_argument(
        "--class", dest="class_ids", nargs="+", default=["auto"], metavar="CLASS",
        help="name or number, or two to compare; auto: the highest score",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=3, help="channels of each node, at most 8")
    parser.add_argument("--depth", type=int, default=3, help="levels of channels in the page")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="an HTML page")


def _check_page(file: Path) -> None:
    if file.suffix.lower() != ".html":
        raise ValueError(f"expected --out as .html, got {str(file)!r}")
    check_writable(file.parent)


def _tree(options: argparse.Namespace) -> dict[str, object]:
    from .panels.tree import MOST, explore_evidence

    if not 1 <= options.top <= MOST:
        raise ValueError(f"expected --top from 1 to {MOST}, got {options.top}")
    if options.depth < 1:
        raise ValueError(f"expected --depth of at least 1, got {options.depth}")
    if len(options.class_ids) > 2:
        raise ValueError(f"expected one or two classes, got {len(options.class_ids)}")
    picture = read_image(options.image)
    _check_page(options.out)
    net = load_network(
        options.network, options.weights, data=options.data_root, device=_device(options)
    )
    class_ids = None if options.class_ids == ["auto"] else options.class_ids
    panel = explore_evidence(net, picture, class_ids, top=options.top)
    panel.grow(options.depth, progress=True)
    panel.add_sketches(progress=True)
    panel.save_html(options.out)
    trees = [tree.to_json() for tree in panel.trees]
    _say(f"{options.out}: {', '.join(map(str, (tree['class_name'] for tree in trees)))}, "
         f"{sum(len(tree['nodes']) for tree in trees)} channels, "
         f"{options.out.stat().st_size / 1000:.0f} kB")  # fmt: skip
    return {"image": options.image.name, "out": str(options.out), "trees": trees}


# -------------------------------------------------------------------------------- train, bench


def _add_train(commands: argparse._SubParsersAction) -> None:
    about = "train a network; a killed run goes on with --resume"
    kinds = commands.add_parser("train", help=about, description=about).add_subparsers(
        required=True, metavar="KIND", parser_class=_Parser
    )
    about = "a classifier of the generated scenes, as the bundled networks were trained"
    parser = _add(kinds, "classifier", _train_classifier, about)
    parser.add_argument("--data", choices=("scenes",), default="scenes")
    parser.add_argument("--network", choices=("scenes_fc", "scenes_conv"), default="scenes_fc")
    parser.add_argument("--epochs", type=int, default=12, help="how often each image is seen")
    parser.add_argument("--limit", type=int, help="at most so many images, for a quick look")
    _add_run(parser)
    about = "a classifier that accumulates its attention while it learns (OAA, OAA++)"
    parser = _add(kinds, "oaa", _train_oaa, about)
    parser.add_argument(
        "--data", default="scenes", metavar="NAME",
        help="scenes, voc2012, coco, cub, or a folder of labeled pictures",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder of the data sets and weights/")
    parser.add_argument("--network", help="scenes for scenes, else vgg16; or squeezenet1_1, ...")
    parser.add_argument("--weights", default="auto", help="to start from: auto, random or a file")
    parser.add_argument("--images", type=int, default=2000, help="how many scenes are drawn")
    parser.add_argument("--limit", type=int, help="at most so many images, for a quick look")
    parser.add_argument(
        "--validation-images", type=int, default=300, help="at most so many to measure on"
    )
    parser.add_argument("--size", type=int, help="short side of the images, in pixels")
    parser.add_argument("--crops", action="store_true", help="learn from parts of images, too")
    parser.add_argument("--rule", choices=("max", "mean"), default="max", help="how maps join")
    parser.add_argument("--no-gate", action="store_true", help="accumulate every map of a label")
    parser.add_argument("--start", type=int, default=1, help="epochs before accumulation")
    parser.add_argument(
        "--drop", nargs="?", choices=("none", "image", "feature"), const="image", default="none",
        help="hide what was attended to (OAA++); --drop alone: in the image",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, default=0.6, help="attention that is hidden")
    parser.add_argument("--rate", type=float, default=0.5, help="how often")
    parser.add_argument(
        "--branch", action="store_true", help="a second head learns the maps, for unseen images"
    )
    _add_loop(parser)
    about = "a network that learns the accumulated maps of a run (OAA+, OAA+++)"
    parser = _add(kinds, "integral", _train_integral, about)
    parser.add_argument("--run", dest="source", type=Path, required=True, metavar="OAA_RUN")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets and weights/")
    parser.add_argument(
        "--weights", default="auto", help="to start from: auto, classifier, random or a file"
    )
    parser.add_argument("--loss", choices=("hybrid", "mce", "ep"), default="hybrid")
    parser.add_argument(
        "--reduction", choices=("thesis", "released"), help="one mean a class, or one of all"
    )
    parser.add_argument("--split", type=float, default=0.0, help="threshold of table 4.6")
    _add_loop(parser)
    _add_segment(kinds)
    _add_defect(kinds)


def _add_segment(kinds: argparse._SubParsersAction) -> None:
    about = "a segmentation network, on pseudo labels, true masks, or some of each"
    parser = _add(kinds, "segment", _train_segment, about)
    parser.add_argument(
        "--data", default="scenes", metavar="NAME",
        help="scenes, voc2012, coco, or a folder of labeled pictures",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder of the data sets and weights/")
    parser.add_argument(
        "--labels", default="true", metavar="DIR",
        help="folder of label pictures ID.png; true: the true masks, the upper bound",
    )  # fmt: skip
    parser.add_argument(
        "--true-count", type=int, default=0, help="so many images have their true masks"
    )
    networks = ", ".join(SEGMENTATION_NETWORKS)
    parser.add_argument(
        "--network", help=f"one of {networks}; scenes for scenes, else largefov_vgg16"
    )
    parser.add_argument("--weights", default="auto", help="to start from: auto, random or a file")
    parser.add_argument("--images", type=int, default=2000, help="how many scenes are drawn")
    parser.add_argument("--limit", type=int, help="at most so many images, for a quick look")
    parser.add_argument(
        "--validation-images", type=int, default=300, help="at most so many to measure on"
    )
    parser.add_argument("--size", type=int, help="short side of the images, in pixels")
    parser.add_argument("--crop", type=int, help="side of the views, in pixels")
    _add_loop(parser, ("small", "thesis"))


def _add_defect(kinds: argparse._SubParsersAction) -> None:
    about = "a classifier of surfaces, with or without a defect, from image labels"
    parser = _add(kinds, "defect", _train_defect, about)
    parser.add_argument(
        "--data", choices=("defects", "dagm2007", "magnetic_tile"), default="defects",
        help="defects are generated",
    )  # fmt: skip
    parser.add_argument("--data-root", type=Path, help="folder of the data sets and weights/")
    parser.add_argument(
        "--network", choices=("defects", "squeezenet1_1", "resnet50"),
        help="defects for defects, else resnet50",
    )  # fmt: skip
    parser.add_argument("--weights", default="auto", help="to start from: auto, random or a file")
    parser.add_argument("--images", type=int, default=1600, help="how many surfaces are drawn")
    parser.add_argument("--limit", type=int, help="at most so many images, for a quick look")
    parser.add_argument(
        "--validation-images", type=int, default=400, help="at most so many to measure on"
    )
    parser.add_argument("--size", type=int, help="height and width of the images, in pixels")
    _add_loop(parser, ("small", "thesis"), "thesis for resnet50, else small")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN")


def _add_loop(
    parser: argparse.ArgumentParser,
    presets: Sequence[str] = ("small", "thesis", "released", "literature"),
    default: str = "small for scenes, else thesis",
) -> None:
    parser.add_argument(
        "--preset", choices=presets, help=f"whose batch, learning rates and schedule; {default}"
    )
    parser.add_argument("--epochs", type=int, help="how often each image is seen")
    parser.add_argument("--batch-size", type=int, help="images per step")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a step, for memory")
    parser.add_argument("--learning-rate", type=float, help="the largest")
    parser.add_argument("--precision", choices=("auto", "32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    parser.add_argument("--workers", type=int, default=1, help="threads that read ahead")
    parser.add_argument(
        "--checkpoint-steps", type=int, metavar="N", help="also save every N steps"
    )
    parser.add_argument("--checkpoint-seconds", type=int, metavar="S", help="or every S seconds")
    _add_run(parser)


def _loop_options(options: argparse.Namespace, *names: str) -> dict[str, object]:
    given = vars(options)
    names += ("epochs", "batch_size", "accumulate", "learning_rate", "precision", "threads")
    names += ("workers", "checkpoint_steps", "checkpoint_seconds", "seed", "device", "weights")
    return {name: given[name] for name in names if given[name] is not None}


def _train_oaa(options: argparse.Namespace) -> dict[str, object]:
    from .training import oaa_config, train_oaa

    network = options.network or ("scenes" if options.data == "scenes" else "vgg16")
    config = oaa_config(
        options.preset or ("small" if network == "scenes" else "thesis"),
        network=network,
        gate=not options.no_gate,
        **_loop_options(
            options, "data", "images", "validation_images", "limit", "size", "crops", "rule",
            "start", "drop", "threshold", "rate", "branch",
        ),
    )  # fmt: skip
    check_writable(options.out.parent)
    return _trained(train_oaa(config, options.out, options.resume, data=options.data_root))


def _train_integral(options: argparse.Namespace) -> dict[str, object]:
    from .training import integral_config, train_integral

    loop = _loop_options(options, "loss", "reduction", "split")
    config = integral_config(options.source, options.preset, **loop)
    check_writable(options.out.parent)
    return _trained(train_integral(config, options.out, options.resume, data=options.data_root))


def _train_segment(options: argparse.Namespace) -> dict[str, object]:
    from .training import segment_config, train_segment

    network = options.network or ("scenes" if options.data == "scenes" else "largefov_vgg16")
    config = segment_config(
        options.preset or ("small" if network == "scenes" else "thesis"),
        network=network,
        **_loop_options(
            options, "data", "labels", "true_count", "images", "validation_images", "limit",
            "size", "crop",
        ),
    )  # fmt: skip
    check_writable(options.out.parent)
    return _trained(train_segment(config, options.out, options.resume, data=options.data_root))


def _train_defect(options: argparse.Namespace) -> dict[str, object]:
    from .training import defect_config, train_defect

    network = options.network or ("defects" if options.data == "defects" else "resnet50")
    config = defect_config(
        options.preset, network=network,
        **_loop_options(options, "data", "images", "validation_images", "limit", "size"),
    )  # fmt: skip
    check_writable(options.out.parent)
    run = train_defect(config, options.out, options.resume, data=options.data_root)
    metrics = _metrics(run, "network.safetensors")
    if _is_first():
        shares = "accuracy {accuracy:.3f} (without looking {accuracy_without_looking:.3f}), "
        shares += "average precision {average_precision:.3f} on {images} images"
        _say(f"{run}: {shares.format(**metrics)}")
        if metrics["unreadable"]:
            names = ", ".join(metrics["unreadable"][:5])
            _say(f"  {len(metrics['unreadable'])} images that cannot be read: {names}")
    return {"run": str(run), **metrics}


def _trained(run: Path) -> dict[str, object]:
    if not (run / "metrics.json").is_file():  # the player's stop button
        if _is_first():
            _say(f"{run}: stopped as asked; go on with --resume")
        return {"run": str(run), "stopped": True}
    metrics = _metrics(run, "metrics.json")
    if _is_first():
        if "mean_average_precision" in metrics:
            found = f"{metrics['mean_average_precision']:.3f} on {metrics['images']} images"
            _say(f"{run}: mean average precision {found}")
        for kind, scores in _mean_ious(metrics.get("validation", {})):
            _say(f"{run}: mean IoU {kind} {scores}")
        for name, maps in metrics.get("maps", {}).items():
            if maps["maps"]:
                shares = ["unknown" if maps[key] is None else f"{100 * maps[key]:.1f} %"
                          for key in ("recall", "noise")]  # fmt: skip
                _say(f"  {name} maps: recall {shares[0]}, noise {shares[1]}")
        for kind, left in metrics["left_out"].items():
            if left["images"]:
                _say(f"  {left['images']} {kind}: {', '.join(left['first'])}")
    return {"run": str(run), **metrics}


def _mean_ious(scores: dict[str, object]) -> list[tuple[str, str]]:
    words = {"plain": "without CRF", "crf": "with CRF"}
    return [
        (
            words[kind],
            "{mean_iou:.3f} ({low:.3f} to {high:.3f})".format(**scores[kind])
            + f" on {scores['images']} images, started from {scores['init']}",
        )
        for kind in words
        if kind in scores
    ]


def _metrics(run: Path, last: str) -> dict[str, object]:
    try:
        return json.loads((run / "metrics.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected the metrics of a finished run in {str(run)!r}, got none that can be read; "
            f"delete its {last} and --resume"
        ) from error


def _train_classifier(options: argparse.Namespace) -> dict[str, object]:
    from .training import TrainConfig, train_classifier

    config = TrainConfig(
        network=options.network, data=options.data, limit=options.limit, epochs=options.epochs,
        seed=options.seed, device=options.device,
    )  # fmt: skip
    check_writable(options.out.parent)
    run = train_classifier(config, options.out, options.resume)
    metrics = _metrics(run, "network.safetensors")
    score = metrics["mean_average_precision"]
    _say(f"{run}: mean average precision {score:.3f} on {metrics['images']} generated scenes")
    return {"run": str(run), **metrics}


def _add_bench(commands: argparse._SubParsersAction) -> None:
    about = "speed against the floor and, where installed, against other packages"
    kinds = commands.add_parser("bench", help=about, description=about).add_subparsers(
        required=True, metavar="KIND", parser_class=_Parser
    )
    about = "maps of all stages against one forward and one backward pass"
    parser = _add(kinds, "cam", _bench_cam, about)
    parser.add_argument("--network", nargs="+", default=["vgg16", "resnet50"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="how often each case runs")
    about = "training steps with accumulation, and with the drop layer, against steps without"
    parser = _add(kinds, "oaa", _bench_oaa, about)
    parser.add_argument("--network", nargs="+", default=["scenes", "squeezenet1_1"])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--size", type=int, help="height and width; the network's usual ones")
    parser.add_argument("--rounds", type=int, default=15, help="how often each case runs")
    about = "evidence trees and ablations against forward passes"
    parser = _add(kinds, "tree", _bench_tree, about)
    parser.add_argument("--network", nargs="+", default=["vgg16", "resnet50"])
    parser.add_argument("--rounds", type=int, default=5, help="how often each case runs")
    parser.add_argument("--no-ablation", action="store_true", help="leave out the ablations")
    about = "segmentation's training steps against the same in plain torch"
    parser = _add(kinds, "segment", _bench_segment, about)
    parser.add_argument("--network", nargs="+", default=["scenes"])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--size", type=int, help="height and width; the network's usual ones")
    parser.add_argument("--rounds", type=int, default=15, help="how often each case runs")
    parser = _add(kinds, "all", _bench_all, "all of these in one report")
    parser.add_argument("--quick", action="store_true", help="a look, in under three minutes")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write bench.json, bench.png and bench.html"
    )


def _bench_all(options: argparse.Namespace) -> dict[str, object]:
    from .bench_all import bench_all, write_benchmark

    if options.out is not None:
        check_writable(options.out)
    result = bench_all(options.quick, options.device, options.seed)
    _say(str(result))
    for path in write_benchmark(result, options.out) if options.out is not None else ():
        _say(str(path))
    return result.to_json()


def _bench_segment(options: argparse.Namespace) -> dict[str, object]:
    from .bench_training import bench_segment

    result = bench_segment(
        options.network, options.batch, options.rounds, options.device, options.seed,
        size=options.size,
    )  # fmt: skip
    _say(str(result))
    return result.to_json()


def _bench_tree(options: argparse.Namespace) -> dict[str, object]:
    from .bench_tree import bench_tree

    result = bench_tree(
        options.network, options.rounds, options.device, options.seed,
        ablation=not options.no_ablation,
    )  # fmt: skip
    _say(str(result))
    return result.to_json()


def _bench_oaa(options: argparse.Namespace) -> dict[str, object]:
    from .bench_training import bench_oaa

    result = bench_oaa(
        options.network, options.batch, options.rounds, options.device, options.seed,
        size=options.size,
    )  # fmt: skip
    _say(str(result))
    return result.to_json()


def _bench_cam(options: argparse.Namespace) -> dict[str, object]:
    from .bench import bench_cam

    result = bench_cam(
        options.network, options.batch, options.rounds, options.device, options.seed
    )
    _say(str(result))
    return result.to_json()


# --------------------------------------------------------------------------------------- data


def _add_data(commands: argparse._SubParsersAction) -> None:
    about = "data sets: what is there, whether it is whole, and fetching what may be fetched"
    kinds = commands.add_parser("data", help=about, description=about).add_subparsers(
        required=True, metavar="KIND", parser_class=_Parser
    )
    jobs = (
        ("list", _data_list, "every data set, and whether it is there"),
        ("check", _data_check, "read a data set through and say what is wrong with it"),
        ("fetch", _data_fetch, "download a data set, verified; a stopped download goes on"),
    )
    for name, run, about in jobs:
        parser = _add(kinds, name, run, about)
        parser.add_argument("--data-root", type=Path, help="folder of the data sets")
        if name != "list":
            parser.add_argument("name", metavar="NAME", help="as `attnviz data list` shows it")


def _data_list(options: argparse.Namespace) -> dict[str, object]:
    from .data.catalog import list_data

    rows = list_data(data_root(options.data_root))
    for row in rows:
        found = ", ".join(f"{count:,} {what}" for what, count in row["counts"].items())
        missing = "not there" if row["folder"] else "drawn when it is needed"
        _say(f"{row['name']:14} {row['title']}: {found or missing}")
        _say(f"{'':14} {row['folder'] or 'no folder'}; {row['terms']}")
    return {"data": rows}


def _data_check(options: argparse.Namespace) -> dict[str, object]:
    from .data.catalog import check_data

    result = check_data(options.name, data_root(options.data_root))
    found = ", ".join(f"{count:,} {what}" for what, count in result["counts"].items())
    _say(f"{result['name']}: {found or 'nothing'} in {result['folder']}")
    for line in (*result["missing"], *result["problems"]):
        _say(f"  {line}")
    if not result["ok"]:
        raise ValueError(f"expected {options.name} without problems, found those above")
    return result


def _data_fetch(options: argparse.Namespace) -> dict[str, object]:
    from .data.catalog import fetch_data

    result = fetch_data(options.name, data_root(options.data_root))
    _say(f"{result['name']}: {result['where']}")
    return result


# --------------------------------------------------------------------------------------- play


def _add_play(commands: argparse._SubParsersAction) -> None:
    about = "the evolution of a training's attention, as a page that plays without a kernel"
    parser = _add(commands, "play", _play, about)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN",
        help="folder of a training; several that watch the same pictures are compared",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="an HTML page")


def _play(options: argparse.Namespace) -> dict[str, object]:
    from .evolution import load_evolution
    from .panels.player import EvolutionPlayer

    evolutions = [load_evolution(run) for run in options.runs]
    _check_page(options.out)
    player = EvolutionPlayer(evolutions)
    player.save_html(options.out)
    epochs = {str(each.run): len(each.epochs) for each in evolutions}
    skipped = [f"{each.run}: {line}" for each in evolutions for line in each.skipped]
    for line in skipped:
        _say(line)
    _say(f"{options.out}: {player!r}, {options.out.stat().st_size / 1000:.0f} kB")
    return {"out": str(options.out), "epochs": epochs, "skipped": skipped}


# --------------------------------------------------------------------------- tables and figures


def _add_table(commands: argparse._SubParsersAction) -> None:
    about = "a table of the thesis: the paper's numbers beside ours"
    parser = _add(commands, "table", _table, about)
    parser.add_argument(
        "id", nargs="*", metavar="ID", help="for instance 3.1; all: every one, as a page"
    )
    parser.add_argument("--list", action="store_true", help="name every table")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="all: the page; tables.html if not given"
    )
    parser.add_argument(
        "--data", default="scenes",
        choices=(
            "scenes", "ilsvrc", "cub", "voc2012", "coco", "defects", "dagm2007", "magnetic_tile"
        ),
        help="tables 3.9 and 3.10 take the last three, and defects in place of scenes",
    )  # fmt: skip
    parser.add_argument("--network", help="a name; if none, a small one for scenes, else vgg16")
    parser.add_argument("--weights", default="auto", help="auto, random or a file")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets and weights/")
    parser.add_argument("--limit", type=int, help="at most so many pictures")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where a stopped table goes on")
    parser.add_argument(
        "--preset", choices=("thesis", "released", "literature"),
        help="chapters 3, 4: whose choices where the sources differ; thesis if not given",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="chapter 3: only these rows"
    )
    parser.add_argument(
        "--gradient-at", choices=get_args(GradientAt),
        help="chapter 3: in place of the preset's choice",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", choices=("auto", "fixed", "held_out"),
        help="chapter 3: of boxes: the preset's, or chosen on the other half; auto: fixed for "
        "vgg16 alone",
    )  # fmt: skip
    parser.add_argument(
        "--channels", metavar="N", help="chapter 3: of each stage in Score-CAM, or all; 64"
    )
    parser.add_argument(
        "--batch", type=int, help="chapter 3: pictures at once; another number measures anew; 8"
    )
    parser.add_argument("--epochs", type=int, help="tables that train: of each training")
    parser.add_argument("--repeats", type=int, help="tables that train: trainings of each row; 1")
    parser.add_argument(
        "--measure", choices=("maps", "segmentation"),
        help="tables 4.5 to 4.10: of the maps themselves, or of a network trained on them; maps",
    )  # fmt: skip
    parser.add_argument(
        "--rule", choices=("saliency", "affinity", "constant", "superpixels"),
        help="segmentation: what is background in pseudo labels; the thesis' own if not given",
    )  # fmt: skip
    parser.add_argument("--segment-epochs", type=int, help="segmentation: of each network")
    parser.add_argument("--workers", type=int, help="segmentation: processes for labels; 0")
    parser.add_argument("--top", type=int, help="table 5.1: channels for each decision; 3")
    parser.add_argument("--decisions", type=int, help="table 5.1: of each stage; 9")


def _table(options: argparse.Namespace) -> dict[str, object]:
    from .tables import make_table, table_names
    from .tables.report import write_report

    if options.list:
        return {"tables": _listed(table_names())}
    if len(options.id) != 1:
        got = " ".join(options.id) or "none"
        raise ValueError(f"expected the ID of one table, or all, got {got}; see --list")
    (id,) = options.id
    names = (
        "preset", "methods", "gradient_at", "threshold", "channels", "batch", "epochs", "repeats",
        "measure", "rule", "segment_epochs", "workers", "top", "decisions",
    )  # fmt: skip
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if "channels" in given:
        text = given["channels"]
        if text != "all" and not text.isdecimal():
            raise ValueError(f"expected --channels as a number or all, got {text!r}")
        given["channels"] = None if text == "all" else int(text)
    given |= {
        "network": options.network, "weights": options.weights, "data_root": options.data_root,
        "limit": options.limit, "cache": options.cache, "device": _device(options),
    }  # fmt: skip
    if id == "all":
        out = options.out or Path("tables.html")
        _check_page(out)
        say = _say if _is_first() else lambda text: None
        given = {name: value for name, value in given.items() if value is not None}
        report = write_report(out, data=options.data, seed=options.seed, say=say, **given)
        say(str(out))
        return report
    if options.out is not None:
        raise ValueError("expected --out with all only; --json writes one table")
    table = make_table(id, data=options.data, seed=options.seed, **given)
    if _is_first():
        _say(str(table))
    return table.to_json()


def _listed(entries: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    for number, title in entries:
        _say(f"{number:5} {title}")
    return [{"id": number, "title": title} for number, title in entries]


def _add_figure(commands: argparse._SubParsersAction) -> None:
    about = "a figure of the thesis, drawn from the bundled or from given pictures"
    parser = _add(commands, "figure", _figure, about)
    parser.add_argument("id", nargs="?", metavar="ID", help="for instance 3.1")
    parser.add_argument("--list", action="store_true", help="name every figure")
    parser.add_argument("--network", help="a name; a bundled one if none")
    parser.add_argument("--pictures", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--runs", nargs="+", type=Path, metavar="RUN", help="of chapter 4")
    parser.add_argument(
        "--masks", nargs="+", metavar="TITLE=DIR", help="3.9, 4.8, 4.9: folders of label pictures"
    )
    parser.add_argument("--data", help="whose masks: scenes if not given, or voc2012")
    parser.add_argument("--data-root", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".pdf, .svg or .png")


def _figure(options: argparse.Namespace) -> dict[str, object]:
    from .figures import figure_names, make_figure

    if options.list:
        return {"figures": _listed(figure_names())}
    if options.id is None or options.out is None:
        raise ValueError("expected the ID of a figure and --out, see attnviz figure --list")
    if options.out.suffix not in (".pdf", ".svg", ".png"):
        raise ValueError(f"expected --out as .pdf, .svg or .png, got {str(options.out)!r}")
    masks, pictures = None, options.pictures
    if options.masks is not None:
        pairs = [text.partition("=") for text in options.masks]
        if wrong := [title for title, is_given, _ in pairs if not is_given]:
            raise ValueError(f"expected --masks TITLE=DIR, got {wrong[0]!r}")
        masks = {title: Path(folder) for title, _, folder in pairs}
    if options.data not in (None, "scenes"):
        if options.data != "voc2012" or (masks is None and options.id != "2.5"):
            raise ValueError(
                "expected --data scenes, or voc2012 for figure 2.5 or with --masks, "
                f"got {options.data}"
            )
        from .data.voc import load_voc
        from .networks import data_root

        folder = data_root(options.data_root) / "voc2012"
        pictures = [item for split in ("train_aug", "val") for item in load_voc(folder, split)]
    check_writable(options.out.parent)
    sheet = make_figure(
        options.id, network=options.network, pictures=pictures, runs=options.runs, masks=masks,
        seed=options.seed,
    )  # fmt: skip
    kind = options.out.suffix[1:]
    write_whole(options.out, lambda file: sheet.savefig(file, format=kind))
    _say(str(options.out))
    return {"figure": options.id, "file": str(options.out)}
