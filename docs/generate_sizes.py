"""Writes the table of the shipped runs into docs/slurm.md: python docs/generate_sizes.py. A test keeps it in step."""

from pathlib import Path

from infini_train.config.files import load_run, scale_sizes
from infini_train.plan.hardware import load_hardware
from infini_train.plan.parts import find_parts
from infini_train.plan.peak import find_peak
from infini_train.plan.rehearsal import find_costs
from infini_train.plan.timing import predict

PAGE = Path(__file__).resolve().parent / "slurm.md"
BEGIN, END = "<!-- written by docs/generate_sizes.py -->", "<!-- end -->"
RUNS = ("1b", "3b", "8b")


def render() -> str:
    """A row for each scale of each run, on H100."""
    lines = [
        "| Run | Nodes | Layout | Tokens per step | States | Activations | Peak | Tokens/s | MFU | Hours |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    return "\n".join(lines + [_row(name, size) for name in RUNS for size in (None, *scale_sizes(name))])


def _row(name: str, world_size: int | None) -> str:
    config, hardware = load_run(name, (), world_size), load_hardware("h100")
    parallel, train = config.parallel, config.train
    part, costs, found = find_parts(config)[0], find_costs(config, on_cuda=True), predict(config, hardware)
    peak = find_peak(config, costs, part, part.device, part.carried_bytes)
    sizes = {way: getattr(parallel, f"{way}_size") for way in ("tensor", "context", "data", "pipeline")}
    layout = " x ".join(f"{way} {size}" for way, size in sizes.items() if size > 1)
    nodes = parallel.model_size * (parallel.data_size or 1) // hardware.devices_per_node
    hours = train.total_steps * found.step_s / 3600
    gigabytes = " | ".join(f"{value / 1e9:.1f} GB" for value in (peak.states, peak.activations, peak.peak))
    return (
        f"| `{name}` | {nodes} | {layout} | {train.tokens_per_step / 1e6:.1f}M | {gigabytes}"
        f" | {found.tokens_s:,.0f} | {found.mfu:.0%} | {hours:,.1f} |"
    )


def fill(page: str) -> str:
    """The page with the table between its two marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{render()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
