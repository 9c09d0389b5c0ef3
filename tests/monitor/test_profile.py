import jax
import jax.numpy as jnp
import pytest

from mmjax.monitor.profile import ProfileWindow
from mmjax.types import MMJaxError


def test_a_window_of_steps_is_traced(tmp_path):
    window = ProfileWindow((1, 3), tmp_path / "profile")
    state, seen = jnp.zeros(()), []
    for step in range(5):
        window.before(step, state)
        seen.append(window.running)
        state = jax.jit(lambda x: x + 1)(state)
    assert seen == [False, True, True, False, False]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    cut = ProfileWindow((1, 9), tmp_path / "cut")  # the run ends within the window
    cut.before(1, state)
    cut.close(state)
    assert list((tmp_path / "cut").rglob("*.xplane.pb")) and not cut.running


def test_no_window_and_windows_that_cannot_be(tmp_path):
    window = ProfileWindow(None, tmp_path)
    window.before(0, None)
    assert not window.running
    with pytest.raises(MMJaxError, match=r"log.profile is \(5, 5\)"):
        ProfileWindow((5, 5), tmp_path)
