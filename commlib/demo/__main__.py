"""`python -m commlib.demo`: what each rank runs, under `commlib demo` and under torchrun."""

import sys

from . import main

sys.exit(main())
