"""The machine: its device and precision, the memory that is left, and whether its GPU can be used."""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from qlora import settings
from qlora.console import Problems, fail

OLDEST = (7, 0)  # compute capability of Volta, the first with tensor cores; older GPUs have no fast 16 bit
WINDOW = 2.0  # seconds over which the load of other processes is measured
IDLE = 0.9  # share of the GPU's memory that is free when no other process uses it


def free_memory() -> int:
    """Bytes that this process may still fill: of its GPU, or else its part of the memory that is available."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # cached by torch for this process
    return available_memory() // settings.process_count(local=True)


def compute_dtype():
    """bf16 where the hardware multiplies it, else fp16 on CUDA and fp32 on the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


@cache
def has_flash_attention(dtype) -> bool:
    """Whether the GPU runs FlashAttention 2 in this type: Ampere or later, in 16 bit."""
    import torch

    return torch.cuda.get_device_capability() >= (8, 0) and dtype.itemsize == 2


def describe() -> str:
    """`cpu in bfloat16, 2 threads`: device, precision and threads, and what a missing bf16 costs."""
    import torch

    dtype = compute_dtype()
    name = str(dtype).removeprefix("torch.")
    if torch.cuda.is_available():
        slow = "" if has_flash_attention(dtype) else ": FlashAttention needs Ampere or later, so attention is slower"
        return f"{torch.cuda.get_device_name()} in {name}{slow}"
    slow = "" if name == "bfloat16" else ": this CPU has no AVX512-BF16, which would halve the time"
    threads = torch.get_num_threads()
    return f"cpu in {name}, {threads} thread{'s' * (threads > 1)}{slow}"


def is_fast() -> bool:
    """Whether 16-bit products are fast here: on a GPU, or with the CPU's bf16."""
    import torch

    return compute_dtype() != torch.float32


def cpu_features() -> list[str]:
    """The CPU's instruction sets that matter here, of those that torch may use."""
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    found = ["AVX2"] * level.startswith("AVX") + ["AVX512"] * level.startswith("AVX512")
    return found + ["AVX512-BF16"] * cpu_multiplies_bf16()


def processor() -> str:
    """The CPU's name, where Linux knows it, else its kind."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
            return found[1]
    return platform.processor() or platform.machine()


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has AVX512-BF16 and torch uses it; with ATEN_CPU_CAPABILITY=avx2 it does not."""
    import torch

    # bitsandbytes asks its own library the same; its import takes 1.6 s, for which a search should not wait.
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()


def available_memory() -> int:
    """Bytes of main memory that are available without swapping."""
    import psutil

    return psutil.virtual_memory().available


def check_gpu() -> None:
    """Raises UserError with the reason why no GPU here can run the scripts."""
    import torch

    if torch.version.cuda is None and list_gpus():
        what = f"torch {torch.__version__} was built without CUDA, and this machine has a GPU"
        raise fail(what, "torch", "install its CUDA build: pytorch.org/get-started")
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise explain_cuda(str(error).strip().splitlines()[0]) from error
    problems, name = Problems(), torch.cuda.get_device_name()
    with problems.collecting():
        check_card()
    free, total = torch.cuda.mem_get_info()
    if free < IDLE * total:
        what = f"another process holds {(total - free) / 1e9:.1f} of the {total / 1e9:.1f} GB of {name}"
        problems.add(what, "GPU", "end it (nvidia-smi lists it), or choose another GPU with CUDA_VISIBLE_DEVICES")
    problems.raise_if_any()


def check_card() -> None:
    """Raises UserError for a GPU that is too old for fast 16 bit, or too few of them. Without one nothing is wrong."""
    import torch

    count, processes = torch.cuda.device_count(), settings.process_count(local=True)
    if 0 < count < processes:
        fix = f"start one per GPU: --nproc_per_node {count} of torchrun, --num_processes of accelerate launch"
        raise fail(f"{processes} processes for {count} GPUs", "this machine", fix)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST:
        has, needed = (".".join(map(str, pair)) for pair in (torch.cuda.get_device_capability(), OLDEST))
        what = f"{torch.cuda.get_device_name()} has compute capability {has}, and {needed} is needed"
        fix = "use a newer GPU (Volta, Turing, Ampere or later), or the CPU with CUDA_VISIBLE_DEVICES="
        raise fail(what, "GPU", fix)


def explain_cuda(said: str):
    """The UserError for torch's message when CUDA does not start."""
    if "driver" in said and "too old" in said:
        return fail(said, "NVIDIA driver", "update the driver, or install a torch for an older CUDA")
    if not list_gpus():
        return fail("no CUDA GPU here", "this machine", "run it where there is one, or everything small with --tiny")
    return fail(
        f"CUDA does not start ({said})", "NVIDIA driver", "compare torch.version.cuda with what nvidia-smi shows"
    )


def list_gpus() -> list[str]:
    """The GPUs with their drivers, as nvidia-smi lists them; it needs no torch, and none without it."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


# ------------------------------------------------------------------------------- threads


class Threads:
    """torch's number of threads: as many as other processes leave cores free, checked every `WINDOW` seconds.

    OpenMP threads wait for each other by spinning. Beside one busy process on 2 cores, 2 threads took up to 15 times
    as long for a step as on an idle machine, and 1 thread twice as long (benchmarks/neighbour.py). Waiting without
    spinning (OMP_WAIT_POLICY=passive) takes half as long again on an idle machine.
    """

    def __init__(self, most: int | None = None):
        import torch

        self.most = most or torch.get_num_threads()
        self.cores = list_cores()
        self.seen = self.look()

    def look(self) -> tuple[float, float]:
        """Seconds so far: by the clock, and of work that other processes did on our cores."""
        import psutil

        times = psutil.cpu_times(percpu=True)
        busy = sum(sum(times[n]) - times[n].idle - getattr(times[n], "iowait", 0) for n in self.cores)
        return time.perf_counter(), busy - time.process_time()

    def adjust(self) -> int:
        """Sets the number of threads by the load since the last call, if that was long enough ago; returns it."""
        import torch

        (then, before), (now, after) = self.seen, self.look()
        if now - then >= WINDOW and self.most > 1:
            self.seen = now, after
            others = (after - before) / (now - then)
            torch.set_num_threads(max(1, min(self.most, round(len(self.cores) - others))))
        return torch.get_num_threads()


@cache
def threads() -> Threads:
    """The `Threads` of this process; it measures the load from the first call on."""
    return Threads()


def list_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# ------------------------------------------------------------------------------- files


def check_writable(path: Path) -> Path:
    """The nearest existing folder of a folder to write, itself or above it.

    Raises UserError when that is a file or cannot be written to.
    """
    nearest = next(above for above in (path.resolve(), *path.resolve().parents) if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise fail("no folder can be made there", str(path), "give a place that you can write to")
    return nearest


def check_file(path: Path) -> None:
    """Raises UserError for a file that cannot be written or made."""
    if path.is_dir():
        raise fail("the file to write is a folder", str(path), "give a file")
    if not path.parent.is_dir():
        raise fail("the folder of the file does not exist", str(path), f"make {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise fail("the file cannot be written", str(path), "give a place that you can write to")


def decode_text(content: bytes, path: Path) -> str:
    """The text of a file: UTF-8, 16 or 32, with or without a byte order mark. Raises UserError for any other."""
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fix = "save it as UTF-8 (iconv -f cp1252 -t utf-8, if it comes from Windows)"
        raise fail(f"the file is not UTF-8 (byte {content[error.start]:#04x})", f"{path}:{line}", fix) from error


def write_whole(path: Path, text: str) -> None:
    """Writes a text file beside its place and renames it: a full disk leaves the old one as it was."""
    made = path.with_name(f".{path.name}.writing")
    try:
        made.write_text(text, encoding="utf-8")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder, if it is there. It loses its name first: what is half removed must not look whole."""
    if folder.exists():
        going = folder.with_name(f".{folder.name.lstrip('.')}.removed")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going, ignore_errors=True)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to fill, beside its place; at the end it is renamed, so that `folder` is whole or absent.

    Another process may be first: then its folder stays. What killed processes have left is removed.
    """
    import psutil

    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".*.making"):
        if not psutil.pid_exists(int(left.name.split(".")[-2])):
            shutil.rmtree(left, ignore_errors=True)
    made = folder.with_name(f".{folder.name}.{os.getpid()}.making")
    made.mkdir()
    try:
        yield made
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def claiming(folder: Path) -> Iterator[None]:
    """Keeps other processes of this project from writing into the folder during the block.

    A file beside it is locked, which the system does for a killed process, too. Raises UserError when another process
    has it.
    """
    import fasteners

    path = folder.resolve().with_name(f".{folder.resolve().name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = fasteners.InterProcessLock(path)
    while True:
        if not lock.acquire(blocking=False):
            raise fail("another process is writing there", str(folder), "wait until it ends, or give another folder")
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock.lockfile.fileno())):
            break
        lock.release()  # its last owner has just removed it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_disk(folder: Path, needed: int) -> None:
    """Raises UserError when the disk of an existing folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise fail(
            f"too little disk: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed",
            str(folder),
            "free some space or choose another folder",
        )
