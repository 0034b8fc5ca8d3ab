"""The leaves and stages of experts, which a layer has instead of an MLP.

A router chooses a few of them for each token. A layer goes through its shared expert, if it has
one, then through expert after expert, and adds what each gives to the tokens that chose it. An
expert that no token chose adds nothing: whether its weights come at all is for the schedule.

A small router stays on the device, and chooses where the input of the experts is made. A large one
is streamed, and has a stage of its own.
"""

from __future__ import annotations

from dataclasses import replace

from jlayer.families.base import Function, Group, Join, JoinBoth, NormAt, Stage, bias_name, one
from jlayer.parts import Experts, Mlp, Router
from jlayer.spec import Leaf, Role

ROUTER, CORRECTION, SHARED_GATE = "router", "router_bias", "shared_gate"
LOGIT_BIAS = "router_logit_bias"
OF_INPUT, OF_WEIGHTS = "router_scale", "expert_scale"
_SHARED = "shared_"  # before the names of the shared expert's leaves
# What a layer with experts adds to the flow; see `families.base`.
OF_EXPERTS = ("inputs", "routing", "mixed")
# A router of so many numbers is streamed: 1 MiB in 16 bits.
MOVES_FROM = 1 << 19


def router_moves(router: Router, width: int) -> bool:
    """Whether a router for inputs of this width is so large that it is streamed."""
    return router.n_experts * width >= MOVES_FROM


def expert_leaves(experts: Experts) -> tuple[Leaf, ...]:
    """The leaves of a layer's router, shared expert and experts."""
    router, shared = experts.router, experts.shared
    n_experts = (("experts", router.n_experts), ("one", 1))
    role = Role.EXACT if router.is_exact else Role.NORM
    axes, moves = ("experts", "width"), experts.router_moves
    leaves = [Leaf(ROUTER, experts.routing, axes, role, sizes=n_experts, moves=moves)]
    if router.logit_bias:
        published = experts.routing.removesuffix("weight") + "bias"
        leaves.append(Leaf(LOGIT_BIAS, published, ("experts",), role, sizes=n_experts))
    if router.has_bias:
        axes = experts.bias_axes
        leaves.append(Leaf(CORRECTION, experts.bias, axes, Role.EXACT, sizes=n_experts))
    if experts.beside:
        leaves += [
            Leaf(OF_INPUT, experts.beside.of_input, ("width",), Role.NORM, sizes=n_experts),
            Leaf(OF_WEIGHTS, experts.beside.of_weights, ("experts",), Role.NORM, sizes=n_experts),
        ]
    if shared:
        leaves += _mlp_leaves(shared.mlp, shared.width, prefix=_SHARED)
        if shared.gate:
            axes = ("one", "width")
            leaves.append(Leaf(SHARED_GATE, shared.gate, axes, Role.NORM, sizes=n_experts))
    matrices = _mlp_leaves(experts.mlp, experts.width, n_experts=router.n_experts)
    biases = map(_bias, matrices) if experts.has_biases else ()
    return (*leaves, *matrices, *biases)


def _bias(matrix):
    """The bias of an expert's matrix."""
    published = matrix.published.removesuffix("weight") + "bias"
    return replace(
        matrix,
        name=bias_name(matrix.name),
        published=published,
        axes=matrix.axes[:1],
        role=Role.BIAS,
        of=matrix.name,
    )


def before_experts(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages of a layer's attention, of which the last gives the input of its experts."""
    *others, last = stages
    return (*others, replace(last, finish=replace(last.finish, gives=("hidden", "inputs"))))


def expert_stages(experts: Experts, join: Join) -> tuple[Stage, ...]:
    """`join`: how what they give is added to the residual stream."""
    router, shared, stages = experts.router, experts.shared, []
    whole = (ROUTER, *[LOGIT_BIAS] * router.logit_bias, *[CORRECTION] * router.has_bias)
    route = Function("route", ("inputs",), ("routing", "mixed"), whole, router)
    if shared:
        gate = (SHARED_GATE,) if shared.gate else ()
        stages += _mlp_stages(
            shared.mlp,
            Function("mix_shared", ("mixed", "inputs"), ("mixed",), gate),
            prefix=_SHARED,
        )
    stages += _stages_of_each(experts)
    joined = Function("join_mixed", ("hidden", "mixed"), ("hidden",), join.leaves, join)
    last = Stage("join_experts", (), finish=joined, drops=OF_EXPERTS)
    return (*_routed(experts, route, stages), last)


def stages_beside(experts: Experts, before: NormAt, after: JoinBoth) -> tuple[Stage, ...]:
    """The stages of experts, then of the MLP beside them. `before`: the norm of its input."""
    whole = (ROUTER, OF_INPUT, OF_WEIGHTS)
    route = Function("route", ("hidden",), ("routing", "mixed"), whole, experts.router)
    stages = _routed(experts, route, _stages_of_each(experts))
    joined = Function("join_both", ("hidden", "mixed"), ("hidden",), after.leaves, after)
    inner, last = _mlp_stages(experts.shared.mlp, joined, prefix=_SHARED)
    normed = Function("normed", ("hidden",), ("x",), before.leaves, before)
    return (
        *stages,
        # A stage of its own: the last expert, after which an input would be made, may not run.
        Stage("between", (), finish=normed),
        replace(inner, source="x"),
        replace(last, drops=OF_EXPERTS),
    )


def _stages_of_each(experts):
    """The stages that are gone through for each expert."""
    router = experts.router
    mix = Function("mix_expert", ("mixed", "routing", "expert"), ("mixed",), how=router)
    first, last = _mlp_stages(experts.mlp, mix)
    return [
        replace(first, per_expert=True, weighs_input=router.weighs_inputs),
        replace(last, per_expert=True),
    ]


def _routed(experts, route, stages):
    """The stages after the router has chosen: it makes the first one's input, or has a stage."""
    if experts.router_moves:
        return [Stage("route", (), finish=route), *stages]
    return [replace(stages[0], input=route), *stages[1:]]


def _mlp_leaves(mlp: Mlp, width, *, prefix="", n_experts=0):
    sizes = (("expert_mlp", width), ("both", 2 * width))

    def matrix(name, axes):
        published = f"{mlp.module}.{name}.weight"
        return Leaf(prefix + name, published, axes, sizes=sizes, n_experts=n_experts)

    if mlp.form in ("fused", "interleaved"):
        inner = [matrix(mlp.up, ("both", "width"))]
    else:
        names = [mlp.gate] * (mlp.form == "gated") + [mlp.up]
        inner = [matrix(name, ("expert_mlp", "width")) for name in names]
    return [*inner, matrix(mlp.down, ("width", "expert_mlp"))]


def _mlp_stages(mlp: Mlp, finish, *, prefix=""):
    """The two stages of an MLP; `finish` ends the second."""
    up, name = prefix + mlp.up, prefix or "expert_"
    if mlp.form == "gated":
        form = {"combine": "gated", "how": mlp.activation}
        if mlp.clamped:
            form = {"combine": "clamped", "how": mlp.clamped}
        group = Group("inner", (prefix + mlp.gate, up), **form)
        between = Function("pass_on", (), ("x",))
    else:
        group, between = one(up), Function("activate", (), ("x",), how=mlp)
    return [
        Stage(f"{name}gate_up", (group,), finish=between, source="inputs"),
        Stage(f"{name}down", (one(prefix + mlp.down),), finish=finish),
    ]
