"""The lines of a batch script that choose where the ranks meet, run by bash."""

import re
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def choose(seed: int) -> tuple[int, str]:
    """Port and secret, from a seed of bash's random numbers."""
    script = (ROOT / "slurm" / "train_1b.sbatch").read_text()
    begin, end = script.index("for _ in {1..100}"), script.index("export MASTER_ADDR")
    text = f'RANDOM={seed}\nMASTER_ADDR=127.0.0.1\n{script[begin:end]}\necho "$MASTER_PORT $INFINI_TRAIN_SECRET"'
    done = subprocess.run(["bash", "-uc", text], capture_output=True, text=True, check=True)
    port, secret = done.stdout.split()
    return int(port), secret


def test_the_ranks_meet_at_a_free_port_with_a_secret_of_their_own() -> None:
    port, secret = choose(7)
    assert 10000 <= port < 30000
    assert re.fullmatch("[0-9a-f]{32}", secret)
    with socket.create_server(("127.0.0.1", port)):
        other_port, other_secret = choose(7)
    assert other_port != port
    assert other_secret != secret
