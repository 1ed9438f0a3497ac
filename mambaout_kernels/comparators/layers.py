"""The linear layer that all comparators share with MambaOut's blocks: where PyTorch's own is slow, none has it slow."""

from torch import Tensor, nn

from ..nn.linear import linear
from ..nn.plain import Weights


class Linear(nn.Linear):
    """nn.Linear by the package's kernels: float32 on the CPU; elsewhere PyTorch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(Weights(self.weight, self.bias), x)
