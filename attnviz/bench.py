"""Speed and memory of the maps, as ratios to the least that any method must do, and to peers.

The floor is one forward pass and one backward pass of the class score to the activation of the
first stage, written by hand on the plain model. Each case runs once in every round, in a new
order, and is divided by the floor of the same round; what is reported is the median of these
ratios with its quartiles. On a CPU the process' CPU time with one thread is taken, on CUDA the
time between two events. Weights are random: neither time nor memory depends on them.
"""

import ctypes
import gc
import importlib
import multiprocessing
import platform
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cam import METHODS, fuse
from .explain import GradientAt, Precision, stage_maps
from .localize import View, sweep_boxes
from .metrics import class_ranks, sweep_counts, sweep_ious
from .networks import bundled_folder, load_network
from .stages import Staged

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Benchmark", "bench_cam"]

M_MMAP_THRESHOLD = -3  # of mallopt
_SWEEP = np.arange(50) / 50  # thresholds of boxes
FLOOR = "forward + backward to stage 1"
OURS, FUSED = "LayerCAM of all stages", "LayerCAM of all stages, fused"
WHOLE = "localization: decode, maps, fusion, boxes, metrics"
EIGHT_CALLS = "LayerCAM of 8 classes, 8 calls"
PEERS = {"captum": "captum", "grad-cam": "pytorch_grad_cam", "torchcam": "torchcam"}
Row = dict[str, str | float | None]
Run = Callable[[Tensor], object]


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What a benchmark measured, and on what."""

    device: str
    """Name of the processor, and the number of threads on a CPU."""
    versions: dict[str, str | None]
    """Version of each package, None for a peer that is not installed."""
    rows: list[Row]
    """One per case: ``case`` and ``baseline`` name what is compared; ``ratio`` is the median of
    case / baseline in time, ``low`` and ``high`` its quartiles, ``peak_memory_ratio`` the ratio
    of what the two need beyond the loaded network, None where it can't be measured."""
    rounds: int
    """How often each case ran."""
    seed: int
    """The seed of weights, images and order."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and how to get it."""

    def to_json(self) -> dict[str, object]:
        """Returns the result as plain values, for :func:`json.dump`."""
        return {
            "device": self.device, "versions": self.versions, "rows": self.rows,
            "rounds": self.rounds, "seed": self.seed, "notes": list(self.notes),
        }  # fmt: skip

    def to_frame(self) -> "DataFrame":
        """Returns the rows as a table."""
        from pandas import DataFrame

        return DataFrame(self.rows)

    def __str__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="{:.2f}".format, na_rep="-")
        return "\n".join([f"{self.device}, {self.rounds} rounds", table, *self.notes])

    def _repr_html_(self) -> str:
        notes = "".join(f"<br>{note}" for note in self.notes)
        table = self.to_frame().to_html(index=False, float_format="{:.2f}".format, na_rep="-")
        return f"{table}<small>{self.device}, {self.rounds} rounds{notes}</small>"


def bench_cam(
    networks: Sequence[str] = ("vgg16", "resnet50"),
    batches: Sequence[int] = (1, 8),
    rounds: int = 7,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    *,
    size: int = 224,
    memory: bool = True,
    progress: bool = True,
) -> Benchmark:
    """Measures time and peak memory of :func:`attnviz.stage_maps` and of its peers.

    Takes minutes. Other work on the machine widens the quartiles but moves the median little.

    Args:
        networks: Names for :func:`attnviz.load_network`.
        batches: Numbers of images per call. Several classes per image are measured at 1.
        rounds: How often each case runs.
        device: ``auto`` takes CUDA where there is one.
        seed: The seed of weights, images and order.
        size: Height and width of the images.
        memory: Whether to measure memory too. On a CPU that is done in another process and needs
            Linux.
        progress: Whether to show a progress bar.

    Returns:
        The ratios.

    Raises:
        ValueError: An argument is out of range, or a network is unknown.
    """
    chosen = _check(networks, batches, rounds, device, size)
    lower = _computes_bfloat16(chosen.type)
    cases = [
        case for case in CAM_CASES
        if (case.package is None or _version(case.package)) and (lower or not case.lower)
    ]  # fmt: skip
    plans = [
        (network, batch, [case for case in cases if case.most is None or batch <= case.most])
        for network in networks
        for batch in batches
    ]
    rows: list[Row] = []
    notes = _missing_peers()
    if not lower:
        notes += ("bf16 is left out: this processor only imitates it, ten times slower",)
    total = sum(len(plan) for _, _, plan in plans) * (rounds + memory)
    with (
        tqdm(total=total, disable=not progress, unit="run", delay=2) as bar,
        _quiet(),
    ):
        for network, batch, plan in plans:
            bar.set_description(f"{network}, batch {batch}")
            subject = _subject(network, size, chosen.type, seed)
            seconds = _seconds(subject, plan, batch, rounds, seed, bar)
            peaks: dict[str, int | None] = dict.fromkeys(case.name for case in plan)
            works = [
                (network, size, chosen.type, seed, batch, case.name) for case in plan if memory
            ]
            measured = (
                (_peak(*work) for work in works) if chosen.type == "cuda" else peaks_apart(works)
            )
            for work, peak in zip(works, measured, strict=True):
                peaks[work[-1]] = peak
                bar.update()
            rows += _rows(f"{network}, batch {batch}", plan, seconds, peaks)
            rates = (
                f"{name} {batch / np.median(seconds[name]):.2f}"
                for name in (FLOOR, WHOLE)
                if name in seconds
            )
            notes += (f"{network}, batch {batch}, images/s: {', '.join(rates)}",)
    if memory and all(row["peak_memory_ratio"] is None for row in rows):
        notes += ("peak memory needs Linux with /proc/self/clear_refs, or CUDA",)
    return Benchmark(_device_name(chosen), _versions(), rows, rounds, seed, notes)


def _check(
    networks: Sequence[str], batches: Sequence[int], rounds: int, device: str, size: int
) -> torch.device:
    if isinstance(networks, str) or not networks:
        raise ValueError(f"expected `networks` as a list of names, got {networks!r}")
    for name, values in (("batches", batches), ("rounds", [rounds]), ("size", [size])):
        if not values or min(values) < 1:
            raise ValueError(f"expected `{name}` of 1 or more, got {min(values, default='none')}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"expected `device` in ('auto', 'cpu', 'cuda'), got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device for `device` 'cuda', got none; use 'cpu'")
    found = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return torch.device(found)


# --------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class _Subject:
    net: Staged
    size: int
    seed: int

    @property
    def model(self) -> nn.Module:
        return self.net.model

    @property
    def layers(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.net.stage_names]

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (batch, 3, self.size, self.size)
        return torch.randn(shape, generator=generator).to(self.net.device)

    def small_image(self) -> Tensor:
        # To load code and fill caches at little cost.
        return self.images(1)[..., :64, :64].contiguous()


@lru_cache(maxsize=1)
def _subject(network: str, size: int, device: str, seed: int) -> _Subject:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = load_network(network, "random", device=device)
    modules = dict(net.model.named_modules())
    if wrong := [name for name in net.stage_names if name not in modules]:
        raise ValueError(
            f"expected a network whose stages end in modules, got {network}, where {wrong[0]!r} "
            "is none; the floor and the peers hook modules"
        )
    return _Subject(net, size, seed)


@dataclass(frozen=True)
class _Case:
    name: str
    prepare: Callable[[_Subject], Run]  # imports and looks up what is not part of the work
    baseline: str | None = FLOOR  # None: only measured to compare others with
    package: str | None = None  # the peer it needs
    most: int | None = None  # the largest batch
    beside: str | None = None  # the case of ours that does the same as the peer
    lower: bool = False  # whether it needs a processor that computes with bfloat16


def _classes(images: Tensor) -> list[int]:
    return list(range(len(images)))


def _floor(subject: _Subject) -> Run:
    first = subject.layers[0]

    def run(images: Tensor) -> object:
        kept = []
        handle = first.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            scores = subject.model(images)
        finally:
            handle.remove()
        total = scores.diagonal().sum()  # the score of class i in image i, as in _classes
        return torch.autograd.grad(total, kept)

    return run


def _plain(subject: _Subject) -> Run:
    return torch.no_grad()(subject.model.__call__)


def _maps(
    methods: Sequence[str] = ("layercam",),
    gradient_at: GradientAt = "native",
    precision: Precision = "32",
) -> Callable[[_Subject], Run]:
    def prepare(subject: _Subject) -> Run:
        return lambda images: stage_maps(
            subject.net, images, _classes(images), methods, gradient_at=gradient_at,
            precision=precision,
        )  # fmt: skip

    return prepare


def _channels_last(subject: _Subject) -> Run:
    def run(images: Tensor) -> object:
        images = images.contiguous(memory_format=torch.channels_last)
        return stage_maps(subject.net, images, _classes(images))

    return run


def _fused(subject: _Subject) -> Run:
    def run(images: Tensor) -> object:
        maps = stage_maps(subject.net, images, _classes(images))["layercam"]
        return fuse(maps, size=tuple(images.shape[-2:]))

    return run


def _localized(subject: _Subject) -> Run:
    # A whole evaluation, from the file to what is right; the other cases begin with the tensor.
    net, file, truth = subject.net, BytesIO(), (100, 80, 400, 300)
    with Image.open(bundled_folder() / "pictures" / "cat.jpg") as picture:
        picture.convert("RGB").resize((500, 375)).save(file, "jpeg", quality=90)

    def run(images: Tensor) -> object:
        size = (images.shape[-2], images.shape[-1])
        view = View((375, 500), size, (0, 0), size)
        shown = [view.pixels(np.array(Image.open(file).convert("RGB"))) for _ in images]
        values = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(part)[:, None, None] for part in (net.mean, net.std))
        maps = stage_maps(net, ((values - mean) / std).to(images), _classes(images))
        fused = fuse(maps["layercam"], size=size).cpu()
        found = [sweep_boxes(map, _SWEEP) for map in fused]
        box = [view.box_to_network(truth)]
        ious = np.stack([sweep_ious(*each, box, len(_SWEEP)) for each in found])
        return class_ranks(maps.scores, _classes(images)), sweep_counts(ious)

    return run


def _eight_calls(subject: _Subject) -> Run:
    return lambda images: [stage_maps(subject.net, images, number) for number in range(8)]


def _one_call(subject: _Subject) -> Run:
    return lambda images: stage_maps(subject.net, images, [list(range(8))] * len(images))


def _grad_cam(subject: _Subject) -> Run:
    from pytorch_grad_cam import LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    def run(images: Tensor) -> object:
        targets = [ClassifierOutputTarget(number) for number in _classes(images)]
        with LayerCAM(model=subject.model, target_layers=subject.layers) as cam:
            return cam(input_tensor=images, targets=targets)

    return run


def _torchcam(subject: _Subject) -> Run:
    from torchcam.methods import LayerCAM

    def run(images: Tensor) -> object:
        with LayerCAM(subject.model, list(subject.net.stage_names)) as extractor:
            maps = extractor(_classes(images), subject.model(images))
            return extractor.fuse_cams(maps, tuple(images.shape[-2:]))

    return run


def _captum(subject: _Subject) -> Run:
    from captum.attr import LayerGradientXActivation

    def run(images: Tensor) -> object:
        explainer = LayerGradientXActivation(subject.model, subject.layers)
        target = torch.tensor(_classes(images), device=images.device)
        products = explainer.attribute(images, target=target)
        return [product.detach().relu().sum(dim=1) for product in products]

    return run


CAM_CASES = (
    _Case(FLOOR, _floor, baseline=None),
    _Case("plain forward", _plain),
    _Case(OURS, _maps()),
    _Case(FUSED, _fused),
    _Case("LayerCAM of all stages, channels last", _channels_last),
    _Case("LayerCAM of all stages, bf16", _maps(precision="bf16"), lower=True),
    _Case(WHOLE, _localized),
    _Case("all methods of all stages", _maps(tuple(METHODS))),
    _Case("LayerCAM of all stages, pool_up", _maps(gradient_at="pool_up")),
    _Case(EIGHT_CALLS, _eight_calls, baseline=None, most=1),
    _Case("LayerCAM of 8 classes, one call", _one_call, baseline=EIGHT_CALLS, most=1),
    _Case("grad-cam: LayerCAM of all stages", _grad_cam, package="grad-cam", beside=FUSED),
    _Case("torchcam: LayerCAM of all stages, fused", _torchcam, package="torchcam", beside=FUSED),
    _Case("captum: LayerCAM of all stages", _captum, package="captum", beside=OURS),
)


def _rows(
    where: str,
    plan: Sequence[_Case],
    seconds: dict[str, np.ndarray],
    peaks: dict[str, int | None],
) -> list[Row]:
    pairs = [(case.name, case.baseline) for case in plan if case.baseline is not None]
    pairs += [(case.name, case.beside) for case in plan if case.beside is not None]
    return [
        row_of(
            f"{where}: {name}", f"{where}: {baseline}", seconds[name] / seconds[baseline],
            (peaks[name], peaks[baseline]),
        )
        for name, baseline in pairs
    ]  # fmt: skip


def row_of(
    case: str, baseline: str, ratios: np.ndarray, peaks: tuple[int | None, int | None]
) -> Row:
    """Returns the row of a case: median and quartiles of the ratios of all rounds."""
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).round(4).tolist()
    peak, floor = peaks
    return {
        "case": case, "baseline": baseline, "ratio": ratio, "low": low, "high": high,
        "peak_memory_ratio": round(peak / floor, 4) if peak is not None and floor else None,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------- time


@contextmanager
def _quiet() -> Iterator[None]:
    # One thread, and no garbage collection in the middle of what is timed.
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
        _subject.cache_clear()


def _seconds(
    subject: _Subject, plan: Sequence[_Case], batch: int, rounds: int, seed: int, bar: tqdm
) -> dict[str, np.ndarray]:
    images = subject.images(batch)
    runs = {case.name: case.prepare(subject) for case in plan}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(subject.small_image())
    names, order = list(runs), random.Random(seed)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            found[name].append(_time(runs[name], images))
            subject.model.zero_grad()  # grad-cam leaves gradients behind
            bar.update()
    return {name: np.array(values) for name, values in found.items()}


def _time(run: Run, images: Tensor) -> float:
    gc.collect(0)  # what the case before left in cycles
    if images.is_cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run(images)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1000
    start = time.process_time()
    run(images)
    return time.process_time() - start


# -------------------------------------------------------------------------------------- memory


def peaks_apart(
    works: Sequence[tuple],
    measure: Callable[..., int | None] | None = None,
    alone: bool = False,
) -> Iterator[int | None]:
    """Measures in another process, and in a new one if that is killed.

    Not in a fork, which torch's threads do not survive.

    Args:
        works: What `measure` is called with.
        measure: Returns a number of bytes; that of the maps if None.
        alone: Whether each has a process of its own. Maps need none (measured: 3 % less at most),
            as what they free goes back to the system; trainings keep more.
    """
    context, waiting = multiprocessing.get_context("spawn"), list(works)
    while waiting:
        with ProcessPoolExecutor(1, mp_context=context, initializer=_start_measuring) as pool:
            ended = False
            while waiting and not ended:
                try:
                    found, ended = pool.submit(measure or _peak, *waiting.pop(0)).result(), alone
                except BrokenProcessPool:  # killed for its memory
                    found, ended = None, True
                yield found


def _peak(network: str, size: int, device: str, seed: int, batch: int, case: str) -> int | None:
    # Bytes that the case needs at most, beyond the network and the images.
    subject = _subject(network, size, device, seed)
    run = next(each for each in CAM_CASES if each.name == case).prepare(subject)
    run(subject.small_image())  # loads code, so that only the work is counted
    subject.model.zero_grad()
    images = subject.images(batch)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(images)
        torch.cuda.synchronize()
        after = torch.cuda.max_memory_allocated()
    else:
        _trim()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is used now
        except OSError:
            return None
        before = _resident_peak()
        run(images)
        after = _resident_peak()
    subject.model.zero_grad()
    return after - before


def _start_measuring() -> None:
    # One thread, and every tensor of its own pages, which go back to the system when it is freed.
    # Otherwise the C library keeps some, and the peak depends on where holes happen to be.
    torch.set_num_threads(1)
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    if tune is not None:
        tune(M_MMAP_THRESHOLD, 64 * 1024)


def _computes_bfloat16(device: str) -> bool:
    from .training.runs import computes_bfloat16

    return computes_bfloat16(device)


def _trim() -> None:
    # Gives freed memory back to the system, where the C library can.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# ----------------------------------------------------------------------------------- surroundings


def _version(package: str) -> str | None:
    try:
        importlib.import_module(PEERS.get(package, package))
        return metadata.version(package)
    except (ImportError, metadata.PackageNotFoundError):
        return None


def _versions() -> dict[str, str | None]:
    from . import __version__

    packages = ("torch", "torchvision", *PEERS)
    own = {"attnviz": __version__, "python": platform.python_version()}
    return own | {package: _version(package) for package in packages}


def _missing_peers() -> tuple[str, ...]:
    missing = [package for package in PEERS if _version(package) is None]
    if not missing:
        return ()
    return (f"not installed, so not measured: {', '.join(missing)}; pip install '.[bench]'",)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, 1 thread"
