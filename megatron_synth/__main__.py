"""`python -m megatron_synth`."""

import sys

from megatron_synth.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
