"""Which prompts of a run are solved together: short ones of one length, as one system.

What a prompt of a few tokens takes is mostly what its operations take to be told apart, not to be
computed (`benchmarks/batching.py`). Who is together with whom depends on the run's options and
prompts alone, so that a resumed run repeats it.
"""

from __future__ import annotations

from collections.abc import Sequence

from elm_lanczos.config import RunConfig, output_positions
from elm_lanczos.linearization import Linearization, Together
from elm_lanczos.operators import TokenOperators
from elm_lanczos.svd.plan import Plan

TOKENS = 256
"""Tokens of short prompts of one length that are solved together, at most."""


def batches(config: RunConfig, lengths: Sequence[int]) -> list[list[int]]:
    """Returns the numbers of the prompts that are solved together.

    Not with Lanczos: each of its vectors is one prompt's.

    Args:
        config: the options of the run.
        lengths: numbers of tokens of its prompts.

    Returns:
        Each number once, in the order of the first ones.
    """
    found: list[list[int]] = []
    unfilled: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        several = 1 if config.method == "lanczos" else TOKENS // length
        if several < 2 or output_positions(config, length) != [length - 1]:
            found.append([number])
            continue
        if length not in unfilled:
            found.append(unfilled.setdefault(length, []))
        unfilled[length].append(number)
        if len(unfilled[length]) == several:
            del unfilled[length]
    return found


def gains(plan: Plan, operators: int) -> bool:
    """Whether prompts gain from being solved together, under the plan for all of their operators.

    Args:
        plan: the plan.
        operators: how many there are.

    Returns:
        False where they do not fit, or what is shared would be done several times.
    """
    return not plan.refusal and plan.panel >= operators and plan.method != "lanczos"


def token_operators(lins: Sequence[Linearization], tokens: Sequence[int]) -> TokenOperators:
    """Returns the Jacobians of some tokens of one prompt, or of several of one length.

    Args:
        lins: the system of each, all of one frozen decoder.
        tokens: the tokens, counted through all prompts.

    Returns:
        The operators.
    """
    return TokenOperators(lins[0] if len(lins) == 1 else Together(lins[0].decoder), tokens)
