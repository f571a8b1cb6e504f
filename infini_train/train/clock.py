"""How long steps and their phases take, and what a profiler records of them."""

import time
from typing import Any

import torch
from torch.profiler import profile

from infini_train.atomic_files import replacing, write_atomic
from infini_train.model.flops import training_flops_per_token
from infini_train.parallel import device
from infini_train.train.session import Session
from infini_train.train.step import StepResult

PHASES = ("data", "wait", "forward", "backward", "optimizer")


class Clock:
    """Time of steps and of their phases since the last report; validation and saving do not count."""

    def __init__(self, session: Session) -> None:
        train = session.config.train
        dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
        self.peak_flops = device.matmul_peak_flops(dtype)
        self.flops_per_step = train.tokens_per_step * training_flops_per_token(
            session.config.model, train.window_tokens
        )
        self.processes = session.place.world[1]
        self.tokens_per_step = train.tokens_per_step
        self.pause()
        self.reset()

    def reset(self) -> None:
        """Begins a new interval between reports."""
        self.steps, self.interval_s = 0, 0.0
        self.phases_s = dict.fromkeys(PHASES, 0.0)

    def pause(self) -> None:
        """From now on time counts for the next step."""
        self._begin = time.perf_counter()

    def start_step(self) -> None:
        """Ends the wait for data: the batch has arrived."""
        self._data_s = time.perf_counter() - self._begin
        self.phases_s["data"] += self._data_s

    def end_step(self, result: StepResult) -> tuple[float, float]:
        """Adds a finished step.

        Returns:
            Seconds of this rank's own work before it had to wait for others (data and forward), and of the whole step.
        """
        step_s = time.perf_counter() - self._begin
        self.steps += 1
        self.interval_s += step_s
        for phase, seconds in result.seconds.items():
            self.phases_s[phase] += seconds
        return self._data_s + result.seconds.get("forward", 0.0), step_s

    def values(self) -> dict[str, float]:
        """Speed, and the phases of the mean step since the last report."""
        step_s = self.interval_s / self.steps
        phases = {f"seconds/{phase}": seconds / self.steps for phase, seconds in self.phases_s.items()}
        return {
            "speed/step_s": step_s,
            "speed/tokens_per_s": self.tokens_per_step / step_s,
            "speed/mfu": self.flops_per_step / step_s / self.peak_flops / self.processes,
            "speed/peak_memory_bytes": device.peak_memory_bytes(),
            **phases,
        }


class profiled:
    """Records the next step with torch.profiler if the config asks for it; writes a Chrome trace and a table."""

    def __init__(self, session: Session) -> None:
        self.step = session.step + 1
        self.folder = session.config.directory / "profile"
        self.side_files = session.side_files
        wanted = session.place.is_first and self.step in session.config.log.profile_steps
        self.profiler: Any = profile(activities=device.profiled_activities()) if wanted else None

    def __enter__(self) -> None:
        if self.profiler is not None:
            self.profiler.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.profiler is None:
            return
        self.profiler.__exit__(*error)
        name = f"step-{self.step:08d}"
        with self.side_files.tolerate(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{name}.json", durable=False) as partial:
                self.profiler.export_chrome_trace(str(partial))
            table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=40)
            write_atomic(self.folder / f"{name}.txt", table, durable=False)
