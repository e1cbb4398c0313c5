"""Tests of other modules, of the program that users run: XLA optimises as it does by default.

They run in a process of their own, since XLA reads its flags once:
tests/repository/test_numerics.py starts it, and
`BIPE_AS_USERS=1 pytest tests/numerics` does.
"""

import os

# What is imported by name is collected here, fixtures included.
from tests.attention.test_attention import (  # noqa: F401
    small_chunks,
    test_attention_equals_a_float64_loop,
    test_attention_with_groups_biases_and_documents_equals_a_float64_loop,
    test_bfloat16_inputs_keep_float32_logits_and_biases,
    test_gradients_equal_finite_differences_in_float64,
    test_gradients_equal_those_of_a_plain_implementation,
)
from tests.model.test_loss import (  # noqa: F401
    test_gradients_equal_float64,
    test_loss_and_log_probs_equal_float64,
)
from tests.model.test_model import (  # noqa: F401
    test_documents_apart_and_other_shapes_equal_the_float64_reference,
    test_every_encoding_equals_the_float64_reference,
)
from tests.training.test_train import (  # noqa: F401
    test_first_loss_is_pinned,
    test_killed_run_resumes_to_the_same_end,
    test_stopped_and_resumed_equals_uninterrupted_bit_for_bit,
)


def test_xla_optimises_as_it_does_for_users():
    flags = os.environ.get("XLA_FLAGS", "")
    assert "optimization_level" not in flags, "start it with BIPE_AS_USERS=1 and without XLA_FLAGS"
