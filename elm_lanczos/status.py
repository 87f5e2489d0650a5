"""The state of one token's triplets, as the engine reports it and the store keeps it."""

from enum import IntEnum


class Status(IntEnum):
    """Why the work on a token ended; the values are those of the `status` array of a store."""

    PENDING = 0
    CONVERGED = 1
    CONVERGED_TO_ROUNDING = 2
    NOT_CONVERGED = 3
    NOT_REQUESTED = 4
