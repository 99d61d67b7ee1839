"""What every test shares."""

from __future__ import annotations

import torch

from tests.commands import folder, project  # noqa: F401

# Tests work on tiny tensors, where threads cost more than they give: ten times slower when cores are shared.
torch.set_num_threads(1)

#: It imports its neighbour as users do, from the folder they work in.
collect_ignore = ["userextensions.py"]
