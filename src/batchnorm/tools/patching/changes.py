"""Old names of the kit, for tools that are not rewritten yet."""

from __future__ import annotations

from batchnorm.tools.patching.attributes import temporary_attributes as changed
from batchnorm.tools.patching.attributes import without_buffer_broadcast as no_broadcast
from batchnorm.tools.patching.buffers import SavedBuffers

__all__ = ["Statistics", "changed", "no_broadcast"]


class Statistics(SavedBuffers):
    """The old name of `SavedBuffers`."""

    def put_back(self) -> None:
        """The old name of `restore`."""
        self.restore()
