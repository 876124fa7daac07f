"""What tests of Triton kernels ask for by name."""

from tests.kernels.interpreter import (
    bfloat16_in_the_interpreter,
    e4m3_in_the_interpreter,
    launches_in_the_interpreter,
)

__all__ = ["bfloat16_in_the_interpreter", "e4m3_in_the_interpreter", "launches_in_the_interpreter"]
