"""Runs a script that makes timm models by name, such as timm's own train.py, so that it knows the fused names, too:

python -m mambaout_kernels.integrations.timm train.py --model fused_mambaout_tiny ...
"""

import os
import runpy
import sys


def main() -> None:
    """Runs sys.argv[1] with what follows as its arguments, as `python SCRIPT ARGUMENTS` would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m mambaout_kernels.integrations.timm SCRIPT [ARGUMENTS]")
    del sys.argv[0]
    if not os.path.isfile(sys.argv[0]):
        sys.exit(f"SCRIPT {sys.argv[0]} does not exist, or is no file")
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
