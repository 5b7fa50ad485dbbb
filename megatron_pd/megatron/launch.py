"""How a run starts: by torchrun or from a prompt, and with flags that Megatron takes."""

import argparse
import contextlib
import io
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import (
    add_megatron_arguments,
    parse_and_validate_args,
    parse_args,
)

from megatron_pd.errors import UserError
from megatron_pd.megatron.arguments import add_pd_arguments

__all__ = [
    "args_at_scale",
    "be_one_process_without_torchrun",
    "config_of_args",
    "default_args",
    "parsed_args",
    "validated_args",
]

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TASKS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpiexec",
}


def be_one_process_without_torchrun() -> None:
    """Without a launcher, set the variables that torchrun sets, for a run of one process.

    Raises:
        UserError: a launcher started several processes that don't know of each other, each of
            which would be a run of its own; or variables of torchrun's are missing.
    """
    given = [name for name in _RENDEZVOUS if name in os.environ]
    if "RANK" in given or "WORLD_SIZE" in given:
        missing = [name for name in _RENDEZVOUS if name not in given]
        if missing:
            raise UserError(
                f"The environment has {' and '.join(given)}, but no {' and '.join(missing)}: "
                "torchrun sets all four. Start by torchrun, or unset them for a run of one process."
            )
        return
    for name, launcher in _TASKS.items():
        if int(os.environ.get(name, "1")) > 1:
            raise UserError(
                f"{launcher} started {os.environ[name]} processes ({name}) without RANK and "
                "WORLD_SIZE, so each would be a run of its own: let it start one torchrun on each "
                "machine, as examples/pretrain_gpt_pd.sbatch does."
            )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def default_args() -> argparse.Namespace:
    """What Megatron's parser makes of no flags at all."""
    return add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([])


def parsed_args(extra_arguments: Callable[[Any], Any]) -> Any:
    """`sys.argv` by Megatron's parser. Raises UserError where Megatron refuses the flags."""
    if "--yaml-cfg" in (argument.partition("=")[0] for argument in sys.argv):
        raise UserError(
            "--yaml-cfg takes the place of all flags in Megatron, of those that it doesn't know "
            "and of this machine's defaults too: give what the file says as flags."
        )
    with _refusals_are_user_errors():
        return parse_args(extra_arguments)


def validated_args(extra_arguments: Callable[[Any], Any]) -> Any:
    """`sys.argv` by Megatron's parser, checked by Megatron, which makes them its own arguments.

    Raises:
        UserError: Megatron refuses the flags.
    """
    with _refusals_are_user_errors():
        return parse_and_validate_args(extra_arguments)


def config_of_args(args: Any) -> Any:
    """What `pretrain()` takes, of a GPT. Raises UserError where Megatron refuses the flags."""
    with _refusals_are_user_errors():
        model = gpt_config_from_args(args)
        model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19.2 leaves it at 8
        return pretrain_cfg_container_from_args(args, model)


@contextlib.contextmanager
def _refusals_are_user_errors() -> Iterator[None]:
    """Megatron refuses flags by exceptions, and many of its assertions have no text: then the
    condition itself is quoted."""
    try:
        yield
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split()) or frame.line
        raise UserError(
            f"Megatron refuses the flags: {reason} ({frame.filename}, line {frame.lineno})."
        ) from error


def args_at_scale(flags: Sequence[str], world_size: int, vocab_size: int | None = None) -> Any:
    """Megatron's validated arguments of a launch line on `world_size` GPUs, of which none is here.

    `padded_vocab_size` is set, by the tokenizer or by `vocab_size` in its place.

    Raises:
        UserError: Megatron refuses the flags, or there is no such tokenizer.
    """
    if vocab_size is not None:  # NullTokenizer adds an end of document
        flags = [*flags, "--tokenizer-type", "NullTokenizer", "--vocab-size", str(vocab_size - 1)]
    before, sys.argv = sys.argv, [sys.argv[0], *flags]
    environment = dict(os.environ)
    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # as examples/launch.sh
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            args = validated_args(add_pd_arguments)
            with _refusals_are_user_errors():
                build_tokenizer(args)
    finally:
        sys.argv = before
        os.environ.clear()
        os.environ.update(environment)
    return args
