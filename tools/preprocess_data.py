#!/usr/bin/env python3
"""`megatron-pd preprocess` under the name that Megatron's own tools/ gives it."""

import sys

from megatron_pd.cli import script

sys.argv.insert(1, "preprocess")
script()
