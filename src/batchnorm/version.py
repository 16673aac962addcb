"""The version of this package, read by the build, by files it writes, and by ``--version``."""

__version__ = "0.1.0"
