"""A Llama whose attention has a memory of fixed size: Infini-attention (arXiv 2404.07143), and what is beside it.

This file stands beside the weights of an exported model and is all the code that it needs, with torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Text of any length is read in windows, and what is carried from one to the next (`InfiniCache`) has a fixed size, unless
layers have full attention. Rows may be padded on either side; padding is not read. A row is one document.

Inside a segment of N tokens attention is exact. What is older is read from a matrix M for each key-value head (and, for
the paper's updates, a normaliser z), and mixed in by a gate. Tokens lie in places: a segment has N of them, and the
first one touched by a call may hold tokens of earlier calls.

Legend: B rows, H query heads, K key-value heads, T tokens of the call, G segments touched, R places a segment that are
computed at once, D key size, E value size, W tokens seen before the segment, Z sinks, C chunks, X other sizes.
"""

import copy
import math
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CHUNK = 64  # tokens of one triangular solve of the gated delta rule
READ_NORM_EPS = 0.01
WEAKEST_WRITE, SLOWEST_DECAY = 1 / 16, 1 / 4096
SHARP_FLOOR, TINY = 0.1, 1e-30
# What transformers calls the state in a model's output.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


USUAL: dict[str, Any] = {  # fields of a config, and what they are where config.json leaves them out
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "head_dim": None,
    "value_head_dim": None,
    "rms_norm_eps": 1e-5,
    "rope": {"theta": 10000.0},
    "qkv_bias": False,
    "qk_norm": False,
    "attentions": {"infini": {"kind": "infini", "segment_tokens": 256}},
    "pattern": None,
    "window_tokens": 4096,
    "initializer_range": 0.02,
    "use_cache": True,
    "tie_word_embeddings": False,
}


class InfiniConfig(PretrainedConfig):
    """Llama's fields, and the attention of each layer.

    attentions: fields by name: kind (infini, local, transformer_xl, full), segment_tokens, overlap_tokens (of
    transformer_xl cache_tokens), sink_tokens, update (linear, delta, gated_delta), features (elu, sharp), read
    (segment, token), read_norm, maps, gate (head, query), conv_tokens. pattern: names, repeated over the layers.
    rope: theta, and where waves are scaled as in Llama 3.1 factor, low_freq_factor, high_freq_factor, original_tokens.
    window_tokens: how many tokens are read at a time.
    """

    model_type = "infini"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    def __init__(self, **values: Any) -> None:
        for name, usual in copy.deepcopy(USUAL).items():
            setattr(self, name, values.pop(name, usual))
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.value_head_dim = self.value_head_dim or self.head_dim
        self.pattern = self.pattern or list(self.attentions)
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **values)

    def attention_of(self, layer: int) -> dict[str, Any]:
        """The fields of a layer's attention; the first layer is 0."""
        return self.attentions[self.pattern[layer % len(self.pattern)]]


def overlap_of(attention: dict[str, Any]) -> int:
    """Tokens seen before the segment."""
    return attention.get("overlap_tokens", attention.get("cache_tokens", 0))


class Places(NamedTuple):
    """Where the tokens of a call lie, for layers that cut it alike.

    index_BT: the place of each token, counted from the first of its first segment; the place after all for padding.
    is_new_BGR: places that hold a token of this call. closed_B: segments that end in it. phase_B: tokens of the first
    segment that were there before; past_B: those of earlier segments; length_B: both. mask_BGRX: who sees whom: sinks,
    the W tokens before the segment, the segment. sink_BGZ: which sinks these are. One segment alone has as many places
    as the call has tokens, and they are the tokens.
    """

    segments: int
    segment_tokens: int
    index_BT: Tensor
    is_new_BGR: Tensor
    closed_B: Tensor
    any_closed: bool
    phase_B: Tensor
    past_B: Tensor
    mask_BGRX: Tensor
    q_position_BR: Tensor
    sink_BGZ: Tensor
    length_B: Tensor


class State(NamedTuple):
    """What a layer carries. Keys and values without rotary embedding, of W tokens and of the open segment."""

    k_BKLD: Tensor
    v_BKLE: Tensor
    sink_k_BKZD: Tensor
    sink_v_BKZE: Tensor
    memory_BKDE: Tensor | None = None
    normaliser_BKD: Tensor | None = None  # of the paper's updates
    entering_BKDE: Tensor | None = None  # of gated_delta: M when the open segment began
    before_BJX: Tensor | None = None  # of the convolution


class InfiniCache(Cache):
    """All that is remembered of the text so far. As a value it can be copied, to ask one text several questions."""

    layers = ()  # transformers' own caches keep theirs here

    is_compileable = False
    is_croppable = False
    is_linear = (False,)
    max_batch_size = None

    def __init__(self) -> None:
        self.columns = 0  # tokens and padding
        self.tokens_B: Tensor | None = None  # tokens read of each row, on the CPU
        self.states: list[State] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(part.nbytes for state in self.states or () for part in state if part is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "InfiniCache":
        """The same values, cut from any graph."""
        other = InfiniCache()
        other.columns, other.tokens_B, other.states = self.columns, self.tokens_B, self.states
        other._map(lambda part: part.detach().clone())
        return other

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> None:
        """None: there is no limit."""
        return None

    def activate_past_recording(self) -> None:
        """Nothing: what was written to a memory can't be taken back."""

    def crop(self, tokens_to_remove: int) -> None:
        """Refused."""
        raise NotImplementedError(
            "what was written to the memory can't be taken back; copy the cache before reading on"
        )

    def reset(self) -> None:
        """Forgets everything."""
        self.columns, self.tokens_B, self.states = 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, for beam search."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._map(lambda part: part.repeat_interleave(repeats, 0))

    def _map(self, change: Any) -> None:
        if self.states is not None:
            self.tokens_B = change(self.tokens_B)
            self.states = [State(*(part if part is None else change(part) for part in state)) for state in self.states]


def find_places(attention: dict[str, Any], past_B: Tensor, new_B: Tensor, tokens: int, device: torch.device) -> Places:
    """Where the tokens of a call lie. past_B: tokens read before; new_B: real ones of this call (both on the CPU)."""
    before, sinks = overlap_of(attention), attention.get("sink_tokens", 0)
    is_full = attention["kind"] == "full"
    size = int((past_B + new_B).max()) if is_full else attention["segment_tokens"]
    size = max(size, 1)
    phase_B = past_B if is_full else past_B % size
    ends_B = phase_B + new_B
    segments = max(1, int(-(-ends_B.max() // size)))
    closed_B = torch.zeros_like(ends_B) if is_full else ends_B // size
    place_BT = phase_B[:, None] + torch.arange(tokens)
    index_BT = torch.where(torch.arange(tokens) < new_B[:, None], place_BT, segments * size)
    if segments == 1:  # the tokens themselves are the queries
        row_BGR = place_BT[:, None]
        is_new_BGR = (index_BT < size)[:, None]
        keys = min(size, int(place_BT.max()) + 1)
    else:
        row_BGR = torch.arange(size).expand(len(past_B), segments, -1)
        place_BGR = (torch.arange(segments) * size)[:, None] + row_BGR
        is_new_BGR = (place_BGR >= phase_B[:, None, None]) & (place_BGR < ends_B[:, None, None])
        keys = size
    first_BG = (past_B - phase_B)[:, None] + torch.arange(segments) * size - before  # of the tokens seen
    column_X = torch.arange(before + keys) - before
    exists_BGX = first_BG[..., None] + column_X + before >= 0
    mask_BGRX = exists_BGX[:, :, None] & (column_X <= row_BGR[..., None])
    # Sinks are seen in the places right before all else; there are fewer where the window begins among them.
    sink_BGZ = first_BG.clamp(max=sinks)[..., None] + torch.arange(-sinks, 0)
    seen_BGRZ = (sink_BGZ >= 0)[:, :, None].expand(-1, -1, mask_BGRX.shape[2], -1)
    mask_BGRX = torch.cat((seen_BGRZ, mask_BGRX), -1)
    q_position_BR = row_BGR[:, 0] + before + sinks
    return Places(
        segments, size, index_BT.to(device), is_new_BGR.to(device), closed_B.to(device), bool(closed_B.any()),
        phase_B.to(device), (past_B - phase_B).to(device), mask_BGRX.to(device), q_position_BR.to(device),
        sink_BGZ.clamp(min=0).to(device), past_B.to(device),
    )  # fmt: skip


def put(x_BNTX: Tensor, base_BNLX: Tensor, index_BT: Tensor) -> Tensor:
    """The rows of x at their indices, in place of those of base; those at its length are dropped."""
    base = F.pad(base_BNLX, (0, 0, 0, 1))
    index = index_BT[:, None, :, None].expand(-1, x_BNTX.shape[1], -1, x_BNTX.shape[3])
    return base.scatter(2, index, x_BNTX.to(base.dtype))[:, :, :-1]


def to_segments(x_BNTX: Tensor, places: Places) -> Tensor:
    """(B, N, G, R, X): each token at its place, zeros elsewhere."""
    if places.segments == 1:
        return x_BNTX[:, :, None]
    lanes, heads, _, size = x_BNTX.shape
    empty = x_BNTX.new_zeros(lanes, heads, places.segments * places.segment_tokens, size)
    return put(x_BNTX, empty, places.index_BT).unflatten(2, (places.segments, -1))


def from_segments(x_BNGRX: Tensor, places: Places) -> Tensor:
    """(B, N, T, X): the inverse of `to_segments`."""
    if places.segments == 1:
        return x_BNGRX[:, :, 0]
    x_BNLX = F.pad(x_BNGRX.flatten(2, 3), (0, 0, 0, 1))
    index = places.index_BT[:, None, :, None].expand(-1, x_BNLX.shape[1], -1, x_BNLX.shape[3])
    return x_BNLX.gather(2, index)


def rotate(x: Tensor, position: Tensor, rope: dict[str, Any]) -> Tensor:
    """Rotary embedding of the halves of the last dimension; positions are broadcast against the others."""
    half = x.shape[-1] // 2
    frequency = rope["theta"] ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    if rope.get("factor", 1.0) != 1.0:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        waves = rope["original_tokens"] * frequency / (2 * math.pi)
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequency = torch.lerp(frequency / rope["factor"], frequency, kept)
    angle = position[..., None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def feature_map(x: Tensor, features: str) -> Tensor:
    """Positive features: ELU + 1, or powers of unit length."""
    if features == "elu":
        return x.clamp(max=0).exp() + x.relu()
    level = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-12)
    return F.normalize(level.relu().square().square() + SHARP_FLOOR, dim=-1)


def unit(x: Tensor) -> Tensor:
    """Vectors of unit length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def write_and_read(
    q_BHGRD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, state: State, places: Places, attention: dict[str, Any]
) -> tuple[Tensor, State]:
    """The paper's memory (Eq. 7 to 9): what each segment reads of those before it, and the memory after the call."""
    size, delta = places.segment_tokens, attention["update"] == "delta"
    group = q_BHGRD.shape[1] // k_BKLD.shape[1]
    q_BHGRD = feature_map(q_BHGRD, attention["features"]).float()
    memory, z = state.memory_BKDE, state.normaliser_BKD
    read = []
    for g in range(places.segments):
        q_BKGRD = q_BHGRD[:, :, g].unflatten(1, (-1, group))
        below = (q_BKGRD @ z[:, :, None, :, None]).clamp(min=TINY)
        read.append((q_BKGRD @ memory[:, :, None] / below).flatten(1, 2))
        if not places.any_closed:
            break
        part = slice(g * size, (g + 1) * size)
        feature, v_BKRE = feature_map(k_BKLD[:, :, part], attention["features"]).float(), v_BKLE[:, :, part].float()
        if delta:  # z is zero, and so is what is found, while nothing is written
            v_BKRE = v_BKRE - feature @ memory / (feature @ z[..., None]).clamp(min=TINY)
        closes = (g < places.closed_B)[:, None, None]
        memory = memory + torch.where(closes[..., None], feature.transpose(-1, -2) @ v_BKRE, 0)
        z = z + torch.where(closes, feature.sum(-2), 0)
    return torch.stack(read, 2), state._replace(memory_BKDE=memory, normaliser_BKD=z)


def write_and_read_gated(
    q_BHGRD: Tensor, k_BKGRD: Tensor, v_BKGRE: Tensor, logs: tuple[Tensor, Tensor], state: State, places: Places,
    read_tokens: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """The gated delta rule (arXiv 2412.06464) in chunks (2406.06484): M <- a M, then M <- M + b k (v - k M)^T.

    logs: log(1 - b) and log(a) of each token (B, K, G, R). read_tokens: a token reads all up to itself, else what is
    older than its segment.
    """
    rows, group = k_BKGRD.shape[3], q_BHGRD.shape[1] // k_BKGRD.shape[1]
    size = min(rows, CHUNK)

    def chunks(x: Tensor) -> Tensor:  # (B, N, C, size, X), filled up with tokens that do nothing
        return F.pad(x.float(), (0, 0, 0, -rows % size)).unflatten(3, (-1, size)).flatten(2, 3)

    q, k, v = chunks(unit(q_BHGRD.float())), chunks(unit(k_BKGRD.float())), chunks(v_BKGRE)
    kept, faded = (chunks((log * places.is_new_BGR[:, None])[..., None])[..., 0] for log in logs)
    faded = faded.cumsum(-1)
    decay = faded.exp()[..., None]
    inner = (faded[..., :, None] - faded[..., None, :]).clamp(max=0).exp().tril()
    strength = -torch.expm1(kept)[..., None]
    overlaps = (strength * (k @ k.transpose(-1, -2)) * inner).tril(-1)
    solved = torch.linalg.solve_triangular(
        overlaps, strength * torch.cat((v, decay * k), -1), upper=False, unitriangular=True
    )
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    lasting = (k * inner[..., -1, :, None]).transpose(-1, -2)
    each = k.shape[2] // places.segments  # chunks a segment
    memory, read, entering = state.memory_BKDE, [], []
    q = q.unflatten(1, (-1, group))
    for c in range(k.shape[2]):
        if c % each == 0:
            opened = memory
            if c == 0 and not read_tokens:
                opened = torch.where((places.phase_B > 0)[:, None, None, None], state.entering_BKDE, memory)
            entering.append(opened)
        written = u[:, :, c] - w[:, :, c] @ memory
        if read_tokens:
            older = (q[:, :, :, c] * decay[:, :, None, c]) @ memory[:, :, None]
            inside = (q[:, :, :, c] @ k[:, :, None, c].transpose(-1, -2)) * inner[:, :, None, c]
            read.append(older + inside @ written[:, :, None])
        else:
            read.append(q[:, :, :, c] @ opened[:, :, None])
        memory = decay[:, :, c, -1:] * memory + lasting[:, :, c] @ written
    read_BHGRE = torch.stack(read, 3).flatten(1, 2).unflatten(2, (places.segments, each)).flatten(3, 4)
    state = state._replace(memory_BKDE=memory)
    if not read_tokens:
        later = torch.stack([*entering, memory], 1)
        opened = later[torch.arange(len(later), device=later.device), places.closed_B]
        state = state._replace(entering_BKDE=opened)
    return read_BHGRE[:, :, :, :rows], state


class InfiniNorm(nn.Module):
    """RMSNorm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class InfiniWriting(nn.Linear):
    """What a token says of how it writes: zeros at first, and a bias."""

    def __init__(self, inputs: int, outputs: int, bias_at_first: float) -> None:
        super().__init__(inputs, outputs)
        self.bias_at_first = bias_at_first


class InfiniMaps(nn.Module):
    """The memory's own maps of queries, keys and what is read, less the identity."""

    def __init__(self, config: InfiniConfig) -> None:
        super().__init__()
        heads, size, value_size = config.num_attention_heads, config.head_dim, config.value_head_dim
        self.query = nn.Parameter(torch.zeros(heads, size, size))
        self.key = nn.Parameter(torch.zeros(config.num_key_value_heads, size, size))
        self.read = nn.Parameter(torch.zeros(heads, value_size, value_size))

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, keys and reads; called, so that weights that were moved away are brought back."""
        return self.query, self.key, self.read


class InfiniAttention(nn.Module):
    """Attention of one layer; what it has beside Llama's is in `config.attention_of(layer)`."""

    def __init__(self, config: InfiniConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.attention = {"update": "linear", "features": "elu", **config.attention_of(layer)}
        hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_heads * config.value_head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * config.value_head_dim, hidden, bias=False)
        if config.qk_norm:
            self.q_norm = InfiniNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = InfiniNorm(config.head_dim, config.rms_norm_eps)
        self.has_memory = self.attention["kind"] == "infini"
        self.is_gated_delta = self.has_memory and self.attention["update"] == "gated_delta"
        self.taps = self.attention.get("conv_tokens", 0)
        if self.has_memory:
            self.gate = nn.Parameter(torch.zeros(heads))
            if self.attention.get("gate") == "query":
                self.gate_query = nn.Parameter(torch.zeros(heads, config.head_dim))
            if self.attention.get("read_norm"):
                self.norm_read = InfiniNorm(config.value_head_dim, READ_NORM_EPS)
            if self.attention.get("maps"):
                self.maps = InfiniMaps(config)
            if self.taps:
                self.conv = nn.Parameter(torch.zeros(self.taps, hidden))
            if self.is_gated_delta:
                self.linear_strength = InfiniWriting(hidden, kv_heads, 0.0)
                self.linear_decay = InfiniWriting(hidden, kv_heads, 8.0)

    def initial_state(self, rows: int, x: Tensor) -> State:
        """Nothing read yet."""
        heads, size, value_size = self.config.num_key_value_heads, self.config.head_dim, self.config.value_head_dim
        kept = overlap_of(self.attention)
        if self.attention["kind"] != "full":
            kept += self.attention["segment_tokens"]
        sinks = self.attention.get("sink_tokens", 0)
        state = State(*(x.new_zeros(rows, heads, n, of) for n in (kept, sinks) for of in (size, value_size)))
        if self.has_memory:
            memory = x.new_zeros(rows, heads, size, value_size, dtype=torch.float32)
            state = state._replace(memory_BKDE=memory)
            if not self.is_gated_delta:
                state = state._replace(normaliser_BKD=memory[..., 0])
            elif self.attention.get("read") != "token":
                state = state._replace(entering_BKDE=memory)
        if self.taps:
            state = state._replace(before_BJX=x.new_zeros(rows, self.taps, self.config.hidden_size))
        return state

    def forward(self, x_BTX: Tensor, state: State, places: Places) -> tuple[Tensor, State]:
        near_BTX, state = self._look_back(x_BTX, state, places)
        size = self.config.head_dim
        q_BHTD, k_BKTD = self._heads(self.q_proj(near_BTX), size), self._heads(self.k_proj(near_BTX), size)
        v_BKTE = self._heads(self.v_proj(x_BTX), self.config.value_head_dim)
        if self.config.qk_norm:
            q_BHTD, k_BKTD = self.q_norm(q_BHTD), self.k_norm(k_BKTD)
        before = overlap_of(self.attention)
        length = before + places.segments * places.segment_tokens
        k_BKLD, v_BKLE = (
            put(x, F.pad(old, (0, 0, 0, length - old.shape[2])), places.index_BT + before)
            for x, old in ((k_BKTD, state.k_BKLD), (v_BKTE, state.v_BKLE))
        )
        state = self._keep_sinks(state, k_BKTD, v_BKTE, places)
        q_BHGRD = to_segments(q_BHTD, places)
        out_BHGRE = self._attend(q_BHGRD, k_BKLD, v_BKLE, state, places)
        if self.has_memory:
            read_BHGRE, state = self._remember(q_BHGRD, (k_BKTD, v_BKTE), (k_BKLD, v_BKLE), near_BTX, state, places)
            out_BHGRE = torch.lerp(out_BHGRE, read_BHGRE.to(out_BHGRE.dtype), self._share(q_BHGRD, places))
        out_BTX = from_segments(out_BHGRE, places).transpose(1, 2).flatten(2)
        return self.o_proj(out_BTX), self._keep_recent(state, k_BKLD, v_BKLE, places)

    @staticmethod
    def _heads(x_BTX: Tensor, size: int) -> Tensor:
        return x_BTX.unflatten(-1, (-1, size)).transpose(1, 2)

    def _look_back(self, x_BTX: Tensor, state: State, places: Places) -> tuple[Tensor, State]:
        """Each token and a weighted sum of those just before it."""
        if not self.taps:
            return x_BTX, state
        joined = torch.cat((state.before_BJX, x_BTX), 1)
        out, tokens = x_BTX, x_BTX.shape[1]
        for back in range(1, self.taps + 1):
            out = out + self.conv[back - 1] * joined[:, self.taps - back : self.taps - back + tokens]
        new_B1 = places.is_new_BGR.flatten(1).sum(1)[:, None]
        last = (new_B1 + torch.arange(self.taps, device=x_BTX.device))[..., None].expand(-1, -1, joined.shape[2])
        return out, state._replace(before_BJX=joined.gather(1, last))

    def _keep_sinks(self, state: State, k_BKTD: Tensor, v_BKTE: Tensor, places: Places) -> State:
        sinks = self.attention.get("sink_tokens", 0)
        if not sinks:
            return state
        tokens = k_BKTD.shape[2]
        is_new_BT = places.index_BT < places.segments * places.segment_tokens
        number_BT = places.length_B[:, None] + torch.arange(tokens, device=k_BKTD.device)
        index_BT = torch.where(is_new_BT, number_BT, sinks).clamp(max=sinks)
        return state._replace(
            sink_k_BKZD=put(k_BKTD, state.sink_k_BKZD, index_BT), sink_v_BKZE=put(v_BKTE, state.sink_v_BKZE, index_BT)
        )

    def _attend(self, q_BHGRD: Tensor, k_BKLD: Tensor, v_BKLE: Tensor, state: State, places: Places) -> Tensor:
        """Softmax attention to the sinks, the W tokens before the segment, and the segment so far."""
        sinks = self.attention.get("sink_tokens", 0)
        seen = places.mask_BGRX.shape[-1] - sinks

        def windows(x_BKLX: Tensor, sink_BKZX: Tensor) -> Tensor:
            x_BKGLX = torch.stack(
                [x_BKLX[:, :, g * places.segment_tokens :][:, :, :seen] for g in range(places.segments)], 2
            )
            if not sinks:
                return x_BKGLX
            index = places.sink_BGZ[:, None, ..., None].expand(-1, x_BKLX.shape[1], -1, -1, x_BKLX.shape[-1])
            picked = sink_BKZX[:, :, None].expand(-1, -1, places.segments, -1, -1).gather(3, index)
            return torch.cat((picked, x_BKGLX), 3)

        k_BKGLD, v_BKGLE = windows(k_BKLD, state.sink_k_BKZD), windows(v_BKLE, state.sink_v_BKZE)
        q = rotate(q_BHGRD, places.q_position_BR[:, None, None], self.config.rope)
        k = rotate(k_BKGLD, torch.arange(seen + sinks, device=q.device), self.config.rope)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(1, 2).flatten(0, 1) for x in (k, v_BKGLE))
        mask = places.mask_BGRX.flatten(0, 1)[:, None]
        out = F.scaled_dot_product_attention(q.transpose(1, 2).flatten(0, 1), k, v, attn_mask=mask)
        return out.unflatten(0, (-1, places.segments)).transpose(1, 2)

    def _remember(
        self, q_BHGRD: Tensor, new: tuple[Tensor, Tensor], seen: tuple[Tensor, Tensor], near_BTX: Tensor, state: State,
        places: Places,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """What is read, and the memory after the call. new: keys and values of the call; seen: the same in places."""
        has_maps, before = hasattr(self, "maps"), overlap_of(self.attention)
        if has_maps:
            query_HDD, key_KDD, read_HEE = self.maps()
            q_BHGRD = q_BHGRD + q_BHGRD @ query_HDD[:, None]
            new, seen = ((k + k @ key_KDD, v) for k, v in (new, seen))
        if self.is_gated_delta:
            k_BKGRD, v_BKGRE = (to_segments(x, places) for x in new)
            strength, decay = (
                to_segments(linear(near_BTX).float().transpose(1, 2)[..., None], places)[..., 0]
                for linear in (self.linear_strength, self.linear_decay)
            )
            logs = (
                -(F.softplus(strength) - WEAKEST_WRITE).clamp(min=0),
                -(F.softplus(-decay) - SLOWEST_DECAY).clamp(min=0),
            )
            read_tokens = self.attention.get("read") == "token"
            with torch.autocast(q_BHGRD.device.type, enabled=False):
                read, state = write_and_read_gated(q_BHGRD, k_BKGRD, v_BKGRE, logs, state, places, read_tokens)
        else:
            k_BKLD, v_BKLE = (x[:, :, before:] for x in seen)
            with torch.autocast(q_BHGRD.device.type, enabled=False):
                read, state = write_and_read(q_BHGRD, k_BKLD, v_BKLE, state, places, self.attention)
        read = read.to(q_BHGRD.dtype)
        if self.attention.get("read_norm"):
            read = self.norm_read(read)
        return (read + read @ read_HEE[:, None] if has_maps else read), state

    def _share(self, q_BHGRD: Tensor, places: Places) -> Tensor:
        """The gate: how much comes from the memory (B, H, G, R, 1); nothing where nothing was written."""
        beta = self.gate[:, None, None].float()
        if self.attention.get("gate") == "query":
            beta = beta + (q_BHGRD * self.gate_query[:, None, None].to(q_BHGRD.dtype)).sum(-1)
        share = torch.sigmoid(beta.float()).to(q_BHGRD.dtype).expand(q_BHGRD.shape[:-1])
        if self.attention.get("read") != "token":
            segment_G = torch.arange(places.segments, device=share.device) * places.segment_tokens
            share = share * (places.past_B[:, None] + segment_G > 0)[:, None, :, None]
        return share[..., None]

    def _keep_recent(self, state: State, k_BKLD: Tensor, v_BKLE: Tensor, places: Places) -> State:
        if not places.any_closed:
            return state._replace(k_BKLD=k_BKLD, v_BKLE=v_BKLE)
        kept = torch.arange(state.k_BKLD.shape[2], device=k_BKLD.device)
        index_BL = (places.closed_B * places.segment_tokens)[:, None] + kept
        k, v = (
            F.pad(x, (0, 0, 0, places.segment_tokens)).gather(
                2, index_BL[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            )
            for x in (k_BKLD, v_BKLE)
        )
        return state._replace(k_BKLD=k, v_BKLE=v)


class InfiniMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: InfiniConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class InfiniDecoderLayer(nn.Module):
    """Llama's layer."""

    def __init__(self, config: InfiniConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = InfiniAttention(config, layer)
        self.mlp = InfiniMLP(config)
        self.input_layernorm = InfiniNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = InfiniNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTX: Tensor, state: State, places: Places) -> tuple[Tensor, State]:
        mixed_BTX, state = self.self_attn(self.input_layernorm(x_BTX), state, places)
        x_BTX = x_BTX + mixed_BTX
        return x_BTX + self.mlp(self.post_attention_layernorm(x_BTX)), state


class InfiniPreTrainedModel(PreTrainedModel):
    """What transformers asks of all its models."""

    config_class = InfiniConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["InfiniDecoderLayer"]
    _supports_sdpa = True
    _supports_cache_class = True  # asked by transformers 4
    _is_stateful = True  # what was read can't be taken back, as some kinds of generation would

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, InfiniNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, InfiniAttention | InfiniMaps):
            for parameter in module.parameters(recurse=False):
                nn.init.zeros_(parameter)
        if isinstance(module, InfiniWriting):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, module.bias_at_first)


class InfiniModel(InfiniPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: InfiniConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(InfiniDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = InfiniNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: InfiniCache | None = None,
        columns_to_keep: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden values of the last `columns_to_keep` columns (0: of all), zeros for padding.

        attention_mask: (B, T) or, as transformers has it, of all columns read so far; 0 is padding, on either side.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        given = cache if cache is not None else past_key_values
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        rows, columns = inputs.shape[:2]
        _check_inputs(inputs, attention_mask, given, kwargs)
        keep, device = min(columns_to_keep, columns) or columns, inputs.device
        source_BT, new_B = _compact(attention_mask, rows, columns, device)
        use_cache = use_cache if use_cache is not None else self.config.use_cache and not self.training
        following = given if given is not None else InfiniCache()
        past_B, states = following.tokens_B, following.states
        past_B = torch.zeros(rows, dtype=torch.int64) if past_B is None else past_B
        window = columns if torch.is_grad_enabled() else self.config.window_tokens
        kept = None
        for part_BT in source_BT.split(window, 1):
            picked = inputs.gather(1, part_BT) if inputs_embeds is None else _rows(inputs, part_BT)
            x_BTX = self.embed_tokens(picked) if inputs_embeds is None else picked
            size_B = new_B.clamp(0, part_BT.shape[1])
            x_BTX, states = self._read(x_BTX, states, past_B, size_B)
            past_B, new_B = past_B + size_B, new_B - size_B
            if kept is None:
                kept = x_BTX.new_zeros(rows, keep + 1, x_BTX.shape[2])
            is_new_BT = (torch.arange(part_BT.shape[1]) < size_B[:, None]).to(device)
            target_BT = torch.where(is_new_BT, part_BT - (columns - keep), -1)
            # The last row takes what is not asked for.
            target_BT = torch.where(target_BT < 0, keep, target_BT).to(x_BTX.device)
            kept = kept.scatter(1, target_BT[..., None].expand_as(x_BTX), x_BTX)
        if use_cache:
            following.columns += columns
            following.tokens_B, following.states = past_B, states
        named = {CACHE: following if use_cache else None}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(kept[:, :-1]), **named)

    def _read(
        self, x_BTX: Tensor, states: list[State] | None, past_B: Tensor, new_B: Tensor
    ) -> tuple[Tensor, list[State]]:
        """Runs the next tokens of each row through the layers."""
        if states is None:
            states = [layer.self_attn.initial_state(x_BTX.shape[0], x_BTX) for layer in self.layers]
        found: dict[str, Places] = {}
        after = []
        for number, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            name = self.config.pattern[number % len(self.config.pattern)]
            if name not in found:
                found[name] = find_places(self.config.attentions[name], past_B, new_B, x_BTX.shape[1], x_BTX.device)
            if self.gradient_checkpointing and self.training:
                x_BTX, state = self._gradient_checkpointing_func(layer.__call__, x_BTX, state, found[name])
            else:
                x_BTX, state = layer(x_BTX, state, found[name])
            after.append(state)
        return x_BTX, after


def _check_inputs(inputs: Tensor, mask: Tensor | None, state: Any, others: dict[str, Any]) -> None:
    """Raises ValueError for what can't be read, or would be read as something else."""
    rows, columns = inputs.shape[:2]
    if columns == 0:
        raise ValueError("give at least one column of tokens")
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < columns):
        raise ValueError(
            "attention_mask must be (rows, columns), 1 for tokens and 0 for padding,"
            f" of at least the {rows} x {columns} given, not {tuple(mask.shape)}"
        )
    if state is not None and not isinstance(state, InfiniCache):
        raise ValueError(f"this model's state is an InfiniCache, not a {type(state).__name__}")
    known = rows if state is None or state.tokens_B is None else len(state.tokens_B)
    if known != rows:
        raise ValueError(f"the state has {known} rows and the input {rows}; see batch_repeat_interleave of the state")
    position_ids = others.get("position_ids")
    if position_ids is not None and mask is None and bool((position_ids.diff(dim=-1) < 0).any()):
        raise ValueError("position_ids begin anew inside a row: a row is one document here; pad instead of packing")
    if others.get("output_hidden_states") or others.get("output_attentions"):
        raise ValueError("hidden values and attention weights of the layers are not kept; leave the option out")


def _compact(mask: Tensor | None, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The columns of each row's tokens in their order, then those of padding; and how many tokens there are."""
    if mask is None or bool((mask := mask[:, -columns:].to(device).bool()).all()):
        return torch.arange(columns, device=device).expand(rows, -1), torch.full((rows,), columns)
    return (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1).cpu()


def _rows(x_BTX: Tensor, index_BT: Tensor) -> Tensor:
    return x_BTX.gather(1, index_BT[..., None].expand(-1, -1, x_BTX.shape[2]))


class InfiniForCausalLM(InfiniPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: InfiniConfig) -> None:
        super().__init__(config)
        self.model = InfiniModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: InfiniCache | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits of the last `logits_to_keep` columns (0: of all), and with labels the mean loss of the next tokens."""
        as_tuple = kwargs.pop("return_dict", None) is False
        found = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, cache, logits_to_keep, **kwargs
        )
        logits = self.lm_head(found.last_hidden_state)
        loss = None
        if labels is not None:
            counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **counted)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(found, CACHE)})
        return out.to_tuple() if as_tuple else out

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: InfiniCache | None = None,
        cache: InfiniCache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `forward` is given in a step: the columns that were not read yet."""
        state = cache if cache is not None else past_key_values
        mask = kwargs.get("attention_mask")
        prepared = {"attention_mask": mask, "use_cache": kwargs.get("use_cache", True), CACHE: state}
        if "logits_to_keep" in kwargs:
            prepared["logits_to_keep"] = kwargs["logits_to_keep"]
        seen = 0 if state is None else state.get_seq_length()
        if inputs_embeds is not None and seen == 0:
            return {**prepared, "inputs_embeds": inputs_embeds}
        # The ids may be those of the whole text or only the new ones; a mask is of the whole. Without one, transformers
        # 5 says how many are new, or nothing if all are.
        new = kwargs.get("next_sequence_length")
        if mask is not None:
            new = mask.shape[1] - seen
        elif new is None:
            new = input_ids.shape[1]
        if not 0 < new <= input_ids.shape[1]:
            raise ValueError(
                f"the state has read {seen} columns: give the ids of the whole text, or the new ones with an"
                " attention_mask of the whole"
            )
        return {**prepared, "input_ids": input_ids[:, -new:]}
