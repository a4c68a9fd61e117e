"""The gradient rule: the raw inputs are saved, everything else is recomputed by the backward."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from . import _primitives
from ._problem import Problem, ShortConvProblem


def attend(problem: Problem | ShortConvProblem, *operands):
    """The results of the operands named by `problem.operand_names`.

    Differentiable in reverse mode, once, in every float operand.
    """
    operands = _primitives.shard_alike(problem, operands)
    return _attend(problem, *_primitives.vary_alike(operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem, *operands):
    return _primitives.forward(problem, *operands)


def _forward_rule(problem, *operands):
    results = _primitives.forward(problem, *operands)
    if problem.residual_name is not None:
        # Named inside the rule, where jax.checkpoint policies see them. With the results named too
        # nothing is left that would need the forward again.
        name = functools.partial(checkpoint_name, name=problem.residual_name)
        operands, results = tuple(map(name, operands)), tuple(map(name, results))
    return results, operands


def _backward_rule(problem, operands, cotangents):
    gradients = _primitives.backward(problem, *operands, *cotangents)
    named = dict(zip(problem.differentiable_names, gradients, strict=True))
    # None is the cotangent of segment_ids, which is an integer array.
    return tuple(named.get(name) for name in problem.operand_names)


_attend.defvjp(_forward_rule, _backward_rule)
