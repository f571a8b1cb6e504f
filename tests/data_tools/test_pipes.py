"""A command whose output is read ends with the process that reads it."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READER = """\
import time
from data_tools.pipes import open_pipe
stream = open_pipe("pipe:sh -c 'echo $$; exec sleep 600'")
print(stream.readline().decode().strip(), flush=True)
time.sleep(600)
"""


def test_no_command_outlives_a_killed_reader():
    with subprocess.Popen([sys.executable, "-c", READER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        command = Path("/proc") / reader.stdout.readline().strip()
        reader.kill()
    deadline = time.monotonic() + 20
    while command.exists() and command.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.02)
