"""LocalVMamba (arXiv 2403.09338): VMamba's stages; what each block's scans are was found by the authors' search.

Modules are named as in LocalMamba's repository, which has VMamba's names.
"""

from .ssm import LocalScan
from .vmamba import VSSM, vssm

# Four scans of each block, by the names of scan_orders.named.
TINY = """
    h h_flip w7 w7_flip
    h_flip v_flip w2 w2_flip
    h_flip v_flip w2_flip w7
    h_flip v v_flip w2
    h h_flip v_flip w2_flip
    h_flip v_flip w2 w2_flip
    h w2_flip w7 w7_flip
    h h_flip v v_flip
    h v_flip w7 w7_flip
    h_flip v w2 w7_flip
    v v_flip w2 w7_flip
    h h_flip v_flip w2_flip
    v_flip w2_flip w7 w7_flip
    h_flip v_flip w2_flip w7_flip
    h_flip v w7 w7_flip
"""
SMALL = """
    h v v_flip w7_flip
    h h_flip v w7
    h_flip v v_flip w7
    h_flip v w2_flip w7
    h_flip v w2_flip w7
    h_flip v_flip w2 w7_flip
    h_flip v v_flip w7
    h v v_flip w7
    h v v_flip w7
    h v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w2
    v v_flip w2_flip w7
    h h_flip v w2
    h_flip v v_flip w7_flip
    h h_flip v v_flip
    h v v_flip w7_flip
    h v v_flip w7_flip
    h h_flip v_flip w7
    h_flip v_flip w2_flip w7
    h_flip v v_flip w7_flip
    v v_flip w7 w7_flip
    h v v_flip w7_flip
    h_flip v v_flip w2
    h v v_flip w2_flip
    h h_flip v w7
    h h_flip w7 w7_flip
    h v_flip w2 w2_flip
    h v_flip w2 w7
    h v v_flip w7_flip
    h_flip v w2_flip w7
    h_flip v_flip w7 w7_flip
    h v w7 w7_flip
"""


def _local_vmamba(
    depths: tuple[int, ...], directions: str, drop_path_rate: float, in_chans: int, num_classes: int
) -> VSSM:
    scans = [tuple(line.split()) for line in directions.strip().splitlines()]
    return vssm(depths, 96, lambda width, i: LocalScan(width, scans[i]), drop_path_rate, in_chans, num_classes)


def localvmamba_tiny(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """LocalVMamba-T, arXiv 2403.09338."""
    return _local_vmamba((2, 2, 9, 2), TINY, drop_path_rate, in_chans, num_classes)


def localvmamba_small(drop_path_rate: float = 0.0, in_chans: int = 3, num_classes: int = 1000) -> VSSM:
    """LocalVMamba-S, arXiv 2403.09338."""
    return _local_vmamba((2, 2, 27, 2), SMALL, drop_path_rate, in_chans, num_classes)
