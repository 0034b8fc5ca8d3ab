"""The parts of a layer as plain data: norms, what mixes tokens, MLPs, experts. Standard library
only; the axis legend is in `spec`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, scaling, and which elements of a head it turns.

    `partial`: the part of a head that is turned. `interleaved`: element 2i is paired with 2i + 1,
    else i with i + H/2. `attention_factor`: multiplies cos and sin. The other fields belong to a
    type of scaling: `low_freq_factor`, `high_freq_factor` to llama3; `beta_fast`, `beta_slow`,
    `truncate` to yarn; `short_factor`, `long_factor` to longrope.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    partial: float = 1.0
    interleaved: bool = False
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def switches_at(self) -> int | None:
        """The most tokens of a text that are turned by `short_factor`; None: nothing switches."""
        return self.original_max_position_embeddings if self.type == "longrope" else None


@dataclass(frozen=True)
class Norm:
    """A norm's form. `kind`: "rms", or "layer" (the mean is subtracted first). `plus_one`: the gain
    is 1 + weight. `rounds_first`: what is normed is rounded before it is multiplied by the gain.
    `has_weight`, `has_bias`: what is stored of it."""

    eps: float = 1e-6
    kind: str = "rms"
    plus_one: bool = False
    rounds_first: bool = True
    has_weight: bool = True
    has_bias: bool = False


@dataclass(frozen=True)
class HeadNorms:
    """Norms of queries and keys. `over`: what one of them is taken over: "head" (one weight [H] for
    all heads), "each" (a weight [N, H]), "flat" (all heads joined, a weight [N*H]). `q`, `k`: their
    leaves. `after_rope`: they follow the rotary embedding."""

    norm: Norm
    q: tuple[str, ...] = ("q_norm",)
    k: tuple[str, ...] = ("k_norm",)
    over: str = "head"
    after_rope: bool = False


@dataclass(frozen=True)
class Growth:
    """Queries that grow with their position: the one at position p is multiplied by
    1 + beta * ln(1 + floor((p + after) / length))."""

    beta: float
    length: int
    after: int = 0


@dataclass(frozen=True)
class Attention:
    """The attention of some layers of a model.

    `name`: of the kind of these layers. `scale`: of the scores. `cap`: scores s become cap * tanh(s
    / cap). `window`: a token sees so many, itself among them; None: all before it. `clip`: queries,
    keys and values are cut to [-clip, clip], after a flat norm. `value_norm`: of values, without a
    weight. `keys_are_values`: the product of keys serves as values too. `has_gate`: the projection
    of queries gives each head a gate too, after its query: what the head mixes is multiplied by the
    gate's sigmoid. `has_sinks`: each head has a number that takes part in its softmax as one more
    score, with no value. `in_chunks`: positions are cut into chunks as long as the window, and a
    token sees those of its own chunk alone: never more than the window.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None
    name: str = "decoder"
    scale: float = 1.0
    cap: float | None = None
    window: int | None = None
    head_norms: HeadNorms | None = None
    clip: float | None = None
    value_norm: Norm | None = None
    keys_are_values: bool = False
    grows: Growth | None = None
    has_gate: bool = False
    has_sinks: bool = False
    in_chunks: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its committed part is no more than a softmax over the first entries of a lane."""
        return self.cap is None and self.window is None


@dataclass(frozen=True)
class Delta:
    """The gated DeltaNet (arXiv 2412.06464) that some layers have instead of attention.

    It keeps a state for each lane, of one size however long the text is. `kernel`: the tokens that
    an output of its convolution is made of, `activation` follows it. `norm`: of each head's output,
    before the gate. `inputs`: the matrices that give what is projected. "apart": four; "grouped":
    two, whose rows are ordered by key head; "half": two as in "apart", and one as in "grouped".
    `is_tiled`: value head n has the key head n modulo their number; else those of a key head are
    neighbours. `has_rates`: A_log is -exp(A_log) already. `name`: of the kind of these layers.
    """

    n_key_heads: int
    n_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    norm: Norm = Norm()
    activation: str = "silu"
    inputs: str = "apart"
    is_tiled: bool = False
    has_rates: bool = False
    name: str = "linear_attention"

    @property
    def channels(self) -> int:
        """The numbers of a token that go through the convolution: queries, keys and values."""
        return 2 * self.n_key_heads * self.key_dim + self.n_value_heads * self.value_dim


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434) of some layers of a model.

    Keys and values of all heads are made of one latent of `rank` numbers, and a part of the key of
    `rope_dim` numbers, which the rotary embedding turns, is the same for all heads: an entry of the
    cache is these. A head's query has `nope_dim` numbers that are not turned before `rope_dim` that
    are; its value has `value_dim`. `q_rank`: of the latent that queries are made of; None: they are
    projected at once. `norm`: of both latents. `scale`, `grows`: as of `Attention`. `is_apart`:
    keys and values are made of a latent by two matrices, not by one. `name`: of the kind of these
    layers.
    """

    n_heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: Rope
    q_rank: int | None = None
    scale: float = 1.0
    norm: Norm = Norm()
    grows: Growth | None = None
    is_apart: bool = False
    name: str = "latent_attention"
    window: None = None  # such layers have none

    @property
    def entry(self) -> int:
        """L, the numbers of an entry of the cache."""
        return self.rank + self.rope_dim

    @property
    def head_dim(self) -> int:
        """What the rotary embedding turns of a head."""
        return self.rope_dim

    @property
    def among_latents(self) -> Attention:
        """What is left of it where queries were brought into the space of the latents: N heads over
        one key of L numbers, which is the value too."""
        return Attention(self.n_heads, 1, self.entry, None, name=self.name, scale=self.scale)

    @property
    def of_heads(self) -> Attention:
        """What it is where each head has keys of its own, made of the latents."""
        n, size = self.n_heads, self.nope_dim + self.rope_dim
        return Attention(n, n, size, None, name=self.name, scale=self.scale)


@dataclass(frozen=True)
class Clamped:
    """A clamped SwiGLU: g * sigmoid(alpha * g) * (u + 1), where g is the gate, at most `limit`, and
    u the other, between -`limit` and `limit`."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class Mlp:
    """An MLP's form. "gated": activation(gate) * up, or as `clamped`; "fused": the same, both in
    one matrix, the gate first; "interleaved": both in one matrix, row 2i of the gate, row 2i + 1 of
    the other, and as `clamped`; "plain": activation(up)."""

    form: str = "gated"
    activation: str = "silu"
    clamped: Clamped | None = None
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    module: str = "mlp"


@dataclass(frozen=True)
class Router:
    """How the experts of a token are chosen, and what their outputs are multiplied by.

    `scores`: of the router's logits: "softmax", "sigmoid", or "sparsemixer", which takes two
    experts one after another. The `n_chosen` experts with the highest scores are chosen, with the
    correction bias added if it `has_bias`; their weights are the scores without it. `n_groups`:
    only the experts of `n_chosen_groups` groups may be chosen, of those with the highest
    `group_score`: of the best expert ("max"), or of the best two ("best_two"). `renormalizes`: the
    weights are divided by their sum plus `above_sum`, or by `least_sum` if that is more; at last
    `scale` multiplies them. `is_exact`: weights and logits are kept and computed in float32,
    whatever is computed in. `logit_bias`: the logits have a bias. `jitter`: of sparsemixer. `norm`:
    what it looks at is normed by it, and multiplied by a vector and by `input_scale`; the weights
    by a number of each expert at last. `by_logits`: those with the highest logits are chosen:
    scores of large ones may be equal. `weighs_inputs`: the weights multiply what goes into the
    experts instead of what comes out.
    """

    n_experts: int
    n_chosen: int
    scores: str = "softmax"
    has_bias: bool = False
    n_groups: int = 1
    n_chosen_groups: int = 1
    group_score: str = "max"
    renormalizes: bool = False
    above_sum: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    is_exact: bool = False
    logit_bias: bool = False
    jitter: float = 0.0
    norm: Norm | None = None
    input_scale: float = 1.0
    by_logits: bool = False
    weighs_inputs: bool = False


@dataclass(frozen=True)
class Shared:
    """The expert of a layer that all tokens go through. `width`: of its MLP; `mlp`: its form;
    `gate`: the published name of the vector whose product with a token, as a sigmoid, multiplies
    its output."""

    width: int
    mlp: Mlp
    gate: str | None = None


@dataclass(frozen=True)
class Beside:
    """The published names of what a layer has whose shared expert is an MLP beside the experts:
    norms of their input (`before`), of their sum (`after`) and of the MLP's output
    (`after_shared`); the router's vectors, of its input (`of_input`) and of each expert's weight
    (`of_weights`)."""

    before: str
    after: str
    after_shared: str
    of_input: str
    of_weights: str


@dataclass(frozen=True)
class Stack:
    """How leaves of all experts of a layer may be published as one tensor: matrices as
    [E, rows, in], biases as [E, rows].

    `published`: its name; `leaves`: what it holds, in the order in which the rows of an expert
    follow one another. `is_only`: a family's experts are published in no other way. `inputs_first`:
    as plain numbers the tensor is [E, in, rows], and holds one matrix of each expert; the pieces of
    an encoding have rows first all the same.
    """

    published: str
    leaves: tuple[str, ...]
    is_only: bool = False
    inputs_first: bool = False

    def __post_init__(self):
        assert not self.inputs_first or len(self.leaves) == 1, "two would be columns side by side"


@dataclass(frozen=True)
class Experts:
    """The experts that some layers have instead of an MLP.

    `width`: of the MLP of one, of the form `mlp`, in whose module `{expert}` is its number.
    `routing`: the published name of the router's matrix; `bias`: of its correction bias, with the
    axes `bias_axes`. `layers`: of each layer whether it has experts; (): all have. `stacks`: how
    they may be published besides one by one. `beside`: the shared expert is added where each has a
    norm of its own; None: it is one more of them. `has_biases`: of their matrices. `router_moves`:
    the router's matrix is streamed.
    """

    router: Router
    width: int
    mlp: Mlp
    routing: str
    bias: str | None = None
    bias_axes: tuple[str, ...] = ("experts",)
    shared: Shared | None = None
    layers: tuple[bool, ...] = ()
    stacks: tuple[Stack, ...] = ()
    beside: Beside | None = None
    has_biases: bool = False
    router_moves: bool = False


@dataclass(frozen=True)
class Quantized:
    """What a config says of weights that are published encoded: the name of the `method`, the
    `encoding` that its matrices have as far as a config tells, and patterns of the names of modules
    that are `left` as plain numbers. `encodings`: of all groups of modules, where a config tells
    them apart; each in the commonest dtype of scales. `bits`: of the published codes, where they
    are fewer than the encoding has; 0: as many."""

    method: str
    encoding: str
    left: tuple[str, ...] = ()
    encodings: tuple[str, ...] = ()
    bits: int = 0


@dataclass(frozen=True)
class Places:
    """The published names of a layer's norms, by place; None: there is none. Those after a branch
    are taken of its output, before it is added."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Scale:
    """A factor. `is_rounded`: it is rounded to the compute dtype before it multiplies.
    `is_of_table`: of an embedding table; vectors that are given in place of its rows are taken as
    they are."""

    value: float = 1.0
    is_rounded: bool = False
    is_of_table: bool = False


@dataclass(frozen=True)
class Logits:
    """What becomes of the products of the head: times `scale`, then cap * tanh(logits / cap)."""

    scale: float = 1.0
    cap: float | None = None


def head_sizes(attention: Attention) -> dict[str, int]:
    """Axis name -> size, of a kind of layer. `heads` is N*H and `kv_heads` is K*H: published
    projections join both axes. `queries` is what queries are projected to."""
    n, k, h = attention.n_heads, attention.n_kv_heads, attention.head_dim
    return {
        "queries": (2 if attention.has_gate else 1) * n * h,
        "heads": n * h,
        "kv_heads": k * h,
        "qkv": (n + 2 * k) * h,
        "head": h,
        "n": n,
        "k": k,
    }


def latent_sizes(latent: Latent) -> dict[str, int]:
    """Axis name -> size, of a kind of layer with latent attention."""
    n = latent.n_heads
    return {
        "q_rank": latent.q_rank or 0,
        "queries": n * (latent.nope_dim + latent.rope_dim),
        "rank": latent.rank,
        "entry": latent.entry,
        "keys_and_values": n * (latent.nope_dim + latent.value_dim),
        "nope": latent.nope_dim,
        "ranks": n * latent.rank,
        "values": n * latent.value_dim,
    }


def delta_sizes(delta: Delta) -> dict[str, int]:
    """Axis name -> size, of a kind of layer with a gated DeltaNet."""
    values = delta.n_value_heads * delta.value_dim
    return {
        "channels": delta.channels,
        "values": values,
        "qkvz": delta.channels + values,
        "value_heads": delta.n_value_heads,
        "two_value_heads": 2 * delta.n_value_heads,
        "value": delta.value_dim,
        "one": 1,
        "kernel": delta.kernel,
    }
