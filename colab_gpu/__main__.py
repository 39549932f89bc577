"""`python -m colab_gpu` is the command `colab-gpu`."""

import sys

from colab_gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
