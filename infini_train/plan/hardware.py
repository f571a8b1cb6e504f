"""What a cluster's machines are capable of: the schema of configs/hardware/*.yaml. Imports no torch."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from infini_train.config.errors import ConfigError, naming
from infini_train.config.files import read_tree, resolve
from infini_train.config.values import Few, to_json

NOT_POSITIVE = ("reserved_gb", "launch_us", "node_latency_us", "network_latency_us")  # may be 0
SHARES = (
    "matmul_efficiency",
    "attention_efficiency",
    "short_attention_efficiency",
    "memory_efficiency",
    "all_reduce_efficiency",
    "all_gather_efficiency",
    "reduce_scatter_efficiency",
    "send_efficiency",
)
LEAST = 1e-9  # of what may not be 0
Measure = Annotated[float, Field(le=1e12, allow_inf_nan=False)]
SHORT_TOKENS, LONG_TOKENS = 64, 256  # lengths that the two shares of the attention kernel belong to


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Nodes of equal devices. Published peaks, and beside each the share of it that is assumed to be reached.

    A process is a rank on a device. On CPU a device is a core.
    """

    name: str  # shown in tables
    device: Literal["cuda", "cpu"] = "cuda"  # cuda: launches run ahead of the work, and norms are one kernel
    devices_per_node: Few  # GPUs of a node, or cores
    memory_gb: Measure  # of a device, in 1e9 bytes
    reserved_gb: Measure = 0.0  # of it, what driver, communication library and fragmentation take
    bf16_tflops: Measure  # peak of dense matrix products, 1e12 operations a second
    fp32_tflops: Measure  # the same in fp32
    matmul_efficiency: Measure = 1.0  # share of the peak that large products of the model reach
    attention_efficiency: Measure = 1.0  # and the attention kernel, in segments of 256 tokens or more
    short_attention_efficiency: Measure = 1.0  # and in those of 64 or fewer
    memory_gb_s: Measure  # bandwidth of the device's memory, 1e9 bytes a second
    memory_efficiency: Measure = 1.0  # share of it that elementwise operations reach
    launch_us: Measure = 0.0  # host's time to start one operation
    node_gb_s: Measure  # what a device sends to others of its node, one direction
    node_latency_us: Measure = 0.0  # of one message there
    network_gb_s: Measure  # what a device sends to other nodes, one direction
    network_latency_us: Measure = 0.0  # of one message there
    all_reduce_efficiency: Measure = 1.0  # share of both bandwidths that a collective reaches, by a ring's bytes
    all_gather_efficiency: Measure = 1.0
    reduce_scatter_efficiency: Measure = 1.0
    send_efficiency: Measure = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                continue
            least = 0 if field.name in NOT_POSITIVE else None
            if value < 0 or (value < LEAST and least is None):
                raise ConfigError(f"{field.name}: must be {'0 or more' if least == 0 else 'positive'}, not {value:g}")
        for name in SHARES:
            if getattr(self, name) > 1:
                raise ConfigError(f"{name}: is a share of the peak, at most 1, not {getattr(self, name):g}")
        if self.reserved_gb >= self.memory_gb:
            raise ConfigError(f"reserved_gb: {self.reserved_gb:g} leaves nothing of memory_gb {self.memory_gb:g}")

    @property
    def usable_bytes(self) -> float:
        """Memory of a device that a rank may fill."""
        return 1e9 * (self.memory_gb - self.reserved_gb)

    def peak_flops(self, precision: str) -> float:
        """Operations a second that utilisation is measured against."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)

    def attention_flops(self, precision: str, keys: int) -> float:
        """Operations a second of the attention kernel where a query sees this many keys.

        Between the two lengths that shares are given for, the share goes with the logarithm.
        """
        reach = math.log(keys / SHORT_TOKENS) / math.log(LONG_TOKENS / SHORT_TOKENS)
        long = min(1.0, max(0.0, reach))
        share = (1 - long) * self.short_attention_efficiency + long * self.attention_efficiency
        return self.peak_flops(precision) * share

    def link(self, kind: str, within_node: bool) -> tuple[float, float]:
        """(bytes a second, seconds of latency) of a device's messages in a collective of this kind."""
        speed = self.node_gb_s if within_node else self.network_gb_s
        latency_us = self.node_latency_us if within_node else self.network_latency_us
        share: float = getattr(self, f"{kind.replace('-', '_')}_efficiency")
        return 1e9 * speed * share, 1e-6 * latency_us


@functools.cache
def _validator() -> pydantic.TypeAdapter[Hardware]:
    return pydantic.TypeAdapter(Hardware)


def load_hardware(name: str) -> Hardware:
    """The description of this name (configs/hardware/) or path, validated.

    Raises:
        ConfigError: no such file, or something in it is wrong.
    """
    path = resolve(name, "hardware")
    return validate_hardware(read_tree(path), str(path))


def validate_hardware(tree: dict[str, Any], source: str) -> Hardware:
    """The tree as a `Hardware`; `source` opens the message of an error."""
    with naming(source):
        text = to_json(tree, "hardware")
    try:
        return _validator().validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        inner = first.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):
            raise ConfigError(f"{source}: {inner}") from error
        shown = ".".join(map(str, first["loc"])) or "hardware"
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = ", ".join(field.name for field in dataclasses.fields(Hardware))
            raise ConfigError(f"{source}: {shown}: unknown key; known: {known}") from error
        problem = "is missing; give it a value" if first["type"].startswith("missing") else first["msg"]
        raise ConfigError(f"{source}: {shown}: {problem}") from error
