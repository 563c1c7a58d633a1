"""The generator: where its files are, what identifies it, and what its license asks for."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_synth.config.errors import UserError
from megatron_synth.config.synthesis import GeneratorConfig
from megatron_synth.core.files import sync_folder
from megatron_synth.core.records import read_text
from megatron_synth.synthesis.documents.counting import ByteCounter, TokenCounter, TokenizerCounter

TOKENIZER = "tokenizer.json"
BLOCK_BYTES = 2**24
MARK = "generator"
EXPORTED = "exported-from.txt"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Generator:
    """What writes the text.

    name: how tables and manifests call it. model: what an engine loads or asks a server for. weights: XXH3 of the folder's
    files; None where it is no folder here. parameters: None where nobody knows. license: None where nobody says.
    """

    name: str
    model: str
    revision: str | None
    weights: str | None
    tokenizer: Path | None
    parameters: int | None
    license: str | None

    def identity(self) -> dict[str, Any]:
        """What a request's key holds of it."""
        return {"name": self.name, "revision": self.revision, "weights": self.weights}

    def counter(self) -> TokenCounter:
        """Counts as it does, where its tokenizer is here."""
        return ByteCounter() if self.tokenizer is None else TokenizerCounter(self.tokenizer)


def generator_of(settings: GeneratorConfig, output: Path, *, export: bool) -> Generator:
    """The generator that the settings name.

    export: write a run's weights to the output's folder; otherwise only what is known without that is told.

    Raises:
        UserError: a folder, a run or a tokenizer is not there.
    """
    if settings.run is not None:
        folder = output / MARK
        if export:
            export_run(Path(settings.run), folder)
        name = f"run {Path(settings.run).name}"
        if not folder.is_dir():
            if not Path(settings.run).is_dir():
                raise UserError(f"generator.run: {settings.run}: no such run directory")
            return Generator(name, str(folder), None, None, _tokenizer(settings, None), settings.parameters, settings.license)
        return _in_folder(settings, name, folder, str(folder))
    assert settings.model is not None
    folder = Path(settings.model)
    if folder.is_dir():
        return _in_folder(settings, folder.resolve().name, folder, settings.model)
    if settings.model.startswith(("/", "./", "../")):
        raise UserError(f"generator.model: {settings.model}: no such folder")
    found = _tokenizer(settings, None)
    return Generator(settings.model, settings.model, settings.revision, None, found, settings.parameters, settings.license)


def _in_folder(settings: GeneratorConfig, name: str, folder: Path, model: str) -> Generator:
    if not (folder / "config.json").is_file():
        raise UserError(f"generator.model: {folder} has no config.json; expected a model in Hugging Face's format")
    license = settings.license or _license(folder)
    parameters = settings.parameters or _parameters(folder)
    return Generator(name, model, settings.revision, digest_of(folder), _tokenizer(settings, folder), parameters, license)


def _tokenizer(settings: GeneratorConfig, folder: Path | None) -> Path | None:
    if settings.tokenizer is not None:
        file = Path(settings.tokenizer)
        if not file.is_file():
            raise UserError(f"generator.tokenizer: {file}: no such file")
        return file
    return folder / TOKENIZER if folder is not None and (folder / TOKENIZER).is_file() else None


def digest_of(folder: Path) -> str:
    """XXH3 of names and contents of a model's files, those that decide what it says."""
    total = xxhash.xxh3_128()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"):
            continue
        if file.name == EXPORTED:
            continue
        total.update(os.fsencode(file.name) + f"\0{file.stat().st_size}\0".encode())
        with open(file, "rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                total.update(block)
    return total.hexdigest()


def _parameters(folder: Path) -> int | None:
    """Elements of all tensors, from the heads of the files."""
    from safetensors import SafetensorError, safe_open

    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    count = 1
                    for size in opened.get_slice(name).get_shape():
                        count *= size
                    total += count
        except (SafetensorError, OSError) as error:
            raise UserError(f"generator.model: {file}: not a readable safetensors file ({error})") from None
    return total or None


def _license(folder: Path) -> str | None:
    """The line `license:` at the head of a README.md, as on the Hub; of one that is `other` its `license_name:`."""
    file = folder / "README.md"
    if not file.is_file():
        return None
    head = read_text(file)[:20_000].split("\n---", 1)[0]
    found = dict(re.findall(r"^(license(?:_name)?):\s*['\"]?([A-Za-z0-9._-]{1,60})", head, re.MULTILINE))
    license = found.get("license")
    return found.get("license_name", license) if license in (None, "other") else license


def export_run(run: Path, folder: Path) -> None:
    """Export a run's newest sound checkpoint, unless that is what the folder holds."""
    from megatron_synth.interop.export import export_to_hf, newest_checkpoint

    checkpoint = newest_checkpoint(run)
    source = os.fsencode(f"{checkpoint.resolve()}\n")
    if (folder / EXPORTED).is_file() and (folder / EXPORTED).read_bytes() == source:
        return
    if folder.exists():
        raise UserError(
            f"{folder}: exported from another checkpoint than {checkpoint}; choose another output, or name that checkpoint as "
            f"generator.run"
        )
    partial = folder.with_name(f"{folder.name}{PARTIAL}")  # without its mark nobody would know what a folder was made from
    shutil.rmtree(partial, ignore_errors=True)
    export_to_hf(checkpoint, partial)
    (partial / EXPORTED).write_bytes(source)
    sync_folder(partial)
    partial.rename(folder)
