"""What is started without torchrun: one process, or a sentence."""

import os

import pytest

from megatron_pd.errors import UserError
from megatron_pd.megatron.launch import be_one_process_without_torchrun

RENDEZVOUS = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "6000"}
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of its own, without a launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in {*RENDEZVOUS, "LOCAL_RANK", *TASKS}}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_from_a_prompt_it_is_one_process(environment: dict[str, str]) -> None:
    environment["MASTER_ADDR"] = "node0"  # of a launch script's, say
    be_one_process_without_torchrun()
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("0", "1")
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert 0 < int(environment["MASTER_PORT"]) < 65536


def test_under_torchrun_nothing_changes(environment: dict[str, str]) -> None:
    environment.update(RENDEZVOUS, SLURM_STEP_NUM_TASKS="8")
    before = dict(environment)
    be_one_process_without_torchrun()
    assert environment == before


@pytest.mark.parametrize("name", TASKS)
def test_processes_that_do_not_know_of_each_other_are_refused(
    environment: dict[str, str], name: str
) -> None:
    environment[name] = "1"
    be_one_process_without_torchrun()
    for variable in RENDEZVOUS:
        del environment[variable]
    environment[name] = "4"
    with pytest.raises(UserError, match=f"started 4 processes \\({name}\\)"):
        be_one_process_without_torchrun()


@pytest.mark.parametrize("missing", RENDEZVOUS)
def test_half_of_a_launchers_variables_is_refused(
    environment: dict[str, str], missing: str
) -> None:
    environment.update({k: v for k, v in RENDEZVOUS.items() if k != missing})
    with pytest.raises(UserError, match=f"but no {missing}: torchrun sets all four"):
        be_one_process_without_torchrun()
