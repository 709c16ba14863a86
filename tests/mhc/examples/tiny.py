"""The size of the transformer in the examples' tests, and an outcome's losses."""

from mhc.examples.model import Size

TINY = Size(blocks=2, width=16, heads=2, context=32)


def losses(outcome):
    return [step.loss for step in outcome.steps]
