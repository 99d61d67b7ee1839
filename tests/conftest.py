"""What every test shares."""

from __future__ import annotations

import torch

# Tests work on tiny tensors, where threads cost more than they give: ten times slower when cores are shared.
torch.set_num_threads(1)
