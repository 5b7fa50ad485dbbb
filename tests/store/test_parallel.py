"""Jobs in several processes stop cleanly, whenever they are told to."""

from __future__ import annotations

import subprocess
import sys

SLOW_TO_LEAVE = """
import multiprocessing, os, signal, sys, threading, time
from megatron_pd.store.admin.parallel import run_jobs

def work(job, report):
    threading.Thread(target=time.sleep, args=(1.5,)).start()  # keeps its process for a while
    return job

def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

try:
    for done, _ in enumerate(run_jobs(work, [1, 2], 2), 1):
        if done == 2:
            threading.Thread(target=interrupt).start()
except KeyboardInterrupt:
    print(len(multiprocessing.active_children()), "left")
    sys.exit(130)
"""


def test_interrupt_while_the_workers_leave_waits_for_them():
    """The last instant: all jobs are done. An interrupted wait left a thread behind that could take
    a lock to its grave, and the process hung at its end."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW_TO_LEAVE], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "0 left\n"), done.stderr
