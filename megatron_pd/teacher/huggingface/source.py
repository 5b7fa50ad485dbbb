"""A Hugging Face folder or GGUF file, and what transformers makes of it.

The files may come from anywhere. So no code of theirs runs (`trust_remote_code`), no pickle is
read, nothing is fetched, and whatever transformers says against them becomes a UserError.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_pd.errors import UserError
from megatron_pd.teacher.fingerprint import content_fingerprint

__all__ = ["Source"]

_INDEX = "model.safetensors.index.json"
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    folder  of config.json and model*.safetensors, or of the GGUF file.
    gguf    the name of the GGUF file in it; None: safetensors.
    """

    folder: Path
    gguf: str | None

    @classmethod
    def of(cls, path: str) -> Source:
        """Raises UserError for what holds no model, or one that is not read; for a missing library,
        with the command that installs it."""
        _check_installed("transformers", "hf", f"--hf-model {path}")
        given = Path(path)
        if given.suffix == ".gguf" and given.is_file():
            for library in ("gguf", "accelerate"):
                _check_installed(library, "gguf", f"--hf-model {path} (GGUF)")
            return cls(given.parent, given.name)
        if not given.is_dir():
            raise UserError(
                f"--hf-model {path}: there is no such folder or .gguf file. Nothing is fetched: "
                "give a folder as save_pretrained writes it, or as it was downloaded."
            )
        _check_folder(given)
        return cls(given, None)

    def __str__(self) -> str:
        return str(self.folder / self.gguf if self.gguf else self.folder)

    def config(self) -> Any:
        """transformers' configuration of the model."""
        from transformers import AutoConfig

        with self._refusing("configuration"):
            return AutoConfig.from_pretrained(self.folder, gguf_file=self.gguf, **_LOCAL)

    def tokenizer(self) -> Any:
        """transformers' tokenizer: that of the folder, else the one inside of the GGUF file."""
        from transformers import AutoTokenizer

        in_folder = (self.folder / "tokenizer.json").is_file()
        with self._refusing("tokenizer"):
            return AutoTokenizer.from_pretrained(
                self.folder, gguf_file=None if in_folder else self.gguf, **_LOCAL
            )

    def model(self, config: Any, dtype: torch.dtype | None) -> Any:
        """The model in evaluation mode, on the CPU, every weight of it from the files.

        Args:
            dtype: of the weights; None: that of the files (GGUF: float32).
        """
        import transformers

        options: dict[str, Any] = dict(_LOCAL)
        if self.gguf is None:
            options["use_safetensors"] = True
        else:
            options["gguf_file"] = self.gguf
            if hasattr(transformers, "GgufConfig"):  # before it, weights always became dense
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with self._refusing("model"):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=config,
                dtype=dtype or ("auto" if self.gguf is None else torch.float32),
                # A configuration may name kernels to be fetched; these are transformers' own.
                attn_implementation=None,
                experts_implementation=None,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **options,
            )
            model, found = loaded
        for name in ("missing_keys", "mismatched_keys", "error_msgs"):
            if wrong := sorted(map(str, found.get(name) or ())):
                raise UserError(
                    f"--hf-model {self}: its weights don't fit its configuration: {len(wrong):,} "
                    f"{name.replace('_', ' ')}, such as {wrong[0]}. Take both from one model."
                )
        if unused := sorted(map(str, found.get("unexpected_keys") or ())):
            print(
                f"note: {self}: {len(unused):,} weights are in the files but not in the model, "
                f"such as {unused[0]}.",
                file=sys.stderr,
            )
        return model.eval()

    def fingerprint(self) -> str:
        """`content_fingerprint` of the files that rows depend on."""
        return content_fingerprint(
            self.folder, [self.gguf] if self.gguf else ["config.json", "**/*.safetensors"]
        )

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """A hostile or damaged file makes transformers and its libraries raise anything. Progress
        bars and warnings of theirs aren't shown."""
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                yield
        except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            text = " ".join(str(error).split())
            if "trust_remote_code" in text:
                reason = "it needs Python code of its own, which is never run"
            else:
                reason = f"{type(error).__name__}: {text[:_REASON_LENGTH]}"
            raise UserError(
                f"--hf-model {self}: its {what} cannot be loaded ({reason}). Copy the files again, "
                "or try another version of transformers."
            ) from error


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def _check_installed(library: str, extra: str, who: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise UserError(
            f"{who} needs {library}, which is not installed: pip install 'megatron-pd[{extra}]'."
        )


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"give the file, such as {folder / ggufs[0]}" if ggufs else "give the model's folder"
        raise UserError(f"--hf-model {folder} has no config.json: {hint}.")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"--hf-model {folder} holds an adapter: merge it into its model (merge_and_unload of "
            "peft, then save_pretrained) and give that folder."
        )
    if (folder / "model.safetensors").is_file():
        return
    if not (folder / _INDEX).is_file():
        raise UserError(
            f"--hf-model {folder} has neither model.safetensors nor {_INDEX}: only safetensors are "
            "read, as pickle files (.bin, .pt) can run code. Save the model again with "
            "save_pretrained."
        )
    try:
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        wrong = [name for name in names if Path(name).name != name or name[-12:] != ".safetensors"]
        reason = f"it names the file {wrong[0]!r}" if wrong else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise UserError(f"{folder / _INDEX} is no index of safetensors ({reason}): copy it again.")
