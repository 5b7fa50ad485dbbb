"""Runs stages one after another, each once: what was stopped goes on at the unfinished stage."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from demo.progress import progress_on
from demo.stages import Stage

__all__ = ["Interrupted", "Runner", "StageError", "run_to_exit_status", "share_done"]

GRACE_S = 60.0
"""What a command has to end in after SIGTERM; torchrun gives its own processes 30 seconds."""


class StageError(Exception):
    """A stage's command failed."""


class Interrupted(BaseException):
    """A signal asked this process to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Runner:
    """Runs stages in `folder`, with the output of their commands in `logs` under it.

    `settings` are what the results depend on, as JSON has it: with others the folder is emptied.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.unfinished: str | None = None
        """The stage that is running, or that was when the run stopped."""

        self._settings = settings
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopping = False
        self._lock = threading.Lock()  # of the two above
        self._progress_file = folder / "finished-stages.json"
        state = self._read_progress()
        if state.get("settings") != settings:
            shutil.rmtree(folder, ignore_errors=True)
            state = {}
        self.seconds: dict[str, float] = state.get("seconds", {})
        """Of every finished stage, by its name."""

        self.logs.mkdir(parents=True, exist_ok=True)

    def log_of(self, name: str) -> Path:
        """The file that the output of a stage's command is in; its first line is the command."""
        return self.logs / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".log")

    def run(self, stages: Sequence[Stage]) -> None:
        """Run what is unfinished of `stages`; raises StageError where a command fails."""
        with progress_on(sys.stdout, [stage.name for stage in stages]) as progress:
            for stage in stages:
                if stage.name in self.seconds:
                    progress.skip(stage.name, self.seconds[stage.name])
                    continue
                self.unfinished = stage.name
                progress.begin(stage.name)
                start = time.monotonic()
                self.run_stage(stage, progress.advance)
                self.seconds[stage.name] = round(time.monotonic() - start, 1)
                self._write_progress()
                self.unfinished = None
                progress.end(self.seconds[stage.name])

    def run_stage(self, stage: Stage, show: Callable[[float], None] = lambda share: None) -> None:
        """Run one stage, finished before or not, and tell `show` how far it is.

        Raises StageError, with the end of the log, if its command fails. What stops this call stops
        the command.
        """
        if stage.replaces:
            shutil.rmtree(stage.replaces, ignore_errors=True)
        if callable(stage.command):
            stage.command()
        else:
            self._run_command(stage.name, stage.command, show)

    def stop(self) -> None:
        """Stop the commands that other threads run and let none begin: their calls raise
        StageError."""
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            _terminate(process)

    def forget(self) -> None:
        """Let the next run start anew."""
        self._progress_file.unlink()

    def _run_command(
        self, name: str, command: Sequence[str], show: Callable[[float], None]
    ) -> None:
        log = self.log_of(name)
        with self._lock:
            if self._stopping:
                raise StageError(f'"{name}" was not begun')
            process = _start(command, log)
            self._running.add(process)
        try:
            while process.poll() is None:
                time.sleep(0.25)
                show(share_done(log))
        finally:
            _terminate(process)
            with self._lock:
                self._running.discard(process)
        if process.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            raise StageError(f'"{name}" failed; the end of {log}:\n{tail}')

    def _read_progress(self) -> dict[str, Any]:
        try:
            return json.loads(self._progress_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def _write_progress(self) -> None:
        new = self._progress_file.with_suffix(".new")
        new.write_text(json.dumps({"settings": self._settings, "seconds": self.seconds}))
        new.replace(self._progress_file)


def run_to_exit_status(run: Callable[[], None], runner: Runner, again: str) -> int:
    """Call `run` and return the process's exit status: 1 after a failed stage, 128 + n after
    signal n. Both say `again` on the standard error: which command goes on, and where."""
    try:
        with raising_on_signals():
            run()
    except StageError as error:
        print(f"error: {error}\n{again}.", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the lines, as in `make demo | head`, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"stopped, as nobody reads the output; {again}.", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except Interrupted as interrupted:
        during = f' during "{runner.unfinished}"' if runner.unfinished else ""
        print(f"\nstopped{during}; {again}.", file=sys.stderr)
        return 128 + interrupted.number
    return 0


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raises Interrupted at the first SIGINT, SIGTERM or SIGHUP, and ignores those after it, so
    that nothing cuts the clean-up short. What is ignored already, as under nohup, stays so."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_done(log: Path) -> float:
    """How far a command is, from the last progress that Megatron or tqdm wrote to its log."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        tail = file.read().decode(errors="replace")
    if iterations := re.findall(r"iteration +(\d+)/ *(\d+)", tail):
        done, total = map(int, iterations[-1])
        return done / total
    if percents := re.findall(r"(\d+)%\|", tail):
        return int(percents[-1]) / 100
    return 0.0


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own; the log is the command and its output."""
    with open(log, "w") as output:
        output.write(shlex.join(command) + "\n")
        output.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
            start_new_session=True,
        )


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """End a command that is still running, and its process group."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
