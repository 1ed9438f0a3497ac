"""Where the ops are: torch.ops.<the name of this package>. A copy under another name has ops of its own.

So two copies can be in one process, as the `kernels` package loads them. csrc/torch/registration.h has the same rule.
"""

from typing import Any

import torch

PACKAGE = __name__.removesuffix(".backends.namespace")
NAMESPACE = PACKAGE.replace(".", "_")

ops: Any = getattr(torch.ops, NAMESPACE)
