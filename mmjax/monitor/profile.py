"""A window of steps whose profile is written, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmjax.types import MMJaxError


class ProfileWindow:
    """Trace the steps from ``start`` up to, not including, ``stop`` into a folder.

    steps: (start, stop), counted from 0, or None for no profile.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        if steps is not None and not 0 <= steps[0] < steps[1]:
            raise MMJaxError(f"log.profile is {steps}; give (start, stop) with 0 <= start < stop")
        self.steps, self.folder = steps, folder
        self.running = False

    def before(self, step: int, state: Any) -> None:
        """Start or stop the trace ahead of a step; ``state`` is waited for, to cut cleanly."""
        if self.steps is None or (step != self.steps[0] and not self.running):
            return
        import jax

        if step >= self.steps[1]:
            self.close(state)
        elif not self.running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder)
            self.running = True

    def close(self, state: Any) -> None:
        """Write what was traced, if anything is being traced."""
        if self.running:
            import jax

            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
