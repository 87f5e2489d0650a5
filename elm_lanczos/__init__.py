"""A language model's computation as linear algebra: detached Jacobians and their triplets."""

