"""The demo's runner with quick stages, its commands by Megatron's own parser, its report."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from demo import report
from demo.progress import progress_on
from demo.runner import Runner, StageError, run_to_exit_status, share_done
from demo.stages import DISTILLATION, Demo, ModelSize, Stage
from megatron.training.arguments import parse_args
from rich.console import Console

from megatron_pd.megatron.arguments import add_pd_arguments, pd_config_from_args

EXAMPLES = Path(__file__).parents[2] / "examples"

# Appends a line to `counts` each time it runs, and fails until the file `ready` exists.
NEEDS_READY = """
import pathlib, sys
with open("counts", "a") as counts: counts.write("run\\n")
print("words of the stage")
sys.exit(not pathlib.Path("ready").exists())
"""

RUN_A_SLEEPER = """
import sys
from pathlib import Path
from demo.runner import Runner, run_to_exit_status
from demo.stages import Stage

child = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
if Path("awake").exists():
    child = "pass"
runner = Runner(Path("folder"), {})
stages = [
    Stage("before", lambda: Path("before").touch(exist_ok=False)),
    Stage("asleep", [sys.executable, "-c", child]),
]
sys.exit(run_to_exit_status(lambda: runner.run(stages), runner, "`make sleep` goes on"))
"""


def command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed, with every duration as 0.0."""
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    return [" ".join("0.0" if word[0].isdigit() else word for word in line) for line in words]


def test_a_line_when_a_stage_begins_and_one_when_it_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = Runner(tmp_path, {})
    runner.run([Stage("think", lambda: None), Stage("do it!", command("print('done')"))])
    assert lines_of(capsys) == [
        "[1/2] think begins",
        "[1/2] think took 0.0 s",
        "[2/2] do it! begins",
        "[2/2] do it! took 0.0 s",
    ]
    log = runner.log_of("do it!")
    assert log == tmp_path / "logs" / "do-it.log"
    first, *rest = log.read_text().splitlines()
    assert shlex.split(first)[0] == sys.executable and rest == ["done"]
    assert set(runner.seconds) == {"think", "do it!"}


def test_a_failed_stage_says_why_and_a_second_run_goes_on_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    once = []
    stages = [Stage("first", lambda: once.append(1)), Stage("second", command(NEEDS_READY))]

    def attempt() -> int:
        runner = Runner(tmp_path / "run", {"size": 1})
        return run_to_exit_status(lambda: runner.run(stages), runner, again="`make it` goes on")

    assert attempt() == 1
    error = capsys.readouterr().err
    assert '"second" failed' in error and "words of the stage" in error
    assert "`make it` goes on." in error
    Path("ready").touch()
    assert attempt() == 0
    first, *others = lines_of(capsys)
    assert first == "[1/2] first was done before, in 0.0 s"
    assert others == ["[2/2] second begins", "[2/2] second took 0.0 s"]
    assert attempt() == 0
    assert once == [1] and Path("counts").read_text().count("run") == 2


def test_other_settings_and_forgetting_start_anew(tmp_path: Path) -> None:
    done = []

    def run(**settings: int) -> Runner:
        runner = Runner(tmp_path / "run", settings)
        runner.run([Stage("only", lambda: done.append(settings))])
        return runner

    run(size=1)
    (tmp_path / "run" / "leftover").touch()
    run(size=1)
    assert (tmp_path / "run" / "leftover").exists()
    run(size=2)
    assert not (tmp_path / "run" / "leftover").exists()
    run(size=2).forget()
    run(size=2)
    assert done == [{"size": 1}, {"size": 2}, {"size": 2}]


def test_another_attempt_replaces_the_traces_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    traces = tmp_path / "traces"
    code = "import os, pathlib; os.makedirs('traces', exist_ok=True)\n"
    code += "pathlib.Path(f'traces/{os.getpid()}').touch()\n" + NEEDS_READY
    stage = Stage("leave traces", command(code), replaces=traces)
    with pytest.raises(StageError):
        Runner(tmp_path / "run", {}).run([stage])
    stopped = set(traces.iterdir())
    Path("ready").touch()
    Runner(tmp_path / "run", {}).run([stage])
    assert len(stopped) == 1 and len(set(traces.iterdir()) - stopped) == 1
    assert not stopped & set(traces.iterdir())


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Starts a run of two stages, of which the second sleeps until the file `awake` exists."""
    processes = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            command(RUN_A_SLEEPER),
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def sleeping_pid(folder: Path) -> int:
    """Of the command, as soon as it sleeps."""
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert time.monotonic() < deadline, "the stage never began"
        time.sleep(0.05)
    return int((folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_command_too_and_a_second_run_goes_on(
    tmp_path: Path, sleeper: Callable[[], subprocess.Popen], number: signal.Signals
) -> None:
    stopped = sleeper()
    pid = sleeping_pid(tmp_path)
    stopped.send_signal(number)
    output, error = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + number
    assert output.splitlines()[-1] == "[2/2] asleep begins"
    sentence = 'stopped during "asleep"; `make sleep` goes on.'
    assert error.strip() == sentence
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

    (tmp_path / "awake").touch()
    second = sleeper()
    output, error = second.communicate(timeout=60)
    assert second.returncode == 0 and not error
    assert "[1/2] before was done before" in output and "[2/2] asleep took" in output


def test_stop_ends_the_commands_of_other_threads_and_lets_none_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    runner = Runner(tmp_path / "run", {})
    with ThreadPoolExecutor(1) as pool:
        asleep = pool.submit(runner.run_stage, Stage("asleep", command(code)))
        sleeping_pid(tmp_path)
        runner.stop()
        with pytest.raises(StageError, match='"asleep" failed'):
            asleep.result(timeout=60)
    with pytest.raises(StageError, match="not begun"):
        runner.run_stage(Stage("next", command("open('began', 'w')")))
    assert not Path("began").exists()


def test_when_nobody_reads_the_lines_it_stops_without_a_traceback(
    tmp_path: Path, sleeper: Callable[[], subprocess.Popen]
) -> None:
    process = sleeper()
    sleeping_pid(tmp_path)
    (tmp_path / "awake").touch()
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    os.kill(sleeping_pid(tmp_path), signal.SIGTERM)  # its stage fails; the message goes to stderr
    error = process.stderr.read()
    assert process.wait(timeout=60) == 1 and "Traceback" not in error

    process = sleeper()
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    assert error.startswith("stopped, as nobody reads") and "Traceback" not in error


def test_on_a_terminal_there_are_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress_on(stream, ["done", "half done"]) as progress:
        progress.skip("done", 1.0)
        progress.begin("half done")
        progress.advance(0.5)
    shown = stream.getvalue()
    assert "half done" in shown and "100%" in shown and "50%" in shown and "begins" not in shown


@pytest.mark.parametrize(
    "log, share",
    [
        ("", 0.0),
        (" [x] iteration       10/     200 | lm\n iteration       50/     200 | lm", 0.25),
        ("dump: 10%|█   | 1/10\rdump: 40%|██████    | 4/10 [00:01<00:02", 0.4),
    ],
)
def test_how_far_a_command_is(tmp_path: Path, log: str, share: float) -> None:
    (tmp_path / "log").write_text(log)
    assert share_done(tmp_path / "log") == share


# --- what it runs ---------------------------------------------------------------------------------


def test_megatron_takes_the_training_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Demo(seed=3)
    stages = {stage.name: stage.command for stage in demo.stages()}
    expected = {
        "train the teacher": (demo.teacher, False),
        "train the student, LM only": (demo.student, False),
        DISTILLATION: (demo.student, True),
    }
    for name, (size, distilled) in expected.items():
        words = list(stages[name])
        monkeypatch.setattr(sys, "argv", words[words.index("megatron_pd.pretrain") :])
        args = parse_args(add_pd_arguments)
        assert (args.num_layers, args.train_iters, args.seed) == (size.layers, size.iterations, 3)
        assert args.micro_batch_size * demo.processes == args.global_batch_size
        config = pd_config_from_args(args)
        assert (config is not None) is distilled


def test_a_training_of_one_process_has_the_whole_batch() -> None:
    demo = Demo()
    words = demo.training("m", "student", demo.student, "--seed", "9", processes=1)
    assert "--nproc-per-node=1" in words
    assert words[words.index("--micro-batch-size") + 1] == str(demo.global_batch)
    assert words[-2:] == ["--seed", "9"]


def test_the_text_is_split_by_files_and_by_seed(tmp_path: Path) -> None:
    small = ModelSize(layers=1, hidden=32, iterations=10, lr=1e-3, decay_iterations=2)
    texts = {}
    for seed in (1, 2):
        demo = Demo(
            seed, root=tmp_path, student=small, text_bytes=2_000_000, held_out_bytes=200_000
        )
        demo.folder.mkdir()
        demo.write_text()
        for corpus in ("heldout", "teacher", "student"):
            lines = Path(demo.path(f"{corpus}.jsonl")).read_text().splitlines()
            texts[corpus, seed] = [json.loads(line)["text"] for line in lines]
    for seed in (1, 2):
        heldout, teacher, student = (texts[c, seed] for c in ("heldout", "teacher", "student"))
        assert not set(heldout) & set(teacher)
        assert teacher[: len(student)] == student and len(student) < len(teacher)
        size = sum(len(text.encode()) for text in heldout)
        assert size - len(heldout[-1].encode()) < 200_000 <= size
    assert texts["heldout", 1] != texts["heldout", 2]


# --- the report -----------------------------------------------------------------------------------

FIGURES = {
    "seed": 7,
    "teacher_lm_loss": 2.70941,
    "teacher_ece": 0.0061,
    "student_lm_only_lm_loss": 2.99904,
    "student_lm_only_ece": 0.0112,
    "student_pd_lm_loss": 2.90412,
    "student_pd_ece": 0.0182,
    "gain_nats": 0.09492,
    "tokens": {"teacher": 1_433_600, "student": 819_200, "held_out": 160_000, "store": 850_000},
    "store_bytes": 29_000_000,
    "store_bytes_per_token": 34.1,
    "mean_entries_per_token": 33.8,
    "milliseconds_per_step": 168.4,
    "of_them_waiting_for_rows": 0.291,
    "seconds": {"collect text": 1.5, "total": 410.2},
}
TABLE = [
    ["teacher", "2.7094", "0.0061", "1,433,600 tokens"],
    ["student, LM only", "2.9990", "0.0112", "819,200 tokens"],
    ["student, PD*", "2.9041", "0.0182", "819,200 tokens"],
]


def test_markdown_and_table_have_the_figures() -> None:
    text = report.markdown(FIGURES)
    for row in TABLE:
        assert f"| {' | '.join(row)} |" in text
    for part in ("seed 7", "by 0.0949 nats", "29,000,000 bytes", "168 ms", "0.29 ms", "| 410.2 |"):
        assert part in text
    stream = io.StringIO()
    Console(file=stream, width=100).print(report.summary(FIGURES))
    rows = [line.strip("│").split("│") for line in stream.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == TABLE


def test_step_and_wait_leave_out_the_first_interval() -> None:
    interval = (
        " iteration {n}/ 30 | elapsed time per iteration (ms): {step} | lm loss: 1.0 |\n"
        "    teacher-rows ...................................: (0.01, {wait})\n"
    )
    figures = [(10, 900.0, 7.0), (20, 100.0, 0.25), (30, 140.0, 0.75)]
    log = "".join(interval.format(n=n, step=step, wait=wait) for n, step, wait in figures)
    assert report.step_and_wait(log) == (120.0, 0.5)


def test_the_curves_are_of_what_tensorboard_got(tmp_path: Path) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    losses = np.linspace(6, 3, 40)
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for step, loss in enumerate(losses, 1):
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("kd loss", loss - 1, step)
            writer.add_scalar("alpha", 0.9, step)
    scalars = report.read_scalars(tmp_path / "events")
    steps, values = scalars["lm loss"]
    np.testing.assert_array_equal(steps, np.arange(1, 41))
    np.testing.assert_allclose(values, losses, rtol=1e-6)

    images = []
    for shift in (0.0, 0.5):
        lower = {"lm loss": (steps, values - shift)}
        curves = {"teacher": scalars, "student_lm_only": lower, "student_pd": scalars}
        report.plot_curves(curves, FIGURES, tmp_path / "curves.png")
        images.append(imread(tmp_path / "curves.png"))
    assert images[0].shape == images[1].shape and images[0].shape[1] >= 1500
    assert (images[0] != images[1]).any(), "the plot doesn't depend on its curves"
