import pytest

pytest.register_assert_rewrite("feature_tester")
