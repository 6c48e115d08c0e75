"""What every training shares: its folder, its checkpoints, its device, its random numbers.

A run is a folder. Files in it are written whole; its checkpoint holds all that the next step
depends on, so that a run that was killed at any moment goes on to the bits that it would have
reached undisturbed. Nothing here knows what is trained.
"""

import csv
import io
import json
import math
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import MISSING, asdict
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol, get_args

import safetensors.torch
import torch
from jaxtyping import Float, Int, UInt8
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor

from .. import __version__
from ..files import first_line, only_one, read_saved, write_whole

__all__ = [
    "Device", "Precision", "RunConfig", "all_answer", "alone", "batches", "by_itself",
    "check_choices", "check_counts", "check_rates", "computes_bfloat16", "csv_bytes",
    "epoch_seed", "json_bytes", "network_bytes", "normalized", "one_cycle", "open_run", "poly",
    "reproducible", "resolved", "save_run", "start_fabric", "step", "steps", "table", "together",
]  # fmt: skip

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "32", "bf16"]
PATIENCE = timedelta(minutes=10)  # how long a process waits for the others


class RunConfig(Protocol):
    """What a config has to say about where it is computed."""

    batch_size: int
    device: Device
    precision: Precision
    threads: int


# -------------------------------------------------------------------------------------- config


def check_choices(config: object, **choices: object) -> None:
    """Raises ValueError where a field has none of the values of its ``Literal``."""
    for name, kind in choices.items():
        if getattr(config, name) not in get_args(kind):
            raise ValueError(
                f"expected `{name}` in {get_args(kind)}, got {getattr(config, name)!r}; "
                "choose one of these"
            )


def check_counts(config: object, **lowest: int) -> None:
    """Raises where a field is no whole number or too low; None passes where it is the default."""
    for name, low in lowest.items():
        value = getattr(config, name)
        if value is None and _default(config, name) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected `{name}` as an integer, got {value!r}; give a whole number")
        if value < low:
            raise ValueError(
                f"expected `{name}` of at least {low}, got {value}; give a larger number"
            )


def check_rates(config: object, **highest: float) -> None:
    """Raises ValueError where a field is no number from 0 to its highest."""
    for name, high in highest.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and 0 <= value <= high):
            limits = "of at least 0" if high == math.inf else f"from 0 to {high}"
            raise ValueError(
                f"expected `{name}` as a number {limits}, got {value}; "
                f"try {_default(config, name)}"
            )


def _default(config: object, name: str) -> object:
    default = type(config).__dataclass_fields__[name].default
    return None if default is MISSING else default


# ------------------------------------------------------------------------------------ schedules


def one_cycle(progress: float) -> float:
    """Returns the learning rate at a share of the training, as a share of the largest.

    Two half cosines: from 1/25 up to 1 over the first 15 %, then down to 0.

    References:
        Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates
        (Smith and Topin, 2017), https://arxiv.org/abs/1708.07120.
    """
    if progress < 0.15:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * progress / 0.15)) / 2
    return (1 + math.cos(math.pi * (progress - 0.15) / 0.85)) / 2


def poly(progress: float) -> float:
    """Returns the learning rate as a share of the first: ``(1 - progress) ** 0.9``."""
    return (1 - progress) ** 0.9


def step(progress: float) -> float:
    """Returns the learning rate as a share of the first: a tenth in the last third."""
    return 1.0 if progress < 2 / 3 else 0.1


def steps(progress: float) -> float:
    """Returns the learning rate as a share of the first: a tenth after each third."""
    return 0.1 ** sum(progress >= share for share in (1 / 3, 2 / 3))


# ------------------------------------------------------------------------------- random, batches


def epoch_seed(seed: int, epoch: int) -> int:
    """Returns the seed of everything random in an epoch."""
    return (seed * 1_000_003 + epoch + 1) * 1009


def batches(order: Int[Tensor, " b"], batch_size: int) -> Sequence[Int[Tensor, " n"]]:
    """Returns the whole batches; what is left over differs from epoch to epoch."""
    whole = len(order) // batch_size * batch_size
    return order[:whole].split(batch_size) if whole else (order,)


def normalized(
    pixels: UInt8[Tensor, "b 3 h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 h w"]:
    """Returns pixels as a network wants them, in the memory order that convolutions like."""
    center, spread = (
        torch.tensor(part, device=pixels.device)[:, None, None] for part in (mean, std)
    )
    values = (pixels.float() / 255 - center) / spread
    return values.contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------- conditions


def resolved(config: RunConfig) -> tuple[Literal["cpu", "cuda"], str]:
    """Returns the device and Fabric's name of the precision that ``auto`` stands for here."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError("expected a CUDA device for `device` 'cuda', got none; use 'cpu'")
    device = "cuda" if cuda and config.device != "cpu" else "cpu"
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if computes_bfloat16(device) else "32"
    return device, {"32": "32-true", "bf16": "bf16-mixed"}[precision]


_by_itself = ContextVar("by_itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """Lets a process of torchrun train inside as if it were the only one."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def start_fabric(config: RunConfig) -> Fabric:
    """Starts what computes: one process, or as many as torchrun has made."""
    device, precision = resolved(config)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # what torchrun says
    world = int(os.environ.get("WORLD_SIZE", "1"))
    devices: int | list[int] = local
    if _by_itself.get():
        local = world = devices = 1
        if device == "cuda":
            devices = [int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()]
    strategy = DDPStrategy(timeout=PATIENCE) if world > 1 else "auto"
    fabric = Fabric(
        accelerator=device, devices=devices, num_nodes=world // local, precision=precision,
        strategy=strategy,
    )  # fmt: skip
    fabric.launch()
    if config.batch_size % fabric.world_size:
        raise ValueError(
            f"expected `batch_size` as a multiple of the {fabric.world_size} processes, "
            f"got {config.batch_size}; change one of the two"
        )
    return fabric


def computes_bfloat16(device: str) -> bool:
    """Returns whether a device is fast with bfloat16; others imitate it, ten times slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def reproducible(config: RunConfig, fabric: Fabric) -> Iterator[None]:
    """Makes equal configs give equal bits inside; all states are as before when it ends."""
    threads = torch.get_num_threads()
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.set_num_threads(config.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def together(out: Path, fabric: Fabric) -> Iterator[None]:
    """Says in one line that another process has ended, where this one waited for it."""
    if fabric.world_size == 1:
        yield
        return
    remedy = f"continue the run in {str(out)!r} after its last checkpoint with `resume` (--resume)"
    with all_answer(fabric.world_size, remedy):
        yield


@contextmanager
def all_answer(count: int, remedy: str) -> Iterator[None]:
    """Raises ConnectionError with a remedy where one of several processes has ended."""
    lost = ConnectionError(f"expected {count} processes, got no answer from one of them; {remedy}")

    def ended(number: int, frame: object) -> None:
        raise lost

    before = signal.signal(signal.SIGTERM, ended)  # what torchrun sends when a process is gone
    try:
        yield
    except RuntimeError as error:  # what gloo and NCCL raise
        words = ("connection", "gloo", "nccl", "timed out", "peer", "socket")
        if not any(word in str(error).lower() for word in words):
            raise
        raise lost from error
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------ the run's folder


@contextmanager
def alone(out: Path, fabric: Fabric) -> Iterator[None]:
    """Keeps a second training out of the folder of a run; the lock ends with the process."""
    with only_one(out, "training") if fabric.is_global_zero else nullcontext():
        yield


def open_run(
    config: object, out: Path, resume: bool, fabric: Fabric, needed: Iterable[str]
) -> dict | None:
    """Returns the state after the run's last checkpoint, or None for a new run.

    Args:
        config: A dataclass; it has to equal the run's.
        out: The folder of the run; made if it is missing.
        resume: Whether a run may, and has to, be there.
        fabric: What computes.
        needed: Keys that a whole checkpoint has beside ``config``.

    Raises:
        FileExistsError: `out` holds a run already and `resume` is False.
        FileNotFoundError: `resume` is True and there is no checkpoint.
        ValueError: The run has another config, or its checkpoint is damaged.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(
            f"expected `out` as a folder, got the file {str(out)!r}; name another"
        )
    path = out / "checkpoint.pt"
    found = path.is_file()
    fabric.barrier()  # nobody writes before all have looked
    if not found and not resume:
        out.mkdir(parents=True, exist_ok=True)
        return None
    if not found:
        raise FileNotFoundError(
            f"expected a run to resume in {str(out)!r}, got no checkpoint.pt there; "
            "start it without `resume`"
        )
    if not resume:
        raise FileExistsError(
            f"expected no run in `out`, got {str(out)!r}, which holds one; "
            "pass `resume` (--resume) to continue it, or name another folder"
        )
    try:
        state = read_saved(path)
        missing = {"config", *needed} - state.keys()
        other = "config" in state and state["config"].keys() != asdict(config).keys()
        if missing and not other:
            raise ValueError(f"it lacks {sorted(missing)}")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the checkpoint of a run, got {str(path)!r}, which could not be read "
            f"({first_line(error)}); delete the run and start again"
        ) from error
    if other:
        raise ValueError(
            f"expected a run with {type(config).__name__} in {str(out)!r}, got one of another "
            "training or version; name another folder"
        )
    before, now = state["config"], asdict(config)
    changed = [name for name in now if not _equal(before.get(name), now[name])]
    if changed:
        stated = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
        given = ", ".join(f"{name} {now[name]!r}" for name in changed)
        raise ValueError(
            f"expected the config of the run in {str(out)!r} ({stated}), got {given}; "
            "resume it as it was, or name another folder"
        )
    return state


def _equal(before: object, now: object) -> bool:
    # Also a folder under another name of its path, or one that has moved.
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    old, new = Path(before), Path(now)
    if old.name != new.name or not new.is_dir():
        return False
    return old.samefile(new) if old.exists() else True


def save_run(out: Path, state: Mapping[str, object], **parts: object) -> None:
    """Writes the checkpoint, ``config.json`` and, after an epoch, ``history.csv``.

    Args:
        out: The folder of the run.
        state: What is kept beside the parts; has ``config`` and ``history``.
        **parts: Whatever has a ``state_dict``.
    """
    file = io.BytesIO()
    torch.save({**state, **{name: part.state_dict() for name, part in parts.items()}}, file)
    write_whole(out / "checkpoint.pt", file.getvalue())
    write_whole(out / "config.json", json_bytes(state["config"]))
    if state["history"]:
        write_whole(out / "history.csv", csv_bytes(state["history"]))


def json_bytes(content: object) -> bytes:
    """Returns JSON for people to read."""
    return json.dumps(content, indent=2).encode() + b"\n"


def csv_bytes(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Returns a table with the keys of the first row as its head."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def network_bytes(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns weights as a safetensors file; equal weights and metadata are equal bytes."""
    versions = f"attnviz {__version__}, torch {torch.__version__.split('+')[0]}"
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(whole, {**metadata, "versions": versions})
    # safetensors writes its metadata in random order
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a Markdown table; numbers with three digits."""
    shown = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *shown])
