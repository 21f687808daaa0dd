"""Settings of all tests."""

import os

from hypothesis import settings

# No deadline: a loaded machine is no defect. In CI the same examples every time, so that a change fails by itself only.
settings.register_profile("kexue", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("kexue")
