"""The former name of ``condense_core.decoder.prompt``, kept for code that imports it; it goes in release 0.3."""

import warnings

from condense_core.decoder.prompt import *  # noqa: F403  # whatever is public there
from condense_core.decoder.prompt import __name__ as _new_name

warnings.warn(f"condense_core.prompt is now {_new_name}", DeprecationWarning, stacklevel=2)
