"""Batch normalization you can read, trust and run fast, for PyTorch.

The public names are listed once, in ``__init__.pyi``. Each is imported when it is first used, so
``batchnorm --help`` does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
