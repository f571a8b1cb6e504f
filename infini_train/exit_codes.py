"""Exit codes of infini-train, infini-data, infini-launch and the batch scripts. Imports no torch.

    0         done
    1         the run failed; its last checkpoint stays, and a retry goes on from it
    2         something that was given is wrong; nothing was changed, and a retry would find the same
    3         this rank's node is at fault (preflight); the batch script leaves it out of the next start; what is
              wrong on all nodes is a 2
    4         training diverged; a retry from the last checkpoint would diverge again
    75        of a batch script only: stopped early on a cluster that does not requeue; the next job continues
    128 + N   ended by signal N. 129, 130 and 143 (SIGHUP, SIGINT, SIGTERM): asked to stop, and saved

The batch scripts write them as numbers: slurm/templates/train.sbatch.j2.
"""

import signal

DONE = 0
FAILED = 1
MISTAKE = 2
BAD_NODE = 3
DIVERGED = 4
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a run that gets one saves and ends


def of_signal(number: int) -> int:
    """The code of a process that this signal ended, or asked to stop."""
    return 128 + number


INTERRUPTED = of_signal(signal.SIGINT)
TERMINATED = of_signal(signal.SIGTERM)
STOPPED = tuple(map(of_signal, STOP_SIGNALS))


def of_process(returncode: int) -> int:
    """The code of a process as a shell reports it; `subprocess` gives -N for signal N."""
    return returncode if returncode >= 0 else of_signal(-returncode)
